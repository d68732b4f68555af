"""`kvllm inspect`: one text and what its compressions kept, as a page."""
