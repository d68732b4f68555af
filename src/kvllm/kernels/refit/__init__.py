"""Survivors fitted to what was evicted, on their way to where they are kept."""

from kvllm.kernels.refit.refit import MOST_DIMS as MOST_DIMS
from kvllm.kernels.refit.refit import refit as refit
from kvllm.kernels.refit.refit import refit_ref as refit_ref
