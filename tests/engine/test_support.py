"""Which layers of a loaded model are compressed: only those known to be full attention."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from kvllm.config import KvConfig
from kvllm.engine.attention import compressed_layers, compressed_spec
from kvllm.engine.settings import why_not_inspected
from kvllm.engine.spec import KvSpec
from kvllm.support import (
    SERVED_KINDS,
    has_mm_prefix,
    is_local_layer,
    layer_reasons,
    layers_reasons,
    model_state_reasons,
)

MAX_MODEL_LEN = 512


def layer(**changes: Any) -> Any:
    """A layer as vLLM's Attention makes it of plain full attention, without an engine around it."""
    made = Attention.__new__(Attention)
    torch.nn.Module.__init__(made)
    impl = {"alibi_slopes": None, "sliding_window": -1, "logits_soft_cap": 0, "sinks": None} | changes.pop("impl", {})
    plain = {
        "attn_type": "decoder",
        "sliding_window": None,
        "kv_sharing_target_layer_name": None,
        "use_mm_prefix": False,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 32,
        "head_size_v": 32,
        "kv_cache_dtype": "auto",
        "impl": SimpleNamespace(**impl),
    }
    for name, value in (plain | changes).items():
        setattr(made, name, value)
    return made


def config_of(**layers: Any) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN, model="some/model", multimodal_config=object()),
        cache_config=SimpleNamespace(block_size=32),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )


