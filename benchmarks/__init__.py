"""Benchmarks of speed, resumption and accuracy."""
