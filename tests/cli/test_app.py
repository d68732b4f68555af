"""The command line: flags from KvConfig, refusals in one line, and what each command prints and writes."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from kvllm import __main__ as cli
from kvllm.cli.options import flag, shown, suggesting_flags
from kvllm.config import KvConfig
from kvllm.engine import arguments
from kvllm.engine.arguments import check_plugin_is_loaded
from kvllm.errors import UsageError
from kvllm.layout import Geometry
from kvllm.measure.eval.stats import wilson
from kvllm.methods import checked_config
from kvllm.options import options_of
from kvllm.support import finding_model
from tools import reference

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
    assert "[default: 0.3]" in printed  # of retention_ratio
    assert (
        printed.index("Compression ─") < printed.index("--request-ratios") < printed.index("Compression, for experts")
    )
    assert printed.index("Compression, for experts") < printed.index("--query-stride")


def test_only_options_that_were_given_override_other_choices(config_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, object] = {}
    monkeypatch.setattr(arguments, "serve_arguments", lambda args, options: (args[0], taken.update(options) or args))
    monkeypatch.setattr(arguments, "run_server", lambda args: None)
    runner.invoke(cli.app, ["serve", "MODEL", "--retention-ratio", "0.3", "--port", "1"], catch_exceptions=False)
    assert taken == {"retention_ratio": 0.3}  # given, if the default's value


def commands() -> list[tuple[str, Any]]:
    return list(reference.commands(typer.main.get_command(cli.app), "kvllm"))


@pytest.mark.parametrize("name, command", commands())
def test_every_command_has_help_and_examples_whose_options_exist(name: str, command: Any) -> None:
    assert command.help and all(p.help for p in command.params if p.name != "kvllm_context")
    if name == "kvllm demo":  # takes what `make demo` gives it
        return
    title, *examples = command.epilog.split("\n\n")
    assert title == "Examples:" and examples
    by_name = dict(commands())
    for example in examples:
        words = shlex.split(example)
        named = " ".join(words[:3]) if " ".join(words[:3]) in by_name else " ".join(words[:2])
        taken = by_name[named]
        known = {option for p in taken.params for option in p.opts}
        unknown = {word for word in words if word.startswith("-")} - known
        assert unknown <= {"--tensor-parallel-size", "--port"}  # vLLM's
        if "--method-options" in words:
            method = words[words.index("--method") + 1]
            checked_config({"method": method, "method_options": json.loads(words[words.index("--method-options") + 1])})


def test_the_shell_completes_options() -> None:
    environment = os.environ | {
        "_KVLLM_COMPLETE": "complete_bash", "COMP_WORDS": "kvllm serve --ret", "COMP_CWORD": "2"
    }  # fmt: skip
    command = [sys.executable, "-c", "from kvllm.__main__ import app; app(prog_name='kvllm')"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["--retention-ratio"]


def test_importing_the_command_loads_neither_torch_nor_vllm() -> None:
    check = "import sys, kvllm.__main__; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_version() -> None:
    import kvllm

    assert runner.invoke(cli.app, ["--version"]).stdout == f"kvllm {kvllm.__version__}\n"


def test_methods_lists_the_registry() -> None:
    printed = runner.invoke(cli.app, ["methods"], catch_exceptions=False).stdout
    for name in ("kara", "random", "snapkv", "streaming_llm"):
        assert name in printed


def test_methods_writes_json(tmp_path: Path) -> None:
    runner.invoke(cli.app, ["methods", "--json", str(tmp_path / "out.json")], catch_exceptions=False)
    written = {method["name"]: method for method in json.loads((tmp_path / "out.json").read_text())}
    kara = {option["name"]: option for option in written["kara"]["options"]}
    assert kara["chunk_fill"]["default"] == 0.5 and kara["chunk_fill"]["accepts"] == "a number in [0, 1)"
    assert written["random"]["summary"]
    runner.invoke(cli.app, ["methods", "kara", "--json", str(tmp_path / "one.json")], catch_exceptions=False)
    assert json.loads((tmp_path / "one.json").read_text()) == [written["kara"]]


def test_methods_shows_each_option_with_its_default_bounds_and_help(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvllm.cli.app import console
    from kvllm.methods import SHARED_OPTIONS, methods

    monkeypatch.setattr(console, "width", 500)
    printed = runner.invoke(cli.app, ["methods"], catch_exceptions=False).stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    for cls in methods().values():
        for option in options_of(cls).values():
            if option.name not in SHARED_OPTIONS:
                default = "required" if option.default == "" else shown(option.default)
                assert [option.name, default, option.accepts, option.help] in rows
    assert ["chunk_fill", "0.5", "a number in [0, 1)"] in [row[:3] for row in rows]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--method", "kaar"], ["'kaar'", "did you mean 'kara'?"]),
        (["--retention-ratio", "30"], ["retention_ratio=30", "(0, 1]"]),
        (["--window-size", "264"], ["window_size=264", "multiple", "16"]),
        (["--window-size", "0"], ["window_size=0", ">= 1"]),
        (["--retention-ratio", "0.05"], ["retention_ratio=0.05", "at least one block", "at least 320"]),
        (["--method-options", "{"], ["--method-options {", "JSON"]),
        (["--method-options", '{"chunk_fill": "x"}'], ["chunk_fill='x'", "[0, 1)", "not a string"]),
        (["--retention-ratio", "nan"], ["retention_ratio=nan", "(0, 1]"]),
        (["--method-options", '{"alpha": 1}'], ["method_options of kara: alpha=1", "attention_floor"]),
        (["--kv-cache-dtype", "fp8_e5m2"], ["kv_cache_dtype=fp8_e5m2: use one of auto,"]),
        (
            ["--kv-cache-dtype", "fp8", "--retention-ratio", '{"0": 0.5, "1": 0.3, "2": 0.2}'],
            ["retention_ratio=", "cannot be combined with kv_cache_dtype=fp8", "one ratio"],
        ),
        (["--request-ratios", "0.01"], ["request_ratios='0.01'", "at least one block"]),
        (
            ["--prompt-budget", "512", "--max-model-len", "900"],
            ["prefix_budget_exhausted: prompt_budget=512", "max_model_len=900", "at most 496"],
        ),
        (["--memory", "80GX"], ["80GX", "80GiB"]),
        (["--compression", "3x"], ["compression='3x'", "4x, 8x, 16x"]),
        (["--compression", "4x", "--survivor-bits", "16"], ["compression=4x", "survivor_bits=16 was given too"]),
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


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError from our own files is no refusal: only UsageError is."""
    monkeypatch.setattr(cli, "app", lambda _: wilson(3, 2))
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        cli.main([])


