"""Compression events, from reading candidates to writing survivors; shared by vLLM's two runners and the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvllm.compression.query_ring import prompt_query_positions, query_positions
from kvllm.compression.rounding import Rounding
from kvllm.compression.rows import Due
from kvllm.compression.store import ALL_LAYERS, Store
from kvllm.config import KvConfig
from kvllm.layout import Geometry, Shape
from kvllm.methods.base import Kept, Method, Window
from kvllm.methods.rope import Rope
from kvllm.support import PLAIN_BITS

CPU_WEIGHTS = 2**21  # attention weights of the layers that a CPU compresses at once

# Kernels that do a method's work in place, without copying candidates. Arguments: the store's candidates, num_kept.
Fused = Callable[[Any, int], None]
# Rounds the first num_kept candidates of each event, and packs them in place. Same arguments.
Pack = Callable[[Any, int], None]


class Compressor:
    """Runs a method over the candidates of due events.

    layers:    [num_layers] int64, the index in the model of each layer of the store
    shifts:    [group_size], from `kvllm.compression.query_ring.query_shifts`
    positions: [max_num_reqs, num_layers, num_kv_heads, most survivors], the survivors' positions in the text;
               None if survivors never become candidates again, or if the kernels do not need positions
    fused:     kernels that replace the method
    rounding:  how survivors are rounded before they are written; None: not at all (survivor_bits=16)
    pack:      rounds and packs the survivors after they are written, in place of `rounding`
    observe:   called with the `Kept` of each event and whether it is the prompt's; not called with `fused`
    """

    def __init__(
        self,
        config: KvConfig,
        method: Method,
        store: Store,
        layers: Tensor,
        shifts: Tensor,
        rope: Rope | None,
        positions: Tensor | None = None,
        fused: Fused | None = None,
        observe: Callable[[Kept, bool], None] | None = None,
        rounding: Rounding | None = None,
        pack: Pack | None = None,
    ) -> None:
        if (rounding.bits if rounding else PLAIN_BITS) != config.survivor_bits:
            raise ValueError(f"survivor_bits={config.survivor_bits} with rounding={rounding}")
        if rounding is not None and fused is not None and pack is None:
            raise ValueError(f"survivor_bits={config.survivor_bits}: the fused kernels do not round")
        if method.uses_rope:
            method.check_rope(rope)
        self.config = config
        self.method = method
        self.store = store
        self.layers = layers
        self.shifts = shifts
        self.rope = rope
        self.positions = positions
        self.fused = fused
        self.observe = observe
        self.rounding = rounding if pack is None else None
        self.pack = pack

    def compress(self, due: Sequence[Due]) -> None:
        """Compress all due events; those of the same geometry and shape in one batch."""
        batches: dict[tuple[Geometry, Shape], list[Due]] = {}
        for each in due:
            batches.setdefault((each.geometry, each.geometry.shape(each.event)), []).append(each)
        for (_, shape), batch in batches.items():
            self.compress_batch(batch, shape, self.store.candidates(batch))
        for each in due:
            cut = each.geometry.prompt_shape(each.num_prompt_tokens)
            if each.event == 0 and cut is not None:
                self._compress_prompt(each, cut)

    def compress_batch(self, batch: Sequence[Due], shape: Shape, candidates: Any) -> None:
        """Compress events of the same geometry and shape, given their candidates."""
        self._move_survivors(batch, shape, candidates)
        if self.pack is not None:
            self.pack(candidates, shape.num_kept)

    def _move_survivors(self, batch: Sequence[Due], shape: Shape, candidates: Any) -> None:
        """Write the survivors over the first candidates."""
        if self.fused is not None:
            if shape.num_kept < shape.num_candidates:
                self.fused(candidates, shape.num_kept)
            return
        # An event that also reads the history has the memory of several windows.
        size = max(1, self.store.max_batch * batch[0].geometry.interval // shape.num_candidates)
        for start in range(0, len(batch), size):
            part = slice(start, start + size)
            self._compress_part(batch[part], shape, self.store.part(candidates, part))

    def _compress_part(self, part: Sequence[Due], shape: Shape, candidates: Any) -> None:
        where = torch.from_numpy(query_positions(self.config, part[0].geometry, part[0].event))
        positions = torch.stack([self._candidate_positions(each) for each in part])
        kept = [
            self._compress_layers(part, shape, candidates, layers, where, positions[:, layers].flatten(0, 1))
            for layers in self._layers_at_once(shape)
        ]
        if self.observe is not None:
            assert len(part) == 1 or len(kept) == 1  # one event, or all layers at once: else the order would be mixed
            self.observe(Kept(torch.cat([each.indices for each in kept])), False)

    def _layers_at_once(self, shape: Shape) -> list[slice]:
        """The layers in parts; on a CPU, parts are small enough for a core's cache to hold intermediate results."""
        if not self.layers.is_cpu:
            return [ALL_LAYERS]
        num_layers, num_heads = self.store.num_layers, self.store.num_kv_heads * len(self.shifts)
        size = max(1, CPU_WEIGHTS // (num_heads * self.config.num_queries * shape.num_candidates))
        return [slice(start, min(start + size, num_layers)) for start in range(0, num_layers, size)]

    def _compress_layers(
        self, part: Sequence[Due], shape: Shape, candidates: Any, layers: slice, where: Tensor, positions: Tensor
    ) -> Kept:
        members = torch.arange(self.store.num_layers, device=positions.device)[layers].repeat(len(part))
        window = self._window(candidates, layers, where, positions, members)
        all_stay = shape.num_kept == shape.num_candidates  # happens at ratios near 1
        if all_stay:
            kept = Kept(torch.arange(shape.num_candidates, device=positions.device).expand_as(positions))
        else:
            kept = paired(window, self.method.compress(window, shape.num_kept))
        if self.rounding is not None:
            kept = rounded(window, kept, self.rounding)
        if not all_stay or self.rounding is not None:
            self.store.write(candidates, kept, layers)
        if self.positions is not None and part[0].geometry.tracks_survivors:
            found = window.positions.gather(-1, kept.indices).to(self.positions.dtype)
            for each, own in zip(part, found.unflatten(0, (len(part), -1)), strict=True):
                first = each.geometry.num_left_alone(each.event)
                self.positions[each.row, layers, :, first : first + shape.num_kept] = own
        return kept

    def _compress_prompt(self, due: Due, cut: Shape) -> None:
        """Cut one prompt, a few layers at a time: a long prompt has the memory of many windows."""
        candidates = self.store.prompt(due)
        where = torch.from_numpy(prompt_query_positions(self.config, due.geometry, due.num_prompt_tokens))
        num_layers = self.store.num_layers
        size = max(1, self.store.max_batch * due.geometry.interval * num_layers // cut.num_raw)
        parts = []
        for start in range(0, num_layers, size):
            layers = slice(start, min(start + size, num_layers))
            members = torch.arange(layers.start, layers.stop, device=self.layers.device)
            window = self._window(candidates, layers, where, None, members)
            parts.append(paired(window, self.method.compress_prompt(window, cut.num_kept)))
            self.store.write(candidates, parts[-1], layers)
        if self.observe is not None:
            self.observe(Kept(torch.cat([part.indices for part in parts])), True)

    def _window(
        self, candidates: Any, layers: slice, query_positions: Tensor, positions: Tensor | None, members: Tensor
    ) -> Window:
        """The method's input.

        positions: None if the candidates are the first tokens of the text
        members:   [batch], the index in the store of each batch member's layer
        """
        keys, values = self.store.read(candidates, layers)
        if positions is None:
            positions = torch.arange(keys.shape[1], device=keys.device).expand(len(keys), keys.shape[2], -1)
        return Window(
            queries=self.store.queries(candidates, layers),
            query_positions=query_positions.to(keys.device),
            keys=keys,
            values=values,
            positions=positions,
            layers=self.layers[members],
            query_shifts=self.shifts,
            rope=self.rope and self.rope.take(members),
        )

    def _candidate_positions(self, due: Due) -> Tensor:
        """Position in the text of each candidate, [num_layers, num_kv_heads, num_candidates] int64."""
        shape, end = due.geometry.shape(due.event), due.geometry.tail_start(due.num_prompt_tokens, due.event + 1)
        raw = torch.arange(end - shape.num_raw, end, device=self.layers.device)
        raw = raw.expand(self.store.num_layers, self.store.num_kv_heads, -1)
        if not shape.num_history:
            return raw
        assert self.positions is not None
        first = due.geometry.num_left_alone(due.event)
        own = self.positions[due.row, ..., first : first + shape.num_history]
        return torch.cat([own.long(), raw], dim=-1)


def most_survivors(config: KvConfig) -> int:
    """The most survivors of a request that may become candidates again, for any ratio."""
    return config.budget_size if config.policy == "budget" else config.history_size


def paired(window: Window, kept: Kept) -> Kept:
    """`kept` with both new keys and new values, or with neither."""
    if kept.keys is None and kept.values is None:
        return kept
    return kept.gathered(window.keys, window.values)


def rounded(window: Window, kept: Kept, rounding: Rounding) -> Kept:
    """`kept` with keys and values as they are after packing and unpacking."""
    kept = kept.gathered(window.keys, window.values)
    assert kept.keys is not None and kept.values is not None
    return Kept(kept.indices, *rounding.round_trip(kept.keys, kept.values))
