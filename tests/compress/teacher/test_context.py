"""A captured context, and one that follows a prompt."""

import pytest
import torch
from transformers import PreTrainedModel

from softprompt_kernels.compress.teacher import context as module
from softprompt_kernels.compress.teacher.context import capture_context
from softprompt_kernels.models import prompted_hidden


def test_a_context_behind_a_prompt_is_the_same_as_both_in_one_piece(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CAPTURE_TOKENS", 4)
    ids = torch.randint(0, 250, (1, 17), generator=torch.Generator().manual_seed(1))
    whole = capture_context(model, ids)
    found = capture_context(model, ids[:, 6:], before=capture_context(model, ids[:, :6]))
    assert found.length == 17
    query = torch.tensor([[3, 1, 2]])
    torch.testing.assert_close(prompted_hidden(model, query, found), prompted_hidden(model, query, whole))
