"""Where in the text the candidates of a compression stand; under the budget policy survivors differ by head."""

from __future__ import annotations

import torch
from torch import Tensor

from kvllm.layout import Geometry
from kvllm.methods.base import Kept, Window


def candidate_positions(geometry: Geometry, num_prompt_tokens: int, event: int, survivors: Tensor) -> Tensor:
    """[num_layers, num_kv_heads, num_candidates] (int64): text position of each candidate of event number `event`.

    survivors: [num_layers, num_kv_heads, num_kept], positions of what the event before kept; only its shape and
               device count at event 0 and under the window policy, whose events share no candidates
    """
    end = geometry.event_at(num_prompt_tokens, event) - geometry.buffer_size
    carried = event > 0 and geometry.policy == "budget"
    num_new = geometry.interval if carried else geometry.num_candidates
    new = torch.arange(end - num_new, end, device=survivors.device).expand(*survivors.shape[:2], -1)
    return torch.cat([survivors.long(), new], dim=-1) if carried else new


def kept_rows(window: Window, kept: Kept) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, num_kept, num_kv_heads, head_dim] that survive: the method's own, or the kept tokens'."""
    index = kept.indices.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, window.keys.shape[-1])
    keys = window.keys.gather(1, index) if kept.keys is None else kept.keys
    values = window.values.gather(1, index) if kept.values is None else kept.values
    return keys, values