def test_a_refusal_shows_its_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLLM_TRACEBACK", "1")
    with pytest.raises(UsageError, match="--prompt-file"):
        cli.main(["generate", "model"])


@pytest.mark.parametrize("plugins", ["", "something_else", "something_else, kvllm"])
@pytest.mark.parametrize("command", [
    ["generate", "model", "--prompt", "a"],
    ["serve", "model"],
    ["demo", "--model", "model"],
    ["eval", "accuracy", "model", "--out", "OUT", "--methods", "kara"],
])  # fmt: skip
def test_no_command_compresses_without_the_plugin(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: list[str],
    plugins: str,
) -> None:
    """vLLM would ignore additional_config["kvllm"] and run stock."""
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    err = refused(capsys, *(str(tmp_path / "run") if word == "OUT" else word for word in command))
    assert f"VLLM_PLUGINS={plugins!r}" in err and "kvllm, or unset VLLM_PLUGINS" in err
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_a_plugin_that_is_not_installed_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvllm.engine.arguments.entry_points", lambda **_: [])
    assert "does not find the plugin 'kvllm'" in refused(capsys, "serve", "model")


@pytest.mark.parametrize("plugins", [None, "kvllm", "other,kvllm"])
def test_the_plugin_is_found_where_vllm_loads_it(monkeypatch: pytest.MonkeyPatch, plugins: str | None) -> None:
    if plugins is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    check_plugin_is_loaded()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--kv-cache-dtype", "fp8"], ["KvLLM does not support kv_cache_dtype=fp8"]),  # ours
        (["--max-model-len", "99999999"], ["max_model_len"]),  # vLLM's, by pydantic
    ],
)
def test_what_the_engine_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    model_dir: Path,
    flags: list[str],
    words: list[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", str(model_dir), "--prompt", "a", "--dtype", "float32", *flags])
    assert exit.value.code == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("Error: the engine refused to start: ") and "errors.pydantic.dev" not in line
    for word in words:
        assert word in line


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
    assert written["footprint"]["query_bank"] == 256 * 96 * 3 * 4 * (8 + 2)  # requests, queries, layers, heads, bytes


def test_plan_refuses_what_serve_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of models whose config has a sliding window but no list of layers, too: Mistral."""
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | mistral | {"max_position_embeddings": 32768}))
    planned = ["plan", str(tmp_path), "--memory", "80GiB"]
    assert "sliding_window=4096: no layer has full attention" in refused(capsys, *planned)
    served = runner.invoke(cli.app, [*planned, "--max-model-len", "4096", "--length", "2048"], catch_exceptions=False)
    assert served.exit_code == 0 and "2048" in served.stdout


@pytest.mark.parametrize(
    "changes, arguments, words",
    [
        ({"head_dim": 512}, ["--kv-cache-dtype", "fp8"], "kv_cache_dtype=fp8: not checked with heads of more than 256"),
        ({"head_dim": 72}, ["--compression", "4x"], "survivor_bits=4: head_dim=72 is not a multiple of 16"),
        ({}, ["--method", "triattention", "--method-options", "FILE"], "statistics=.*this one has 3 layers, 4 heads"),
    ],
)
def test_plan_refuses_settings_that_do_not_fit_the_model(
    config_dir: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], arguments: list[str], words: str
) -> None:
    import torch

    from kvllm.methods.triattention import save_statistics

    (config_dir / "config.json").write_text(json.dumps(CONFIG | changes))
    save_statistics(str(config_dir / "statistics"), torch.randn(1, 1, 8, 64), torch.ones(32))
    given = json.dumps({"statistics": str(config_dir / "statistics")})
    named = [given if argument == "FILE" else argument for argument in arguments]
    assert re.search(words, refused(capsys, "plan", str(config_dir), "--memory", "8GiB", *named))


def test_plan_refuses_images_that_the_engine_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of models whose images see later tokens, and with methods that compute angles from indices."""
    import torch
    from transformers import AutoConfig

    from kvllm.methods.triattention import save_statistics

    sizes = {name: value for name, value in CONFIG.items() if name not in ("architectures", "model_type")}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    text = sizes | {"head_dim": 16, "sliding_window": 128, "layer_types": kinds, "hidden_size_per_layer_input": 0}
    text |= {"global_head_dim": 16, "use_bidirectional_attention": "vision"}
    AutoConfig.for_model("gemma4", text_config=text).save_pretrained(tmp_path)
    planned = ["plan", str(tmp_path), "--memory", "8GiB", "--weights", "1GiB"]
    assert "gemma4 with use_mm_prefix=True: tokens of an image attend to later ones" in refused(capsys, *planned)
    assert runner.invoke(cli.app, [*planned, "--language-model-only"], catch_exceptions=False).exit_code == 0

    mrope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    AutoConfig.for_model("qwen2_5_vl", text_config=sizes | {"rope_parameters": mrope}).save_pretrained(tmp_path)
    save_statistics(str(tmp_path / "statistics"), torch.randn(3, 4, 8, 16), torch.ones(8))
    options = ["--method", "triattention", "--method-options", json.dumps({"statistics": str(tmp_path / "statistics")})]
    words = "method=triattention: it computes the keys' angles from their indices in the text"
    assert words in refused(capsys, *planned, *options)
    assert runner.invoke(cli.app, [*planned, *options, "--language-model-only"], catch_exceptions=False).exit_code == 0


def test_plan_refuses_a_model_that_is_not_there(tmp_path: Any) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        with pytest.raises(
            UsageError, match=f"/{name}: the model's config.json cannot be read .*; give the folder of a model"
        ):
            cli.app(["plan", str(tmp_path / name), "--memory", "8GiB"], standalone_mode=False)


@pytest.mark.parametrize(
    "error",
    [
        OSError(
            "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cache."
        ),
        ValueError("Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/models/qwen'."),
    ],
)
@pytest.mark.parametrize(
    "given", [["/models/qwen", "--port", "8001"], ["--port", "8001", "/models/qwen"], ["--model", "/models/qwen"]]
)
def test_serve_refuses_a_model_that_cannot_be_read(
    error: Exception, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And names it, wherever it stands; vLLM's parser, which is slow, runs once for that."""
    parsed = []

    def run_server(args: list[str]) -> None:
        raise error

    def parse(args: list[str], parse: Any = arguments._parse_serve) -> Any:
        parsed.append(args)
        return parse(args)

    monkeypatch.setattr(arguments, "run_server", run_server)
    monkeypatch.setattr(arguments, "_parse_serve", parse)
    with pytest.raises(UsageError, match="^/models/qwen: the model's config.json cannot be read .*; give the folder"):
        cli.app(["serve", *given], standalone_mode=False)
    assert len(parsed) == 1


@pytest.mark.parametrize(
    "number, raised, words",
    [(errno.EADDRINUSE, UsageError, "port is in use; .* use another --port"), (errno.ENOSPC, OSError, "by the system")],
)
def test_a_port_in_use_is_refused_and_other_system_errors_are_not(
    number: int, raised: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_server(args: list[str]) -> None:
        raise OSError(number, "said by the system")

    monkeypatch.setattr(arguments, "run_server", run_server)
    with pytest.raises(raised, match=words):
        cli.app(["serve", "/models/qwen"], standalone_mode=False)


@pytest.mark.parametrize("error", [OSError("libnone.so: cannot open shared object file"), ConnectionError("refused")])
def test_an_error_that_is_not_of_the_model_is_not_said_to_be(error: OSError) -> None:
    with pytest.raises(type(error), match="^(libnone|refused)"), finding_model("/models/qwen"):
        raise error


def test_our_flags_accept_underscores_as_vllms_do(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(arguments, "serve_arguments", lambda args, options: (args[0], [*args, options]))
    monkeypatch.setattr(arguments, "run_server", taken.extend)
    cli.app(["serve", "MODEL", "--retention_ratio", "0.5", "--max_model_len=64"], standalone_mode=False)
    assert taken == ["MODEL", "--max_model_len=64", {"retention_ratio": 0.5}]


def test_a_misspelt_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.app(["serve", "MODEL", "--compresion", "8x", "--enforce-eager"], standalone_mode=False)
    assert "--compresion: did you mean --compression?" in capsys.readouterr().err


def test_flags_of_vllms_and_help_get_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    for code in (0, 2):
        with pytest.raises(SystemExit), suggesting_flags(["--compresion" if code == 0 else "--seed", "1"]):
            raise SystemExit(code)
    assert not capsys.readouterr().err
