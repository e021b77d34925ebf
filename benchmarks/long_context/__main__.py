"""`python -m benchmarks.long_context`: time and peak memory of what grows with the length of a context.

    capture     the context, random tokens, goes through the model in chunks
    answers     8 queries are answered behind it, 8 tokens each
    matching    one layer is fitted in closed form, to 6,144 rows

for the keys and values in memory, in 16 bits, and on the disk. `--part matching` needs no model: it takes random keys
in the shapes of the demo's model. Each measurement runs in a fresh process. Memory is how far the process's own pages
(anonymous) and mapped files grow; the system can drop the second. The count of `softprompt compress --dry-run` stands
beside it.

A context longer than the model's window is read with frequencies for a longer one (`--yarn`): that measures memory and
time, and says nothing about how well the model reads it. `--layers` cuts the model, for a shorter measurement.
"""

from __future__ import annotations

import argparse
import os

import torch

from benchmarks.long_context.measure import Peak, measure_matching, measure_model
from softprompt_kernels.bench.memory import in_fresh_process

MODEL = ".cache/SmolLM2-135M-Instruct"
STORAGES = ("memory", "bfloat16", "disk")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8000])
    parser.add_argument("--part", choices=("model", "matching"), nargs="+", default=("model", "matching"))
    parser.add_argument("--storage", choices=STORAGES, nargs="+", default=STORAGES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--yarn", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", default=os.getcwd(), help="for the file of keys and values")
    given = vars(parser.parse_args())
    print(f"{'tokens':>8} {'stored':>9}  {'stage':20} {'seconds':>9} {'own MB':>9} {'mapped MB':>9}", flush=True)
    for tokens in given["tokens"]:
        options = given | {"tokens": tokens}
        for storage in given["storage"]:
            found: dict[str, Peak] = {}
            if "model" in given["part"]:
                found |= in_fresh_process(measure_model, options, storage)
            if "matching" in given["part"] and storage != "disk":
                dtype = torch.bfloat16 if storage == "bfloat16" else torch.float32
                found |= in_fresh_process(measure_matching, options, dtype)
            for stage, peak in found.items():
                print(
                    f"{tokens:8} {storage:>9}  {stage:20} {peak.seconds:9.1f} {peak.anonymous / 1e6:9.0f} "
                    f"{peak.mapped / 1e6:9.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
