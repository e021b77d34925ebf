"""Drivers of the losses on CPUs, shared by the `cpu` and `composed` backends: chunking, GEMMs and the order of row kernels."""
