"""`make counters`: bytes, FLOP, launches and memory of GPU kernels, counted in Triton's interpreter."""
