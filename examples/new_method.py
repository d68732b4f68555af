"""Write your own method and compare it with others: `python examples/new_method.py MODEL TEXTS.jsonl`.

A method scores the tokens of a window; the engine keeps the best of each head. Here the script registers the class. To
make it available to all commands as `--method`, put it into `src/kvllm/methods/` (see docs/methods.md).
"""

from __future__ import annotations

import sys

from compare_methods import main
from pydantic import Field
from torch import Tensor

from kvllm.methods import register
from kvllm.methods.base import Method, Window
from kvllm.options import strict_dataclass


@register("long_values")
@strict_dataclass
class LongValues(Method):
    """Keep the tokens with the largest value norm, favouring newer ones; uses no queries."""

    recency: float = Field(0.5, ge=0, description="What the newest token's score gains, as a share; 0 = nothing.")

    def score(self, window: Window) -> Tensor:
        """[batch, num_kv_heads, num_tokens] in float32: tokens with the highest scores are kept."""
        lengths = window.head_values.norm(dim=-1)
        age = (window.positions - window.positions[..., :1]) / window.num_tokens
        return lengths * (1 + self.recency * age)


if __name__ == "__main__":
    main([*sys.argv[1:3], "long_values", "kara", "random"])
