"""Recall of key-value pairs: 8 tokens of a KV prompt take the place of a context that is known to hold seven pairs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt_kernels.compress import ChatFormat, CompressConfig, compress, load_model
from softprompt_kernels.models import Head, capture, head_of, prompted_hidden
from tests.compress.distill.recall_model import RecallTask, save_recall_model

Recall = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.usefixtures("no_plot")
TRAINED = {"init": "strided", "learning_rate": 0.1, "steps": 150, "batch_size": 28}


@pytest.fixture(scope="module")
def recall_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_recall_model(tmp_path_factory.mktemp("recall") / "model")


@pytest.fixture
def recall(recall_folder: Path, tmp_path: Path) -> Recall:
    """`recall(steps=0)`: the figures of held-out queries of a compression into 8 tokens."""

    def call(task: RecallTask | None = None, **options: Any) -> dict[str, Any]:
        settings = {
            "model": str(recall_folder),
            "output": tmp_path / "run",
            "tokens": 8,
            "selfstudy": 0,
            "new_tokens": 1,
            "device": "cpu",
            **(task or RecallTask.of()).write(tmp_path),
        }
        return compress(CompressConfig.model_validate(settings | options))["heldout"]

    return call


def test_the_model_recalls_with_the_context_alone_and_leaves_a_tail_that_depends_on_it(recall_folder: Path) -> None:
    model, tokenizer = load_model(str(recall_folder), "float32", "cpu")
    chat, task = ChatFormat(tokenizer), RecallTask.of(3)
    context = capture(model, chat.context_ids(task.context))
    tails = []
    for query in task.heldout:
        ids, value = (
            torch.tensor([chat.query_ids(query)]),
            tokenizer.convert_tokens_to_ids(task.pairs[query.split()[1]]),
        )
        with_context, without = (
            head_of(model).logits(prompted_hidden(model, ids, prefix)[0, -1]).softmax(-1) for prefix in (context, None)
        )
        assert int(with_context.argmax()) == value
        assert 0.25 < float(with_context[value]) < 0.6
        assert float(without[value]) < 0.05
        tails.append(with_context.clone())
        tails[-1][value] = 0
    for tail in tails:
        assert float(tail.topk(5).values.sum()) < 0.6 * float(tail.sum()), "the tail is spread over many tokens"
    likeness = torch.corrcoef(torch.stack(tails[::2]))
    assert float(likeness.fill_diagonal_(0).max()) < 0.7, "another value has another tail"


def test_matching_alone_recovers_the_pairs(recall: Recall) -> None:
    assert recall(steps=0)["recovered"] >= 0.9


@pytest.mark.parametrize(
    ("objective", "least", "options"),
    [("kl", 0.95, {}), ("jsd", 0.9, {}), ("nll", 0.9, {"samples": 32, "batch_size": 112})],
)
def test_training_end_to_end_recovers_the_pairs(
    recall: Recall, objective: str, least: float, options: dict[str, Any]
) -> None:
    figures = recall(**(TRAINED | {"objective": objective} | options))
    assert figures["kl_untrained"] > 0.5 * figures["kl_none"], "nothing is known before the training"
    assert figures["recovered"] >= least


def top_5_without_the_tail(student: Tensor, teacher: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Σ_v p_t(v) (log p_t(v) − log p_s(v)) over the teacher's five most probable tokens, as cached top-k
    log-probabilities give it. The rest of the distribution, more than a third of it here, has no say."""
    log_p, chosen = head.logits(teacher).log_softmax(-1).topk(5)
    return (log_p.exp() * (log_p - head.logits(student).log_softmax(-1).gather(-1, chosen))).sum(-1)


def test_the_top_tokens_without_the_tail_ruin_the_distribution_and_the_agreement_hides_it(recall: Recall) -> None:
    figures = recall(**TRAINED, objective=top_5_without_the_tail)
    assert figures["top1_agreement"] >= 0.9
    assert figures["recovered"] < 0.5
