"""Drivers of the losses on CPUs, shared by the `cpu` and `composed` backends: chunks, GEMMs, calls of row kernels."""
