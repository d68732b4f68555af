"""The arguments that vLLM receives from a command line with its flags and ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvllm import __main__ as cli
from kvllm.cli.options import flag
from kvllm.config import PRESET_KEY, KvConfig
from kvllm.engine.arguments import merge_options, without_additional_config


@pytest.mark.parametrize(
    "arguments, kept",
    [
        (["m", "--additional-config", "{}", "--port", "1"], ["m", "--port", "1"]),
        (["m", '--additional_config={"a":\n1}', "-tp", "2"], ["m", "-tp", "2"]),
        (["m", "--additional-config.kvllm.window_size", "128", "--x"], ["m", "--x"]),
        (["m", "--additional-config.kvllm.window_size=128"], ["m"]),
        (["m", "--additional-configs", "1"], ["m", "--additional-configs", "1"]),
    ],
)
def test_without_additional_config(arguments: list[str], kept: list[str]) -> None:
    assert without_additional_config(arguments) == kept


def test_flags_win_over_additional_config_and_other_plugins_stay() -> None:
    given = {"other": {"x": 1}, "kvllm": {"retention_ratio": 0.5, "window_size": 128}}
    merged = merge_options(given, {"retention_ratio": 0.25})
    assert merged == {"other": {"x": 1}, "kvllm": KvConfig(retention_ratio=0.25, window_size=128).to_dict()}
    assert given["kvllm"] == {"retention_ratio": 0.5, "window_size": 128}


@pytest.mark.parametrize(
    "theirs, flags",
    [({"retention_ratio": 0.3}, {"compression": "8x"}), ({"compression": "4x"}, {"retention_ratio": 0.4375})],
)
def test_flags_win_over_additional_config_where_one_of_them_is_a_preset(theirs: Any, flags: Any) -> None:
    merged = merge_options({"kvllm": theirs}, flags)["kvllm"]
    assert (merged["survivor_bits"], merged["retention_ratio"]) == (4, 0.4375)


def test_compression_is_on_without_options() -> None:
    assert merge_options(None, {}) == {"kvllm": KvConfig().to_dict()}


class TestServe:
    """`kvllm serve`, up to the call of vLLM's entry point."""

    @pytest.fixture
    def served(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Calls `kvllm serve` with the arguments; the ones that `vllm` is then started with."""
        seen: list[list[str]] = []
        monkeypatch.setattr("kvllm.engine.arguments.run_server", lambda arguments: seen.append(list(arguments)))

        def serve(*arguments: str) -> list[str]:
            with pytest.raises(SystemExit) as exit:
                cli.main(["serve", *arguments])
            assert exit.value.code == 0
            return seen.pop()

        return serve

    def test_flags_pass_through_in_their_order(self, served: Any) -> None:
        theirs = ["-tp", "2", "--max_model_len=4096", "-O0"]
        *passed, name, merged = served("--port", "8123", "my/model", "--retention-ratio", "0.5", *theirs)
        assert passed == ["serve", "--port", "8123", "my/model", *theirs]
        assert name == "--additional-config"
        assert json.loads(merged) == {"kvllm": KvConfig(retention_ratio=0.5).to_dict()}

    def test_additional_config_is_merged(self, served: Any) -> None:
        given = '{"other": 1, "kvllm": {"window_size": 512}}'
        argv = served("m", "--additional-config", given, "--method", "snapkv", "--seed", "7")
        assert argv[:-1] == ["serve", "m", "--seed", "7", "--additional-config"]
        assert json.loads(argv[-1]) == {"other": 1, "kvllm": KvConfig(method="snapkv", window_size=512).to_dict()}

    def test_dotted_keys_and_a_config_file(self, served: Any, tmp_path: Path) -> None:
        file = tmp_path / "serve.yaml"
        file.write_text("port: 8124\n")
        argv = served("m", "--config", str(file), "--additional-config.kvllm.window_size", "128")
        assert argv[:-2] == ["serve", "m", "--config", str(file)]
        assert json.loads(argv[-1])["kvllm"]["window_size"] == 128

    def test_a_wrong_option_in_additional_config_is_refused(
        self, served: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit:
            cli.main(["serve", "m", "--additional-config", '{"kvllm": {"windowsize": 128}}'])
        assert exit.value.code == 2
        assert capsys.readouterr().err.strip().endswith("did you mean 'window_size'?")

    def test_our_flags_do_not_clash_with_vllms(self) -> None:
        pytest.importorskip("vllm")
        from dataclasses import fields

        from vllm.utils.argparse_utils import FlexibleArgumentParser

        from kvllm.engine.compat import RELEASE

        if RELEASE >= (0, 33):
            from vllm.entrypoints.common.cli_args import make_arg_parser
        else:
            from vllm.entrypoints.launchers.cli_args import make_arg_parser

        theirs = make_arg_parser(FlexibleArgumentParser())._option_string_actions
        assert "--seed" in theirs and flag("seed") == "--kv-seed"
        for name in (PRESET_KEY, *(field.name for field in fields(KvConfig))):
            assert flag(name) not in theirs


def test_engine_args_of_generate(model_dir: Path) -> None:
    pytest.importorskip("vllm")
    from kvllm.engine.arguments import engine_args

    model = str(model_dir)
    args = engine_args(["--dtype", "float32", model, "--block-size", "32"], {"retention_ratio": 0.5})
    assert (args.model, args.dtype, args.block_size) == (model, "float32", 32)
    assert args.additional_config == {"kvllm": KvConfig(retention_ratio=0.5).to_dict()}
    assert not engine_args([model], None).additional_config
