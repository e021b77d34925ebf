"""The ops with the signatures of PyTorch's losses: `nn.Module`s and functions."""
