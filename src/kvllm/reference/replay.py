"""Teacher-forced replay: a given text's log-probabilities under compression, compared with those of the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.reference.request import Request

MAX_STEP = 512  # tokens: the logits of a step are vocab_size wide, so this bounds the memory


@dataclass(frozen=True)
class Replay:
    """Row i is the model's prediction of token i + 1.

    logprobs:      [num_tokens - 1], log-probability of the token that follows in the text
    argmax:        [num_tokens - 1], the most likely token
    full_logprobs: [num_tokens - 1, vocab_size] float32, with `keep_full`; otherwise None
    kept:          for each compression the indices of the survivors, [num_layers, num_kv_heads, num_kept]
    """

    logprobs: Tensor
    argmax: Tensor
    full_logprobs: Tensor | None
    kept: list[Tensor]


def replay(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    config: KvConfig | None = None,
    block_size: int = 16,
    keep_full: bool = False,
) -> Replay:
    """Feed the text in chunks that end at compressions, so that tokens attend to the same cache as in generation."""
    if not 1 <= num_prompt_tokens < len(token_ids):
        raise UsageError(
            f"num_prompt_tokens={num_prompt_tokens}: must be 1 to {len(token_ids) - 1} for a text of "
            f"{len(token_ids)} tokens."
        )
    return feed(Request(model, num_prompt_tokens, config, block_size), token_ids, keep_full=keep_full)


def feed(request: Request, token_ids: Sequence[int], end: int | None = None, keep_full: bool = False) -> Replay:
    """Replay from the request's current token up to token `end`, exclusive (default: the last); one row per token."""
    targets = torch.tensor(list(token_ids[1:]), device=request.model.device)
    end = len(targets) if end is None else min(end, len(targets))
    logprobs: list[Tensor] = []
    argmax: list[Tensor] = []
    full: list[Tensor] = []
    while request.num_computed_tokens < end:
        first = request.num_computed_tokens
        last = min(first + min(request.max_step() or MAX_STEP, MAX_STEP), end)
        rows = request.step(token_ids[first:last]).float().log_softmax(dim=-1)
        logprobs.append(rows.gather(1, targets[first:last, None])[:, 0])
        argmax.append(rows.argmax(dim=-1))
        if keep_full:
            full.append(rows)
    if not logprobs:
        raise ValueError(f"nothing to replay: the request is at token {request.num_computed_tokens}, and end={end}.")
    return Replay(torch.cat(logprobs), torch.cat(argmax), torch.cat(full) if full else None, request.kept)


@dataclass(frozen=True)
class Fidelity:
    """How close a compressed replay is to the full one.

    kl:             mean KL divergence of the compressed next-token distribution from the full one, in nats
    top1_agreement: share of rows with the same most likely token
    delta_nll:      mean increase of the text's negative log-likelihood, in nats per token
    num_tokens:     rows compared
    """

    kl: float
    top1_agreement: float
    delta_nll: float
    num_tokens: int


def compare(full: Replay, compressed: Replay, first: int) -> Fidelity:
    """Fidelity over the rows from `first` on; none can differ before `Geometry.event_at(P, 0)`."""
    if not 0 <= first < len(full.logprobs):
        raise ValueError(f"first={first}: the replay has rows 0 to {len(full.logprobs) - 1}.")
    return Fidelity(
        kl=float(kl_by_row(full, compressed)[first:].mean()),
        top1_agreement=float((full.argmax == compressed.argmax)[first:].float().mean()),
        delta_nll=float((full.logprobs - compressed.logprobs)[first:].mean()),
        num_tokens=len(full.logprobs) - first,
    )


def kl_by_row(full: Replay, compressed: Replay) -> Tensor:
    """[num_tokens - 1]: KL(full || compressed) of each row."""
    if full.full_logprobs is None or compressed.full_logprobs is None:
        raise ValueError("KL needs two replays made with keep_full=True.")
    if full.full_logprobs.shape != compressed.full_logprobs.shape:
        raise UsageError(
            f"replays of different texts: {tuple(full.full_logprobs.shape)}, {tuple(compressed.full_logprobs.shape)}."
        )
    parts = zip(full.full_logprobs.split(MAX_STEP), compressed.full_logprobs.split(MAX_STEP), strict=True)
    return torch.cat([(p.exp() * (p - q)).sum(dim=-1) for p, q in parts])
