"""Measurements: how compression changes outputs (`eval`) and performance (`bench`)."""
