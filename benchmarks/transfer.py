"""Does a calibrated threshold transfer?  python benchmarks/transfer.py

False alarms (the share of measurements of calm runs with risk above 1) of the default thresholds, which were calibrated
with dpmpp_2m in 30 steps on other scenes, on other samplers and numbers of steps; the paper's window 10 with 0.01
beside them. Writes benchmarks/results/transfer.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import kvlock_sampling as kv
from kvlock_sampling.calibrate import resting, scenes
from kvlock_sampling.edit import edit_video
from kvlock_sampling.files import write_atomically
from kvlock_sampling.run import DEFAULT_ESTIMATOR, DEFAULT_THRESHOLD
from kvlock_sampling.tiny import load

ROOT = Path(__file__).resolve().parent.parent
METERS = {
    "default": {"estimator": DEFAULT_ESTIMATOR, "threshold": DEFAULT_THRESHOLD},
    "paper": {"estimator": kv.TrajectoryVariance(window=10), "threshold": 0.01},
}
RUNS = (("dpmpp_2m", 30), ("dpmpp_2m", 20), ("dpmpp_2m", 50), ("euler", 30), ("heun", 20), ("euler_ancestral", 30))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=32)
    given = parser.parse_args()
    video, examples = load(), scenes(given.clips, first=850_000)
    clips, masks = torch.stack([e.clip for e in examples]), torch.stack([e.mask for e in examples])
    rows = []
    for sampler, steps in RUNS:
        row: dict[str, object] = {"sampler": sampler, "steps": steps}
        for name, meter in METERS.items():
            edit = edit_video(
                clips,
                masks,
                [e.prompt for e in examples],
                model=video,
                sampler=sampler,
                steps=steps,
                policy=resting,
                composite=True,
                seed=850_000,
                **meter,
            )
            risks = [r["risk"] for r in edit.trace.rows() if r["risk"] == r["risk"]]
            row[name] = sum(r > 1 for r in risks) / len(risks)
        rows.append(row)
        print(json.dumps(row), flush=True)
    write_atomically(ROOT / "benchmarks/results/transfer.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
