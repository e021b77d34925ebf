"""The `reference` backend: plain PyTorch in any floating dtype and on any device. It defines what the ops compute."""
