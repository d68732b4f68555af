"""The KV cache groups that vLLM makes of a model's layers, and what a request holds in those that are not compressed.

vLLM puts the layers into groups of equal size. Each has a block table of its own, and all take their blocks from one
pool. `kvllm plan` and vLLM's front end count them before there is an engine, which compares the answer with the groups
that vLLM has made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvllm.budgets import Budget, check_layers, table_of
from kvllm.errors import UsageError
from kvllm.layers import Cacheless, LayerKind, Local, Recurrent

Count = TypeVar("Count")

# Blocks of a group of recurrent layers that a request holds: its state, that of the step before while it moves on to
# the next block, and one that is kept for other requests with the same prompt.
STATE_BLOCKS = 3


@dataclass(frozen=True)
class Groups:
    """`num_full` groups of layers of full attention and `num_local` of local or recurrent layers.

    group_size: layers in each group: a block of the pool holds what so many layers store of `block_size` tokens
    local:      how the local layers look back, or that they are recurrent; None where there are none
    """

    group_size: int
    num_full: int = 1
    num_local: int = 0
    local: Local | Recurrent | None = None

    @classmethod
    def of(cls, kinds_of_layers: Sequence[LayerKind], num_parts: int = 1) -> Groups:
        """vLLM's grouping of layers of full attention (None) and of local or recurrent ones, all of one kind.

        A group has as many layers as there are of the rarer kind, or of the other where it has less than 1.5 times as
        many. With layer budgets (`kvllm.budgets`) each of the `num_parts` parts of the full-attention layers, which are
        of equal size, is a kind of its own.
        """
        layers = [kind for kind in kinds_of_layers if not isinstance(kind, Cacheless)]
        kinds = set(layers) - {None}
        num_full = sum(layer is None for layer in layers)
        if not kinds or not num_full:
            parts = num_parts if num_full else 1
            return cls(len(layers) // parts, num_parts * (not kinds), int(not num_full), next(iter(kinds), None))
        (local,) = kinds
        counts = num_full // num_parts, len(layers) - num_full
        size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
        num_full, num_local = (-(-count // size) for count in counts)
        return cls(size, num_parts * num_full, num_local, local)

    def local_blocks(self, num_tokens: int, block_size: int, in_flight: int) -> int:
        """The most blocks of local groups that a request holds while it grows to `num_tokens`, as vLLM admits it.

        in_flight: tokens that may be computed before the blocks behind them are freed
        """
        if self.local is None:
            return 0
        if isinstance(self.local, Recurrent):
            return self.num_local * STATE_BLOCKS
        if self.local.chunked:
            most = -(-(self.local.size + in_flight) // block_size)
        else:
            most = -(-(self.local.size - 1 + in_flight) // block_size) + 1
        return self.num_local * min(most, -(-num_tokens // block_size))

    def peak_local_blocks(
        self, num_prompt_tokens: int, num_tokens: int, block_size: int, prefill_in_flight: int, decode_in_flight: int
    ) -> int:
        """The same over a request's life: while its prompt is computed, or later, with so many tokens in flight."""
        prefill = self.local_blocks(num_prompt_tokens, block_size, prefill_in_flight)
        return max(prefill, self.local_blocks(num_tokens, block_size, decode_in_flight))

    def local_blocks_held(self, num_computed_tokens: Count, block_size: int) -> Count:
        """Blocks of local groups that a request holds once what its next token does not see is freed.

        num_computed_tokens: a number, or an array of them
        """
        computed: Any = num_computed_tokens
        if self.local is None:
            return computed * 0
        if isinstance(self.local, Recurrent):
            return computed * 0 + self.num_local
        return self.num_local * (-(-computed // block_size) - self.local.first_seen(computed) // block_size)


def full_layers(layers: Sequence[LayerKind]) -> list[int]:
    """The numbers of the layers of full attention."""
    return [number for number, local in enumerate(layers) if local is None]


def groups_of(layers: Sequence[LayerKind], budgets: Sequence[Budget]) -> Groups:
    """`Groups.of` layers, which have these budgets; none: all layers of full attention are compressed alike.

    Raises UsageError where the budgets do not name these layers, or vLLM would divide the layers of one of them.
    """
    if not budgets:
        return Groups.of(layers)
    check_layers(budgets, full_layers(layers))
    if any(isinstance(kind, Recurrent) for kind in layers):
        raise UsageError(
            f"retention_ratio={table_of(budgets)}: not beside recurrent layers, whose states make blocks of other "
            "lengths. Use one ratio for all layers."
        )
    groups = Groups.of(layers, len(budgets))
    if groups.num_full != len(budgets):
        raise UsageError(
            f"retention_ratio={table_of(budgets)}: beside {len(layers) - len(full_layers(layers))} layers that look "
            f"back less far, vLLM would make {groups.num_full} KV cache groups of these {len(budgets)}; use more "
            "groups, or one ratio for all layers."
        )
    return groups
