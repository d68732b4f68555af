"""Compare ways to quantise survivors: KL from the full cache on replayed traces, with transformers.

    python benchmarks/rounding_study.py MODEL TRACES.jsonl OUT.json --half train --variants rounding,sizes

Every configuration continues from the full cache at its first compression (`measure/eval/forks.py`). With windows of
256 tokens and `--block-size 8`, the sizes of packed blocks of 16 are exact: 56 tokens in 4 bits take as many bytes as
16 tokens in 16 bits, so keeping 224, 112 or 56 of 256 tokens makes a window 4, 8 or 16 times smaller.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import Field
from torch import Tensor

from kvllm.compression.rounding import Rounded, encode, round_along
from kvllm.measure.eval import fidelity
from kvllm.measure.eval.problems import half_of
from kvllm.measure.eval.report import Progress
from kvllm.measure.eval.sweep import Case, cases, combinations, name_of
from kvllm.measure.eval.traces import read_traces
from kvllm.methods import register
from kvllm.methods.base import Kept, Window
from kvllm.methods.kara import Kara
from kvllm.methods.refit import gather_tokens, normal_equations, refit, ridge_solve
from kvllm.options import Count, parse_json, strict_dataclass
from kvllm.reference import load_model

WINDOW = 256
SHRINK = torch.linspace(1, 0.5, 21).tolist()  # of the range between the smallest and the largest number
NUM_FITS = 3  # rounds of least squares


@strict_dataclass
class RoundedKara(Kara):
    """Kara's survivors, or random ones, quantised in each of the compared ways; the compressor does not quantise.

    16 bits: not quantised.
    """

    scores: Literal["kara", "random"] = "kara"
    key_bits: int = Field(4, ge=1, le=16)
    value_bits: int = Field(4, ge=1, le=16)
    group: int = Field(56, ge=0, description="Kept tokens that share a scale of the keys; 0 = all of a window's.")
    key_axis: Literal["channel", "token"] = "channel"
    value_group: int = Field(0, ge=0, description="Channels that share a scale of the values; 0 = all of a head's.")
    fit: Literal["range", "exact_scales", "shrink", "least_squares"] = Field(
        "range",
        description="Levels from the smallest to the largest number; the same with scales in float32, which bfloat16 "
        "makes coarser; over the part of that range with the least square error; or, after that, fitted to the numbers "
        "by least squares.",
    )
    refit: Literal["none", "before", "after"] = Field(
        "before", description="Refit before rounding, as if nothing were rounded; or after, to the rounded keys."
    )
    most_refitted: Count = 128

    def compress(self, window: Window, num_kept: int) -> Kept:
        window = self.ahead(window)
        kept = self._random(window, num_kept) if self.scores == "random" else self.select(self._score(window), num_kept)
        keys, values = gather_tokens(window.head_keys, kept), gather_tokens(window.head_values, kept)
        if self.refit == "none" or self.scores == "random" or num_kept > self.most_refitted:
            keys, values = self.rounded_keys(keys), self.rounded_values(values)
        elif self.refit == "before":
            ridges = self.key_ridge, self.value_ridge
            keys, values = refit(window.scaled_queries, keys, values, window.attended, *ridges)
            keys, values = self.rounded_keys(keys), self.rounded_values(values)
        else:
            keys = self.rounded_keys(keys)
            shift, values = self._refit_to(window, keys, values)
            # The shift is one vector for all kept keys, so it is added to their lowest values.
            keys, values = keys + shift, self.rounded_values(values)
        return Kept(kept, keys.transpose(1, 2), values.transpose(1, 2))

    def _random(self, window: Window, num_kept: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(window.positions[0, 0, 0]))
        scores = torch.rand(len(window.keys), window.num_kv_heads, window.num_tokens, generator=generator)
        return scores.topk(num_kept).indices.sort().values.to(window.keys.device)

    def _refit_to(self, window: Window, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The shift of quantised keys and the refitted values, as in `kvllm.methods.refit` for exact keys.

        keys, values: [batch, num_kv_heads, num_kept, head_dim]
        """
        queries = window.grouped_queries().flatten(2, 3) * keys.shape[-1] ** -0.5
        whole, logits = window.logits().flatten(2, 3), queries @ keys.transpose(-1, -2)
        lost = (whole.logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)).clamp(-7, 7)
        shift = ridge_solve(*normal_equations(queries, lost), self.key_ridge).transpose(-1, -2)
        after = logits.softmax(-1)
        wanted = whole.softmax(-1) @ window.values.float().transpose(1, 2)
        return shift, values + ridge_solve(*normal_equations(after, wanted - after @ values), self.value_ridge)

    def rounded_keys(self, keys: Tensor) -> Tensor:
        """[batch, num_kv_heads, num_kept, head_dim]"""
        if self.key_bits == 16:
            return keys
        if self.key_axis == "token":
            return self.round_trip(keys, -1, self.key_bits)
        runs = keys.split(self.group or keys.shape[2], dim=2)
        return torch.cat([self.round_trip(run, 2, self.key_bits) for run in runs], dim=2)

    def rounded_values(self, values: Tensor) -> Tensor:
        """[batch, num_kv_heads, num_kept, head_dim]"""
        if self.value_bits == 16:
            return values
        groups = values.unflatten(-1, (-1, self.value_group or values.shape[-1]))
        return self.round_trip(groups, -1, self.value_bits).flatten(-2)

    def round_trip(self, x: Tensor, dim: int, bits: int) -> Tensor:
        """x: float32; rounded along `dim` and restored"""
        if self.fit == "range":
            return round_along(x, dim, bits).restore()
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        if self.fit == "exact_scales":
            step = (high - low).clamp(min=torch.finfo(torch.float32).tiny) / (2**bits - 1)
            return ((x - low) / step).round() * step + low
        candidates = (encode(x, *shrunk(low, high, share), bits) for share in SHRINK)
        best = best_of(x, dim, candidates)
        if self.fit == "least_squares":
            best = best_of(x, dim, least_squares(x, dim, best, bits))
        return best.restore()


