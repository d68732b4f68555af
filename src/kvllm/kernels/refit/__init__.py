"""Kernels that move survivors and refit them to compensate for evicted tokens."""

from kvllm.kernels.refit.launch import MOST_DIMS as MOST_DIMS
from kvllm.kernels.refit.launch import refit as refit
from kvllm.kernels.refit.launch import refit_ref as refit_ref
