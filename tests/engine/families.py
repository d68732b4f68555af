"""Model families tried with the engine: a tiny random checkpoint of each, compared with the reference.

    python -m tests.engine.families            # all of them: about 20 s of one core each
    python -m tests.engine.families glm phi    # those with one of these in their names
    python -m tests.engine.families --page     # none: write the page anew

This updates families.json, beside this file, and docs/compatibility.md. `test_families.py` compares a few with the
recorded outcome on every run, and all of them with KVLLM_ALL_FAMILIES=1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.version import __version__ as vllm_version

from kvllm.config import KvConfig
from kvllm.methods import checked_config
from kvllm.reference import load_model
from kvllm.support import model_reasons, torchvision_problem
from tests.engine import architectures
from tests.near_ties import check_greedy

VOCAB_SIZE = 512
BLOCK_SIZE = 32
CONFIG = KvConfig(window_size=64, buffer_size=32, retention_ratio=0.5)
PROMPT_LENGTHS = (5, 40, 77)
NUM_TOKENS = 260  # three compressions each: at 96, 160 and 224 tokens past the end of the prompt's last block
MAX_MODEL_LEN = 512
RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.1,  # wide, so that attention is far from uniform and tokens far from ties
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HEAD_DIM = {"head_dim": 32}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
GPT = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": MAX_MODEL_LEN, "n_inner": 128}
FULL_WINDOW = {"sliding_window": MAX_MODEL_LEN}
"""A window as long as the context: full attention."""
MIXED = {"sliding_window": 128, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
"""Two layers of three look back over a window that every request outgrows."""


KEYS_AS_VALUES = {"num_key_value_heads": 4, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
                  "hidden_size_per_layer_input": 0}  # fmt: skip
"""Of the larger models of Gemma 4: layers of full attention have fewer KV heads, and values that are their keys."""


@dataclass(frozen=True)
class Family:
    """A tiny model: its `model_type`, and what its config has besides SIZES."""

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        return AutoConfig.for_model(self.model_type, **(SIZES | {"dtype": "float32"} | self.options))


@dataclass(frozen=True)
class Result:
    """What came of a family.

    outcome: "equal" to the reference; "refused" by KvLLM; "stock fails" where vLLM itself cannot run it here;
             "stock differs" where vLLM's uncompressed answers already are not the reference's;
             "no reference" where transformers cannot run the checkpoint with the reference; "differs"
    detail:  the message of a refusal or failure
    options: method options that the run needed
    """

    architecture: str
    outcome: str
    detail: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    near_ties: int = 0


def _families() -> dict[str, Family]:
    mla = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
           "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
           "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4}  # fmt: skip
    linear = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
              "linear_num_value_heads": 4, "full_attention_interval": 2, "num_hidden_layers": 2}  # fmt: skip
    mamba = {"mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_expand": 2, "mamba_n_groups": 1,
             "mamba_d_ssm": 256, "mamba_chunk_size": 32}  # fmt: skip
    shared = {"shared_expert_intermediate_size": 64, "shared_intermediate_size": 64}
    listed: list[tuple[str, str, dict[str, Any]]] = [
        ("Llama", "llama", HEAD_DIM),
        ("Llama with Llama-3 RoPE scaling", "llama", HEAD_DIM | {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 128}}),
        ("Mistral", "mistral", HEAD_DIM | {"sliding_window": None}),
        ("Mistral, window as long as the context", "mistral", HEAD_DIM | FULL_WINDOW),
        ("Mistral, shorter window", "mistral", HEAD_DIM | {"sliding_window": 128}),
        ("Ministral", "ministral", HEAD_DIM | MIXED),
        ("Ministral 3", "ministral3", HEAD_DIM | {"sliding_window": None}),
        ("Mixtral", "mixtral", MOE | {"sliding_window": None}),
        ("Qwen2", "qwen2", {}),
        ("Qwen2 with layers of a shorter window", "qwen2",
            {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}),
        ("Qwen2 with layers of a window as long as the context", "qwen2",
            {"use_sliding_window": True, "sliding_window": MAX_MODEL_LEN, "max_window_layers": 1}),
        ("Qwen2-MoE", "qwen2_moe", MOE | shared),
        ("Qwen3", "qwen3", HEAD_DIM),
        ("Qwen3-MoE", "qwen3_moe", HEAD_DIM | MOE),
        ("Qwen3-Next", "qwen3_next", HEAD_DIM | MOE | shared | linear),
        ("Qwen3.5", "qwen3_5_text", HEAD_DIM | linear),
        ("OLMo", "olmo", {}),
        ("OLMo 2", "olmo2", {}),
        ("OLMo 3", "olmo3", MIXED),
        ("OLMoE", "olmoe", MOE),
        ("Phi", "phi", {"partial_rotary_factor": 0.5}),
        ("Phi-3", "phi3", {"sliding_window": None}),
        ("GLM", "glm", HEAD_DIM | {"partial_rotary_factor": 0.5}),
        ("GLM-4", "glm4", HEAD_DIM | {"partial_rotary_factor": 0.5}),
        ("GLM-4-MoE", "glm4_moe", HEAD_DIM | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 64, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5}),
        ("Granite", "granite", {}),
        ("GraniteMoE", "granitemoe", MOE),
        ("Granite 4 (Mamba hybrid)", "granitemoehybrid", MOE | shared | {
            "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8, "mamba_d_head": 32,
            "mamba_d_state": 16}),
        ("StableLM", "stablelm", {"partial_rotary_factor": 0.5}),
        ("GPT-2", "gpt2", GPT),
        ("GPT-NeoX", "gpt_neox", {"rotary_pct": 0.5}),
        ("GPT-J", "gptj", GPT | {"rotary_dim": 16}),
        ("GPT-BigCode", "gpt_bigcode", GPT | {"multi_query": True}),
        ("StarCoder2", "starcoder2", {"sliding_window": None}),
        ("Falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
        ("Falcon with ALiBi", "falcon", {"new_decoder_architecture": False, "alibi": True, "multi_query": True}),
        ("MPT", "mpt", {"d_model": 128, "n_heads": 4, "n_layers": 3, "max_seq_len": MAX_MODEL_LEN}),
        ("BLOOM", "bloom", {"n_head": 4, "n_layer": 3}),
        ("OPT", "opt", {"ffn_dim": 128, "word_embed_proj_dim": 128, "pad_token_id": 1}),
        ("Gemma", "gemma", HEAD_DIM),
        ("Gemma 2, shorter window", "gemma2", HEAD_DIM | {"sliding_window": 128}),
        ("Gemma 2, window as long as the context", "gemma2", HEAD_DIM | FULL_WINDOW),
        ("Gemma 3, shorter window", "gemma3_text", HEAD_DIM | MIXED),
        ("Gemma 4, per-layer embeddings, larger heads in the full layer", "gemma4_text", HEAD_DIM | MIXED | {
            "global_head_dim": 64, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE}),
        ("Gemma 4 MoE, keys as values", "gemma4_text", HEAD_DIM | MIXED | KEYS_AS_VALUES | {
            "global_head_dim": 128, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
            "moe_intermediate_size": 64}),
        ("Gemma 4, shared KV caches", "gemma4_text", HEAD_DIM | MIXED | {"num_hidden_layers": 6,
            "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"], "global_head_dim": 64,
            "num_kv_shared_layers": 3}),
        ("Cohere", "cohere", {}),
        ("Cohere 2, shorter window", "cohere2", HEAD_DIM | MIXED),
        ("Cohere 2 MoE", "cohere2_moe", HEAD_DIM | MOE | MIXED),
        ("Cohere 2, window as long as the context", "cohere2", HEAD_DIM | MIXED | FULL_WINDOW),
        ("Nemotron", "nemotron", HEAD_DIM),
        ("Nemotron-H", "nemotron_h", HEAD_DIM | {"layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1}),
        ("EXAONE 4, shorter window, no RoPE in the global layer", "exaone4", HEAD_DIM | MIXED),
        ("K-EXAONE", "exaone_moe", HEAD_DIM | MOE | MIXED | {"num_shared_experts": 1, "mlp_layer_types": [
            "dense", "sparse", "sparse"], "n_group": 1, "topk_group": 1}),
        ("EXAONE 4", "exaone4", HEAD_DIM | {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
        ("SmolLM3", "smollm3", {"no_rope_layer_interval": 2, "sliding_window": None}),
        ("Seed-OSS", "seed_oss", HEAD_DIM),
        ("ERNIE 4.5", "ernie4_5", HEAD_DIM),
        ("ERNIE 4.5 MoE", "ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1}),
        ("Arcee", "arcee", HEAD_DIM),
        ("Apertus", "apertus", HEAD_DIM),
        ("HunYuan dense", "hunyuan_v1_dense", HEAD_DIM),
        ("HunYuan MoE", "hunyuan_v1_moe", HEAD_DIM | MOE | {"moe_topk": 2, "moe_intermediate_size": 128}),
        ("MiniMax-M2", "minimax_m2", HEAD_DIM | MOE | {"rotary_dim": 16, "scoring_func": "sigmoid"}),
        ("Jais 2", "jais2", HEAD_DIM),
        ("HyperCLOVA X", "hyperclovax", HEAD_DIM),
        ("CWM", "cwm", HEAD_DIM | MIXED | {"bos_token_id": 1, "eos_token_id": 2}),
        ("Trinity (AFMoE)", "afmoe", HEAD_DIM | MOE | MIXED | {"score_func": "sigmoid", "route_norm": True,
            "num_dense_layers": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1}),
        ("DBRX", "dbrx", {"d_model": 128, "n_heads": 4, "n_layers": 3, "max_seq_len": MAX_MODEL_LEN,
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}}),
        ("gpt-oss", "gpt_oss", HEAD_DIM | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128}),
        ("Llama 4", "llama4_text", HEAD_DIM | MOE | {"num_experts_per_tok": 1, "intermediate_size_mlp": 128,
            "attention_chunk_size": 128, "num_hidden_layers": 4}),
        ("Mamba", "mamba", {}),
        ("Mamba 2", "mamba2", {"num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 1}),
        ("Falcon-H1", "falcon_h1", HEAD_DIM | mamba),
        ("Jamba", "jamba", MOE | {"attn_layer_period": 2, "attn_layer_offset": 1}),
        ("LFM2", "lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
        ("DeepSeek-V2", "deepseek_v2", mla),
        ("DeepSeek-V3", "deepseek_v3", mla),
        ("MiniCPM3", "minicpm3", mla),
    ]  # fmt: skip
    return {name: Family(name, kind, options) for name, kind, options in listed}


FAMILIES = _families()
# Few, but of every kind: grouped queries and none, learned positions, windows of all and of some layers, refusals.
# Models with local layers are in test_local_layers.py.
ON_EVERY_RUN = (
    "Qwen3",
    "Mistral, window as long as the context",
    "Cohere 2, window as long as the context",
    "GPT-2",
    "BLOOM",
    "Falcon with ALiBi",
    "Mistral, shorter window",
)


def prompts() -> list[list[int]]:
    """Random token ids; no special tokens are among them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def save_random(family: Family, folder: Path) -> str:
    """A float32 checkpoint without a tokenizer; returns its architecture."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32)
    model.save_pretrained(folder)
    return type(model).__name__


def outputs(folder: Path, config: KvConfig | None) -> tuple[list[list[int]], int]:
    """Greedy tokens for `prompts()` from one batch of an engine in this process, and the windows it compressed."""
    from vllm import SamplingParams

    from kvllm.engine.stats import engine_stats
    from tests.engine.conftest import engine

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    sizes = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 4}
    with engine(folder, config, skip_tokenizer_init=True, **sizes) as llm:
        made = llm.generate([{"prompt_token_ids": p} for p in prompts()], params, use_tqdm=False)
        events = engine_stats(llm)["num_windows_compressed"] if config else 0
    return [list(o.outputs[0].token_ids) for o in made], events


@cache
def reference_process() -> ProcessPoolExecutor:
    """A process without vLLM, which changes classes of transformers where it runs a model through them."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def compare(folder: Path, answers: list[list[int]], config: KvConfig | None) -> int:
    """The near ties among tokens that all are the reference's; AssertionError if one is not."""
    torch.set_num_threads(1)
    model = load_model(folder)
    return sum(
        check_greedy(model, prompt, answer, config, BLOCK_SIZE).near_ties
        for prompt, answer in zip(prompts(), answers, strict=True)
    )


