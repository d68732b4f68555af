"""Everything that knows vLLM. Nothing here is imported by `import kvllm`."""