def shrunk(low: Tensor, high: Tensor, share: float) -> tuple[Tensor, Tensor]:
    middle, half = (high + low) / 2, (high - low) / 2 * share
    return middle - half, middle + half


def best_of(x: Tensor, dim: int, candidates: Iterator[Rounded]) -> Rounded:
    """The candidate with the smallest squared error, for each scale."""
    best = next(candidates)
    least = (best.restore() - x).square().sum(dim, keepdim=True)
    for other in candidates:
        error = (other.restore() - x).square().sum(dim, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = Rounded(*(torch.where(better, new, old) for new, old in zip(other, best, strict=True)))
    return best


def least_squares(x: Tensor, dim: int, start: Rounded, bits: int) -> Iterator[Rounded]:
    """Codes and scales fitted alternately, beginning with `start`."""
    found = start
    yield found
    for _ in range(NUM_FITS):
        codes = found.codes.float()
        centred = codes - codes.mean(dim, keepdim=True)
        variance = centred.square().sum(dim, keepdim=True)
        slope = torch.where(variance > 0, (centred * x).sum(dim, keepdim=True) / variance, found.scale.float())
        low = x.mean(dim, keepdim=True) - slope * codes.mean(dim, keepdim=True)
        found = encode(x, low, low + slope * (2**bits - 1), bits)
        yield found


def entry(num_kept: int | list[int], **options: Any) -> dict[str, Any]:
    ratios = [n / WINDOW for n in (num_kept if isinstance(num_kept, list) else [num_kept])]
    return {"method": "rounded_kara", "retention_ratio": ratios, "method_options": options}


PLAIN = {"key_bits": 16, "value_bits": 16}
FOUR = [224, 112, 56]  # 4, 8 and 16 times smaller in 4 bits
# Lists of entries as in `kvllm.measure.eval.sweep`.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    # Not quantised: as many tokens as fit in bf16 (today's default), and as many as in 4 bits (the upper bound).
    "plain": [entry([64, 32, 16, 80, *FOUR], **PLAIN), entry([64, 32, 16], **PLAIN, scores="random")],
    # How to quantise the survivors.
    "rounding": [
        entry(FOUR),
        entry(FOUR, fit=["exact_scales", "shrink", "least_squares"]),
        entry(FOUR, key_axis="token"),
        entry([224, 112], group=0),  # 56 tokens are one group
        entry(FOUR, value_group=[32, 64]),
        entry(FOUR, value_bits=16),
        entry(FOUR, key_bits=16),
    ],
    # When to refit, and how many tokens.
    "refit": [
        entry([112, 56], refit=["none", "after"]),
        entry(224, refit=["before", "after"], most_refitted=256),
        entry(FOUR, refit="after", fit="least_squares", most_refitted=256),
    ],
    # How many bits at the same size (heads of 128, blocks of 16): fewer bits for more tokens, and do scores matter?
    "sizes": [
        entry([224, 112], key_bits=2, value_bits=2, group=112),
        entry([224, 112], key_bits=2, value_bits=2, group=112, fit="least_squares"),
        entry([144, 72], key_bits=3, value_bits=3, group=72),
        entry([144, 72], key_bits=3, value_bits=3, group=72, fit="least_squares"),
        entry([144, 72], key_bits=4, value_bits=2, group=72),
        entry([144, 72], key_bits=2, value_bits=4, group=72),
        entry([96, 48, 24], key_bits=8, value_bits=8, group=24),
        entry(FOUR, scores="random"),
    ],
}


