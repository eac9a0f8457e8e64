"""What keeping the source's K/V costs in quality:  python benchmarks/cost.py [--scenes 32]

Held-out scenes of the first world, full lock from the same noise: exact, with K/V served from a KV cache in several
formats and at several rates of refresh, from a fixed noise, and from a KV cache that another seed filled; and what each
changes in the result, beside what the lock itself changes. Writes benchmarks/results/cost.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from first_world import EDITS, FIRST_WORLD, load, sample_edit
from world.compare import compare, make_task

import kvlock_sampling as kv
from kvlock_sampling.utils.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
FIRST_SCENE = 760_000
FREE, FULL = kv.Constant(lock=0.0), kv.Constant(lock=1.0)


def kv_cache(**options: Any) -> dict[str, Any]:
    # The run's own noise, unlike what edit_video gives a kv_cache: then only what is kept differs from the full lock.
    return {
        "policy": FULL,
        "noise": None,
        "kv_cache": kv.KVCache(budget=None, **{"ratio": None, "every": 1, "format": None, **options}),
    }


def variants() -> dict[str, dict[str, Any]]:
    filled = kv.KVCache(budget=None, ratio=None, every=3, format="int8")
    return {
        "composited": {"policy": FREE, "composite": True},
        "full lock": {"policy": FULL},
        "int8": kv_cache(format="int8"),
        "every 2": kv_cache(every=2),
        "every 3": kv_cache(every=3),
        "every 3, within a ratio of 1.5": kv_cache(every=3, ratio=1.5),
        "every 5": kv_cache(every=5),
        "fixed noise": {"policy": FULL, "noise": "fixed"},
        "fixed noise, int8, every 3": {"policy": FULL, "noise": "fixed", "kv_cache": filled},
        "the same, filled by another seed": {"policy": FULL, "noise": "fixed", "kv_cache": filled},
        "source without a prompt": {"policy": FULL, "source_prompt": ""},
        "source under the edit's prompt": {"policy": FULL, "source_prompt": None},
        "preset fast": {"policy": "fast"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    pairs = [sample_edit(FIRST_SCENE + i, EDITS[i % len(EDITS)]) for i in range(given.scenes)]
    task = make_task(pairs, FIRST_WORLD)
    video, rows, results = load(), [], {}
    for name, options in variants().items():
        if name.startswith("the same, filled"):
            other = {k: v for k, v in options.items() if k != "kv_cache"} | {"kv_cache": options["kv_cache"]}
            assert options["kv_cache"].used > 0
            compare(task, video, {name: other}, steps=given.steps, seed=FIRST_SCENE + 5000)
        edit, score = compare(task, video, {name: options}, steps=given.steps, seed=FIRST_SCENE)[name]
        results[name] = (edit.pixels, score)
        exact, plain = results.get("full lock"), results["composited"]
        gain = score.inside_psnr - plain[1].inside_psnr
        row = {
            "way": name,
            "in-mask PSNR": float(score.inside_psnr.mean()),
            "gain": float(gain.mean()),
            "error": float(gain.std() / given.scenes**0.5),
            "colour": float(score.colour.mean()),
            "shape": float(score.shape.mean()),
            "passes": score.nfe,
        }
        if exact is not None:
            changed, locked = (edit.pixels - exact[0]).abs(), (plain[0] - exact[0]).abs()
            against = score.inside_psnr - exact[1].inside_psnr
            row |= {
                "to full lock, dB": float(against.mean()),
                "its error": float(against.std() / given.scenes**0.5),
                "mean change / the lock's": float(changed.mean() / locked.mean()),
                "max change / the lock's": float(changed.max() / locked.max()),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    write_atomically(ROOT / "benchmarks/results/cost.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
