"""Silences the libraries that a command uses, so that only the command itself prints."""

from __future__ import annotations

import os
import sys


def quiet_libraries() -> None:
    """Turn off transformers' logging and progress bars. On a terminal, downloads still show their bar.

    Raises:
        ValueError: SOFTPROMPT_BACKEND is not the name of a backend.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    from softprompt_kernels.ops.dispatch import check_backend

    check_backend(os.environ.get("SOFTPROMPT_BACKEND") or None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()
