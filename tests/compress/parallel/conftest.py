"""Runs a function on several ranks: children of this process, which have all its modules and models already."""

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

LONGEST = 60.0  # seconds until ranks are taken for stuck


class Ended(NamedTuple):
    """How a rank ended: its wait status, what its function returned, its traceback."""

    status: int
    value: Any
    error: str


@pytest.fixture
def on_ranks(tmp_path: Path, one_thread: None) -> Callable[..., list[Ended]]:
    """`on_ranks(2, function)` calls `function(rank)` on each rank and returns how the ranks ended."""

    def run(world: int, function: Callable[[int], Any]) -> list[Ended]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        files = [tmp_path / f"ended-{port}-{rank}.json" for rank in range(world)]
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                _child(rank, world, port, function, files[rank])
            children.append(child)
        statuses, end = {}, time.monotonic() + LONGEST
        while len(statuses) < world and time.monotonic() < end:
            for child in {*children} - {*statuses}:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    statuses[child] = status
            time.sleep(0.01)
        for child in {*children} - {*statuses}:
            os.kill(child, 9)
            os.waitpid(child, 0)
        texts = [json.loads(file.read_text()) if file.exists() else (None, "") for file in files]
        return [Ended(statuses.get(c, -1), *text) for c, text in zip(children, texts, strict=True)]

    return run


def _child(rank: int, world: int, port: int, function: Callable[[int], Any], file: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    value, error = None, ""
    try:
        value = function(rank)
    except BaseException:
        error = traceback.format_exc()
    file.write_text(json.dumps([value, error]))
    sys.stdout.flush()
    os._exit(0)
