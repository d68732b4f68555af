"""Bidirectional scores of candidates, as Kara computes them."""

from kvllm.kernels.window_scores.launch import window_scores as window_scores
from kvllm.kernels.window_scores.launch import window_scores_ref as window_scores_ref
