"""The command line `softprompt`: one file for each command, and what the commands share."""

from softprompt_kernels.cli.app import app, main

__all__ = ["app", "main"]
