"""The losses for torchtune and torchtitan, called as their recipes do; neither package is needed."""

import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from examples import torchtitan_loss, torchtune_loss
from tests.examples.conftest import time_ratio


def plain_losses(folders, tokens, labels, valid, steps=5) -> list[float]:
    """The same steps with F.kl_div on logits."""
    model, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        with torch.no_grad():
            log_p = functional.log_softmax(teacher(tokens).logits[labels != -100], -1)
        log_q = functional.log_softmax(model(tokens).logits[labels != -100], -1)
        loss = functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / valid
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("hidden", [True, False])
def test_torchtune_gives_the_losses_of_the_plain_loop(folders, hidden) -> None:
    losses = torchtune_loss.main(*folders, hidden=hidden)
    tokens = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    labels = torch.hstack([tokens[:, 1:], torch.full((4, 1), -100)])
    assert losses == pytest.approx(plain_losses(folders, tokens, labels, 4 * 31), rel=1e-4)


def test_torchtitan_gives_the_losses_of_the_plain_loop(folders) -> None:
    losses = torchtitan_loss.main(*folders)
    tokens = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[0, :9] = -100
    assert losses == pytest.approx(plain_losses(folders, tokens[:, :-1], labels, 4 * 32 - 9), rel=1e-4)


def torchtune_value(student, teacher, labels, normalize=True) -> torch.Tensor:
    """−Σ p_t log p_s over the tokens with a label, and so larger by the teacher's entropy."""
    rows = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)[labels != -100]
    return rows.mean() if normalize else rows.sum()


@pytest.mark.parametrize("normalize", [True, False])
def test_torchtunes_loss_differs_by_the_teachers_entropy_alone(normalize) -> None:
    student, teacher = torch.randn(2, 6, 50, dtype=torch.float64)
    student.requires_grad_()
    labels = torch.tensor([1, -100, 3, 4, -100, 0])
    ours = torchtune_loss.ForwardKLLoss()(student, teacher, labels, normalize)
    theirs = torchtune_value(student, teacher, labels, normalize)
    torch.testing.assert_close(theirs - ours, torchtune_value(teacher, teacher, labels, normalize))
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)))
    assert torchtune_loss.ForwardKLLoss()(student, teacher, torch.full((6,), -100)) == 0


def test_torchtunes_chunks_are_the_whole() -> None:
    """5 tokens in 3 chunks: the chunks are of unequal length."""
    student, teacher = torch.randn(2, 4, 5, 50)
    labels = torch.randint(0, 50, (4, 5))
    labels[1, 2:] = -100
    loss = torchtune_loss.ForwardKLLoss(num_output_chunks=3)
    whole = loss(student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss(student.chunk(3, dim=1), teacher.chunk(3, dim=1), labels), whole)


def test_a_tied_output_layer_of_torchtune(folders) -> None:
    """torchtune's TiedLinear holds the module whose weight it uses."""

    class TiedLinear:
        def __init__(self, module) -> None:
            self.tied_module = module

    model, teacher = (torchtune_loss.Decoder(AutoModelForCausalLM.from_pretrained(folder)) for folder in folders)
    loss, tied_loss = torchtune_loss.LinearForwardKLLoss(), torchtune_loss.LinearForwardKLLoss()
    loss.set_model_output(model, teacher)
    tied_loss.heads = (TiedLinear(model.output), teacher.output)
    hidden, labels = torch.randn(2, 3, 32), torch.randint(0, 300, (2, 3))
    assert tied_loss(hidden, hidden, labels) == loss(hidden, hidden, labels)
    assert not list(loss.parameters()) and not loss.state_dict()


def test_a_quantised_or_sharded_weight_is_refused_by_torchtunes() -> None:
    class Quantised(torch.nn.Parameter):
        pass

    head = torch.nn.Linear(4, 9, bias=False)
    head.weight = Quantised(head.weight.detach())
    with pytest.raises(ValueError, match="output: got a weight of type Quantised, accepted is an ordinary tensor"):
        torchtune_loss.output_weight(head)


def test_a_loss_that_was_not_set_up_says_so() -> None:
    hidden = torch.randn(1, 2, 4)
    with pytest.raises(ValueError, match="set_model_output must be called"):
        torchtune_loss.LinearForwardKLLoss()(hidden, hidden, torch.zeros(1, 2).long())
    with pytest.raises(ValueError, match="set_lm_head and watch must be called"):
        torchtitan_loss.DistillationLoss()(hidden, torch.zeros(1, 2).long())


