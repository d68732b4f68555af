"""Measurements: fidelity to the full cache, recall of a fact, accuracy on problems with answers."""
