"""`python -m benchmarks.serve`: many clients of `softprompt serve` at once, for a minute.

    one client    asks every question, one at a time: what it gets is what the others must get
    one client    asks again for a while: the rate of one at a time
    a client      is killed in the middle of an answer: its place is free after how long
    64 clients    ask for a minute: wrong answers, rate, and the server's memory at a quarter of the time and at the end

The server is a process of its own. Answers are greedy. Questions whose answers have two tokens within 1e-3 nats at some
step are left out before anything is compared: rounding, which depends on the batch, may decide between these.
Exits with 1 if an answer is wrong, the rates differ by less than 3×, or memory grows by more than a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.serve.clients import Count, Question, killed_client, known_answers, load, occupied
from benchmarks.serve.model import prompts_of, random_model
from softprompt_kernels.cli.quiet import quiet_libraries

WORDS = ("Who", "Where", "When", "Why", "What", "How", "Whose", "red", "river", "house", "goose", "cat", "seven")


def main() -> int:
    """Run, print, and judge."""
    options = arguments()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model" if options.model is None else options.model
        if options.model is None:
            random_model(model, options.layers, options.width)
        names = prompts_of(model, folder / "prompts", options.prompts)
        questions = [
            Question(names[i % len(names)], f"{WORDS[i % 7]} {WORDS[i % 13]} {i}?", options.tokens)
            for i in range(4 * options.clients)
        ]
        with server(model, folder / "prompts", options.clients) as (address, process):
            return judged(measure(address, psutil.Process(process.pid), questions, options))


@dataclass(frozen=True)
class Measured:
    """What `measure` found: two loads, bytes of memory early and late, and places that are still taken."""

    alone: Count
    together: Count
    memory: tuple[int, int]
    taken: int


def measure(address: str, process: psutil.Process, questions: list[Question], options: argparse.Namespace) -> Measured:
    """The four parts, in their order."""
    known, ties = asyncio.run(known_answers(address, questions, options.clients))
    print(f"{len(known)} questions to {options.prompts} prompts, {options.tokens} tokens each; {ties} with near ties")
    alone = asyncio.run(load(address, known, 1, options.seconds / 4))
    show("one client", alone)
    seconds = killed_client(address, known[0].model, options.long)
    print(f"a killed client's place was free after {1000 * seconds:.0f} ms")
    memory = [process.memory_info().rss]
    timer = threading.Timer(options.seconds / 4, lambda: memory.append(process.memory_info().rss))
    timer.start()
    together = asyncio.run(load(address, known, options.clients, options.seconds))
    timer.cancel()
    memory.append(process.memory_info().rss)
    show(f"{options.clients} clients", together)
    return Measured(alone, together, (memory[-2], memory[-1]), occupied(address))


def judged(found: Measured) -> int:
    """Print what was found. 0 if all is well, else 1."""
    early, late = found.memory
    print(f"memory of the server: {early >> 20} MiB after a quarter of the time, {late >> 20} MiB at the end")
    wrong, ratio = [*found.alone.wrong, *found.together.wrong], found.together.rate / found.alone.rate
    for question, text in wrong[:3]:
        print(f"wrong: {question}\n  got {text!r}")
    print(f"{len(wrong)} wrong answers, {ratio:.1f}× the rate, {found.taken} places taken")
    return int(bool(wrong) or ratio < 3 or late > 1.1 * early or found.taken > 0)


def show(who: str, count: Count) -> None:
    """One line."""
    print(f"{who}: {count.answers} answers, {len(count.wrong)} wrong, {count.rate:.0f} tokens/s", flush=True)


@contextmanager
def server(model: Path, prompts: Path, clients: int, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """`softprompt serve` in a process of its own, on a free port. Its address, and the process."""
    code = "from softprompt_kernels.cli import main; main()"
    words = ["serve", "--model", model, "--prompts", prompts, "--port", 0, "--batch-size", clients, *options]
    command = [sys.executable, "-c", code, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"Serving on (\S+)", line):
                break
        else:
            raise RuntimeError(f"the server has not started: {''.join(said)}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
        try:
            yield found[1], process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def arguments() -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description="Load on `softprompt serve`.")
    parser.add_argument("--seconds", type=float, default=60, help="of the load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--long", type=int, default=1000, help="tokens that the client asks for that is killed")
    parser.add_argument("--layers", type=int, default=6, help="of the random model")
    parser.add_argument("--width", type=int, default=256, help="of the random model, a multiple of 64")
    parser.add_argument("--model", type=Path, help="the folder of another model")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
