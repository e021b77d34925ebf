"""The `composed` backend: CPU kernels made of PyTorch's own operations, for where the C++ module was not built."""
