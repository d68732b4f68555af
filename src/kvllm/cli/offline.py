"""vLLM's offline engine, for the commands that generate text: quiet, and what it refuses is one line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kvllm.cli.options import suggesting_flags
from kvllm.cli.quiet import silence_vllm
from kvllm.errors import UsageError, message_of
from kvllm.support import finding_model

if TYPE_CHECKING:
    from vllm import LLM


def start_llm(
    arguments: Sequence[str], options: Mapping[str, Any] | None, console: Console, in_process: bool = True
) -> LLM:
    """Start an engine; call it before anything imports vLLM, which reads its environment then.

    arguments:  MODEL and any of vLLM's engine flags
    options:    fields of KvConfig; None: stock vLLM
    console:    shows what is being started, while it starts
    in_process: run the engine in this process, whose state can then be read. It also starts sooner, since vLLM is
                imported once; one in a process of its own frees all of a GPU's memory when it is closed
    Raises UsageError if the engine refuses to start.
    """
    silence_vllm(arguments)
    if in_process:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from kvllm.engine.arguments import engine_args

    with finding_model(None), suggesting_flags(arguments):
        args = engine_args(arguments, options)
    with finding_model(args.model):
        try:
            with console.status(f"Starting vLLM with {args.model} ..."):
                return LLM.from_engine_args(args)
        except ValueError as e:
            raise UsageError(f"the engine refused to start: {' '.join(message_of(e).split())}") from e
        except Exception as e:  # a worker's failure has no class of its own
            if not any(f"{part} initialization failed" in str(e) for part in ("Engine core", "WorkerProc")):
                raise
            raise UsageError("the engine did not start; see the first error in vLLM's messages above.") from e
