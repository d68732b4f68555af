"""The seam into vLLM: all code that depends on it. `import kvllm` imports nothing from here."""
