"""What a lock costs beside the model: when it does nothing, and when it locks.  python benchmarks/overhead.py

A Wan transformer of the 1.3B model's width (dim 1536, 12 heads, feed-forward 8960) with 2 of its 30 layers, random
weights, float32, CPU. One evaluation is a guided prediction: [uncond, cond]. Every way of evaluating takes its turn
in each round, and is compared with the bare model's time of the same round, so that a machine that is busy for a
while slows both. (Of two layers a lock saves the source most of one; `speed.py` says what that is of thirty.) Then
the same on the full depth of 30 layers with next to no arithmetic: what remains is the fixed cost of an evaluation in
milliseconds, that of launching further passes included, where there are some. Writes benchmarks/results/overhead.json
and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from measuring import keep_freed_memory
from torch import Tensor, nn

import kvlock_sampling as kv
from kvlock_sampling.utils.extras import hide_broken_torchvision
from kvlock_sampling.utils.files import write_atomically

hide_broken_torchvision()
from diffusers import WanTransformer3DModel  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
WIDE = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096, "freq_dim": 256}
NARROW = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 32, "freq_dim": 32}
DEPTH = 30
BARE = "bare"
Way = tuple[AbstractContextManager[object], Callable[[], Tensor]]  # the block of a lock, and what is timed in it


class Wan(nn.Module):
    """A Wan transformer behind the call contract of a flow model."""

    def __init__(self, layers: int, sizes: dict[str, int]) -> None:
        super().__init__()
        self.transformer = WanTransformer3DModel(num_layers=layers, in_channels=16, out_channels=16, **sizes)

    def forward(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.transformer(z, t * 1000, cond.expand(len(z), -1, -1), return_dict=False)[0]


def idle(obs: kv.Observation) -> kv.Control:
    """Could lock, and does not."""
    return kv.Control(lock=0.0)


def ways(layers: int, sizes: dict[str, int], grid: tuple[int, int, int]) -> dict[str, Way]:
    """Every way to make the same guided prediction, by name."""
    torch.manual_seed(0)
    model = kv.FlowDenoiser(Wan(layers, sizes)).eval().requires_grad_(False)
    shape = (1, 16, grid[0], 2 * grid[1], 2 * grid[2])
    source, noise = torch.randn(shape), torch.randn(shape)
    mask = torch.zeros(1, 1, *shape[2:])
    mask[..., : grid[1], : grid[2]] = 1  # a quarter of each frame
    text = {"cond": torch.randn(1, 64, sizes["text_dim"]), "uncond": torch.zeros(1, 64, sizes["text_dim"])}
    x, sigma, plain = source + 2 * noise, torch.tensor([2.0]), kv.CFGDenoiser(model)

    def lock(policy: object, **options: object) -> kv.KVLock:
        # Without compositing, so that what is timed is evaluation alone, except where the path needs it.
        options = {"foreground": False, "composite": False, **options}
        return kv.KVLock(model, source=source, mask=mask, policy=policy, **options)

    def bare() -> Tensor:
        return plain(x, sigma, **text, cond_scale=5.0)

    def under(held: kv.KVLock) -> Way:
        return held, lambda: held(x, sigma, **text, cond_scale=5.0)

    return {
        BARE: (nullcontext(), bare),
        "inside a lock's block, not through it": (lock(kv.stateless(idle)), bare),
        "lock 0: nothing to do": under(lock(kv.stateless(idle))),
        "lock 1, lockstep": under(lock(kv.Constant(lock=1.0))),
        "lock 1, capture and inject": under(lock(kv.Constant(lock=1.0), batched=False)),
        "lock 1, foreground only (25%)": under(lock(kv.Constant(lock=1.0), foreground=True, composite=True)),
    }


def measure(made: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Seconds by way and round. The order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    names = list(made)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            block, way = made[name]
            with block:  # one at a time, for hooks of another lock cost as well
                way()  # a run's beginning is no cost of an evaluation
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of the wide model; at least 2")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 16, 16), help="tokens along time, height, width")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/overhead.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    grid = tuple(chosen.grid)

    warnings.filterwarnings("ignore", "the lock was not called in its block")
    with torch.no_grad():
        wide = measure(ways(chosen.layers, WIDE, grid), chosen.rounds)
        deep = measure(ways(DEPTH, NARROW, (2, 4, 4)), 5 * chosen.rounds)

    # A full-depth evaluation is not run: its time is that of these layers, times as many.
    full = statistics.median(wide[BARE]) * DEPTH / chosen.layers
    rows = {}
    for name in wide:
        extra = [1000 * (s - b) for s, b in zip(deep[name], deep[BARE], strict=True)]
        rows[name] = {
            "seconds": spread(wide[name]),
            "ratio": spread([s / b for s, b in zip(wide[name], wide[BARE], strict=True)]),
            "fixed_ms": spread(extra),
            "fixed_share_of_30_layers": statistics.median(extra) / 1000 / full,
        }
    result = {
        "model": {
            "dim": 1536,
            "heads": 12,
            "ffn": 8960,
            "layers": chosen.layers,
            "tokens": grid[0] * grid[1] * grid[2],
        },
        "rounds": chosen.rounds,
        "machine": {
            "threads": chosen.threads,
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "torch": torch.__version__,
        },
        "load_average": os.getloadavg()[0],
        "ways": rows,
    }
    write_atomically(chosen.out, json.dumps(result, indent=1) + "\n")
    print(f"{'':40}{'seconds':>9}{'x bare':>8}{'quartiles':>15}{'fixed ms':>10}")
    for name, row in rows.items():
        ratio = row["ratio"]
        print(
            f"{name:40}{row['seconds']['median']:9.2f}{ratio['median']:8.3f}"
            f"{ratio['low']:8.3f}-{ratio['high']:.3f}{row['fixed_ms']['median']:10.2f}"
        )


if __name__ == "__main__":
    main()
