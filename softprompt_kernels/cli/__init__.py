"""The command `softprompt`."""

from softprompt_kernels.cli.app import app, main

__all__ = ["app", "main"]
