"""vLLM's log in commands that print a result: of vLLM's messages only errors, of KvLLM's also warnings."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from logging.config import dictConfig
from pathlib import Path

# vLLM reads this file in each of its processes. Its own setting, one level for all, would hide our warnings too.
CONFIG = Path(__file__).with_name("quiet.json")
# For this process and those that vLLM starts; what the user has set stays. Standard output is for the command's own.
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # notes on NUMA
}
PATH = "VLLM_LOGGING_CONFIG_PATH"
# With any of these, or a flag such as --log-level or --logging-config, the log is as the user wants it.
CONFIGURED = ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM", PATH, "VLLM_CONFIGURE_LOGGING")


def silence_vllm(arguments: Sequence[str] = ()) -> None:
    """Call it before anything imports vLLM, which reads its environment then. arguments: vLLM's flags"""
    flags = (argument.replace("_", "-") for argument in arguments)
    if not any(name in os.environ for name in CONFIGURED) and not any(flag.startswith("--log") for flag in flags):
        os.environ[PATH] = str(CONFIG)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    configure_early()


def configure_early() -> None:
    """In a silenced command and in processes that it starts: vLLM warns of things before it reads the file."""
    if os.environ.get(PATH) == str(CONFIG):
        dictConfig(json.loads(CONFIG.read_text()))
        warnings.filterwarnings("ignore", message="`torch.distributed.reduce_op` is deprecated", category=FutureWarning)
