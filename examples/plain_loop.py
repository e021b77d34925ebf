"""Train a KV prompt in a plain PyTorch loop, against the same model with the full text.

    loss = 1/T · Σ_tokens KL( Pr(·|text, x<) ‖ Pr(·|σ, x<) )        T: the tokens of a step, without padding

The teacher runs once. Of each token it leaves d + 1 numbers, its moments, from which the KL is exact if the head is
linear. A step runs the student and 2 GEMMs with the head, and stores no logits. Take over the lines marked `ours`.

    python -m examples.plain_loop MODEL TEXT OUTPUT
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from softprompt_kernels import KVPrompt, TeacherMoments, linear_kl_div_from_moments, teacher_moments
from softprompt_kernels.models import Head, capture, head_of, prefix_of, prepare, prompted_hidden
from softprompt_kernels.prompts import EmbeddingPrompt, save

Example = tuple[Tensor, Tensor]  # token ids [M], and where their moments are in the table, [M]; a batch: [B, M]
Prompt = KVPrompt | EmbeddingPrompt | DistributedDataParallel
PADDING = -1  # in place of such a row


def linear_head(model: PreTrainedModel) -> Head:
    """The head of a model, for moments."""
    head = head_of(model)  # ours
    if head.softcap is not None:
        raise ValueError(
            f"model: its head has a softcap of {head.softcap}, accepted is none: keep the teacher's hidden states "
            "instead of moments, and use linear_kl_div with softcap"
        )
    return head


@torch.no_grad()
def teach(model: PreTrainedModel, text: Tensor, sequences: Sequence[Tensor]) -> TeacherMoments:
    """The moments of all tokens of `sequences`, ids `[M]` each, behind `text [1, C]`."""
    prepare(model)  # ours
    head, context = linear_head(model), capture(model, text)  # ours: the text is read once
    hidden = torch.cat([prompted_hidden(model, ids[None], context)[0] for ids in sequences])  # ours
    return teacher_moments(hidden, head.weight, bias=head.bias, logit_scale=head.logit_scale)  # ours


def numbered(sequences: Sequence[Tensor]) -> list[Example]:
    """The sequences with their rows in the table that `teach` returns."""
    sizes = [len(ids) for ids in sequences]
    rows = torch.arange(sum(sizes), device=sequences[0].device).split(sizes)
    return list(zip(sequences, rows, strict=True))


def collate(examples: Sequence[Example]) -> Example:
    """A batch: ids and rows, both `[B, M]`, padded on the right."""
    ids, rows = zip(*examples, strict=True)
    return pad_sequence(list(ids), batch_first=True), pad_sequence(list(rows), batch_first=True, padding_value=PADDING)


def loss_sum(model: PreTrainedModel, prompt: Prompt, moments: TeacherMoments, batch: Example) -> Tensor:
    """The KL of a batch, summed over its tokens."""
    ids, rows = batch
    real, head = rows != PADDING, linear_head(model)
    hidden = prompted_hidden(model, ids, prefix_of(model, prompt), attention_mask=real)  # ours
    return linear_kl_div_from_moments(  # ours
        hidden[real],
        moments[rows[real]],
        head.weight,
        bias=head.bias,
        logit_scale=head.logit_scale,
        reduction="sum",
    )


def train(
    model: PreTrainedModel,
    prompt: Prompt,
    examples: Sequence[Example],
    moments: TeacherMoments,
    *,
    epochs: int = 1,
    batch_size: int = 4,
    accumulate: int = 1,
    learning_rate: float = 2e-2,
) -> list[float]:
    """Train `prompt` in place, `accumulate` batches a step. Returns the mean loss of each step, in nats per token."""
    dataset = cast(Dataset[Example], examples)  # a DataLoader takes any sequence
    loader = DataLoader(dataset, batch_size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(prompt.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(epochs):
        batches = list(loader)
        for start in range(0, len(batches), accumulate):
            step = batches[start : start + accumulate]
            tokens = sum(int((rows != PADDING).sum()) for _, rows in step)  # of the whole step: as one large batch
            loss = 0.0
            for batch in step:
                part = loss_sum(model, prompt, moments, batch) / tokens
                part.backward()
                loss += part.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
    return losses


def passages(text: Tensor, length: int = 64) -> list[Tensor]:
    """Training sequences: the passages of `text [1, C]`. Questions about the text, with answers, teach more."""
    return list(text[0].split(length))


def first_tokens(model: PreTrainedModel, text: Tensor, tokens: int) -> KVPrompt:
    """The prompt to start from: keys and values of the first tokens of `text [1, C]`."""
    prepare(model)  # ours
    return KVPrompt.from_prefix(capture(model, text[:, :tokens]))  # ours


def load(model: str, text: str) -> tuple[PreTrainedModel, Tensor]:
    """The frozen model of a folder, and the ids `[1, C]` of a text file."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().requires_grad_(False).to(device)
    words = Path(text).read_text(encoding="utf-8")
    return loaded, AutoTokenizer.from_pretrained(model)(words, return_tensors="pt").input_ids.to(device)


def arguments(description: str) -> argparse.Namespace:
    """The command line of these recipes."""
    parser = argparse.ArgumentParser(description=description)
    for name, what in (("model", "folder of a model"), ("text", "text file"), ("output", "folder for the prompt")):
        parser.add_argument(name, help=what)
    return parser.parse_args()


def main() -> None:
    options = arguments("Train a KV prompt of 16 tokens for a text.")
    model, text = load(options.model, options.text)
    prompt, sequences = first_tokens(model, text, 16), passages(text)
    losses = train(model, prompt, numbered(sequences), teach(model, text, sequences), epochs=4)
    save(options.output, prompt, model=model)
    print(f"KL per token in the first step {losses[0]:.4f}, in the last {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