class Cache(torch.nn.Module, AttentionLayerBase):
    """A layer of a kind that KvLLM has never seen, with a KV cache of its own, or without."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec = spec

    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return self.spec


SPEC = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)


@pytest.mark.parametrize(
    "changes",
    [{}, {"impl": {"logits_soft_cap": 30.0}}, {"impl": {"sinks": torch.ones(4)}}, {"sliding_window": MAX_MODEL_LEN}],
    ids=["plain", "soft cap", "sinks", "window"],
)
def test_served(changes: dict[str, Any]) -> None:
    assert layer_reasons(layer(**changes), MAX_MODEL_LEN) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"impl": {"alibi_slopes": torch.ones(4)}}, "alibi_slopes=4: ALiBi"),
        ({"impl": {"chunk_lookback": 0}}, "chunk_lookback=0"),
        ({"kv_sharing_target_layer_name": "a"}, "kv_sharing_target_layer_name=a: layers that share"),
        ({"attn_type": "encoder_only"}, "attn_type=encoder_only"),
        ({"use_mm_prefix": True}, "use_mm_prefix=True"),
        ({"head_size_v": 16}, "head_size_v=16: .* keys is 32"),
        ({"head_size": 512, "head_size_v": 512, "kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8: not checked with heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"KvLLM does not support layer b with {message}"):
        compressed_layers(config_of(a=layer(), b=layer(**changes)))


def test_attention_among_the_tokens_of_an_image_matters_where_prompts_may_have_one() -> None:
    """Gemma 4 as a text model says of its layers that they would, too."""
    text = config_of(a=layer(use_mm_prefix=True))
    text.model_config.multimodal_config = None
    assert list(compressed_layers(text)) == ["a"]
    with pytest.raises(ValueError, match="use_mm_prefix=True: .*; use --language-model-only for text alone"):
        compressed_layers(config_of(a=layer(use_mm_prefix=True)))


@pytest.mark.parametrize(
    "model_type", ["gemma3", "gemma4", "gemma4_unified", "paligemma", "qwen2_5_vl", "llama4", "mistral3"]
)
def test_the_config_says_what_vllm_says_of_attention_among_the_tokens_of_an_image(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    of_type = MODEL_ARCH_CONFIG_CONVERTORS.get(model_type, ModelArchConfigConvertorBase)
    assert has_mm_prefix(config) == of_type(config, config.get_text_config()).is_mm_prefix_lm()
    if "gemma4" in model_type:
        for value in (None, "vision"):
            config.get_text_config().use_bidirectional_attention = value
            assert has_mm_prefix(config) == of_type(config, config.get_text_config()).is_mm_prefix_lm() == bool(value)


def test_every_other_class_of_vllm_with_a_cache_is_refused() -> None:
    def below(cls: type) -> set[type]:
        return {cls}.union(*map(below, cls.__subclasses__()))

    served = {Attention, ChunkedLocalAttention}
    others = [cls for cls in below(AttentionLayerBase) - served if not inspect.isabstract(cls)]
    assert len(others) > 5  # those that importing vLLM's layers brings: MLA, cross attention, static sinks and others
    for cls in others:
        (found,) = layer_reasons(object.__new__(cls), MAX_MODEL_LEN)
        assert found.startswith(f"class={cls.__module__}.{cls.__qualname__}: supported layers are")


def test_a_cache_beside_attention_is_refused_and_a_layer_without_one_left_alone() -> None:
    assert list(compressed_layers(config_of(a=layer(), b=Cache(None)))) == ["a"]
    with pytest.raises(ValueError, match=r"layer model.indexer with class=.*Cache: supported layers are full,"):
        compressed_layers(config_of(a=layer(), **{"model.indexer": Cache(SPEC)}))


def test_layers_with_shorter_attention_are_left_alone() -> None:
    """Any head sizes are served; a KV cache shared with another layer, or attention that is not causal, is refused."""
    window = layer(sliding_window=MAX_MODEL_LEN - 1, num_kv_heads=4, head_size_v=16, impl={"chunk_lookback": 1})
    chunked = ChunkedLocalAttention.__new__(ChunkedLocalAttention)
    torch.nn.Module.__init__(chunked)
    for name, value in (vars(layer()) | {"attention_chunk_size": 64, "kv_cache_torch_dtype": torch.float32}).items():
        if name not in vars(chunked):
            setattr(chunked, name, value)
    assert is_local_layer(window, MAX_MODEL_LEN) and is_local_layer(chunked, MAX_MODEL_LEN)
    assert not is_local_layer(window, MAX_MODEL_LEN - 1) and not is_local_layer(layer(), MAX_MODEL_LEN)
    assert list(compressed_layers(config_of(a=window, b=layer(), c=chunked))) == ["b"]
    assert window.sliding_window == MAX_MODEL_LEN - 1
    with pytest.raises(ValueError, match="layer a with kv_sharing_target_layer_name=b"):
        compressed_layers(config_of(a=layer(sliding_window=64, kv_sharing_target_layer_name="b"), b=layer()))
    with pytest.raises(ValueError, match="does not support some/model: no layer has full attention"):
        compressed_layers(config_of(a=window, c=chunked))


def test_only_full_attention_gets_our_spec() -> None:
    shape: dict[str, Any] = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    window = SlidingWindowSpec(sliding_window=64, **shape)
    assert compressed_spec("a", window, KvConfig()) is window and compressed_spec("a", None, KvConfig()) is None
    assert type(compressed_spec("a", SPEC, KvConfig())) is KvSpec
    with pytest.raises(ValueError, match="layer a with ChunkedLocalAttentionSpec: supported layers are full,"):
        compressed_spec("a", ChunkedLocalAttentionSpec(attention_chunk_size=64, **shape), KvConfig())


@pytest.mark.parametrize("cpu", [True, False])
def test_a_window_longer_than_any_text_is_removed(cpu: bool) -> None:
    window = MAX_MODEL_LEN - 1 if cpu else (MAX_MODEL_LEN - 1, 0)
    made = layer(sliding_window=MAX_MODEL_LEN, impl={"sliding_window": window})
    assert compressed_layers(config_of(a=made)) == {"a": made}
    assert made.sliding_window is None and made.impl.sliding_window == (-1 if cpu else (-1, -1))


@pytest.mark.parametrize("attribute", ["num_heads", "num_kv_heads", "head_size", "kv_cache_dtype"])
def test_layers_of_different_shapes_are_refused(attribute: str) -> None:
    layers = {"a": layer(), "b": layer(**{attribute: 8})}
    (found,) = layers_reasons(layers)
    assert found.startswith(f"{attribute}=8: layer b differs from a")


def test_only_the_known_model_state_is_extended() -> None:
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class Other(DefaultModelState):
        pass

    assert model_state_reasons(DefaultModelState) == []
    assert model_state_reasons(Other) == [f"model_state=Other: {SERVED_KINDS}"]


@pytest.mark.parametrize("module, extra", [("cpu_attn", ()), ("triton_attn", ("use_alibi_sqrt", "chunk_lookback"))])
def test_the_backends_take_nothing_that_was_not_considered(module: str, extra: tuple[str, ...]) -> None:
    """What a model may ask of its attention. A new argument must be judged in `layer_reasons` first."""
    backend = __import__(f"vllm.v1.attention.backends.{module}", fromlist=["x"])
    impl = getattr(backend, {"cpu_attn": "CPUAttentionBackendImpl", "triton_attn": "TritonAttentionImpl"}[module])
    known = (
        "self", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window", "kv_cache_dtype",
        "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name", "sinks",
    )  # fmt: skip
    assert tuple(inspect.signature(impl.__init__).parameters) == known + extra


def test_a_missing_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself reports only that the architectures "failed to be inspected"."""
    arguments = SimpleNamespace(model="some/vl-model", additional_config={"kvllm": {}})
    failed = ValueError("Model architectures ['Qwen2_5_VLForConditionalGeneration'] failed to be inspected.")
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)  # import raises ModuleNotFoundError
    said = why_not_inspected(arguments, failed)
    assert said is not None and "some/vl-model" in said and "torchvision is not installed" in said
    assert "uv pip install torchvision --torch-backend" in said
    assert why_not_inspected(arguments, ValueError("something else")) is None
    arguments.additional_config = {}
    assert why_not_inspected(arguments, failed) is None
    arguments.additional_config = {"kvllm": {}}
    monkeypatch.setitem(__import__("sys").modules, "torchvision", SimpleNamespace())
    assert why_not_inspected(arguments, failed) is None
