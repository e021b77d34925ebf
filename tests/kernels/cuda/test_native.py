"""Launchers of the CUDA kernels: which GPUs a module has code for, the memory of a launch, and missing modules."""

import pytest
import torch

from softprompt_kernels.kernels.cuda import native

BUILT = "80;86;89;90;100;120"


@pytest.mark.parametrize(
    ("capability", "archs", "served"),
    [
        ((8, 0), BUILT, True),
        ((8, 9), "80;86", True),  # machine code for 8.6
        ((8, 7), BUILT, False),  # Tegra, a system on a chip
        ((8, 7), "80;87", True),
        ((10, 3), BUILT, True),
        ((12, 1), "80", True),  # PTX of the newest architecture of the module
        ((8, 0), "86", False),  # the module's code is for a later minor version
        ((9, 0), "80;100", False),
        ((7, 5), BUILT, False),
    ],
)
def test_a_module_serves_later_minor_versions_and_every_gpu_newer_than_its_ptx(capability, archs, served):
    reason = native._unsupported_arch(capability, archs)
    assert (reason is None) == served
    if not served:
        assert f"the GPU is of sm_{capability[0]}{capability[1]}" in reason
        assert f"SOFTPROMPT_CUDA_ARCHS={capability[0]}{capability[1]}" in reason


def test_memory_ranges_are_those_of_the_tensors_without_gaps():
    storage = torch.empty(100)
    first = storage.data_ptr()
    rows = storage[:40].view(2, 20)[:, 3:5]  # numbers 3 to 24
    assert native._memory_ranges([rows, None], [storage[50:60]]) == [
        (first + 4 * 3, first + 4 * 25, False),
        (first + 4 * 50, first + 4 * 60, True),
    ]
    assert native._memory_ranges([storage[:0]], []) == []


def test_overlapping_tensors_are_one_range_that_is_writable_if_one_of_them_is():
    packed = torch.empty(4, 3, 8)
    query, key = packed[:, 0], packed[:, 1]
    assert [each[1] - each[0] for each in native._memory_ranges([query, key], [])] == [4 * (3 * 24 + 16)]
    assert [each[2] for each in native._memory_ranges([query], [key])] == [True]


@pytest.mark.parametrize(("launcher", "variable"), [(native.GpuLauncher(), "CUDA"), (native.HostLauncher(), "SIMT")])
def test_a_module_that_was_not_built_says_how_to_build_it(launcher, variable, monkeypatch):
    monkeypatch.setattr(launcher, "_module_name", "softprompt_kernels.kernels.cuda._nowhere")
    assert "its module was not built" in launcher.missing() and f"SOFTPROMPT_{variable}=1" in launcher.missing()
    with pytest.raises(RuntimeError, match="its module was not built"):
        launcher.module()


def test_a_module_without_a_device_quotes_the_error_of_cuda():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    missing = native.DEVICE.missing()
    if "was not built" in missing:
        pytest.skip(f"the cuda backend: {missing}")
    assert "it cannot run here" in missing and "driver" in missing


def test_tensors_of_other_devices_and_dtypes_are_refused_by_name():
    assert "key is on cpu, and it serves NVIDIA GPUs" in native.DEVICE.unsupported_tensor("key", torch.ones(1))
    double = torch.ones(1, dtype=torch.float64)
    assert "key is torch.float64, and it computes in fp32" in native.HOST.unsupported_tensor("key", double)
    assert "key is on meta" in native.HOST.unsupported_tensor("key", torch.empty(1, device="meta"))
