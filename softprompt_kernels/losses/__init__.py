"""The ops as modules, with the signatures of PyTorch's and Liger's losses."""

from softprompt_kernels.losses.modules import JSDLoss, KLDivLoss, LinearKLDivLoss

__all__ = ["JSDLoss", "KLDivLoss", "LinearKLDivLoss"]
