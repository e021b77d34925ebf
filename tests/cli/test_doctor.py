"""`softprompt doctor` reports what is here, not what somebody wrote down."""

import importlib.metadata

import pytest
import torch

from softprompt_kernels.ops import dispatch


@pytest.fixture
def versions(monkeypatch):
    """`versions(numpy="1.0")`: what importlib.metadata says of a package; None: not installed."""
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


def test_a_working_installation_is_usable(run):
    result = run("doctor")
    assert result.exit_code == 0 and result.stdout.rstrip().endswith("Usable.")
    for name in ("torch", "transformers", "numpy", "safetensors"):
        assert importlib.metadata.version(name) in line(result.stdout, name)
    backends = result.stdout.partition("Backends\n")[2].partition("Devices\n")[0]
    for record in dispatch.available_backends():
        assert record.detail in line(backends, record.name)
    assert f"threads: {torch.get_num_threads()}" in line(result.stdout, "processor")


def test_a_package_older_than_any_that_was_tried(run, versions):
    versions(transformers="4.50.0")
    result = run("doctor")
    assert result.exit_code == 1 and "Not usable: see transformers." in result.stdout
    assert "accepted is >=5.23" in line(result.stdout, "transformers") and "pip install" in result.stdout


def test_a_package_that_is_missing(run, versions):
    versions(safetensors=None)
    result = run("doctor")
    assert result.exit_code == 1 and "missing" in line(result.stdout, "safetensors")


def test_an_optional_package_that_is_missing_keeps_nothing_from_working(run, versions):
    versions(peft=None)
    result = run("doctor")
    assert result.exit_code == 0
    assert 'missing (optional, pip install "softprompt-kernels[peft]")' in line(result.stdout, "peft")


@pytest.mark.parametrize(("version", "word"), [("2.13.0+cu130", ", tried"), ("2.9.1", "untried")])
def test_another_torch_is_named_untried_but_kept(run, versions, version, word):
    versions(torch=version)
    result = run("doctor")
    assert result.exit_code == 0 and word in line(result.stdout, "torch")


def test_a_backend_that_is_missing_says_how_to_get_it(run, monkeypatch):
    abacus = dispatch.Backend("abacus", "beads", {}, missing=lambda: "no beads here: buy some")
    monkeypatch.setattr(dispatch, "BACKENDS", (abacus, *dispatch.BACKENDS))
    result = run("doctor")
    assert result.exit_code == 0 and "not here: no beads here: buy some" in line(result.stdout, "abacus")


def test_no_backend_at_all_is_not_usable(run, monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", ())
    result = run("doctor")
    assert result.exit_code == 1 and "none can run here" in result.stdout