def try_family(family: Family) -> Result:
    """Serve it, compare every token with the reference, and say what came of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        architecture = save_random(family, folder)
        config, answers, events = CONFIG, None, 0
        for options in ({}, {"lookahead": 0}):  # Kara's lookahead needs to know the model's RoPE
            config = checked_config(CONFIG.to_dict() | {"method_options": options})
            try:
                answers, events = outputs(folder, config)
                break
            except Exception as e:
                message = _kvllm_message(e)
                if message is None or "cannot start" in message:
                    try:
                        outputs(folder, None)
                    except Exception as stock:
                        detail = torchvision_problem() if message else _first_line(stock)
                        return Result(architecture, "stock fails", str(detail))
                    raise
                if "lookahead=0" not in message or options:
                    return Result(architecture, "refused", message)
        assert answers is not None
        expected = 3 * len(PROMPT_LENGTHS)
        needed = dict(config.method_options)
        if events != expected:
            return Result(architecture, "differs", f"{events} windows compressed, not {expected}", needed)
        try:
            ties = reference_process().submit(compare, folder, answers, config).result()
        except AssertionError as e:
            try:
                reference_process().submit(compare, folder, outputs(folder, None)[0], None).result()
            except AssertionError as stock:
                return Result(architecture, "stock differs", _first_line(stock), {})
            return Result(architecture, "differs", _first_line(e), needed)
        except Exception as e:
            return Result(architecture, "no reference", _first_line(e), needed)
        return Result(architecture, "equal", "", needed, ties)


def _kvllm_message(error: BaseException) -> str | None:
    """What KvLLM said when it refused; None where something else failed."""
    seen: BaseException | None = error
    while seen is not None:
        if "KvLLM" in str(seen):
            return _first_line(seen, "KvLLM")
        seen = seen.__cause__ or seen.__context__
    return None


def _first_line(error: BaseException, word: str = "") -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and word in line]
    return f"{'' if word else type(error).__name__ + ': '}{lines[0] if lines else ''}"[:300]


def recorded() -> tuple[dict[str, Result], dict[str, str]]:
    """The results that are committed, by the family's name, and the versions that gave them."""
    made = json.loads(RESULTS.read_text())
    return {name: Result(**result) for name, result in made["results"].items()}, made["versions"]


