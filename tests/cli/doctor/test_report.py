"""`softprompt doctor` reports the actual state of the installation."""

import importlib.metadata

import pytest
import torch

from softprompt_kernels.ops import dispatch


@pytest.fixture
def versions(monkeypatch):
    """`versions(numpy="1.0")` sets the version that importlib.metadata returns for a package; None: not installed."""
    real = importlib.metadata.version

    def pretend(**changes: str | None) -> None:
        def version(name: str) -> str:
            if name not in changes:
                return real(name)
            if changes[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return str(changes[name])

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def line(text: str, name: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
    return found


def test_a_working_installation(run):
    result = run("doctor")
    assert result.exit_code == 0 and result.stdout.rstrip().endswith("This installation works.")
    for name in ("torch", "transformers", "numpy", "safetensors"):
        assert importlib.metadata.version(name) in line(result.stdout, name)
    backends = result.stdout.partition("Backends\n")[2].partition("Devices\n")[0]
    for record in dispatch.available_backends():
        assert record.detail in line(backends, record.name)
    assert f"threads: {torch.get_num_threads()}" in line(result.stdout, "processor")


def test_a_package_older_than_the_lowest_tested_version(run, versions):
    versions(transformers="4.50.0")
    result = run("doctor")
    assert result.exit_code == 1 and "This installation does not work. See: transformers." in result.stdout
    assert "accepted is >=5.23" in line(result.stdout, "transformers") and "pip install" in result.stdout


def test_a_missing_package(run, versions):
    versions(safetensors=None)
    result = run("doctor")
    assert result.exit_code == 1 and "missing" in line(result.stdout, "safetensors")


def test_a_missing_optional_package_is_not_an_error(run, versions):
    versions(peft=None)
    result = run("doctor")
    assert result.exit_code == 0
    assert 'missing (optional: pip install "peft>=' in line(result.stdout, "peft")


@pytest.mark.parametrize(("version", "remark"), [("2.13.0+cu130", "(tested)"), ("2.9.1", "(tested: 2.13.0)")])
def test_an_untested_torch_is_accepted_with_a_remark(run, versions, version, remark):
    versions(torch=version)
    result = run("doctor")
    assert result.exit_code == 0 and remark in line(result.stdout, "torch")


def test_an_unavailable_backend_says_how_to_get_it(run, monkeypatch):
    abacus = dispatch.Backend("abacus", "beads", {}, missing=lambda: "no beads here: buy some")
    monkeypatch.setattr(dispatch, "BACKENDS", (abacus, *dispatch.BACKENDS))
    result = run("doctor")
    assert result.exit_code == 0 and "not available: no beads here: buy some" in line(result.stdout, "abacus")


def test_without_any_backend_the_installation_does_not_work(run, monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", ())
    result = run("doctor")
    assert result.exit_code == 1 and "none is available" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "bfloat16"], "--dtype: needs --model"),
        (["--device", "cpu"], "--device: needs --model"),
        (["--tokens", 9], "--tokens: needs --model"),
        (["--model", "x", "--compile"], "--model: got --compile too, accepted is one of them"),
    ],
)
def test_options_that_would_do_nothing_are_refused(run, options, message):
    result = run("doctor", *options)
    assert result.exit_code == 2 and message in result.stderr
