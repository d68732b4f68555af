"""The engine on Hugging Face transformers: small, slow, obviously right. The vLLM engine is tested against it."""

from kvllm.reference.generate import Generation, generate
from kvllm.reference.replay import Fidelity, Replay, compare, feed, kl_by_row, replay
from kvllm.reference.request import Request, block_size_of, load_model

__all__ = [
    "Fidelity",
    "Generation",
    "Replay",
    "Request",
    "block_size_of",
    "compare",
    "feed",
    "generate",
    "kl_by_row",
    "load_model",
    "replay",
]
