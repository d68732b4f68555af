"""One request on a transformers model: steps of new tokens, and compressions at the events between them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from kvllm import support
from kvllm.compression.compressor import Compressor, most_survivors
from kvllm.compression.footprint import head_dim_of
from kvllm.compression.query_ring import query_shifts
from kvllm.compression.rounding import Rounding, packed_block_tokens
from kvllm.compression.rows import Due
from kvllm.config import KvConfig
from kvllm.errors import UsageError
from kvllm.groups import full_layers, groups_of
from kvllm.layers import Cacheless, LayerKind, Recurrent, local_layers
from kvllm.layout import Geometry, request_geometry
from kvllm.methods import make_method, with_budgets
from kvllm.methods.base import Kept, LayerShape
from kvllm.methods.rope import Rope
from kvllm.reference.attention import attention_through
from kvllm.reference.cache import DenseStore, LayerCache
from kvllm.reference.formats import CacheFormat
from kvllm.reference.images import PromptImages
from kvllm.reference.rope import rope_of
from kvllm.reference.states import states_of
from kvllm.support import PLAIN_BITS, finding_model


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """The language model in a local folder, ready for the reference; of a vision-language model all of it."""
    with finding_model(folder):
        kind = type(AutoConfig.from_pretrained(folder, local_files_only=True))
        sees = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


class Request:
    """The state of a request, batch size 1. `config=None` compresses nothing, and keeps `max_queries` for a fork.

    layers:      the cache of each layer; those of full attention are compressed
    states:      of recurrent layers, which are as long as the text is; None where there are none
    kept:        for each compression so far, the indices that survived, [num_compressed, num_kv_heads, num_kept]; with
                 layer budgets those of each group of layers, one after the other
    kept_prompt: the same of the prompt, once it is cut (`prompt_budget`); with layer budgets of all groups together
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_prompt_tokens: int,
        config: KvConfig | None = None,
        block_size: int = 16,
        max_queries: int = 0,
        packed: bool = False,
        formats: Sequence[CacheFormat | None] | None = None,
        cache_dtype: str = "auto",
    ) -> None:
        """
        packed:      windows keep whole packed blocks, as where survivors are stored in fewer bits (on GPUs)
        formats:     of the cache of each layer; None, for one or all: numbers are stored as they are
        cache_dtype: of the engine, which says what a packed block holds; nothing is rounded to it, as `formats` do
        """
        check_model(model)
        if num_prompt_tokens < 1:
            raise ValueError(f"num_prompt_tokens={num_prompt_tokens}: a prompt has at least one token.")
        self.model = model
        self.num_prompt_tokens = num_prompt_tokens
        self.geometry = None
        self.cache_dtype = cache_dtype
        if config:
            every = layers_of(model)
            config = with_budgets(config, full_layers(every))
            groups_of(every, config.budgets)
            head_dim = head_dim_of(model.config.get_text_config())
            held = packed_block_tokens(block_size, head_dim, config.survivor_bits, cache_dtype)
            self.geometry = request_geometry(
                config, block_size, packed_tokens=held if packed and config.survivor_bits < PLAIN_BITS else None
            )
        self.config = config
        self.num_events = 0
        self.kept: list[Tensor] = []
        self.kept_prompt: Tensor | None = None
        self.num_computed_tokens = 0
        self.images: PromptImages | None = None
        self._compressors: list[Compressor] = []
        if config and self.geometry:
            self.method = make_method(config)
            self.rope = None
            if self.method.uses_rope:
                self.rope = _known_rope(model)
                self.method.check_rope(self.rope)
        max_queries = config.query_span if config else max_queries
        kinds = layers_of(model)
        self.layers = [
            LayerCache(max_queries, kind, format, num_prompt_tokens if format and format.exact_prefill else 0)
            for kind, format in zip(kinds, formats or [None] * len(kinds), strict=True)
        ]
        self.states = states_of(model, kinds)

    @classmethod
    def fork(cls, full: Request, config: KvConfig, block_size: int = 16, packed: bool = False) -> Request:
        """A compressed request that goes on where `full`, which compresses nothing, is: its text is not computed again.

        Raises ValueError where `full` is past the first event, or keeps too few queries (`max_queries`).
        """
        forked = cls(full.model, full.num_prompt_tokens, config, block_size, packed=packed)
        if full.geometry is not None or full.num_computed_tokens > (forked.max_step() or full.num_computed_tokens):
            raise ValueError(f"{full.num_computed_tokens} tokens are computed: past the first event, or compressed.")
        if any(layer.max_queries < config.query_span for layer in full.compressed):
            raise ValueError(f"the request keeps {full.layers[0].max_queries} queries, not {config.query_span}.")
        forked.num_computed_tokens = full.num_computed_tokens
        forked.layers = [copy.copy(layer) for layer in full.layers]  # their tensors are replaced, never written into
        forked.states = copy.deepcopy(full.states)
        return forked

    @property
    def compressed(self) -> list[LayerCache]:
        """The caches of the layers of full attention, which are compressed."""
        return [layer for layer in self.layers if layer.local is None]

    @property
    def physical_len(self) -> int:
        """Tokens that are in the cache of each layer of full attention; with layer budgets the mean, rounded."""
        lengths = [len(layer.keys) for layer in self.compressed] if self.num_computed_tokens else [0]
        return round(sum(lengths) / len(lengths))

    def max_step(self) -> int | None:
        """Most tokens of the next step, which may not run past the next event; None: as many as you like."""
        if self.images is not None and not self.num_computed_tokens:
            return self.num_prompt_tokens
        rest_of_prompt = self.num_prompt_tokens - self.num_computed_tokens
        if rest_of_prompt > 0 and any(layer.exact_until for layer in self.layers):
            return rest_of_prompt
        if self.geometry is None:
            return None
        event = self.geometry.num_events(self.num_prompt_tokens, self.num_computed_tokens)
        return self.geometry.event_at(self.num_prompt_tokens, event) - self.num_computed_tokens

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Compress if it is due, then compute these tokens; returns their logits, [num_new, vocab_size]."""
        most = self.max_step()
        if not token_ids or (most is not None and len(token_ids) > most):
            raise ValueError(f"a step of {len(token_ids)} tokens: the next event allows 1 to {most}.")
        context_len = self.model.config.get_text_config().max_position_embeddings
        end = self.num_computed_tokens + len(token_ids)
        if end > context_len:
            raise UsageError(f"{end} tokens: the model's context ends at {context_len}.")
        self.compress_if_due()
        first, device = self.num_computed_tokens, self.model.device
        if self.images is None:
            inputs: dict[str, Any] = {"position_ids": torch.arange(first, end, device=device)[None]}
        else:
            inputs = self.images.step_inputs(first, end)
        if self.states is not None:
            inputs["past_key_values"] = self.states
        with attention_through(self.model, self.layers):
            logits = self.model(
                input_ids=torch.tensor([list(token_ids)], device=device), use_cache=False, **inputs
            ).logits
        self.num_computed_tokens = end
        self._check_layers()
        return logits[0]

    def show(self, prompt_ids: Sequence[int], inputs: Mapping[str, Tensor]) -> None:
        """Take images into the prompt, before the first step; `inputs` as in `PromptImages`."""
        if self.num_computed_tokens or len(prompt_ids) != self.num_prompt_tokens:
            raise ValueError(f"{len(prompt_ids)} tokens with images: they must be the prompt, before its first step.")
        if self.config and self.geometry and self.method.counts_positions:
            raise UsageError(support.reason("method", self.config.method, support.COUNTS_POSITIONS))
        self.images = PromptImages(self.model, prompt_ids, inputs)

    def compress_if_due(self) -> None:
        """What a step begins with: the compression that the tokens computed so far call for, if any."""
        event = self.num_events
        if self.geometry is None or self.config is None:
            return
        if self.geometry.num_events(self.num_prompt_tokens, self.num_computed_tokens) == event:
            return
        groups, full = self.geometry.groups, [i for i, layer in enumerate(self.layers) if layer.local is None]
        if not self._compressors:
            numbers = [budget.layers for budget in self.config.budgets] or [tuple(full)]
            self._compressors = [
                self._make_compressor(*each, [full.index(number) for number in each[-1]])
                for each in zip(self.config.parts, groups, numbers, strict=True)
            ]
        for compressor, geometry in zip(self._compressors, groups, strict=True):
            compressor.compress([Due(0, 0, geometry, self.num_prompt_tokens, event)])
        self.num_events += 1

    def _make_compressor(
        self, config: KvConfig, geometry: Geometry, numbers: Sequence[int], members: Sequence[int]
    ) -> Compressor:
        """Of one group of layers, by their numbers and by their places among those that are compressed."""
        layers = [self.layers[number] for number in numbers]
        layer, num_layers = layers[0], len(layers)
        device, (num_kv_heads, head_dim) = layer.keys.device, layer.keys.shape[1:]
        num_heads = layer.queries.shape[1]
        self.method.check_layers(LayerShape(1 + numbers[-1], num_heads, num_kv_heads, head_dim))
        shifts = query_shifts(config.query_stride, num_heads // num_kv_heads)
        positions = torch.zeros(1, num_layers, num_kv_heads, most_survivors(config), dtype=torch.int32, device=device)
        return Compressor(
            config, self.method, DenseStore(config, layers), torch.tensor(numbers, device=device),
            torch.from_numpy(shifts).to(device), self.rope and self.rope.take(torch.tensor(members, device=device)),
            positions, observe=self._note,
            rounding=Rounding.from_config(config, geometry.block_size, head_dim, self.cache_dtype),
        )  # fmt: skip

    def _note(self, kept: Kept, of_prompt: bool) -> None:
        if of_prompt:
            before = [] if self.kept_prompt is None else [self.kept_prompt]
            self.kept_prompt = torch.cat([*before, kept.indices])
        else:
            self.kept.append(kept.indices)

    def _check_layers(self) -> None:
        for i, layer in enumerate(self.layers):
            if isinstance(layer.local, Recurrent | Cacheless):
                continue
            if layer.num_appended != self.num_computed_tokens:
                raise UsageError(
                    f"layer {i} of {type(self.model).__name__} keeps no KV cache of its own; every layer must have one."
                )


# Measuring a rotary embedding takes a second, and a study makes hundreds of requests on one model.
_ropes: WeakKeyDictionary[PreTrainedModel, tuple[torch.device, Rope | None]] = WeakKeyDictionary()


def _known_rope(model: PreTrainedModel) -> Rope | None:
    """`rope_of`, measured once for each model and device."""
    if model not in _ropes or _ropes[model][0] != model.device:
        _ropes[model] = (model.device, rope_of(model, full_layers(layers_of(model))))
    return _ropes[model][1]


def layers_of(model: PreTrainedModel) -> list[LayerKind]:
    """How each layer of the model looks back; None: over the whole text, or a window as long as the context."""
    text = model.config.get_text_config()
    return local_layers(text, getattr(text, "max_position_embeddings", None))


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError unless the model can be compressed, as far as its config says."""
    support.check_model(model.config, type(model).__name__)
