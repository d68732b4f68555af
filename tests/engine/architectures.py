"""What `kvllm.support` says of every architecture that vLLM generates text with, and where that was tried.

`python -m tests.engine.families --page` writes it into docs/compatibility.md and architectures.json, beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from kvllm.support import model_reasons

RECORD = Path(__file__).with_suffix(".json")
# Architectures whose outputs the tests in tests/gpu compare with the reference, and the test that does.
ON_GPU = {
    "LlamaForCausalLM": "test_engine_gpu.py",
    "Gemma3ForCausalLM": "test_local_layers_gpu.py",
    "Exaone4ForCausalLM": "test_local_layers_gpu.py",
    "Qwen3MoeForCausalLM": "test_moe_gpu.py",
    "Glm4MoeForCausalLM": "test_moe_gpu.py",
    "GptOssForCausalLM": "test_moe_gpu.py",
    "GraniteMoeHybridForCausalLM": "test_linear_layers_gpu.py",
    "Qwen3NextForCausalLM": "test_delta_nets_gpu.py",
}
NO_CONFIG = "transformers has no config of it"

TRIED = {"equal": "equal", "refused": "refused as tried above", "": "untested"}

INTRODUCTION = """\

# Architectures

All architectures that vLLM {vllm} generates text with and of which transformers {transformers} has a config, {count}
of them. *Served* or *refused* is what `src/kvllm/support.py` says of the default config; a checkpoint's own may say
otherwise (a shorter window, another kind of layer), and `kvllm plan` tells at once. *Equal* means equal to the
reference, on a CPU by the table above, on a GPU by a test in `tests/gpu`; *untested* means that nobody has compared it.
The other {others} that vLLM lists have code and config in their own repositories: their layers are checked when the
engine has loaded them.

| architecture | by its config | CPU | GPU |
| --- | --- | --- | --- |
"""


def known() -> dict[str, str]:
    """The model type of each architecture that vLLM generates text with; "" where transformers has no config."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    types: dict[str, str] = {}
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        for model_type, names in mapping.items():
            types |= dict.fromkeys([names] if isinstance(names, str) else names, model_type)
    return {name: types.get(name, "") for name in sorted(_TEXT_GENERATION_MODELS, key=str.lower)}


@cache
def reason(model_type: str) -> str:
    """Why the default config of this type is refused; "" where it is served."""
    return next(iter(model_reasons(AutoConfig.for_model(model_type))), "")


def recorded() -> dict[str, str]:
    return json.loads(RECORD.read_text())


def section(architectures: dict[str, str], outcomes: Mapping[str, set[str]], versions: dict[str, str]) -> str:
    """Of docs/compatibility.md.

    architectures: as of `known`; outcomes: on a CPU, of the models tried of each architecture
    """
    with_config = {name: kind for name, kind in architectures.items() if kind}
    others = len(architectures) - len(with_config)
    lines = [INTRODUCTION.format(count=len(with_config), others=others, **versions)]
    for name, kind in with_config.items():
        if why := reason(kind):
            cells = [f"refused: {why}".replace("|", "/"), "", ""]
        else:
            found = outcomes.get(name, set())
            on_cpu = next((words for outcome, words in TRIED.items() if outcome in found), TRIED[""])
            cells = ["served", on_cpu, "equal" if name in ON_GPU else "untested"]
        lines.append(f"| `{name}` | {' | '.join(cells)} |\n")
    return "".join(lines)
