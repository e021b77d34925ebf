"""The ops with the signatures of PyTorch's losses: `nn.Module`s and functions."""

from softprompt_kernels.losses.modules import JSDLoss, KLDivLoss, LinearKLDivLoss

__all__ = ["JSDLoss", "KLDivLoss", "LinearKLDivLoss"]
