"""Time, memory and counts of the kernels and of a training step, beside baselines and floors."""
