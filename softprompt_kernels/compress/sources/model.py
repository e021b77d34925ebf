"""Loads a model and its tokenizer: complete, frozen, in evaluation mode, prepared for prefixes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file, is_peft_available

from softprompt_kernels.compress.parallel.launch import launched
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.sources.quantize import check_quantization, keep_arithmetic, loading_options
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import auto_class, prepare
from softprompt_kernels.models.families import max_positions
from softprompt_kernels.prompts.adapter import PEFT_TYPES
from softprompt_kernels.prompts.json_file import read_object

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPLIT = "split"  # the device of a model that lies on several


@own_torch_modes()
def load_model(name: str, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Of the settings that a folder brings for generation only the tokens with a role are taken (see `_take_settings`).

    Args:
        name: a folder in transformers' layout, or a name on the hub; also of a PEFT adapter, which is put on its model.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, where it is fastest, else as stored.
            "8bit", "4bit": quantised weights, that compute as "auto" does (see `quantize.py`).
        device: a torch device, or "auto": "cuda" if there is one, else "cpu". "split": accelerate spreads the layers
            over all GPUs; what does not fit them lies in the CPU's memory, then on the disk, and is read for each run.

    Raises:
        SoftPromptError: nothing can be loaded under that name, its weights do not match its configuration, the model
            family is not supported, the device does not exist, or a package for quantised weights is missing.
    """
    resolved = resolve_device(device)
    torch_dtype = DTYPES.get(dtype) or (torch.float32 if resolved.type == "cpu" else "auto")
    with _loading("model", name):
        base = _base_of_adapter(name)
        config = AutoConfig.from_pretrained(base or name)
        auto = auto_class(config)  # what is wrong here is not the tokenizer's fault
    options: dict[str, Any] = {}
    if check_quantization(name, config, dtype):
        stored = getattr(config, "dtype", None)
        compute = stored if torch_dtype == "auto" else torch_dtype
        options = loading_options(dtype, compute if isinstance(compute, torch.dtype) else torch.float32, resolved)
    if device == SPLIT:
        options["device_map"] = "auto"
    tokenizer = _load_tokenizer(name, base)
    with _loading("model", name):
        try:
            loaded: Any = auto.from_pretrained(
                base or name, dtype=torch_dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except RuntimeError as error:
            if keys := _not_converted(error):
                raise _mismatch(base or name, [f"incomplete: {_some(keys)}"]) from error
            raise
        model, report = loaded
        check_weights(model, base or name, report)
        if base is not None:
            check_weights(model, name, model.load_adapter(name).to_dict())
            model.config._name_or_path = name  # what a saved prompt names as its model
    check_tokenizer(model, tokenizer)
    _take_settings(model)
    prepare(model)
    if options:
        keep_arithmetic(model)  # it was loaded to its device
    else:
        torch.nn.Module.to(model, resolved)  # the type of transformers' own `to` is wrong
    return model.eval().requires_grad_(False), tokenizer


def load_tokenizer(name: str) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of a model, and the model's window in tokens. The weights are not read.

    Args:
        name: as in `load_model`.

    Raises:
        SoftPromptError: nothing can be loaded under that name, or the model family is not supported.
    """
    with _loading("model", name):
        base = _base_of_adapter(name)
        config = AutoConfig.from_pretrained(base or name)
        auto_class(config)
    return _load_tokenizer(name, base), max_positions(config)


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Turns every error but the package's own into one sentence."""
    try:
        yield
    except (MemoryError, SoftPromptError):
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise many types for broken files
        first = str(error).strip().split("\n")[0]
        raise SoftPromptError(f"{what}: cannot load {name!r} ({first})") from error


def _base_of_adapter(name: str) -> str | None:
    """The model that the PEFT adapter of this name belongs to; None if it is no adapter, or one that lies in its model.

    Raises:
        SoftPromptError: the adapter is a soft prompt, names no model, or needs PEFT, which is not installed.
    """
    path = find_adapter_config_file(name)
    if path is None or (Path(name) / "config.json").exists():
        return None
    config = read_object(Path(path))
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind in PEFT_TYPES:
        raise SoftPromptError(
            f"model: {name!r} is a soft prompt ({kind}), accepted is the model that it was made for; "
            "a soft prompt is the argument of --prompt"
        )
    if not isinstance(base, str) or not base:
        raise SoftPromptError(
            f"model: {name!r} is a PEFT adapter that does not name its model, accepted is one that does"
        )
    if not is_peft_available():
        raise SoftPromptError(f"model: {name!r} is a PEFT adapter, for which PEFT must be installed: pip install peft")
    return base


def _load_tokenizer(name: str, base: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of this name, or else that of the base model of an adapter."""
    try:
        with _loading("tokenizer", name):
            return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(name))
    except SoftPromptError:
        if base is None:
            raise
    with _loading("tokenizer", base):
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(base))


def check_weights(model: PreTrainedModel, name: str, report: Mapping[str, Any]) -> None:
    """Check that the files gave the model each of its weights, and no others for its modules.

    Args:
        model: the loaded model. What its files did not give it has random numbers.
        name: of its folder.
        report: what transformers says about loading it (`output_loading_info`).

    Raises:
        SoftPromptError: weights are missing, have another shape, or belong to a model of other layers.
    """
    modules = {path for path, _ in model.named_modules()} - {"", model.base_model_prefix}
    # Weights of other parts, such as the images' part of a multimodal model, or a second head, may well lie there.
    unused = [
        key
        for key in report["unexpected_keys"]
        if key.rpartition(".")[2] in ("weight", "bias") and any(ancestor in modules for ancestor in _ancestors(key))
    ]
    shapes = [f"{key} {tuple(there)} for {tuple(here)}" for key, there, here in report["mismatched_keys"]]
    wrong = {"missing": report["missing_keys"], "of another shape": shapes, "not used": unused}
    phrases = [f"{what}: {_some(keys)}" for what, keys in wrong.items() if keys]
    phrases += [str(message).strip().split("\n")[0] for message in report.get("error_msgs", ())]
    if phrases:
        raise _mismatch(name, phrases)


def _mismatch(name: str, phrases: Iterable[str]) -> SoftPromptError:
    return SoftPromptError(
        f"model: the weights in {name!r} do not match its configuration ({'; '.join(phrases)}), accepted are "
        "weights for exactly this model"
    )


def _not_converted(error: RuntimeError) -> list[str]:
    """The weights that transformers could not make of several in the files, such as one for all experts of a layer.

    Their names are in the report that it logs, and not in the error. The report is a variable where it was raised.
    """
    reports = (frame.f_locals.get("loading_info") for frame, _ in walk_tb(error.__traceback__))
    return sorted({key for report in reports for key in getattr(report, "conversion_errors", None) or ()})


def _ancestors(key: str) -> Iterator[str]:
    """The paths of the modules that a weight lies in: "a.b" and "a" for "a.b.weight"."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _some(keys: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _take_settings(model: PreTrainedModel) -> None:
    """Keep of the generation settings in the model's folder only which tokens begin, end and fill a sequence.

    The others (min_p, num_beams, repetition_penalty, suppressed tokens and so on) would change the distribution that
    the prompt is trained for, or what `generate` returns.
    """
    given = model.generation_config
    if given is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(given, name) for name in names})


