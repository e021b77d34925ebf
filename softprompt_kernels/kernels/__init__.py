"""The kernels: one package per backend, the drivers that backends share, and the problems that kernels are given."""
