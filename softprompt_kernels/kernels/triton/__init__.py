"""Kernels in Triton, for CUDA and ROCm devices (and, in Triton's interpreter, for CPU tensors).

Modules that dispatch sees import Triton only when they run something, so that the package costs a CPU user nothing.
"""
