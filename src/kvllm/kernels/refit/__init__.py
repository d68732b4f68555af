"""Survivors fitted to what was evicted, on their way to where they are kept."""

from kvllm.kernels.refit.launch import MOST_DIMS as MOST_DIMS
from kvllm.kernels.refit.launch import refit as refit
from kvllm.kernels.refit.launch import refit_ref as refit_ref
