"""--block-size is vLLM's: where a model's compressed layers have larger blocks, measurements take those."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, Gemma4TextConfig

from kvllm import __main__ as cli
from kvllm import reference
from kvllm.groups import full_attention_block_size
from kvllm.measure.eval.traces import Trace, write_traces

# 4 KV heads of 256 in layers with a window, one of 512 in those of full attention.
GEMMA = Gemma4TextConfig(num_hidden_layers=6, num_global_key_value_heads=1, attention_k_eq_v=True)


class TakenError(Exception):
    """Raised by the first function that a measurement gives its block size, with that size."""


def test_blocks_of_the_compressed_layers() -> None:
    assert full_attention_block_size(GEMMA, 4096, 16) == 32 == full_attention_block_size(GEMMA, None, 16)
    assert full_attention_block_size(GEMMA, 4096, 16, num_shards=4) == 16


@pytest.mark.parametrize(
    "command, module, function",
    [
        ("eval fidelity --traces FILE --model MODEL --methods kara", "eval.fidelity", "measure"),
        ("eval attention --traces FILE --model MODEL", "eval.attention", "measure"),
        ("eval recall --model MODEL --methods kara", "eval.recall", "measure"),
        ("eval frontier --traces FILE --model MODEL", "eval.frontier", "grid"),
        ("eval calibrate-layers --traces FILE --model MODEL --out OUT", "eval.calibrate_layers", "measured_by_kl"),
        ("tune MODEL FILE --saving 2", "tune.run", "candidates"),
        ("inspect MODEL --trace FILE", "inspect.run", "request_geometry"),
    ],
)
def test_a_measurement_takes_the_blocks_of_the_compressed_layers(
    command: str, module: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurement: Any = importlib.import_module(f"kvllm.measure.{module}")
    signature = inspect.signature(getattr(measurement, function))

    def taken(*args: Any, **kwargs: Any) -> None:
        raise TakenError(signature.bind(*args, **kwargs).arguments["block_size"])

    monkeypatch.setattr(measurement, function, taken)
    for where in (reference, measurement):
        monkeypatch.setattr(where, "load_model", lambda *_: SimpleNamespace(config=GEMMA), raising=False)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    for name in ("make_items", "read_texts", "equal_groups", "most_groups"):  # what else reads the model
        monkeypatch.setattr(measurement, name, lambda *_, **__: [], raising=False)
    write_traces(tmp_path / "FILE", [Trace("a", [1, 2, 3], 1)])
    words = [str(tmp_path / word) if word in ("FILE", "OUT") else word for word in command.split()]
    with pytest.raises(TakenError, match="^32$"):
        cli.app([*words, "--block-size", "16"], standalone_mode=False)
