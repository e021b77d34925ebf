"""The backend `cpu`: attention, losses and GEMM in C++ with SIMD; the source is `csrc/cpu`."""