def resolve_device(device: str) -> torch.device:
    """The torch device of a name; "auto" is "cuda" if there is one, else "cpu", as is the first of "split".

    Of the processes that torchrun starts, each has a GPU of its own: "auto" and "cuda" are that one.

    Raises:
        SoftPromptError: not a device name, or a device that does not exist here.
    """
    if device == SPLIT and find_spec("accelerate") is None:
        raise SoftPromptError("device: got split, for which accelerate must be installed: pip install accelerate")
    if device == SPLIT and launched().world > 1:
        raise SoftPromptError("device: got split with several processes, which would all take the same devices")
    if device in ("auto", SPLIT):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and launched().world > 1:
        device = f"cuda:{launched().local_rank}"
    try:
        resolved = torch.device(device)
        if resolved.type != "cuda" or torch.cuda.is_available():
            torch.empty(0, device=resolved)  # a valid name may still be a device that does not exist
    except (RuntimeError, AssertionError, ImportError) as error:
        raise SoftPromptError(
            f"device: got {device!r}, which torch cannot use here; "
            'accepted are "auto", "cpu", "cuda", "cuda:1", "split", …'
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise SoftPromptError(f'device: got {device!r}, but torch sees no CUDA device here; accepted is "cpu"')
    return resolved


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if the tokenizer has tokens without an embedding, such as one for padding that is never read.

    Texts that need such a token are refused by `check_ids`.
    """
    embeddings = embedding_count(model)
    missing = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= embeddings)
    if missing:
        shown = ", ".join(repr(token) for _, token in missing[:3]) + (", …" if len(missing) > 3 else "")
        warnings.warn(
            f"tokenizer: {len(missing)} of its tokens ({shown}) have no embedding in the model, "
            f"which has {embeddings}; a text that needs one is refused",
            stacklevel=2,
        )


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], name: str) -> None:
    """Check that the model has an embedding for every token of a text; `name` is the argument that gave it.

    Raises:
        SoftPromptError: a token has no embedding.
    """
    embeddings, largest = embedding_count(model), max(ids, default=-1)
    if largest >= embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise SoftPromptError(
            f"{name}: the tokenizer gives the token {token!r} of id {largest}, "
            f"accepted are ids below {embeddings}, the model's embeddings"
        )


def embedding_count(model: PreTrainedModel) -> int:
    """How many tokens the model has an embedding for."""
    return int(cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0])