def write_page() -> None:
    architectures.RECORD.write_text(json.dumps(architectures.known(), indent=1) + "\n")
    PAGE.write_text(page(*recorded()))


OUTCOMES = {
    "equal": "served, equal to the reference",
    "refused": "refused",
    "differs": "**differs from the reference**",
    "no reference": "served, not compared, since the reference does not run it",
    "stock differs": "stock vLLM's own answers are not those of transformers, so there is nothing to compare",
    "stock fails": "stock vLLM does not run it here",
}
INTRODUCTION = """\
# Models that were tried

Each line is a tiny random checkpoint in float32, built from a transformers config, on a CPU. *Served, equal to the
reference* means that {prompts} prompts decoded {tokens} greedy tokens each in one batch, with three compressions each
(`kara`, windows of {window} tokens of which half stay), and every token is the one that the reference chooses, near
ties aside. The context is {context} tokens, a shorter window or chunk {local}; layers that have one are left to
vLLM, as are Mamba and linear-attention layers, and those of full attention beside them are compressed. *Refused* is
what the engine says at start-up and, where the reason is in the config, what `kvllm plan` and the reference say too. An
architecture that is not listed is served if each of its layers passes the checks of `src/kvllm/support.py`, and refused
by name if not. Models with Mamba or linear-attention layers are served on GPUs only. Models whose images see later
tokens (`Gemma3ForConditionalGeneration`, `Gemma4ForConditionalGeneration`) are refused unless `--language-model-only`
is given.

On GPUs (H100, `tests/gpu/`) these equal the reference in float32 under CUDA graphs, with prefix caching, chunked
prefill and preemption: Llama, Gemma 3, EXAONE 4, Qwen3-MoE, GLM-4.5, gpt-oss, Granite 4 (Mamba) and Qwen3-Next
(linear attention), the last two with 200 requests, aborts and 89 and 101 preemptions; and on two GPUs Llama (tensor,
pipeline and data parallel) and Qwen3-MoE (tensor and expert parallel).

Last run: {date}, vLLM {vllm}, transformers {transformers}, torch {torch}. `python -m tests.engine.families` runs all of
them again and writes this page.

| model | architecture | outcome |
| --- | --- | --- |
"""


