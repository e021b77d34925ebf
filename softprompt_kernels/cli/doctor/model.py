"""`softprompt doctor --model`: compares a model behind a prefix with its run over the concatenated sequence."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from softprompt_kernels.errors import NotServedError, SoftPromptError


@dataclass(frozen=True)
class Loading:
    """How the model is loaded, and how much context it reads.

    Args:
        name: folder or hub name.
        dtype: "auto" is float32: other dtypes round too much to see a small error.
        device: as of the other commands.
        tokens: of random context.
    """

    name: str
    dtype: str
    device: str
    tokens: int


def check(loading: Loading) -> None:
    """Print each comparison, and whether the model is served.

    Raises:
        SoftPromptError: nothing can be loaded, or the model's window is shorter than the context.
        typer.Exit: with exit code 1, if the model is not served.
    """
    from softprompt_kernels.models.registry import undeclared_families

    with undeclared_families() as undeclared:
        try:
            exact = _is_exact(loading)
        except NotServedError as error:
            _refuse(str(error))
    if not exact:
        _refuse("it does not give the same behind a prefix")
    if undeclared:
        calls = ", ".join(f"register_family({name!r})" for name in sorted(undeclared))
        _refuse(f"it is exact, but nobody has declared its family. Call softprompt_kernels.models.{calls}")
    typer.echo("\nServed.")


def _is_exact(loading: Loading) -> bool:
    from softprompt_kernels.compress.sources.model import load_model
    from softprompt_kernels.models.exactness import INPUT, check_exactness
    from softprompt_kernels.models.families import attention_modules, decoder_of, max_positions, text_config

    model, _ = load_model(loading.name, "float32" if loading.dtype == "auto" else loading.dtype, loading.device)
    config = text_config(model)
    family = config.model_type if config is model.config else f"{config.model_type} inside {model.config.model_type}"
    typer.echo(f"{type(model).__name__}, family {family}, {str(model.dtype).removeprefix('torch.')} on {model.device}")
    if loading.tokens + INPUT > (window := max_positions(config)):
        raise SoftPromptError(f"--tokens: got {loading.tokens}, accepted is at most {window - INPUT} for this model")
    passed = []
    for one in check_exactness(model, loading.tokens):
        passed.append(one.passed)
        typer.echo(
            f"  {one.name:30}largest difference {one.difference:.1e}, accepted {one.accepted:.1e}"
            f"{'' if one.passed else '  FAILED'}"
        )
    windows = {getattr(module, "sliding_window", None) for module in attention_modules(decoder_of(model))}
    longest = max((window for window in windows | {getattr(config, "sliding_window", None)} if window), default=0)
    if longest > loading.tokens:
        typer.echo(f"  The window of {longest} tokens was not reached: --tokens {longest + 1} tests it too.")
    return all(passed)


def _refuse(reason: str) -> None:
    typer.echo(f"\nNot served: {reason.rstrip('.')}.")
    raise typer.Exit(1)