def test_a_softcap_and_a_scale_are_served_by_name() -> None:
    states = torch.randn(2, 1, 6, 8, dtype=torch.float64)
    head, labels = torch.nn.Linear(8, 50, bias=False).double(), torch.tensor([[1, -100, 3, 4, -100, 0]])
    linear = torchtune_loss.LinearForwardKLLoss(softcap=2.0, logit_scale=0.5)
    linear.heads = (head, head)
    student, teacher = (2.0 * torch.tanh(head(state) * 0.5 / 2.0) for state in states)
    expected = torchtune_loss.ForwardKLLoss()(student, teacher, labels)
    torch.testing.assert_close(linear(*states, labels), expected)


class Adapted(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 9, bias=False)
        self.adapter = torch.nn.Linear(4, 9, bias=False)


@pytest.mark.parametrize(
    ("head", "got"),
    [
        (torch.nn.Linear(4, 9), r"Linear with parameters \['weight', 'bias'\]"),
        (Adapted(), r"Adapted with parameters \['weight', 'adapter.weight'\]"),
        (torch.nn.Embedding(9, 4), r"Embedding with parameters \['weight'\]"),
    ],
    ids=["bias", "adapter", "other"],
)
def test_other_heads_are_refused_before_the_first_step(head, got) -> None:
    plain, other = (types.SimpleNamespace(output=one, lm_head=one) for one in (torch.nn.Linear(4, 9, bias=False), head))
    linear = torchtune_loss.LinearForwardKLLoss()
    for pair in ((plain, other), (other, plain)):
        with pytest.raises(ValueError, match=f"output: got a {got}, accepted are nn.Linear with a weight alone"):
            linear.set_model_output(*pair)
    assert not hasattr(plain, "skip_output_layer")
    with pytest.raises(ValueError, match=f"lm_head: got a {got}, accepted is nn.Linear with a weight"):
        torchtitan_loss.DistillationLoss().set_lm_head(head)
    with pytest.raises(ValueError, match=f"lm_head: got a {got}, accepted is nn.Linear with a weight"):
        torchtitan_loss.DistillationLoss().watch(torch.nn.Identity(), other)


@pytest.mark.parametrize("recipe", [torchtune_loss, torchtitan_loss], ids=["torchtune", "torchtitan"])
def test_a_transformers_model_with_a_softcap_is_refused(recipe) -> None:
    config = Gemma2Config(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=30.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"logits have softcap 30.0 and scale 1.0, accepted is neither"):
        recipe.Decoder(Gemma2ForCausalLM(config))


@pytest.mark.parametrize("recipe", [torchtune_loss, torchtitan_loss], ids=["torchtune", "torchtitan"])
def test_runs_from_the_command_line(folders, monkeypatch, capsys, recipe) -> None:
    monkeypatch.setattr(sys, "argv", [Path(recipe.__file__).name, *map(str, folders)])
    runpy.run_path(recipe.__file__, run_name="__main__")
    losses = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5 and losses[-1] < losses[0]


@pytest.mark.parametrize("hidden", [True, False])
def test_at_least_as_fast_with_a_real_vocabulary(hidden) -> None:
    states = torch.randn(2, 1, 128, 64)
    states.requires_grad_()
    heads = [torch.nn.Linear(64, 32768, bias=False).requires_grad_(False) for _ in range(2)]
    labels = torch.randint(0, 32768, (1, 128))
    linear = torchtune_loss.LinearForwardKLLoss()
    linear.heads = tuple(heads)

    def ours() -> None:
        if hidden:
            linear(*states, labels).backward()
        else:
            logits = [head(state).flatten(0, 1) for head, state in zip(heads, states, strict=True)]
            torchtune_loss.ForwardKLLoss()(logits[0], logits[1].detach(), labels.flatten()).backward()

    def theirs() -> None:
        logits = [head(state).flatten(0, 1) for head, state in zip(heads, states, strict=True)]
        torchtune_value(logits[0], logits[1].detach(), labels.flatten()).backward()

    assert time_ratio(ours, theirs) < 1
