"""A user's own loss: what it is given, and what is refused before a run begins."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress import CompressConfig, Interrupted, compress
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.own_loss import load_own_loss
from softprompt_kernels.compress.sources.sequences import Batch, Example
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import Head, head_of
from softprompt_kernels.prompts import Prefix

pytestmark = pytest.mark.usefixtures("no_plot")
CPU = torch.device("cpu")
LOSSES = """
import torch

number = 3

def forward_kl(student, teacher, head, labels):
    q, p = (head.logits(rows).float().log_softmax(-1) for rows in (student, teacher))
    return (p.exp() * (p - q)).sum(-1)

def mean(*arguments):
    return forward_kl(*arguments).mean()

def integers(*arguments):
    return forward_kl(*arguments).long()

def listed(*arguments):
    return forward_kl(*arguments).tolist()

def squeezed(*arguments):
    return forward_kl(*arguments).squeeze()

def infinite(*arguments):
    return forward_kl(*arguments) / 0

def root(student, teacher, head, labels):
    return (student - student.detach()).norm(dim=-1).sqrt()

def detached(student, *rest):
    return forward_kl(student.detach(), *rest)

def two(student, teacher):
    return forward_kl(student, teacher, None, None)
"""


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the module `mylosses` in the current folder."""
    file = tmp_path / "mylosses.py"
    file.write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    yield file
    sys.modules.pop("mylosses", None)


def plain_kl(student: Tensor, teacher: Tensor, head: Head, labels: Tensor) -> Tensor:
    """The forward KL by its formula."""
    q, p = (head.logits(rows).log_softmax(-1) for rows in (student, teacher))
    return (p.exp() * (p - q)).sum(-1) + 0 * labels


@pytest.mark.parametrize("weights", ["uniform", "entropy", "student"])
def test_the_kl_as_an_own_loss_is_the_objective_kl(
    make_targets: Any, model: PreTrainedModel, context: Prefix, examples: list[Example], weights: Any
) -> None:
    chosen, head = [4, 0, 3], head_of(model)
    batch = Batch.of([examples[i] for i in chosen], CPU)
    student = batch.hidden(model, context.slice(0, 5)).requires_grad_()
    found = []
    for objective in (
        Objective("kl", head, token_weights=weights),
        Objective("mine", head, token_weights=weights, function=plain_kl),
    ):
        loss, weight = objective.loss(student, batch.labels, chosen, make_targets(form=objective.form))
        found.append((loss, torch.tensor(weight), torch.autograd.grad(loss, student)[0]))
    for expected, own in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=2e-4, atol=1e-5)


def test_a_run_with_an_own_loss_ends_as_one_with_the_objective(make_config: Any, losses: Path, tmp_path: Path) -> None:
    before = list(sys.path)
    own = compress(make_config(objective="mylosses:forward_kl", steps=3))
    assert sys.path == before
    expected = compress(make_config(steps=3, output=tmp_path / "other"))
    assert own["heldout"]["kl_prompt"] == pytest.approx(expected["heldout"]["kl_prompt"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_to_be_found:f", r"cannot import 'nowhere_to_be_found' \(ModuleNotFoundError: .*current folder"),
        ("mylosses:nothing", r"'mylosses' has no 'nothing', accepted is the name of a function in .*mylosses\.py"),
        ("mylosses:number", r"mylosses:number is of type int, accepted is a function: function\(student"),
        ("mylosses:mean", r"mean returns float32 of shape \[\], accepted is a floating tensor of shape \[4\]"),
        ("mylosses:integers", r"integers returns int64 of shape \[4\], accepted is a floating"),
        ("mylosses:listed", r"listed returns list, accepted is a floating"),
        ("mylosses:squeezed", r"squeezed returns float32 of shape \[\], accepted is a floating tensor of shape \[1\]"),
        ("mylosses:infinite", r"infinite gives losses that are not finite"),
        ("mylosses:root", r"root gives gradients that are not finite"),
        ("mylosses:detached", r"the losses of detached do not depend on the student"),
        (
            "mylosses:two",
            r"two fails on . tokens \(TypeError: .*4 were given\), accepted is function\(student \[n, d\]",
        ),
    ],
)
def test_a_function_that_is_no_loss_is_refused_before_any_work(
    make_config: Any, losses: Path, name: str, message: str
) -> None:
    config = make_config(objective=name)
    with pytest.raises(SoftPromptError, match=f"^objective: {message}"):
        compress(config)
    assert not config.output.exists()


@pytest.mark.parametrize("content", ["raise RuntimeError('not today')", "import sys; sys.exit(3)", "def f(:"])
def test_a_module_that_cannot_be_imported_is_named(losses: Path, content: str) -> None:
    losses.write_text(content)
    with pytest.raises(SoftPromptError, match=r"^objective: cannot import 'mylosses' \((RuntimeError|SystemExit|Synt)"):
        load_own_loss("mylosses:f")


def test_a_changed_function_is_another_run(make_config: Any, losses: Path, recording_reporter: Any) -> None:
    config = make_config(objective="mylosses:forward_kl")
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Training", 3))
    text = losses.read_text()
    losses.write_text(text.replace("(p - q)", "(q - p)"))
    with pytest.raises(SoftPromptError, match="holds another run, which differs in objective;"):
        compress(config)
    losses.write_text(text)
    reporter = recording_reporter()
    compress(config, reporter)
    assert "Resuming from step 3." in reporter.messages


@pytest.mark.parametrize("options", [{"nll_weight": 0.5}, {"temperature": 2.0}], ids=str)
def test_what_is_for_the_function_to_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SoftPromptError, match=r"got .* with a loss of your own, accepted is"):
        Objective("mine", Head(torch.zeros(3, 2)), function=plain_kl, **options)


def test_a_configuration_takes_a_function_by_its_name(make_config: Callable[..., CompressConfig]) -> None:
    assert make_config(objective=plain_kl).objective == f"{__name__}:plain_kl"
    with pytest.raises(ValueError, match=r"<lambda> cannot be found by its name, accepted is a function at the top"):
        make_config(objective=lambda *_: None)
