from __future__ import annotations

import pytest
import torch

from kvllm.config import KvConfig
from kvllm.measure.eval import calibrate
from kvllm.measure.eval.calibrate import queries_before_rope, rope_frequencies
from kvllm.measure.eval.traces import Trace, write_traces
from kvllm.methods.triattention import load_statistics
from kvllm.reference import replay
from tests.measure.commands import kvllm
from tests.reference.models import text, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TRACES = [Trace("a", text(120), 21), Trace("b", text(70, seed=1), 30)]


def test_the_queries_are_those_before_rope():
    model = tiny_model("llama")
    frequencies = rope_frequencies(model)  # asks the model itself, so before the hooks
    projected: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, inputs, output: projected.append(output[0]))
        for layer in model.model.layers
    ]
    queries = queries_before_rope(model, TRACES[0], frequencies, stride=3)
    for hook in hooks:
        hook.remove()
    expected = torch.stack(projected).unflatten(2, (6, 16)).transpose(1, 2)[:, :, ::3]
    torch.testing.assert_close(queries, expected, rtol=1e-4, atol=1e-4)


def test_the_command_writes_what_triattention_reads(tmp_path, monkeypatch, capsys):
    model, path = tiny_model("qwen3"), tmp_path / "statistics.safetensors"
    monkeypatch.setattr(calibrate, "load_model", lambda folder, dtype, device: model)
    write_traces(tmp_path / "t.jsonl", TRACES)
    arguments = ["--traces", str(tmp_path / "t.jsonl"), "--model", "tiny", "--device", "cpu", "--stride", "1"]
    kvllm("eval", "calibrate", *arguments, "--out", str(path))
    assert "188 queries of each of 2 x 6 heads" in capsys.readouterr().out
    everything = [queries_before_rope(model, trace, rope_frequencies(model), 1) for trace in TRACES]
    mean = torch.cat(everything, dim=2).mean(dim=2)[..., :8]
    torch.testing.assert_close(load_statistics(str(path), torch.device("cpu"))["mean_real"], mean, rtol=1e-4, atol=1e-5)
    config = KvConfig(
        method="triattention", method_options={"statistics": str(path)}, retention_ratio=0.5,
        window_size=32, buffer_size=16,
    )  # fmt: skip
    assert len(replay(model, TRACES[0].token_ids, 21, config).kept) == 2
