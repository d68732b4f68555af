"""Study ideas for improving Kara: KL from the full cache on replayed traces, and recall of facts, with transformers.

    python benchmarks/kara_study.py MODEL TRACES.jsonl OUT.json --half train --variants parts,refit,scores,queries

Choose on one half of the traces and on the facts of one `--seed`, confirm on the others. `study_kara` without options
is `kara`; each of its options is an idea that the method does not have.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import Field
from scipy.linalg import hadamard
from torch import Tensor
from transformers import AutoTokenizer

from kvllm.measure.eval import fidelity, recall
from kvllm.measure.eval.problems import half_of
from kvllm.measure.eval.report import Progress
from kvllm.measure.eval.sweep import Case, cases
from kvllm.measure.eval.traces import read_traces
from kvllm.methods import register
from kvllm.methods.base import Kept, Window
from kvllm.methods.kara import Kara
from kvllm.methods.keydiff import KeyDiff
from kvllm.methods.refit import LEAST_KEPT, gather_tokens, normal_equations, ridge_solve
from kvllm.options import parse_json, strict_dataclass

MOST_BIAS = 3.0  # of the logarithm of a weight: more would make one token out of a whole window


@strict_dataclass
class StudyKara(Kara):
    """Kara with ideas that it does not have, each off by default."""

    protect_values: float = Field(
        0.0, ge=0, lt=1, description="Share of the survivors that is chosen by the norm of the value alone (VaSE)."
    )
    protect_keys: float = Field(0.0, ge=0, lt=1, description="Share that is chosen by the distinctness of the key.")
    importance: Literal["attention", "loss", "leverage"] = Field(
        "attention",
        description="loss: what evicting the key alone changes in the output of each query, root mean square; "
        "leverage: how much the key's attention cannot be rebuilt from the other keys'.",
    )
    floor_of: Literal["attention", "mean"] = Field(
        "attention", description="mean: the floor is the mean importance times `attention_floor`, whatever its unit."
    )
    buffer_weight: float = Field(1.0, gt=0, description="Weight of the buffer's queries in score and refit.")
    mass_power: float = Field(
        0.0, ge=0, description="Weight of a query in the refit: this power of its sum of exponents over the window."
    )
    token_bias: Literal["none", "cluster"] = Field(
        "none",
        description="cluster: each survivor's weight grows by that of the evicted tokens nearest to it, by its key.",
    )
    start: Literal["own", "merged"] = Field(
        "own", description="merged: values are fitted from the mean of each survivor and the tokens nearest to it."
    )
    steps: int = Field(4, ge=0, description="Of conjugate gradients.")
    precondition: bool = Field(True, description="Divide each unknown by its diagonal first, as Kara does.")
    query_bits: Literal[4, 32] = Field(
        32,
        description="4: queries are rounded to 15 levels, one scale for each. Only for float32 models: the bank rounds "
        "those of others.",
    )
    rotate_queries: bool = Field(
        False, description="Round them in a basis in which no channel stands out: random signs, then Hadamard's matrix."
    )

    def ahead(self, window: Window) -> Window:
        """As Kara's, from queries of `query_bits`: the bank rounds them where they stand, before they are rotated."""
        if self.query_bits == 4:
            window = replace(window, queries=four_bits(window.queries, self.rotate_queries))
        return super().ahead(window)

    def _score(self, window: Window) -> Tensor:
        logits = window.logits().flatten(2, 3)
        weights = self.query_weights(window)
        scores = self.importances(window, logits, weights)
        floor = 1 / window.num_tokens if self.floor_of == "attention" else scores.mean(-1, keepdim=True)
        scores = scores + self.attention_floor * floor
        if self.value_norm and self.importance != "loss":
            scores = scores * window.values.float().norm(dim=-1).transpose(1, 2)
        if self.keydiff_power > 0:
            scores = scores * distinctness(window) ** self.keydiff_power
        return scores

    def choose(self, window: Window, num_kept: int) -> Tensor:
        """[batch, num_kv_heads, num_kept]: indices, those that are protected before all others."""
        norms = window.values.float().norm(dim=-1).transpose(1, 2)
        scores = protect(self._score(window), norms, int(self.protect_values * num_kept))
        return self.select(protect(scores, distinctness(window), int(self.protect_keys * num_kept)), num_kept)

    def importances(self, window: Window, logits: Tensor, weights: Tensor) -> Tensor:
        """[batch, num_kv_heads, num_tokens]; weights: [num_queries of a group], of mean 1"""
        attention = logits.softmax(dim=-1)
        if self.importance == "attention":
            if self.moment == "rms":
                return (attention.square() * weights[:, None]).mean(dim=2).sqrt()
            return (attention * weights[:, None]).mean(dim=2)
        if self.importance == "loss":
            values = window.values.float().transpose(1, 2)
            outputs = attention @ values
            # |v - o|^2 without a tensor of queries x tokens x channels
            square = values.square().sum(-1)[:, :, None] - 2 * outputs @ values.transpose(-1, -2)
            square = (square + outputs.square().sum(-1, keepdim=True)).clamp(min=0)
            odds = attention / (1 - attention).clamp(min=0.05)
            return (odds.square() * square * weights[:, None]).mean(dim=2).sqrt()
        rows = attention * weights[:, None].sqrt()
        gram = rows.transpose(-1, -2) @ rows
        strength = 0.1 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        eye = torch.eye(gram.shape[-1], device=gram.device)
        inverse = torch.linalg.inv(gram + strength * eye)
        # What the others leave unexplained of each column: 1 / diagonal of the inverse, less the ridge.
        return (1 / inverse.diagonal(dim1=-2, dim2=-1) - strength[..., 0]).clamp(min=0).sqrt() / rows.shape[-2] ** 0.5

    def query_weights(self, window: Window) -> Tensor:
        in_buffer = window.query_positions >= window.num_tokens
        weights = torch.where(in_buffer, self.buffer_weight, 1.0).to(window.keys.device)
        group_size = window.queries.shape[2] // window.num_kv_heads
        return (weights / weights.mean()).repeat(group_size)

    def compress(self, window: Window, num_kept: int) -> Kept:
        window = self.ahead(window)
        kept = self.choose(window, num_kept)
        if not self.refits(num_kept):
            return Kept(kept)
        logits, queries = window.logits().flatten(2, 3), window.grouped_queries().flatten(2, 3)
        queries = queries * queries.shape[-1] ** -0.5
        whole = logits.logsumexp(-1, keepdim=True)
        weights = self.query_weights(window)[:, None].expand_as(whole)
        if self.mass_power:
            mass = (self.mass_power * (whole - whole.amax(2, keepdim=True))).exp()
            weights = weights * mass / mass.mean(2, keepdim=True)
        root = weights.sqrt()
        keys, values = gather_tokens(window.head_keys, kept), gather_tokens(window.head_values, kept)
        some = logits.gather(-1, kept.unsqueeze(2).expand(*logits.shape[:-1], -1))
        start = values
        if self.token_bias == "cluster" or self.start == "merged":
            share, merged = clusters(window, kept, (logits.softmax(-1) * weights).mean(2))
            if self.token_bias == "cluster":
                along = self.solve(queries * root, root, self.key_ridge).transpose(-1, -2)  # queries @ along is about 1
                bias = share.log().clamp(max=MOST_BIAS)[..., None] * along
                keys, some = keys + bias, some + queries @ bias.transpose(-1, -2)
            start = merged if self.start == "merged" else start
        if self.key_ridge > 0:
            lost = (whole - some.logsumexp(-1, keepdim=True)).clamp(max=-torch.tensor(LEAST_KEPT).log().item())
            keys = keys + self.solve(queries * root, lost * root, self.key_ridge).transpose(-1, -2)
        if self.value_ridge > 0:
            after, before = some.softmax(-1), logits.softmax(-1) @ window.values.float().transpose(1, 2)
            values = start + self.solve(after * root, (before - after @ start) * root, self.value_ridge)
        return Kept(kept, keys.transpose(1, 2).to(window.keys.dtype), values.transpose(1, 2).to(window.values.dtype))

    def solve(self, rows: Tensor, targets: Tensor, ridge: float) -> Tensor:
        """As `ridge_solve`; without `precondition` by plain conjugate gradients."""
        if self.precondition:
            return ridge_solve(*normal_equations(rows, targets), ridge, self.steps)
        gram, residual = normal_equations(rows, targets)
        strength = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        solution, direction = torch.zeros_like(residual), residual
        square = residual.square().sum(-2, keepdim=True)
        for _ in range(self.steps):
            image = gram @ direction + strength * direction
            length = ratio(square, (direction * image).sum(-2, keepdim=True))
            solution, residual = solution + length * direction, residual - length * image
            before, square = square, residual.square().sum(-2, keepdim=True)
            direction = residual + ratio(square, before) * direction
        return solution


def ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)


def four_bits(vectors: Tensor, rotated: bool = False) -> Tensor:
    """Vectors (the last axis) as they are after rounding to -7 to 7 times a scale for each, in float32.

    Raises ValueError if vectors of a length that is no power of two are to be rotated.
    """
    size, levels = vectors.shape[-1], 7
    if rotated and size & (size - 1):
        raise ValueError(f"rotate_queries: heads have {size} dimensions, and the rotation needs a power of two.")
    signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(vectors.device)
    rotation = torch.from_numpy(hadamard(size) / size**0.5).float().to(vectors.device) if rotated else None
    vectors = vectors.float() if rotation is None else vectors.float() * signs @ rotation
    scales = (vectors.abs().amax(-1, keepdim=True) / levels).clamp(min=1e-30)
    vectors = (vectors / scales).round() * scales
    return vectors if rotation is None else vectors @ rotation * signs  # the matrix is its own inverse


def distinctness(window: Window) -> Tensor:
    """[batch, num_kv_heads, num_tokens]: 1 - cosine of each key to the mean key."""
    return (1 + KeyDiff().score(window)).clamp(min=0)


def protect(scores: Tensor, by: Tensor, count: int) -> Tensor:
    """The scores, those of the `count` tokens that `by` ranks first above all others."""
    if not count:
        return scores
    first = by.topk(count, dim=-1).indices
    return scores + torch.zeros_like(scores).scatter(-1, first, 1.0) * (1 + 2 * scores.amax(-1, keepdim=True))


