"""`kvllm inspect`: an HTML page that shows which tokens of a text each compression kept."""
