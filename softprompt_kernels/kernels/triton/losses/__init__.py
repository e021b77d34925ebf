"""Loss kernels in Triton and the launches that run them."""
