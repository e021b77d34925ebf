"""Drivers of the losses on CPUs, which the `cpu` and `composed` backends share: chunks, GEMMs, row kernels."""
