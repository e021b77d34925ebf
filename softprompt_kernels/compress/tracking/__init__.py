"""A run followed in TensorBoard or Weights & Biases, through their own packages."""
