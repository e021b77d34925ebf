"""Chooses a configuration by timing the candidates on the device, if the user asks for it.

SOFTPROMPT_TRITON_TUNE=1 turns tuning on. Without it, for tensors without data and in the interpreter, the first
candidate is used, which is the shipped one. The choice is kept in a JSON file, so that a device is timed only once:

    SOFTPROMPT_CACHE_DIR, or else XDG_CACHE_HOME/softprompt-kernels, or else ~/.cache/softprompt-kernels
    triton-tuning.json: {"version": ..., "chosen": {key: {"candidate": index, "of": digest, "milliseconds": ...}}}

A key names the kernel, the device, the dtype and the class of shapes. The version is that of this package, Triton and
torch. A file that has another version or cannot be read is ignored with one warning, and replaced. An entry is tuned
again if its candidates have changed since. A file is replaced as a whole, so no reader sees half of it. If two
processes tune at the same time, the later one adds its entries to those of the earlier one. Nothing is timed while a
CUDA graph is captured.
"""

import hashlib
import importlib.metadata
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from softprompt_kernels.kernels.triton.launch import Launch, run_all
from softprompt_kernels.kernels.triton.runtime import interpreting

Config = TypeVar("Config")
Timer = Callable[[Callable[[], None]], float]

_DISTRIBUTIONS = ("softprompt-kernels", "triton", "torch")
_lock = threading.Lock()


def enabled() -> bool:
    """Whether configurations are tuned on the device."""
    return os.environ.get("SOFTPROMPT_TRITON_TUNE") == "1"


def shape_class(*sizes: int) -> str:
    """Sizes rounded up to powers of 2, as "1x128x256": shapes of one class share a configuration."""
    return "x".join(str(1 << max(0, size - 1).bit_length()) for size in sizes)


def choose(
    kernel: str,
    key: str,
    candidates: Sequence[Config],
    launches_of: Callable[[Config], Sequence[Launch]],
    device: torch.device,
    *,
    timer: Timer | None = None,
) -> Config:
    """The candidate whose launches take the least time.

    Args:
        kernel: its name.
        key: dtype and class of shapes, as "bf16 D128 causal 512x4096".
        candidates: configurations, the shipped one first.
        launches_of: the launches with one of them. They run several times, so running them again must do no harm.
        device: where they run.
        timer: returns the milliseconds of a call; None: the device's own clock.

    Raises:
        RuntimeError: none of the candidates runs on the device.
    """
    if not enabled() or len(candidates) == 1 or interpreting() or device.type != "cuda":
        return candidates[0]
    name = f"{kernel} | {_device_name(device)} | {key}"
    digest = hashlib.sha256(repr(list(candidates)).encode()).hexdigest()[:16]
    with _lock:
        known = _entry(name, digest, len(candidates))
        if known is None and _capturing():
            return candidates[0]
        if known is None:
            known = _tune(name, digest, candidates, launches_of, timer or _device_milliseconds, device)
        return candidates[known]


def _tune(
    name: str,
    digest: str,
    candidates: Sequence[Config],
    launches_of: Callable[[Config], Sequence[Launch]],
    timer: Timer,
    device: torch.device,
) -> int:
    """The index of the fastest. One that cannot run, for lack of registers or shared memory, is skipped."""
    times: dict[int, float] = {}
    failure: Exception | None = None
    for index, candidate in enumerate(candidates):
        launches = launches_of(candidate)

        def run(launches: Sequence[Launch] = launches) -> None:
            run_all(launches, device)

        try:
            times[index] = timer(run)
        except Exception as error:  # Triton's OutOfResources and the driver's errors share no type
            failure = error
    if not times:
        raise RuntimeError(f"none of the {len(candidates)} configurations of {name} runs on this device") from failure
    best = min(times, key=lambda index: times[index])
    _keep(name, {"candidate": best, "of": digest, "milliseconds": times[best]})
    return best


def _device_milliseconds(run: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=50, return_mode="median"))


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@cache
def _device_name(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.multi_processor_count}"


# --- the file ---------------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """The file that keeps the choices."""
    folder = os.environ.get("SOFTPROMPT_CACHE_DIR")
    if folder:
        return Path(folder) / "triton-tuning.json"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "softprompt-kernels" / "triton-tuning.json"


@cache
def version() -> str:
    """The versions of all packages that change what a kernel compiles to."""

    def of(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    return ", ".join(f"{name} {of(name)}" for name in _DISTRIBUTIONS)


_chosen: dict[Path, dict[str, Any]] = {}  # entries of a file, as last read or written
_warned: set[Path] = set()


def _entry(name: str, digest: str, count: int) -> int | None:
    file = cache_file()
    if file not in _chosen:
        _chosen[file] = _read(file)
    entry = _chosen[file].get(name)
    if not isinstance(entry, dict) or entry.get("of") != digest:
        return None
    index = entry.get("candidate")
    return index if type(index) is int and 0 <= index < count else None


def _read(file: Path) -> dict[str, Any]:
    """The entries of a file; none if there is no such file, or if it was not written by this version."""
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return _ignored(file, f"cannot be read ({error})")
    if not isinstance(written, dict) or not isinstance(written.get("chosen"), dict):
        return _ignored(file, "is not a tuning file")
    if written.get("version") != version():
        return _ignored(file, f"was written by {written.get('version')!r}, and this is {version()!r}")
    return dict(written["chosen"])


def _ignored(file: Path, why: str) -> dict[str, Any]:
    if file not in _warned:
        _warned.add(file)
        warnings.warn(f"{file} {why}; configurations are tuned again, and the file is replaced", stacklevel=2)
    return {}


def _keep(name: str, entry: dict[str, Any]) -> None:
    """Adds an entry, by writing the whole file again. If that fails, this process still remembers the entry."""
    file = cache_file()
    chosen = {**_read(file), **_chosen.get(file, {}), name: entry}
    _chosen[file] = chosen
    text = json.dumps({"version": version(), "chosen": chosen}, indent=1, sort_keys=True) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        if file not in _warned:
            _warned.add(file)
            warnings.warn(f"{file} cannot be written ({error}); configurations are tuned in each process", stacklevel=2)
