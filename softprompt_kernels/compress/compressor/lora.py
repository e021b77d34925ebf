"""LoRA on a frozen model (arXiv 2106.09685), through PEFT. It is on while a compressor reads, and off in between.

All linear layers but the head are adapted: W + (α/r)·B·A with α = 2r. A and B are in fp32 where the model has 16
bits. B starts at 0, so the model starts unchanged. The model of teacher and student has to stay as it is, and so has
its fingerprint. Therefore `detach` takes the layers out again.

PEFT is imported here alone, and only where a compressor has LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError

NAME = "compressor"  # of the adapter in the model
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of PEFT's names in a file


class Lora:
    """LoRA layers in a model, off at first.

    Args:
        model: gets the layers in place.
        rank: r, at least 1.
        seed: of A.

    Raises:
        SoftPromptError: PEFT is not installed, or the model has layers of PEFT already.
    """

    def __init__(self, model: PreTrainedModel, rank: int, seed: int = 0) -> None:
        try:
            from peft import LoraConfig, LoraModel
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError as error:
            raise SoftPromptError(
                'lora_rank: LoRA needs PEFT, which is not installed: pip install --editable ".[peft]"'
            ) from error
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise SoftPromptError(
                "lora_rank: got a model with an adapter of PEFT, accepted is one without; merge the adapter first, or "
                "use a compressor without LoRA"
            )
        self.rank = rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        before = set(vars(model))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._tuner: Any = LoraModel(model, {NAME: config}, NAME)
        self._model, self._added = model, set(vars(model)) - before
        self._config = config
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for parameter in self.named_parameters().values():
            if parameter.dtype.itemsize == 2:  # PEFT gives them the model's dtype, in which small updates are lost
                parameter.data = parameter.data.float()
        self._enable(False)

    @contextmanager
    def on(self) -> Iterator[None]:
        """The layers are on and trainable within. Forward and backward pass both have to run there."""
        self._enable(True)
        try:
            yield
        finally:
            self._enable(False)

    def _enable(self, on: bool) -> None:
        for layer in self._layers:
            layer.enable_adapters(on)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """A and B of each layer, by the names that PEFT's files have."""
        middle = f".{NAME}."
        return {
            _PREFIX + name.replace(middle, "."): parameter
            for name, parameter in self._model.named_parameters()
            if middle in name
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], place: str) -> None:
        """Take the numbers of a file.

        Args:
            tensors: by PEFT's names.
            place: of the file, for the message.

        Raises:
            SoftPromptError: names or shapes are not those of this model's layers.
        """
        own = self.named_parameters()
        wrong = sorted(
            name
            for name in {*own, *tensors}
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape
        )
        if wrong:
            raise SoftPromptError(
                f"{place} does not fit the model: {len(wrong)} tensors differ, the first is {wrong[0]}; accepted are "
                f"LoRA layers of rank {self.rank} for all linear layers"
            )
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    def files(self, base_model: str) -> dict[str, bytes]:
        """The content of a PEFT adapter folder, by file name.

        Args:
            base_model: name of the model.
        """
        config = {**self._config.to_dict(), "base_model_name_or_path": base_model, "inference_mode": True}
        config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.named_parameters().items()}
        return {CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), WEIGHTS: save(tensors)}

    def detach(self) -> None:
        """Take the layers out. The model is as before."""
        self._tuner.unload()
        for name in self._added & set(vars(self._model)):
            delattr(self._model, name)
