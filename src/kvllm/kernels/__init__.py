"""Triton kernels, each beside its PyTorch reference `*_ref` with the same signature.

One launch handles all layers and all requests that are due in a step. Importing this package does not import Triton;
its modules do. If TRITON_INTERPRET=1 is set before Triton is first imported, kernels run on the CPU, slowly.
"""
