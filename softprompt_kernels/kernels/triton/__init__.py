"""Kernels in Triton, for CUDA and ROCm devices (and, in Triton's interpreter, for CPU tensors).

The modules that dispatch imports import Triton only when a kernel runs, so the package costs a CPU user nothing.
"""