def study_cases(variants: str, configs: list[str]) -> list[Case]:
    """The named variants, then the JSON entries; no baselines are added."""
    found: list[Case] = []
    for name in [v for v in variants.split(",") if v]:
        if name not in VARIANTS:
            raise typer.BadParameter(f"{name!r}: no such variant; use {', '.join(VARIANTS)}")
        # Named here, since the options of a registered method say more than `name_of` shows of ratios.
        for each in VARIANTS[name]:
            for options in combinations(each):
                kept = round(options["retention_ratio"] * WINDOW)
                found += cases([{**options, "name": f"{kept} {name_of(options, {})}"}], {}, baselines=())
    for text in configs:
        found += cases([parse_json("--config", text)], {}, baselines=())
    return list({json.dumps(case.config.to_dict(), sort_keys=True): case for case in found}.values())


def main(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    traces: Annotated[Path, typer.Argument(help="JSONL file written by `kvllm eval traces`.")],
    out: Annotated[Path, typer.Argument(help="JSON file to write, with results for each configuration and trace.")],
    variants: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(VARIANTS)}; empty = none.")] = "plain",
    config: Annotated[list[str] | None, typer.Option(help="An entry of a sweep, as JSON (repeatable).")] = None,
    half: Annotated[str, typer.Option(help="train: for choosing; test: for reporting.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Use only the first N traces of the half.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block; with 8, the sizes in 4 bits are exact.")] = 8,
    device: Annotated[str, typer.Option()] = "cuda",
    dtype: Annotated[str, typer.Option(help="Data type of model and cache: bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Measure every variant on every trace, and print KL and agreement relative to today's default."""
    register("rounded_kara")(RoundedKara)
    chosen = study_cases(variants, config or [])
    texts = half_of(read_traces(traces), half)[:limit]
    language_model = load_model(model, getattr(torch, dtype), device)
    start = time.perf_counter()
    results = fidelity.measure(language_model, texts, chosen, block_size, Progress("replays"))
    about = {"model": model.name, "traces": traces.name, "half": half, "block_size": block_size, "dtype": dtype}
    seconds = time.perf_counter() - start
    out.write_text(json.dumps(fidelity.report(results, **about, seconds=seconds), indent=1) + "\n")
    print(fidelity.table(results))
    print(f"\n{len(texts)} traces, {len(chosen)} configurations, {dtype} on {device}, {seconds:.0f} s")


if __name__ == "__main__":
    typer.run(main)
