"""KvLLM serves reasoning models on vLLM with a compressed KV cache."""

__version__ = "0.1.0"
