"""Measuring: what compression changes (`eval`), and what it costs or gains (`bench`)."""
