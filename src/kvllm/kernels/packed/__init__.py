"""Survivors in four bits: packed blocks in the paged cache, which `pack` writes and `PackedAttention` reads."""
