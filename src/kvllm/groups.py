"""How vLLM divides a model's layers into KV cache groups, and what a request holds in the uncompressed ones.

All groups have the same number of layers, each has its own block table, and all allocate from one pool. `kvllm plan`
and vLLM's front end derive the groups from the config, before an engine exists; the engine compares them with the
groups that vLLM made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kvllm.budgets import Budget, check_layers, table_of
from kvllm.errors import UsageError
from kvllm.layers import (
    Cacheless,
    Heads,
    LayerKind,
    Local,
    Recurrent,
    full_heads,
    has_other_heads,
    heads_of,
    local_layers,
)

Count = TypeVar("Count")

# Blocks that a request holds in a group of recurrent layers: its state, the previous step's state while it moves to the
# next block, and one that is kept for other requests with the same prompt.
STATE_BLOCKS = 3


@dataclass(frozen=True)
class Groups:
    """`num_full` groups of full-attention layers and `num_local` groups of local or recurrent layers.

    group_size:  layers per group; a block of the pool holds `block_size` tokens of that many layers
    local:       the kind of the local or recurrent layers; None if there are none
    scale:       tokens in a block of the full-attention layers, in vLLM's --block-size
    local_scale: tokens in a block of the local layers, likewise. All blocks have the same number of bytes, so vLLM
                 enlarges those of the layers with less KV per token (Gemma 4); one of the two is 1
    """

    group_size: int
    num_full: int = 1
    num_local: int = 0
    local: Local | Recurrent | None = None
    scale: int = 1
    local_scale: int = 1

    @classmethod
    def of(cls, kinds_of_layers: Sequence[LayerKind], num_parts: int = 1) -> Groups:
        """How vLLM groups full-attention layers (None) and local or recurrent ones, all of the same kind.

        The group size is the number of layers of the rarer kind, or of the other kind if that has less than 1.5 times
        as many. With layer budgets (`kvllm.budgets`) each of the `num_parts` equal parts of the full-attention layers
        counts as a kind.
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

    def local_block_size(self, block_size: int) -> int:
        """Tokens in a block of the local layers; block_size: in one of the full-attention layers."""
        return block_size * self.local_scale // self.scale

    def local_blocks(self, num_tokens: int, block_size: int, in_flight: int) -> int:
        """The most blocks that a request holds in local groups while it grows to `num_tokens`, as vLLM counts them.

        block_size: tokens in a block of the full-attention layers
        in_flight:  tokens that may be computed before the blocks that the window has left are freed
        """
        if self.local is None:
            return 0
        if isinstance(self.local, Recurrent):
            return self.num_local * STATE_BLOCKS
        block_size = self.local_block_size(block_size)
        if self.local.chunked:
            most = -(-(self.local.size + in_flight) // block_size)
        else:
            most = -(-(self.local.size - 1 + in_flight) // block_size) + 1
        return self.num_local * min(most, -(-num_tokens // block_size))

    def peak_local_blocks(
        self, num_prompt_tokens: int, num_tokens: int, block_size: int, prefill_in_flight: int, decode_in_flight: int
    ) -> int:
        """`local_blocks` over a request's lifetime: the maximum over its prefill and its decoding."""
        prefill = self.local_blocks(num_prompt_tokens, block_size, prefill_in_flight)
        return max(prefill, self.local_blocks(num_tokens, block_size, decode_in_flight))

    def local_blocks_held(self, num_computed_tokens: Count, block_size: int) -> Count:
        """Blocks that a request holds in local groups once those that its next token does not attend to are freed.

        num_computed_tokens: a number, or an array of them
        block_size:          as in `local_blocks`
        """
        computed: Any = num_computed_tokens
        if self.local is None:
            return computed * 0
        if isinstance(self.local, Recurrent):
            return computed * 0 + self.num_local
        block_size = self.local_block_size(block_size)
        return self.num_local * (-(-computed // block_size) - self.local.first_seen(computed) // block_size)


def full_layers(layers: Sequence[LayerKind]) -> list[int]:
    """The indices of the full-attention layers."""
    return [number for number, local in enumerate(layers) if local is None]


def groups_of(layers: Sequence[LayerKind], budgets: Sequence[Budget]) -> Groups:
    """`Groups.of` these layers under these layer budgets; without budgets all full-attention layers share one ratio.

    Raises UsageError if the budgets do not match the layers, or if vLLM would split one of their groups.
    """
    if not budgets:
        return Groups.of(layers)
    check_layers(budgets, full_layers(layers))
    if any(isinstance(kind, Recurrent) for kind in layers):
        raise UsageError(
            f"retention_ratio={table_of(budgets)}: layer budgets are not supported in models with recurrent layers, "
            "whose states change the block size. Use one ratio for all layers."
        )
    groups = Groups.of(layers, len(budgets))
    if groups.num_full != len(budgets):
        raise UsageError(
            f"retention_ratio={table_of(budgets)}: because of the model's {len(layers) - len(full_layers(layers))} "
            f"local layers, vLLM would split these {len(budgets)} groups into {groups.num_full} KV cache groups; use "
            "more groups, or one ratio for all layers."
        )
    return groups


def groups_of_model(
    text: Any, max_model_len: int | None, budgets: Sequence[Budget] = (), num_shards: int = 1
) -> Groups:
    """`groups_of` the layers of the model with this config, which must be supported, with the sizes of their blocks.

    text, max_model_len: as in `local_layers`
    num_shards:          devices over which the heads are sharded (tensor parallelism)
    Raises UsageError as `groups_of` does, and for layer budgets where layers have different heads.
    """
    layers = local_layers(text, max_model_len)
    groups = groups_of(layers, budgets)
    if not has_other_heads(text) or not isinstance(groups.local, Local):
        return groups
    if budgets:
        raise UsageError(
            f"retention_ratio={table_of(budgets)}: layer budgets are not supported in models whose full-attention "
            "layers have other heads than the rest. Use one ratio for all layers."
        )
    scale, local_scale = block_scales(full_heads(text), heads_of(text, layers.index(groups.local)), num_shards)
    return replace(groups, scale=scale, local_scale=local_scale)


def full_attention_block_size(text: Any, max_model_len: int | None, block_size: int, num_shards: int = 1) -> int:
    """Tokens in a block of the full-attention layers. Arguments: as of `groups_of_model`; block_size: --block-size"""
    if not has_other_heads(text):
        return block_size
    return block_size * groups_of_model(text, max_model_len, num_shards=num_shards).scale


def block_scales(full: Heads, local: Heads, num_shards: int = 1) -> tuple[int, int]:
    """`Groups.scale` and `Groups.local_scale` of layers with these heads.

    Raises UsageError where a block of the one would not be a whole number of the other's, and vLLM would pad it.
    """
    own, other = full.width(num_shards), local.width(num_shards)
    if own % other and other % own:
        raise UsageError(
            f"tensor_parallel_size={num_shards}: keys have {own} numbers in full-attention layers and {other} in the "
            "others, and one must be a multiple of the other; use another --tensor-parallel-size, or serve the model "
            "without KvLLM."
        )
    return max(1, other // own), max(1, own // other)
