"""`kvllm tune`: settings for a model and texts of the user's own, with what they lose."""
