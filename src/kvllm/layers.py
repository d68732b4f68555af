"""The kind of each layer of a model, from the model's config alone.

Full-attention layers are compressed. *Local* layers attend within a sliding window, or within their chunk of the text;
they keep vLLM's own KV caches, whose blocks are freed once no token attends to them. *Recurrent* layers (Mamba, linear
attention) keep a state of fixed size in a block of vLLM's pool. Other layers cache nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

Position = TypeVar("Position")

# Models whose configs count the window without the current token, so that vLLM's window is one token longer.
WINDOWS_WITHOUT_SELF = {"cohere2", "cohere2_moe"}


@dataclass(frozen=True)
class Local:
    """The attention range of a local layer.

    size:    tokens in its window, including the current one, or in a chunk
    chunked: whether a token attends back to the start of its chunk
    """

    size: int
    chunked: bool = False

    def first_seen(self, position: Position) -> Position:
        """The first position that a token at `position` (a number or an array) attends to."""
        at: Any = position
        start = at // self.size * self.size if self.chunked else at - self.size + 1
        return start * (start > 0)


@dataclass(frozen=True)
class Recurrent:
    """A layer that summarizes the text so far in a state of fixed size."""


@dataclass(frozen=True)
class Cacheless:
    """A layer that caches nothing."""


LayerKind = Local | Recurrent | Cacheless | None  # None: full attention


@dataclass(frozen=True)
class Heads:
    """The attention heads of a layer: of queries, of keys and values, and the numbers in each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def width(self, num_shards: int = 1) -> int:
        """Numbers in a token's keys, or in its values, on one of `num_shards` tensor-parallel devices."""
        return max(1, self.num_kv_heads // num_shards) * self.head_dim


RECURRENT = {"linear_attention", "mamba"}
CACHELESS = {"mlp", "moe"}


def local_layers(text: Any, max_model_len: int | None) -> list[LayerKind]:
    """The kind of each layer of the model with this config.

    text:          a transformers config; for a multimodal model, the config of its language model
    max_model_len: maximum text length, prompt included; a window of at least that length counts as full attention
    """
    window, chunk = sliding_window(text), getattr(text, "attention_chunk_size", None)
    local: dict[str, LayerKind] = {"chunked_attention": Local(chunk, chunked=True) if chunk else None}
    local |= dict.fromkeys(RECURRENT, Recurrent()) | dict.fromkeys(CACHELESS, Cacheless())
    if window is not None and (max_model_len is None or window < max_model_len):
        local["sliding_attention"] = Local(window)
    return [local.get(kind) for kind in layer_kinds(text)]


def layer_kinds(text: Any) -> list[str]:
    """The kind of each layer in transformers' names; in a config without a list, all layers have the same kind."""
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds is not None:
        return list(kinds)
    kind = "full_attention" if sliding_window(text) is None else "sliding_attention"
    return [kind] * getattr(text, "num_hidden_layers", 1)


def has_other_heads(text: Any) -> bool:
    """Whether the layers of the model with this config have different heads, as in Gemma 4."""
    return bool(getattr(text, "is_heterogeneous", False))


def heads_of(text: Any, layer: int) -> Heads:
    """The heads of one layer, by its index; text: as in `local_layers`."""
    own = text.per_layer_config[layer] if has_other_heads(text) else text
    num_heads, head_dim = own.num_attention_heads, getattr(own, "head_dim", None)
    num_kv_heads = getattr(own, "num_key_value_heads", None) or num_heads
    return Heads(num_heads, num_kv_heads, head_dim or own.hidden_size // num_heads)


def full_heads(text: Any) -> Heads:
    """The heads of the full-attention layers, which must all have the same ones."""
    layers = local_layers(text, None)
    return heads_of(text, layers.index(None) if None in layers else 0)


def sliding_window(text: Any) -> int | None:
    """Tokens that a sliding-window layer attends to, including the current one; None if no layer has a window."""
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return int(window) + (text.model_type in WINDOWS_WITHOUT_SELF) if window else None
