"""One request on a transformers model: steps of new tokens, with compressions between them."""

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
from kvllm.groups import full_attention_block_size, full_layers, groups_of_model
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
    """Load the model in a local folder for inference; a vision-language model is loaded whole."""
    with finding_model(folder):
        kind = type(AutoConfig.from_pretrained(folder, local_files_only=True))
        sees = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


class Request:
    """The state of one request. `config=None` compresses nothing, and keeps `max_queries` queries for a fork.

    layers:      the cache of each layer; those of full-attention layers are compressed
    states:      the states of recurrent layers; None if there are none
    kept:        for each compression so far, the indices of the survivors, [num_compressed, num_kv_heads, num_kept];
                 with layer budgets, one tensor per group of layers
    kept_prompt: the same for the prompt once it is cut (`prompt_budget`); with layer budgets, all groups in one tensor
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
        block_size:  tokens in a block of the compressed layers (`block_size_of`)
        packed:      windows keep whole packed blocks, as on GPUs
        formats:     the cache format of each layer; None, for one layer or all: unchanged
        cache_dtype: vLLM's --kv-cache-dtype; determines only how many tokens a packed block holds (see `formats`)
        """
        check_model(model)
        if num_prompt_tokens < 1:
            raise ValueError(f"num_prompt_tokens={num_prompt_tokens}: must be at least 1.")
        self.model = model
        self.num_prompt_tokens = num_prompt_tokens
        self.geometry = None
        self.cache_dtype = cache_dtype
        if config:
            text = model.config.get_text_config()
            config = with_budgets(config, full_layers(layers_of(model)))
            groups_of_model(text, getattr(text, "max_position_embeddings", None), config.budgets)
            head_dim = head_dim_of(text)
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
        """A compressed request that continues from an uncompressed one, without recomputing its text.

        Raises ValueError if `full` is past the first event, or keeps too few queries (`max_queries`).
        """
        forked = cls(full.model, full.num_prompt_tokens, config, block_size, packed=packed)
        if full.geometry is not None or full.num_computed_tokens > (forked.max_step() or full.num_computed_tokens):
            raise ValueError(f"{full.num_computed_tokens} computed tokens: past the first event, or compressed.")
        if any(layer.max_queries < config.query_span for layer in full.compressed):
            raise ValueError(f"the request keeps {full.layers[0].max_queries} queries, not {config.query_span}.")
        forked.num_computed_tokens = full.num_computed_tokens
        forked.layers = [copy.copy(layer) for layer in full.layers]  # shallow: tensors are never modified in place
        forked.states = copy.deepcopy(full.states)
        return forked

    @property
    def compressed(self) -> list[LayerCache]:
        """The caches of the full-attention layers, which are compressed."""
        return [layer for layer in self.layers if layer.local is None]

    @property
    def physical_len(self) -> int:
        """Tokens in the cache of each full-attention layer; with layer budgets their mean, rounded."""
        lengths = [len(layer.keys) for layer in self.compressed] if self.num_computed_tokens else [0]
        return round(sum(lengths) / len(lengths))

    def max_step(self) -> int | None:
        """The most tokens that the next step may have without running past the next event; None: no limit."""
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
        """Compress if an event is due, then compute these tokens; returns their logits, [num_new, vocab_size]."""
        most = self.max_step()
        if not token_ids or (most is not None and len(token_ids) > most):
            raise ValueError(f"a step of {len(token_ids)} tokens: the next event allows 1 to {most}.")
        context_len = self.model.config.get_text_config().max_position_embeddings
        end = self.num_computed_tokens + len(token_ids)
        if end > context_len:
            raise UsageError(f"{end} tokens: the model's context length is {context_len}.")
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
        """Add images to the prompt, before the first step; `inputs` as in `PromptImages`."""
        if self.num_computed_tokens or len(prompt_ids) != self.num_prompt_tokens:
            raise ValueError(f"{len(prompt_ids)} tokens with images: must be the whole prompt, before the first step.")
        if self.config and self.geometry and self.method.counts_positions:
            raise UsageError(support.reason("method", self.config.method, support.COUNTS_POSITIONS))
        if both := getattr(self.model.config.get_text_config(), "use_bidirectional_attention", None):
            why = "the reference's attention is causal; use prompts without images"
            raise UsageError(support.reason("use_bidirectional_attention", both, why))
        self.images = PromptImages(self.model, prompt_ids, inputs)

    def compress_if_due(self) -> None:
        """Run the compression that is due at the current number of computed tokens, if any. `step` calls it first."""
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
        """The compressor of one group of layers.

        numbers: the layers' indices in the model; members: their indices among the compressed layers
        """
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
                    f"layer {i} of {type(self.model).__name__} has no KV cache of its own, which is not supported."
                )


# Cached, because measuring takes a second, and a study makes hundreds of requests on one model.
_ropes: WeakKeyDictionary[PreTrainedModel, tuple[torch.device, Rope | None]] = WeakKeyDictionary()


def _known_rope(model: PreTrainedModel) -> Rope | None:
    """`rope_of` the full-attention layers, measured once for each model and device."""
    if model not in _ropes or _ropes[model][0] != model.device:
        _ropes[model] = (model.device, rope_of(model, full_layers(layers_of(model))))
    return _ropes[model][1]


def layers_of(model: PreTrainedModel) -> list[LayerKind]:
    """The kind of each layer of the model; None: full attention, or a window as long as the context."""
    text = model.config.get_text_config()
    return local_layers(text, getattr(text, "max_position_embeddings", None))


def block_size_of(model: PreTrainedModel, block_size: int) -> int:
    """Tokens in a block of the compressed layers, as `Request` takes them; block_size: vLLM's --block-size

    Raises UsageError unless the model's config is supported.
    """
    check_model(model)
    text = model.config.get_text_config()
    return full_attention_block_size(text, getattr(text, "max_position_embeddings", None), block_size)


def check_model(model: PreTrainedModel) -> None:
    """Raise UsageError unless the model's config is supported, for text or for images of models with M-RoPE."""
    support.check_model(model.config, type(model).__name__, sees_images=False)
