"""Benchmarks: each prints a table and writes the same columns as JSON."""
