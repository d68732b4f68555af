"""Survivors in four bits: packed blocks in the paged cache, written by `pack` and read by `PackedAttention`."""
