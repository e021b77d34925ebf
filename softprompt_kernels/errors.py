"""The errors that the package raises for a user's input."""


class SoftPromptError(ValueError):
    """Input that cannot be used. The message is one sentence that names what was given and what is accepted.

    The command line prints the message and exits with code 2, without a traceback.
    """


class NotServedError(SoftPromptError):
    """A model whose family is not served, or that has an option with which its results would be wrong."""
