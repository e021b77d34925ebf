"""Benchmarks of the kernels and of a training step: time, memory and counts, against baselines and floors."""
