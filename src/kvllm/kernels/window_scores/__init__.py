"""Kara's bidirectional scores of candidates."""

from kvllm.kernels.window_scores.launch import MOST_DIMS as MOST_DIMS
from kvllm.kernels.window_scores.launch import window_scores as window_scores
from kvllm.kernels.window_scores.launch import window_scores_ref as window_scores_ref
