"""Drivers of the losses on GPUs, shared by the `triton` and `cuda` backends: chunks, GEMMs, launches of row kernels."""