def page(results: dict[str, Result], versions: dict[str, str]) -> str:
    """docs/compatibility.md: the outcomes of the last run, and for refusals by the config what `kvllm.support` says."""
    context = {"prompts": len(PROMPT_LENGTHS), "tokens": NUM_TOKENS, "window": CONFIG.window_size}
    local = MIXED["sliding_window"]
    lines = [INTRODUCTION.format(**context, context=MAX_MODEL_LEN, local=local, **versions)]
    for name, result in results.items():
        detail = "" if "differs" in result.outcome else result.detail  # which token by how much is in the JSON
        if result.outcome == "refused" and (said := model_reasons(FAMILIES[name].config(), MAX_MODEL_LEN)):
            detail = said[0]
        options = ", ".join(f"`{key}={value}`" for key, value in result.options.items())
        outcome = OUTCOMES[result.outcome] + (f", with {options}" if options else "")
        outcome += f": {detail}" if detail else ""
        lines.append(f"| {name} | `{result.architecture}` | {outcome.replace('|', '/')} |\n")
    outcomes: dict[str, set[str]] = {}
    for result in results.values():
        outcomes.setdefault(result.architecture, set()).add(result.outcome)
    return "".join(lines) + architectures.section(architectures.recorded(), outcomes, versions)


def versions() -> dict[str, str]:
    """Of what the results depend on, with today's date."""
    found = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    return found | {"vllm": vllm_version.partition("+")[0], "date": datetime.date.today().isoformat()}


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="names, or parts of them; default: all")
    parser.add_argument("--missing", action="store_true", help="only those not tried, that differ, or that stock fails")
    parser.add_argument("--page", action="store_true", help="run none: write docs/compatibility.md anew")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file to update")
    options = parser.parse_args(arguments)
    if options.page:
        return write_page()
    wanted = [n for n in FAMILIES if not options.families or any(w.lower() in n.lower() for w in options.families)]
    if options.missing and options.output.exists():
        done = json.loads(options.output.read_text())["results"]
        wanted = [n for n in wanted if done.get(n, {"outcome": "differs"})["outcome"] in ("differs", "stock fails")]
    for name in wanted:
        try:
            result = try_family(FAMILIES[name])
        except Exception:
            show(f"{name}: failed\n{traceback.format_exc()}")
            continue
        show(f"FAMILY {name}: {result}")
        made = json.loads(options.output.read_text()) if options.output.exists() else {"results": {}}
        made["versions"] = versions()
        made["results"][name] = asdict(result)
        made["results"] = {n: made["results"][n] for n in FAMILIES if n in made["results"]}
        options.output.write_text(json.dumps(made, indent=1) + "\n")
        if options.output == RESULTS:
            write_page()


if __name__ == "__main__":
    main()
