"""The benchmark part of `make gpu`: times on a CUDA device."""
