"""When, where and how strongly to lock:  python benchmarks/when.py

Constant locks restricted to high or low noise, to a half of the layers, softened around the mask, at other guidance, or
with the source read under the edit's prompt; against compositing alone, paired by scene and noise. Writes
benchmarks/results/when.json and .md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from world.compare import compare, make_task

import kvlock_sampling as kv
from kvlock_sampling.tiny import load, sample_edit
from kvlock_sampling.tiny.world import EDITS
from kvlock_sampling.utils.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
FIRST_SCENE = 720_000
FREE, FULL = kv.Constant(lock=0.0), kv.Constant(lock=1.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "composited": {"policy": FREE, "composite": True},
    "full lock": {"policy": FULL},
    "sigma >= 1 only": {"policy": kv.LockAbove(FREE, above=1.0)},
    "sigma >= 4 only": {"policy": kv.LockAbove(FREE, above=4.0)},
    "sigma < 4 only": {"policy": kv.Windowed(FULL, below=4.0)},
    "half near the mask": {"policy": FULL, "transition": (1, 0.5)},
    "first four layers": {"policy": FULL, "layers": range(4)},
    "last four layers": {"policy": FULL, "layers": range(4, 8)},
    "full, guidance 2": {"policy": kv.Constant(lock=1.0, cfg_scale=2.0)},
    "full, guidance 5": {"policy": kv.Constant(lock=1.0, cfg_scale=5.0)},
    "composited, guidance 5": {"policy": kv.Constant(lock=0.0, cfg_scale=5.0), "composite": True},
    "full, source under the edit's prompt": {"policy": FULL, "source_prompt": None},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    task = make_task([sample_edit(FIRST_SCENE + i, EDITS[i % len(EDITS)]) for i in range(given.scenes)])
    video, base, rows = load(), None, []
    for name, options in VARIANTS.items():
        _, score = compare(task, video, {name: options}, steps=given.steps, seed=FIRST_SCENE)[name]
        base = base or score
        gain = score.inside_psnr - base.inside_psnr
        rows.append(
            {
                "lock": name,
                "in-mask PSNR": float(score.inside_psnr.mean()),
                "gain": float(gain.mean()),
                "error": float(gain.std() / given.scenes**0.5),
                "temporal error": float(score.temporal.mean()),
                "colour": float(score.colour.mean()),
                "shape": float(score.shape.mean()),
                "passes": score.nfe,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    lines = ["| lock | in-mask PSNR | gain, dB | temporal error | colour | shape | passes |", "|" + " --- |" * 7]
    for r in rows:
        gain = f"{r['gain']:+.2f} ± {r['error']:.2f}"
        lines.append(
            f"| {r['lock']} | {r['in-mask PSNR']:.2f} | {gain} | {r['temporal error']:.4f} | {r['colour']:.0%} "
            f"| {r['shape']:.0%} | {r['passes']} |"
        )
    record = {"scenes": given.scenes, "first_scene": FIRST_SCENE, "steps": given.steps, "rows": rows}
    write_atomically(ROOT / "benchmarks/results/when.json", json.dumps(record, indent=1) + "\n")
    write_atomically(ROOT / "benchmarks/results/when.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
