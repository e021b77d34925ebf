"""The checks, sizes and views of a prefix."""

import pytest
import torch

from softprompt_kernels.prompts import Prefix


def prefix(rows: int = 2, length: int = 5, lengths: list[int] | None = None) -> Prefix:
    torch.manual_seed(0)
    # Layers of different head counts and dimensions, and values narrower than keys.
    layers = [
        (torch.randn(rows, 3, length, 8), torch.randn(rows, 3, length, 4)),
        (torch.randn(rows, 1, length, 6), torch.randn(rows, 1, length, 6)),
    ]
    return Prefix.of(layers, None if lengths is None else torch.tensor(lengths))


def test_sizes_are_those_of_the_tensors() -> None:
    bank = prefix(rows=2, length=5)
    assert (bank.num_layers, bank.rows, bank.length) == (2, 2, 5)
    assert bank.nbytes == 4 * (2 * 3 * 5 * (8 + 4) + 2 * 5 * (6 + 6))


def test_an_empty_prefix_is_legal() -> None:
    assert prefix(length=0).length == 0


def test_detach_shares_the_memory_and_drops_the_graph() -> None:
    key = torch.randn(1, 2, 3, 4, requires_grad=True)
    attached = Prefix.of([(key * 1, key * 2)])
    detached = attached.detach()
    assert not detached.layers[0][0].requires_grad
    assert detached.layers[0][1].data_ptr() == attached.layers[0][1].data_ptr()


def test_to_converts_keys_and_values_but_keeps_lengths_int64() -> None:
    half = prefix(lengths=[3, 5]).to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.lengths is not None and half.lengths.dtype == torch.int64
    moved = prefix(lengths=[3, 5]).to("meta")
    assert moved.device.type == "meta" and moved.lengths is not None and moved.lengths.device.type == "meta"


def test_float_is_fp32() -> None:
    key = torch.randn(1, 2, 3, 4)
    prefix = Prefix.of([(key.bfloat16(), key.bfloat16())])
    assert prefix.float().dtype == torch.float32
    assert torch.equal(prefix.float().layers[0][1], key.bfloat16().float())


def test_slice_keeps_the_tokens_and_clamps_the_lengths() -> None:
    bank = prefix(lengths=[1, 4])
    part = bank.slice(2, 5)
    assert part.length == 3 and part.lengths is not None and part.lengths.tolist() == [0, 2]
    assert torch.equal(part.layers[1][0], bank.layers[1][0][:, :, 2:5])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 6)])
def test_slice_outside_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="0 ≤ start ≤ stop ≤ 5"):
        prefix().slice(start, stop)


def test_layers_that_do_not_fit_are_refused_by_index() -> None:
    good = (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="empty"):
        Prefix(())
    with pytest.raises(ValueError, match=r"layers\[0\]"):
        Prefix.of([(torch.zeros(2, 3), torch.zeros(2, 3))])
    with pytest.raises(ValueError, match=r"layers\[1\].*\(1, 2, 5, 4\)"):
        Prefix.of([good, (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4))])
    with pytest.raises(ValueError, match=r"layers\[1\].*1 rows of 7 tokens"):
        Prefix.of([good, (torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4))])


@pytest.mark.parametrize(
    ("lengths", "what"),
    [
        (torch.tensor([1, 6]), "0 to 5"),
        (torch.tensor([-1, 5]), "0 to 5"),
        (torch.tensor([1]), r"shape \(2,\)"),
        (torch.tensor([1, 2], dtype=torch.int32), "int64"),
    ],
)
def test_lengths_out_of_range_are_refused(lengths: torch.Tensor, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Prefix(prefix().layers, lengths)


def test_stack_is_a_bank_of_all_rows_padded_to_the_longest() -> None:
    one, two = prefix(rows=1, length=5), prefix(rows=2, length=3, lengths=[1, 3])
    bank = Prefix.stack([one.slice(0, 0), one, two])
    assert (bank.rows, bank.length) == (4, 5)
    assert bank.lengths is not None and bank.lengths.tolist() == [0, 5, 1, 3]
    for (key, value), (k1, v1), (k2, v2) in zip(bank.layers, one.layers, two.layers, strict=True):
        assert torch.equal(key[1], k1[0]) and torch.equal(value[1], v1[0])
        assert torch.equal(key[2:, :, :3], k2) and torch.equal(value[2:, :, :3], v2)
        assert not key[2:, :, 3:].any() and not value[0].any()
    with pytest.raises(ValueError, match="prefixes: got"):
        Prefix.stack([])
    with pytest.raises(ValueError, match=r"prefixes: got \[2, 1\] layers"):
        Prefix.stack([one, Prefix(one.layers[:1])])