def clusters(window: Window, kept: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Every token of the window counted to the survivor whose key is most like its own.

    mass:   [batch, num_kv_heads, num_tokens], mean attention
    returns by how much each survivor's mass grows [batch, num_kv_heads, num_kept], and the mean value of each cluster,
            weighted by mass
    """
    keys, values = window.keys.float().transpose(1, 2), window.values.float().transpose(1, 2)
    keys = keys - keys.mean(2, keepdim=True)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    chosen = unit.gather(2, kept.unsqueeze(-1).expand(*kept.shape, unit.shape[-1]))
    nearest = (unit @ chosen.transpose(-1, -2)).argmax(-1)  # a survivor is nearest to itself
    mass = mass + 1e-9
    total = torch.zeros_like(kept, dtype=mass.dtype).scatter_add(-1, nearest, mass)
    spread = nearest.unsqueeze(-1).expand_as(values)
    sums = torch.zeros(*kept.shape, values.shape[-1], device=values.device)
    merged = sums.scatter_add(2, spread, values * mass.unsqueeze(-1)) / total.unsqueeze(-1)
    return total / mass.gather(-1, kept), merged


def entry(name: str, **options: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        k: options.pop(k) for k in ("max_chunk_size", "query_stride", "buffer_size") if k in options
    }
    return {"name": name, "method": "study_kara", "method_options": options, **fields}


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "parts": [
        entry("kara"),
        entry("causal", bidirectional=False),
        entry("no chunks", max_chunk_size=1),
        entry("no refit", key_ridge=0.0, value_ridge=0.0),
        entry("floor 0", attention_floor=0.0),
        entry("no keydiff", keydiff_power=0.0),
        entry("values protected 0.1", protect_values=0.1),
        entry("values protected 0.25", protect_values=0.25),
        entry("keys protected 0.1", protect_keys=0.1),
    ],
    "refit": [
        entry("6 steps", steps=6),
        entry("8 steps", steps=8),
        entry("12 steps", steps=12),
        entry("refit not preconditioned", precondition=False),
        entry("ridges 0.3", key_ridge=0.3, value_ridge=0.3),
        entry("ridge 0.1 of values", value_ridge=0.1),
        entry("ridge 0.1 of keys", key_ridge=0.1),
        entry("bias of clusters", token_bias="cluster"),
        entry("merged", start="merged"),
        entry("merged, bias of clusters", start="merged", token_bias="cluster"),
        entry("8 steps, ridges 0.3", steps=8, key_ridge=0.3, value_ridge=0.3),
        entry("merged, bias of clusters, 8 steps", start="merged", token_bias="cluster", steps=8),
        entry("mass 0.5", mass_power=0.5),
        entry("mass 1", mass_power=1.0),
        entry("buffer weighs 2", buffer_weight=2.0),
        entry("buffer weighs 4", buffer_weight=4.0),
        entry("buffer weighs 0.5", buffer_weight=0.5),
    ],
    "scores": [
        entry("rms", moment="rms"),
        entry("rms, floor of the mean", moment="rms", floor_of="mean"),
        entry("loss, floor of the mean", importance="loss", floor_of="mean"),
        entry("loss, floor of the mean 0.5", importance="loss", floor_of="mean", attention_floor=0.5),
        entry("loss, floor of the mean, 8 steps", importance="loss", floor_of="mean", steps=8),
        entry("rms, floor of the mean, merged", moment="rms", floor_of="mean", start="merged"),
        entry("leverage, floor of the mean", importance="leverage", floor_of="mean"),
        entry("leverage, floor of the mean 0.5", importance="leverage", floor_of="mean", attention_floor=0.5),
        entry("keydiff 3", keydiff_power=3.0),
        entry("keydiff 4", keydiff_power=4.0),
        entry("floor 0.5", attention_floor=0.5),
        entry("floor 2", attention_floor=2.0),
        entry("lookahead 100", lookahead=100),
        entry("lookahead 600", lookahead=600),
    ],
    "queries": [
        entry("stride 8", query_stride=8),
        entry("4-bit queries", query_bits=4),
        entry("rotated 4-bit queries", query_bits=4, rotate_queries=True),
    ],
}


def study_cases(variants: str, configs: list[str], ratio: float) -> list[Case]:
    """The named variants, then the JSON entries, and random."""
    found: list[dict[str, Any]] = []
    for name in [v for v in variants.split(",") if v]:
        if name not in VARIANTS:
            raise typer.BadParameter(f"{name!r}: no such variant; use {', '.join(VARIANTS)}")
        found += VARIANTS[name]
    found += [parse_json("--config", text) for text in configs]
    return cases(found, {"retention_ratio": ratio}, baselines=("random",))


def main(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    traces: Annotated[Path, typer.Argument(help="JSONL file written by `kvllm eval traces`.")],
    out: Annotated[Path, typer.Argument(help="JSON file to write, with results for each configuration and trace.")],
    variants: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(VARIANTS)}; empty = none.")] = "parts",
    config: Annotated[list[str] | None, typer.Option(help="An entry of a sweep, as JSON (repeatable).")] = None,
    half: Annotated[str, typer.Option(help="train: for choosing; test: for reporting.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Use only the first N traces of the half; 0 = none.")] = None,
    ratio: Annotated[float, typer.Option(help="Retention ratio of all variants.")] = 0.3,
    facts: Annotated[int, typer.Option(help="Number of facts to recall at distances 512 and 1024; 0 = none.")] = 0,
    seed: Annotated[int, typer.Option(help="Random seed of the facts; `kvllm eval recall` uses 0.")] = 1,
    seconds: Annotated[float, typer.Option(help="Do not start another trace after this time.")] = 3600.0,
    device: Annotated[str, typer.Option()] = "cuda",
    dtype: Annotated[str, typer.Option(help="Data type of model and cache: bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Measure every variant on every trace, and print KL beside random's; then facts recalled."""
    register("study_kara")(StudyKara)
    chosen = study_cases(variants, config or [], ratio)
    language_model = load_model(model, device, dtype)
    start = time.perf_counter()
    report: dict[str, Any] = {"model": model.name, "traces": traces.name, "half": half, "dtype": dtype, "seed": seed}
    texts = half_of(read_traces(traces), half)[:limit]
    results: list[fidelity.Result] = []
    for done, text in enumerate(texts, start=1):
        for old, new in zip(results, made := fidelity.measure(language_model, [text], chosen), strict=False):
            old.rows |= new.rows
        results = results or made
        report["fidelity"] = fidelity.report(results, half=half)
        out.write_text(json.dumps(report, indent=1) + "\n")
        if done == len(texts) or time.perf_counter() - start > seconds:
            print(f"{fidelity.table(results)}\n\n{done} of {len(texts)} traces", flush=True)
            break
    if facts:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        items = recall.make_items(tokenizer, [512, 1024], [0.1, 0.3, 0.5, 0.7], facts, seed=seed)
        answers = recall.measure(language_model, tokenizer, items, chosen, progress=Progress("texts"))
        print(recall.table(answers))
        report["recall"] = recall.report(answers, chosen)
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{len(chosen)} configurations, {time.perf_counter() - start:.0f} s")


def load_model(folder: Path, device: str, dtype: str) -> Any:
    from kvllm.reference import load_model

    return load_model(folder, getattr(torch, dtype), device)


if __name__ == "__main__":
    typer.run(main)
