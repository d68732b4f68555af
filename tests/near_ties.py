"""Is an engine's greedy answer the reference's? Near ties are told from errors, those of tokens and those of survivors.

Engine and reference sum in different orders. Where two scores are equal but for that, they keep different tokens, and
all that follows differs visibly. So an answer that the reference does not give may still be one that it gives when its
scores are moved by as much as rounding moves them; then every single token has to agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvllm.config import KvConfig
from kvllm.methods.base import Method
from kvllm.reference import Request, feed

NEAR_TIE = 1e-3  # nats that a token may fall short of the best one
# By how much a variant moves scores. Of a random Llama of four layers, float32 and float64 differ by 3e-6 (last layer,
# first event) to 1e-5 (sixth event), root mean square.
SCORE_NOISE = 1e-5
NUM_VARIANTS = 32


class Match(NamedTuple):
    """How an answer agrees: tokens that are not the best one, but near ties; the variant that gave it, None: as is."""

    near_ties: int
    variant: int | None


def check_greedy(
    model: Any,
    prompt_ids: Sequence[int],
    output: Sequence[int],
    config: KvConfig | None,
    block_size: int,
    num_variants: int = NUM_VARIANTS,
    images: Mapping[str, Tensor] | None = None,
) -> Match:
    """Every token of the output is the reference's choice after those before it; AssertionError if not.

    num_variants: how many variants of the scores may explain an answer; 0: survivors must be the same without any
    images: in the prompt, as `Request.show` takes them
    """
    loss = greedy_losses(model, prompt_ids, output, config, block_size, images=images)
    if bool((loss <= NEAR_TIE).all()):
        return Match(int((loss > 0).sum()), None)
    for seed in range(num_variants if config else 0):
        moved = greedy_losses(model, prompt_ids, output, config, block_size, seed, images)
        if bool((moved <= NEAR_TIE).all()):
            return Match(int((moved > 0).sum()), seed)
    wrong = (loss > NEAR_TIE).nonzero().flatten().tolist()
    raise AssertionError(
        f"prompt of {len(prompt_ids)}: {len(wrong)} of {len(output)} differ, first {wrong[:5]} by "
        f"{loss[wrong[:5]].tolist()} nats, and no near tie in the scores explains it"
    )


def greedy_losses(
    model: Any,
    prompt_ids: Sequence[int],
    output: Sequence[int],
    config: KvConfig | None,
    block_size: int,
    seed: int | None = None,
    images: Mapping[str, Tensor] | None = None,
    packed: bool = False,
    cache_dtype: str = "auto",
) -> Tensor:
    """[len(output)]: how far each token is from the reference's best, in nats; with a seed, from that variant's."""
    request = Request(model, len(prompt_ids), config, block_size, packed=packed, cache_dtype=cache_dtype)
    if images is not None:
        request.show(prompt_ids, images)
    if seed is not None:
        request.method = with_score_noise(request.method, seed)
    logprobs = feed(request, [*prompt_ids, *output], keep_full=True).full_logprobs
    assert logprobs is not None
    rows = logprobs[len(prompt_ids) - 1 :]
    chosen = torch.tensor(list(output), device=rows.device)
    return rows.max(dim=-1).values - rows.gather(1, chosen[:, None])[:, 0]


def with_score_noise(method: Method, seed: int) -> Method:
    """The method, selecting by scores that are moved by up to SCORE_NOISE of themselves; nothing else changes."""
    generator = torch.Generator().manual_seed(seed)

    class Noisy(type(method)):  # type: ignore[misc]
        def select(self, scores: Tensor, num_kept: int) -> Tensor:
            # Equal scores stay equal: which of them stays is the method's definition, not a matter of rounding.
            values, which = scores.unique(return_inverse=True)
            noise = torch.rand(len(values), generator=generator, dtype=torch.float64) * 2 - 1
            moved = values.double() * (1 + SCORE_NOISE * noise.to(values.device))
            return super().select(moved.to(scores.dtype)[which], num_kept)

    return Noisy(**vars(method))
