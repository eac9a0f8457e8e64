"""Where the time of an evaluation goes, by kind of work:  python benchmarks/where_time_goes.py

The network of speed.py at one depth, a quarter of the tokens edited, under torch's profiler: plain guidance, the source
in lockstep, and the foreground alone with a KV cache that is refreshed every third evaluation. Writes
benchmarks/results/where_time_goes.json.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from measuring import keep_freed_memory
from speed import evaluations, wan, ways
from torch.profiler import ProfilerActivity, profile

from kvlock_sampling.utils.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "matrix products": ("addmm", "mm", "bmm", "convolution", "linear"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "copies and gathers": ("copy", "cat", "index", "clone", "fill", "zero", "scatter", "gather"),
    "fusing": ("lerp",),
}
REST = "activations, norms, the rest"


def kind(name: str) -> str:
    """What kind of work an operator is."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--latents", type=int, nargs=3, default=(5, 32, 48), metavar=("TIME", "HEIGHT", "WIDTH"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    subject = wan(given.layers, tuple(given.latents), 3, given.device, getattr(torch, given.dtype))
    made = ways(subject, None) | ways(subject, 0.25)
    on_gpu = given.device != "cpu"
    rows = []
    for way in ("plain", "lockstep", "foreground, KV cache every 3"):
        with evaluations(made[way](), subject) as run:
            run()
        with (
            evaluations(made[way](), subject) as run,
            profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen,
        ):
            run()
        spent = dict.fromkeys((*KINDS, REST), 0.0)
        for event in seen.key_averages():
            spent[kind(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        total = sum(spent.values())
        rows.append({"way": way, "seconds": total / 3e6, **{name: t / total for name, t in spent.items()}})
        shares = ", ".join(f"{name} {share:.1%}" for name, share in rows[-1].items() if name in spent)
        print(f"{way:26} {total / 3e6:6.2f} s per evaluation: {shares}", flush=True)
    record = {"model": f"{subject.name}, {given.layers} layers", "threads": given.threads, "rows": rows}
    write_atomically(ROOT / "benchmarks/results/where_time_goes.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
