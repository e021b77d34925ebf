"""Batches of examples: which row predicts which token, and that padding and the other sequences change nothing."""

import pytest
import torch
from transformers import PreTrainedModel

from softprompt_kernels.compress.sources.sequences import Batch, Example, in_batches, total_targets
from softprompt_kernels.prompts import Prefix

CPU = torch.device("cpu")


def test_rows_and_labels_equal_those_of_a_loop_over_tokens(examples: list[Example]) -> None:
    batch = Batch.of(examples, CPU)
    width = max(len(e.input_ids) + len(e.output_ids) - 1 for e in examples)
    assert batch.input_ids.shape == (len(examples), width)
    rows, labels = [], []
    for index, example in enumerate(examples):
        sequence = example.input_ids + example.output_ids
        for position in range(len(sequence) - 1):
            assert batch.input_ids[index, position] == sequence[position]
            assert batch.attention_mask[index, position] == 1
            if position + 1 >= len(example.input_ids):
                rows.append(index * width + position)
                labels.append(sequence[position + 1])
        assert not batch.attention_mask[index, len(sequence) - 1 :].any()
    assert batch.target_rows.tolist() == rows
    assert batch.labels.tolist() == labels
    assert total_targets(examples) == len(labels)


def test_sequences_of_equal_length_need_no_mask() -> None:
    batch = Batch.of([Example((1, 2), (3, 4)), Example((5, 6, 7), (8,))], CPU)
    assert batch.attention_mask is None
    assert batch.input_ids.tolist() == [[1, 2, 3], [5, 6, 7]]


@pytest.mark.parametrize("prompted", [True, False])
def test_hidden_states_equal_those_of_each_sequence_alone(
    model: PreTrainedModel, context: Prefix, examples: list[Example], prompted: bool
) -> None:
    prefix = context if prompted else None
    together = Batch.of(examples, CPU).hidden(model, prefix)
    alone = torch.cat([Batch.of([example], CPU).hidden(model, prefix) for example in examples])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_hidden_states_without_prefix_equal_those_of_transformers(
    tiny_model_folder: object, model: PreTrainedModel, examples: list[Example]
) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, attn_implementation="eager")
    for example in examples:
        ids = torch.tensor([example.input_ids + example.output_ids])
        with torch.no_grad():
            expected = plain.base_model(ids).last_hidden_state[0, len(example.input_ids) - 1 : -1]
        torch.testing.assert_close(Batch.of([example], CPU).hidden(model, None), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 9, 16, 1000])
def test_groups_hold_every_example_once_and_keep_to_their_size(examples: list[Example], tokens: int) -> None:
    groups = list(in_batches(examples, tokens))
    assert sorted(index for group in groups for index in group) == list(range(len(examples)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(examples[i].length for i in group) <= tokens
    assert list(in_batches([], tokens)) == []
