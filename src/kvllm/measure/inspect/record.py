"""Record what each compression of a text keeps, per layer and head, with the reference implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvllm.config import KvConfig
from kvllm.layout import Geometry
from kvllm.methods.base import Kept, LayerShape, Method, Window
from kvllm.methods.rope import Rope
from kvllm.reference import Request, feed


@dataclass(frozen=True)
class Span:
    """Number of heads per layer that hold each token of a range of the text after an event.

    start: position of the first token
    heads: [num_layers, num_tokens] (uint8)
    """

    start: int
    heads: Tensor


@dataclass(frozen=True)
class Event:
    """One compression.

    num_tokens: length of the text at the time
    window:     [first, last) position of the raw tokens that were read
    spans:      the ranges that changed
    percentile: [tokens of the window], share of the window's tokens with a lower score, averaged over all heads
    """

    num_tokens: int
    window: tuple[int, int]
    spans: list[Span]
    percentile: Tensor


class Recorder(Method):
    """Wraps a method and records the scores of each call."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.scores: list[Tensor] = []  # [num_layers, num_kv_heads, num_candidates] each

    @property
    def uses_rope(self) -> bool:
        return self.method.uses_rope

    def check_rope(self, rope: Rope | None) -> None:
        self.method.check_rope(rope)

    def check_layers(self, shape: LayerShape) -> None:
        self.method.check_layers(shape)

    def score(self, window: Window) -> Tensor:
        return self.method.score(window)

    def compress(self, window: Window, num_kept: int) -> Kept:
        self.scores.append(self.method.score(window))
        return self.method.compress(window, num_kept)

    def compress_prompt(self, window: Window, num_kept: int) -> Kept:
        return self.method.compress_prompt(window, num_kept)


def record(
    model: Any, token_ids: Sequence[int], num_prompt_tokens: int, config: KvConfig, block_size: int
) -> list[Event]:
    """The compression events of a text, replayed as it was generated."""
    request = Request(model, num_prompt_tokens, config, block_size)
    assert isinstance(request.geometry, Geometry)
    recorder = request.method = Recorder(request.method)
    feed(request, token_ids)
    events: list[Event] = []
    survivors: Tensor | None = None
    for event, indices in enumerate(request.kept):
        shape = request.geometry.shape(event)
        end = request.geometry.tail_start(num_prompt_tokens, event + 1)
        kept, survivors = follow(survivors, indices, request.geometry, event, end)
        # An event that also reads older survivors changes the whole text after the prompt.
        first = request.geometry.protected_len(num_prompt_tokens) if shape.num_history else end - shape.num_raw
        spans = [padded(heads_at(survivors if shape.num_history else kept, end), first)]
        if event == 0 and request.kept_prompt is not None:
            prompt = heads_at(request.kept_prompt, request.geometry.protected_len(num_prompt_tokens))
            spans.append(padded(prompt, 0))
        all_stay = shape.num_kept == shape.num_candidates
        scores = None if all_stay else recorder.scores.pop(0)
        events.append(
            Event(
                request.geometry.event_at(num_prompt_tokens, event),
                (end - shape.num_raw, end),
                spans,
                percentiles(scores, shape.num_raw),
            )
        )
    return events


def follow(
    survivors: Tensor | None, indices: Tensor, geometry: Geometry, event: int, end: int
) -> tuple[Tensor, Tensor]:
    """Positions of the tokens that an event kept and of all survivors after it, [num_layers, num_kv_heads, ...].

    survivors: positions of the survivors before the event; indices: candidates that the event kept
    """
    shape = geometry.shape(event)
    raw = torch.arange(end - shape.num_raw, end).expand(*indices.shape[:2], -1)
    before = raw[..., :0] if survivors is None else survivors
    alone = before.shape[-1] - shape.num_history
    kept = torch.cat([before[..., alone:], raw], dim=-1).gather(-1, indices.cpu())
    return kept, torch.cat([before[..., :alone], kept], dim=-1)


def heads_at(positions: Tensor, end: int) -> Span:
    """Number of heads that hold each position, from the first held one; positions: [num_layers, num_kv_heads, n]."""
    start = int(positions.min())
    heads = torch.zeros(len(positions), end - start, dtype=torch.int64)
    flat = positions.flatten(1).cpu() - start
    heads.scatter_add_(1, flat, torch.ones_like(flat))
    return Span(start, heads.to(torch.uint8))


def padded(span: Span, start: int) -> Span:
    """The span extended to an earlier start; no head holds the added positions."""
    return Span(start, torch.nn.functional.pad(span.heads, (span.start - start, 0)))


def percentiles(scores: Tensor | None, num_raw: int) -> Tensor:
    """[num_raw]: percentile of each raw token among the candidates (the last ones); all 1 if nothing was scored."""
    if scores is None:
        return torch.ones(num_raw)
    order = scores[..., -num_raw:].float().argsort(dim=-1).argsort(dim=-1)
    return order.float().mean(dim=(0, 1)).cpu() / max(num_raw - 1, 1)
