"""`kvllm demo`: a dozen requests in a KV pool that is too small for them, stock vLLM against KvLLM."""
