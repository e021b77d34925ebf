"""SIGTERM and SIGHUP save a run like Ctrl-C, and leave the handlers of the process as they were."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from softprompt_kernels.compress import CompressConfig, Interrupted, compress
from softprompt_kernels.compress.distill.trainer import Trainer
from softprompt_kernels.compress.matching import match
from softprompt_kernels.compress.process.signals import SIGNALS, Terminated, signal_of, signals_as_interrupts

Make = Callable[..., CompressConfig]
ALL = [signal.SIGINT, *SIGNALS]

pytestmark = [
    pytest.mark.usefixtures("no_plot", "default_signals"),
    pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no signals of POSIX"),
]


def after(monkeypatch: pytest.MonkeyPatch, calls: int, owner: Any, name: str, number: int) -> None:
    """The call of a function after so many others first gets a signal."""
    function, left = getattr(owner, name), [calls]

    def signalled(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            signal.raise_signal(number)
        return function(*arguments)

    monkeypatch.setattr(owner, name, signalled)


@pytest.mark.parametrize("number", ALL, ids=str)
def test_a_signal_in_training_saves_the_last_step(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, recording_reporter: Any, number: int
) -> None:
    before = [signal.getsignal(each) for each in ALL]
    after(monkeypatch, 3, Trainer, "train_step", number)
    config, reporter = make_config(checkpoint_every=100), recording_reporter()
    with pytest.raises(Interrupted) as stop:
        compress(config)
    assert (stop.value.step, stop.value.signal) == (3, number)
    assert [signal.getsignal(each) for each in ALL] == before
    compress(config, reporter)
    assert "Resuming from step 3." in reporter.messages
    assert [signal.getsignal(each) for each in ALL] == before


@pytest.mark.parametrize("number", SIGNALS, ids=str)
def test_a_signal_in_matching_keeps_the_finished_layers(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(match, "GROUP_BYTES", 1)  # each layer is stored on its own
    after(monkeypatch, 1, match, "fit_layer", number)
    with pytest.raises(Interrupted) as stop:
        compress(make_config())
    assert (stop.value.unit, stop.value.step, stop.value.signal) == ("layer", 1, number)


def test_a_signal_in_another_stage_interrupts_like_ctrl_c(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "softprompt_kernels.compress.run.capture_context", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    )
    with pytest.raises(KeyboardInterrupt) as stop:
        compress(make_config())
    assert signal_of(stop.value) == signal.SIGTERM and str(stop.value) == "stopped by SIGTERM"
    assert json.loads((make_config().output / "run.json").read_text())


def test_a_signal_that_is_ignored_or_handled_already_stays_so() -> None:
    handled: list[int] = []
    kept = {signal.SIGHUP: signal.SIG_IGN, signal.SIGTERM: lambda number, _: handled.append(number)}  # nohup; a service
    before = {number: signal.signal(number, handler) for number, handler in kept.items()}
    try:
        with signals_as_interrupts():
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert handled == [signal.SIGTERM]
        assert {number: signal.getsignal(number) for number in kept} == kept
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_other_threads_have_no_handlers() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with signals_as_interrupts():
                assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


@pytest.mark.parametrize("first", SIGNALS, ids=str)
@pytest.mark.parametrize(("second", "code", "output"), [(signal.SIGTERM, -15, ""), (signal.SIGHUP, 0, "still here")])
def test_a_second_sigterm_ends_the_process_and_a_closing_terminal_sends_many(
    first: int, second: int, code: int, output: str
) -> None:
    program = f"""
import signal
from softprompt_kernels.compress.process.signals import Terminated, signals_as_interrupts
with signals_as_interrupts():
    try:
        signal.raise_signal({int(first)})
    except Terminated:
        signal.raise_signal({int(second)})
        print("still here", end="")
assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, output), done.stderr


def test_a_signal_in_the_last_save_loses_no_step(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    after(monkeypatch, 0, Trainer, "save", signal.SIGTERM)
    with pytest.raises(Interrupted) as stop:
        compress(make_config(checkpoint_every=100))
    assert (stop.value.step, stop.value.steps) == (5, 5)


def test_the_first_signal_is_raised_where_the_main_thread_is() -> None:
    with pytest.raises(Terminated), signals_as_interrupts():
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the signal was not raised")
