"""Where in the text the candidates of a compression stand; those that survived an earlier one differ by head."""

from __future__ import annotations

import torch
from torch import Tensor

from kvllm.layout import Geometry
from kvllm.methods.base import Kept, Window


def candidate_positions(geometry: Geometry, num_prompt_tokens: int, event: int, survivors: Tensor) -> Tensor:
    """[num_layers, num_kv_heads, num_candidates] (int64): text position of each candidate of event number `event`.

    survivors: [num_layers, num_kv_heads, at least as many as there are], positions of the survivors so far; where the
               event takes none of them, only its shape and device count
    """
    end = geometry.event_at(num_prompt_tokens, event) - geometry.buffer_size
    num_survivors = geometry.num_groups(event) * geometry.num_kept
    carried = survivors[..., geometry.candidate_offset(event) : num_survivors].long()
    num_new = geometry.shape(event).num_candidates - carried.shape[-1]
    new = torch.arange(end - num_new, end, device=survivors.device).expand(*survivors.shape[:2], -1)
    return torch.cat([carried, new], dim=-1)


def paired_rows(window: Window, kept: Kept) -> Kept:
    """`kept` with new keys and values, or with neither: then the survivors can be moved bit for bit."""
    if kept.keys is None and kept.values is None:
        return kept
    return Kept(kept.indices, *kept_rows(window, kept))


def kept_rows(window: Window, kept: Kept) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, num_kept, num_kv_heads, head_dim] that survive: the method's own, or the kept tokens'."""
    index = kept.indices.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, window.keys.shape[-1])
    keys = window.keys.gather(1, index) if kept.keys is None else kept.keys
    values = window.values.gather(1, index) if kept.values is None else kept.values
    return keys, values
