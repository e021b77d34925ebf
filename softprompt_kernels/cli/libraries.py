"""What is set in the libraries under a command: they keep quiet, for the command speaks for itself."""

from __future__ import annotations

import os
import sys


def quiet_libraries() -> None:
    """Silences transformers' logging and bars; a terminal still sees the bar of a download.

    Raises:
        ValueError: SOFTPROMPT_BACKEND names no backend.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    from softprompt_kernels.ops.dispatch import check_backend

    check_backend(os.environ.get("SOFTPROMPT_BACKEND") or None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()
