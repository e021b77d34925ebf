"""Switch a model of transformers or PEFT to the package's attention, and back.

    patch(model)      changes this one model in place, and nothing else in the process
    unpatch(model)    restores it

A transformers model gets `prompt_attention` in each layer. A PEFT model with a prompt gets it in its base model, and
its class becomes one that hands the prompt to the attention as a prefix that the batch shares (`peft_model.py`).
Parameters, `state_dict`, configurations and adapter files stay as they are.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from transformers import PreTrainedModel

from softprompt_kernels.models import prepare, release

Model = TypeVar("Model")


def patch(model: Model) -> Model:
    """Make `model` use the package's attention, and a PEFT prompt as a prefix that the batch shares.

    Losses, gradients and the logits of real tokens stay those of the unpatched model within rounding. Logits at padding
    do not, so give −100 to labels that they predict; a row's first token behind a prompt may keep its label. A second
    call changes nothing. Call it before the model is compiled or wrapped (`torch.compile`, DDP, FSDP2), and before an
    optimiser or a Trainer.

    Args:
        model: a transformers model of a served family, or a `peft.PeftModelForCausalLM` around one, with adapters of
            PREFIX_TUNING, CARTRIDGE or PROMPT_TUNING.

    Returns:
        The same object.

    Raises:
        TypeError: `model` is neither.
        SoftPromptError: its family, its PEFT type or an option of its adapters is not served, or another package has
            replaced its forward. The model is unchanged then.
    """
    if _is_peft(model):
        from softprompt_kernels.integrations import peft_model

        peft_model.share_prompt(model)
    elif isinstance(model, PreTrainedModel):
        prepare(model)
    else:
        raise _no_model(model)
    return model


def unpatch(model: Model) -> Model:
    """Restore what `patch` changed. Trained parameters stay. Does nothing to a model that is not patched.

    Args:
        model: what was given to `patch`.

    Returns:
        The same object, with its former class, attention and configuration, and so with the same bits in its results.

    Raises:
        TypeError: `model` is no model of transformers or PEFT.
        SoftPromptError: another package has changed the model's class since then, as FSDP2 does.
    """
    if _is_peft(model):
        from softprompt_kernels.integrations import peft_model

        peft_model.unshare_prompt(model)
    elif isinstance(model, PreTrainedModel):
        release(model)
    else:
        raise _no_model(model)
    return model


def _is_peft(model: object) -> bool:
    """Whether `model` is PEFT's. If nobody has imported PEFT, nobody has made a model with it."""
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))


def _no_model(model: object) -> TypeError:
    return TypeError(
        f"model: got {type(model).__name__}, accepted are a transformers PreTrainedModel and a "
        "peft.PeftModelForCausalLM, before they are compiled or wrapped"
    )
