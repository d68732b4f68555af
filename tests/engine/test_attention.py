"""How a layer's two calls per step, the cache write and the attention, are replaced."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvllm.engine.attention import capture_queries, store_with_queries
from kvllm.errors import UsageError


class Impl:
    def __init__(self, log, scale):
        self.log = log
        self.scale = scale

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        self.log.append("written by vLLM")

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        self.log.append(("attention", query, key, value))
        return output


def layer_of(log, backend="FLASH_ATTN", scale=0.5):
    return SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: backend), impl=Impl(log, scale), head_size=4)


def test_keys_and_values_are_stored_with_the_queries():
    log: list = []
    layers = [layer_of(log), layer_of(log)]
    store_with_queries(layers, lambda *arguments: log.append(("store", *arguments)), "cuda")
    query, key, value, cache, output = (torch.full((2, 1, 4), float(i)) for i in range(5))
    slots = torch.tensor([3, 7])

    layers[0].impl.do_kv_cache_update(layers[0], key, value, cache, slots)
    layers[1].impl.do_kv_cache_update(layers[1], key, value, cache, slots + 1)
    assert not log
    assert layers[1].impl.forward(layers[1], query, key, value, cache, None, output=output) is output
    first, then = log
    assert first[:2] == ("store", 1) and all(a is b for a, b in zip(first[2:5], (query, key, value), strict=True))
    assert first[5].tolist() == [4, 8]
    assert then[0] == "attention" and all(a is b for a, b in zip(then[1:], (query, key, value), strict=True))

    log.clear()
    layers[0].impl.forward(layers[0], query, key, value, cache, None, output=output)
    assert log[0][1] == 0 and log[0][5].tolist() == [3, 7]
    # A step that has nothing to write must not write where the last one did.
    layers[0].impl.forward(layers[0], query, key, value, cache, None, output=output)
    assert log[2][:2] == ("store", 0) and log[2][5] is None


def test_methods_see_queries_as_the_layer_scales_them():
    """Methods multiply logits by head_dim ** -0.5, here 0.5; the layer itself receives its queries unscaled."""
    log: list = []
    layers = [layer_of(log, scale=0.25)]
    capture_queries(layers, lambda *arguments: log.append(arguments), "cuda")
    query, key, value, cache, output = (torch.full((2, 1, 4), float(i)) for i in range(1, 6))
    layers[0].impl.forward(layers[0], query, key, value, cache, None, output=output)
    (index, captured, *rest), attention = log
    torch.testing.assert_close(captured, query * 0.5)
    assert index == 0 and rest[0] is key and rest[1] is value and attention[1] is query


@pytest.mark.parametrize("hook", [capture_queries, store_with_queries])
def test_other_backends_are_refused(hook):
    layers = [layer_of([]), layer_of([], "FLEX_ATTENTION")]
    with pytest.raises(ValueError, match="attention_backend=FLEX_ATTENTION: use one of FLASH_ATTN, TRITON_ATTN"):
        hook(layers, print, "cuda")
    assert layers[0].impl.forward.__name__ == "forward"


@pytest.mark.parametrize("hook", [capture_queries, store_with_queries])
def test_a_model_that_writes_the_cache_itself_is_refused(hook):
    """As some models of vLLM 0.33 do, in one kernel with the rotation: attention is called without keys and values."""
    log: list[Any] = []
    layer = layer_of(log)
    hook([layer], lambda *arguments: log.append(arguments), "cuda")
    with pytest.raises(UsageError, match="layer model.layers.0.attn: its model writes keys and values to the KV cache"):
        layer.impl.forward(SimpleNamespace(layer_name="model.layers.0.attn"), torch.zeros(1, 2, 4), None, None)
    assert log == []
