"""The one error that a user's input can raise."""


class SoftPromptError(ValueError):
    """Input that cannot be served: one sentence that names what was given and what is accepted.

    The command line prints the sentence and exits with code 2, without a traceback.
    """
