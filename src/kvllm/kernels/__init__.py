"""Triton kernels, each beside its PyTorch reference `*_ref` with the same signature.

One launch serves every layer and every request due in a step. Importing this package loads no Triton; its modules do.
With TRITON_INTERPRET=1 in the environment before the first import of Triton they run on the CPU, slowly.
"""
