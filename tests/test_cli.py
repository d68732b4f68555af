"""The command line: flags from KvConfig, refusals in one line, and what each command prints and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvllm import cli
from kvllm.cli_options import flag
from kvllm.config import KvConfig
from kvllm.layout import Geometry

runner = CliRunner(env={"COLUMNS": "200"})
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    """A model's folder with config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `kvllm` prints to stderr as it refuses these arguments: one line, exit code 2, nothing on stdout."""
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == "" and err.startswith("Error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", ["generate", "serve", "plan", "demo"])
def test_every_field_of_the_config_is_a_flag(command: str) -> None:
    printed = runner.invoke(cli.app, [command, "--help"], catch_exceptions=False).stdout
    for field in fields(KvConfig):
        assert flag(field.name) in printed
    assert "(0.3)" in printed  # the default of retention_ratio, shown


def test_importing_the_command_loads_neither_torch_nor_vllm() -> None:
    check = "import sys, kvllm.cli; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_version() -> None:
    import kvllm

    assert runner.invoke(cli.app, ["--version"]).stdout == f"kvllm {kvllm.__version__}\n"


def test_methods_lists_the_registry() -> None:
    printed = runner.invoke(cli.app, ["methods"], catch_exceptions=False).stdout
    for name in ("kara", "random", "snapkv", "streaming_llm"):
        assert name in printed


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--method", "kaar"], ["'kaar'", "did you mean 'kara'?"]),
        (["--retention-ratio", "30"], ["retention_ratio=30", "(0, 1]"]),
        (["--window-size", "264"], ["window_size=264", "multiple", "16"]),
        (["--window-size", "0"], ["window_size=0", "positive"]),
        (["--retention-ratio", "0.999"], ["retention_ratio=0.999", "every block"]),
        (["--method-options", "{"], ["--method-options {", "JSON"]),
        (["--method-options", '{"alpha": 1}'], ["'alpha'", "kara"]),
        (["--memory", "80GX"], ["80GX", "80GiB"]),
        (["--memory", "1MiB"], ["nothing for the KV cache"]),
        (["--max-num-seqs", "1000000"], ["nothing for the KV cache", "--max-num-seqs"]),
        (["--length", "100"], ["--length 100", "--prompt-tokens 256"]),
        (["--length", "1k"], ["--length 1k"]),
    ],
)
def test_plan_refuses(
    config_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    memory = [] if "--memory" in arguments else ["--memory", "8GiB"]
    err = refused(capsys, "plan", str(config_dir), *memory, *arguments)
    for word in words:
        assert word in err


def test_generate_refuses_before_an_engine_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompt-file" in refused(capsys, "generate", "model")
    assert "--prompt-file" in refused(capsys, "generate", "model", "--prompt", "a", "--prompt-file", "b")
    err = refused(capsys, "generate", "model", "--prompt", "a", "--stock", "--retention-ratio", "0.5")
    assert "--stock" in err and "--retention-ratio" in err


def test_an_error_that_is_not_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        json.loads("{")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(json.JSONDecodeError):
        cli.main([])


def test_plan_writes_what_it_prints(config_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    arguments = ["plan", str(config_dir), "--memory", "4GiB", "--length", "2048,8192", "--json", str(out)]
    printed = runner.invoke(cli.app, arguments, catch_exceptions=False).stdout
    written = json.loads(out.read_text())
    geometry = Geometry.from_config(KvConfig(), 16)
    assert geometry is not None
    assert [row["length"] for row in written["rows"]] == [2048, 8192]
    for row in written["rows"]:
        assert row["stock_blocks"] == row["length"] // 16
        assert row["kvllm_blocks"] == geometry.peak_blocks(256, row["length"])
        assert row["kvllm_requests"] == (written["num_blocks"] - 1) // row["kvllm_blocks"]
        assert row["stock_requests"] == (written["stock_num_blocks"] - 1) // row["stock_blocks"]
        assert str(row["kvllm_requests"]) in printed
    assert written["footprint"]["query_bank"] == 256 * 48 * 3 * 4 * (16 + 4)  # requests, queries, layers, heads, bytes


def test_plan_refuses_what_serve_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of models whose config has a sliding window but no list of layers, too: Mistral."""
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | mistral | {"max_position_embeddings": 32768}))
    planned = ["plan", str(tmp_path), "--memory", "80GiB"]
    assert "sliding_window=4096: all layers must be full attention" in refused(capsys, *planned)
    served = runner.invoke(cli.app, [*planned, "--max-model-len", "4096", "--length", "2048"], catch_exceptions=False)
    assert served.exit_code == 0 and "2048" in served.stdout
