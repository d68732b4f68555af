"""Greedy generation under compression: what the vLLM engine must reproduce, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from kvllm.config import KvConfig
from kvllm.reference.request import Request


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    token_ids:    the new tokens, including the end-of-text token
    kept:         for each compression the indices of the survivors, [num_layers, num_kv_heads, num_kept]
    margins:      for each new token the difference between the two largest logits
    physical_len: tokens in the cache at the end
    """

    token_ids: list[int]
    kept: list[Tensor]
    margins: list[float]
    physical_len: int


def generate(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    max_tokens: int,
    config: KvConfig | None = None,
    block_size: int = 16,
    ignore_eos: bool = False,
    packed: bool = False,
) -> Generation:
    """The greedy continuation: the prompt in one step, then one token per step. `config=None`: nothing is compressed.

    packed: as in `Request`
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: must be at least 1.")
    request = Request(model, len(prompt_ids), config, block_size, packed=packed)
    stop = set() if ignore_eos else eos_token_ids(model)
    token_ids: list[int] = []
    margins: list[float] = []
    new: Sequence[int] = prompt_ids
    while len(token_ids) < max_tokens:
        best = request.step(new)[-1].float().topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        new = [int(best.indices[0])]
        token_ids += new
        if token_ids[-1] in stop:
            break
    return Generation(token_ids, request.kept, margins, request.physical_len)


def eos_token_ids(model: PreTrainedModel) -> set[int]:
    """The end-of-text tokens, from the model's generation config or its config."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return {ids} if isinstance(ids, int) else set(ids or ())
