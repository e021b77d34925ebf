"""What each rank of test_recipes_on_two_ranks.py runs: `torchrun recipe_ranks.py STUDENT TEACHER FOLDER`.

The test runs the same functions in its own process. The batches of a step are the same: of 4 texts, so 4 texts of one
process or 2 texts of each of 2 ranks. The texts have different lengths, so that no two ranks have as many tokens.
"""

import importlib.util
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer

from tests.examples.loop_problems import end_if_stuck

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
KINDS: dict[str, dict[str, Any]] = {
    "PREFIX_TUNING": {},
    "CARTRIDGE": {"greater_is_better": True},  # a larger loss: the best prompt is not the last
    "PROMPT_TUNING": {"gradient_accumulation_steps": 2},
}
COMMON = {
    "per_device_train_batch_size": 4 // RANKS,
    "per_device_eval_batch_size": 2 // RANKS,
    "dataloader_drop_last": True,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
}


class Run(NamedTuple):
    """What a Trainer has logged, what it has trained, and the loss of the model that it ended with."""

    log: dict[str, list[float]]
    trained: dict[str, Tensor]
    final_loss: float
    best_loss: float


def texts() -> list[str]:
    """18 to train on and 2 held out, of 2 to 6 words."""
    words = random.Random(0)
    return [" ".join(words.choices(["lake", "river", "hill", "a", "of"], k=2 + i % 5)) for i in range(20)]


def result(trainer: Trainer) -> Run:
    history = trainer.state.log_history
    log = {name: [record[name] for record in history if name in record] for name in ("loss", "grad_norm", "eval_loss")}
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return Run(log, trained, trainer.evaluate()["eval_loss"], trainer.state.best_metric)


def train_prompt(student: Path, folder: Path, kind: str, **options: Any) -> Run:
    """`examples/peft_prompts_trainer.py` from its arguments, for 2 epochs of 4 batches."""
    from examples import peft_prompts_trainer

    data = folder.with_suffix(".jsonl")
    if not dist.is_initialized() or dist.get_rank() == 0:
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    if dist.is_initialized():
        dist.barrier()
    given = {
        "model": student, "data": data, "kind": kind, "tokens": 5, "output_dir": folder, "use_cpu": True,
        "disable_tqdm": True, "num_train_epochs": 2, "learning_rate": 0.05, **COMMON, **KINDS[kind], **options,
    }  # fmt: skip
    torch.manual_seed(0)
    return result(
        peft_prompts_trainer.main([word for name, value in given.items() for word in (f"--{name}", str(value))])
    )


def distil(student: Path, teacher: Path, folder: Path, **options: Any) -> Run:
    """`examples/trainer_distillation.py`, for 2 epochs of 4 batches."""
    from examples import trainer_distillation

    given = {
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "num_train_epochs": 2, "learning_rate": 3e-3,
        "dataloader_pin_memory": False, **COMMON, **options,
    }  # fmt: skip
    return result(trainer_distillation.main(student, teacher, texts(), folder, **given))


def distil_with_trl(student: Path, teacher: Path, folder: Path, **options: Any) -> Run:
    """`examples/trl_distillation.py`, for 2 steps. It takes the likeliest tokens, which no seed of a rank changes.

    The texts have one length, since PEFT counts padding on the left as positions.
    """
    from examples import trl_distillation

    given = {
        **{name: value for name, value in COMMON.items() if "_batch_size" in name},
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        "max_steps": 2, "learning_rate": 3e-2, "bf16": False, "max_completion_length": 8, "top_k": 1,
        "gradient_accumulation_steps": 2, "dataloader_pin_memory": False, **options,
    }  # fmt: skip
    prompts = ["the cat", "one dog", "red hat", "no more"] * 5
    return result(trl_distillation.main(student, teacher, prompts, folder, 4, **given))


def main() -> None:
    end_if_stuck()
    torch.set_num_threads(1)
    student, teacher, folder = (Path(argument) for argument in sys.argv[1:])
    dist.init_process_group("gloo")
    from tests.examples import sharded_ranks
    from tests.examples.sharded_ranks import both, refused

    results: dict[str, Run] = {}
    for kind in KINDS:
        results[kind] = train_prompt(student, folder / kind, kind)
    stopped = folder / "PREFIX_TUNING-stopped"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "PREFIX_TUNING/checkpoint-4", stopped / "checkpoint-4")
    dist.barrier()
    results["resumed"] = train_prompt(student, stopped, "PREFIX_TUNING", resume=True)
    results["distilled"] = distil(student, teacher, folder / "distilled", gradient_accumulation_steps=2)
    sharded = {kind: both(sharded_ranks.train_prompt, student, kind) for kind in KINDS}
    for name, train in (("torchtitan", sharded_ranks.train_titan), ("torchtune", sharded_ranks.train_tune)):
        sharded[name] = both(train, student, teacher)
    fsdp = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    (folder / f"fsdp{dist.get_rank()}.json").write_text(json.dumps(fsdp["fsdp_config"]))
    said = [
        refused(lambda: distil(student, teacher, folder / "refused", **fsdp)),
        refused(
            lambda: train_prompt(
                student,
                folder / "refused",
                "PREFIX_TUNING",
                fsdp="full_shard",
                fsdp_config=folder / f"fsdp{dist.get_rank()}.json",
            )
        ),
    ]
    if importlib.util.find_spec("trl"):
        compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
        results["trl"] = distil_with_trl(student, teacher, folder / "trl", **compiled)
    if dist.get_rank() == 0:
        runs = {name: tuple(run) for name, run in results.items()}
        torch.save({**runs, "sharded": sharded, "refused": said}, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
