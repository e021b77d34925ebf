"""Other implementations of the ops, one file each: plain PyTorch and other packages. registry.py lists them."""
