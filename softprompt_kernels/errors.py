"""The errors that the package raises for a user's input."""


class SoftPromptError(ValueError):
    """Input that cannot be used. The message is one sentence that names what was given and what is accepted.

    The command line prints the message and exits with code 2, without a traceback.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, or that a tensor is larger than any memory."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # of torch, on any device
        or "can't allocate memory" in text
        or "Storage size calculation overflowed" in text
    )


class NotServedError(SoftPromptError):
    """A model whose family is not served, or that has an option with which its results would be wrong."""
