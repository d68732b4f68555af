"""The commands that serve, and what they print. `kvllm.__main__` joins them to those that measure."""
