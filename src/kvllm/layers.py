"""Which layers of a model look back over the whole text, from the model's config alone.

Layers of full attention are compressed. *Local* layers look back over a window of tokens, or within their chunk of the
text; they keep vLLM's own KV caches, whose blocks are freed once no token looks back to them. *Recurrent* layers
(Mamba, linear attention) keep a state of fixed size in a block of vLLM's pool. Other layers keep nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

Position = TypeVar("Position")

# Models whose windows are counted without the token that looks back, and so are one longer in vLLM.
WINDOWS_WITHOUT_SELF = {"cohere2", "cohere2_moe"}


@dataclass(frozen=True)
class Local:
    """How far a local layer looks back.

    size:    tokens of its window, the token that looks back included, or of a chunk
    chunked: whether it looks back to the start of the token's chunk
    """

    size: int
    chunked: bool = False

    def first_seen(self, position: Position) -> Position:
        """The first position that a token at this position, a number or an array of them, looks back to."""
        at: Any = position
        start = at // self.size * self.size if self.chunked else at - self.size + 1
        return start * (start > 0)


@dataclass(frozen=True)
class Recurrent:
    """A layer that keeps a state of fixed size, which sums up the text so far."""


@dataclass(frozen=True)
class Cacheless:
    """A layer that keeps nothing of the text."""


LayerKind = Local | Recurrent | Cacheless | None  # None: full attention

RECURRENT = {"linear_attention", "mamba"}
CACHELESS = {"mlp", "moe"}


def local_layers(text: Any, max_model_len: int | None) -> list[LayerKind]:
    """How each layer of the model with this config looks back; None: over the whole text.

    text:          a transformers config, of a multimodal model that of its language model
    max_model_len: longest text, prompt included; a window that no text outgrows is full attention
    """
    window, chunk = sliding_window(text), getattr(text, "attention_chunk_size", None)
    local: dict[str, LayerKind] = {"chunked_attention": Local(chunk, chunked=True) if chunk else None}
    local |= dict.fromkeys(RECURRENT, Recurrent()) | dict.fromkeys(CACHELESS, Cacheless())
    if window is not None and (max_model_len is None or window < max_model_len):
        local["sliding_attention"] = Local(window)
    return [local.get(kind) for kind in layer_kinds(text)]


def layer_kinds(text: Any) -> list[str]:
    """The kind of each layer, by the names of transformers; where a config has no list, all are of one kind."""
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds is not None:
        return list(kinds)
    kind = "full_attention" if sliding_window(text) is None else "sliding_attention"
    return [kind] * getattr(text, "num_hidden_layers", 1)


def sliding_window(text: Any) -> int | None:
    """Tokens that a sliding layer sees, the token that looks back included; None where no layer slides."""
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return int(window) + (text.model_type in WINDOWS_WITHOUT_SELF) if window else None
