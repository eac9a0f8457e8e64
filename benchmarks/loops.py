"""Is there a loop to close?  python benchmarks/loops.py [--scenes 32]

On the embedded world: (1) open loop: the variance at constant lock and guidance, hence d(signal)/d(lock) and
d(signal)/d(scale) with sign and size; (2) policies against *constant* settings at the same mean lock and mean scale;
(3) does risk predict failed edits before the run is over: AUROC at 25, 50 and 75% of it. Writes
benchmarks/results/loops.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from scipy import stats
from world.compare import Score, compare, make_task

import kvlock_sampling as kv
from kvlock_sampling.app.edit import Edit
from kvlock_sampling.policy import Policy
from kvlock_sampling.tiny import load, sample_edit
from kvlock_sampling.tiny.world import EDITS
from kvlock_sampling.types import Control, Observation
from kvlock_sampling.utils.files import write_atomically
from kvlock_sampling.variance import Estimator
from kvlock_sampling.variance.thresholds import DEFAULT_ESTIMATOR

ROOT = Path(__file__).resolve().parent.parent
FIRST_SCENE = 710_000
ESTIMATORS: dict[str, Estimator] = {
    "trajectory, window 10": kv.TrajectoryVariance(window=10),
    "trajectory, span 8, integral": DEFAULT_ESTIMATOR,
}


class Measured(Policy):
    """A constant control that still measures, so that the signal can be recorded at rest."""

    def __init__(self, lock: float, scale: float) -> None:
        self.lock, self.scale = lock, scale

    def start(self, obs: Observation) -> Control:
        return Control(self.lock, self.scale)

    def step(self, state: object, obs: Observation) -> tuple[object, Control]:
        return state, Control(self.lock, self.scale)


def task_of(scenes: int, first: int):
    kinds = [EDITS[i % len(EDITS)] for i in range(scenes)]
    return make_task([sample_edit(first + i, kind) for i, kind in enumerate(kinds)])


def signal(edit: Edit) -> tuple[torch.Tensor, torch.Tensor]:
    """(sigmas, log variance (evaluations, clips)) of a run, where measured."""
    steps = [s for s in edit.trace if torch.isfinite(s.variance).all()]
    return torch.tensor([s.sigma for s in steps]), torch.stack([s.variance for s in steps]).clamp_min(1e-12).log()


def slope(levels: list[float], logs: list[torch.Tensor]) -> dict[str, float]:
    """d(log variance) / d(level), one regression per clip: mean and its standard error over clips."""
    x = torch.tensor(levels)
    y = torch.stack(logs)  # (levels, clips)
    centred = x - x.mean()
    per_clip = (centred.unsqueeze(1) * y).sum(0) / centred.square().sum()
    return {"mean": float(per_clip.mean()), "error": float(per_clip.std() / math.sqrt(len(per_clip)))}


def open_loop(video, task, steps: int) -> list[dict]:
    rows = []
    for title, estimator in ESTIMATORS.items():
        grid = {("lock", v): (v, 3.0) for v in (0.0, 0.5, 1.0)} | {("scale", v): (0.5, v) for v in (1.5, 3.0, 5.0)}
        variants = {k: {"policy": Measured(*v), "estimator": estimator, "composite": True} for k, v in grid.items()}
        runs = {k: signal(e) for k, (e, _) in compare(task, video, variants, steps=steps, seed=FIRST_SCENE).items()}
        for actuator in ("lock", "scale"):
            mine = {level: run for (name, level), run in runs.items() if name == actuator}
            sigmas = next(iter(mine.values()))[0]
            for low, high in ((3.0, 100.0), (0.8, 3.0), (0.05, 0.8)):
                band = (sigmas >= low) & (sigmas < high)
                logs = [run[1][band].mean(0) for run in mine.values()]
                rows.append(
                    {
                        "estimator": title,
                        "actuator": actuator,
                        "sigma": f"{low:g} to {high:g}",
                        **slope(list(mine), logs),
                    }
                )
    return rows


def closed_loop(video, task, steps: int) -> list[dict]:
    """Every preset that schedules, and the constant with its own mean lock and scale, paired."""
    rows = []
    for name in ("paper", "threshold", "sigmoid", "pid", "steady", "early", "default"):
        edit, score = compare(task, video, {name: {"policy": name}}, steps=steps, seed=FIRST_SCENE)[name]
        lock = float(torch.stack([s.lock.mean() for s in edit.trace]).mean())
        scale = float(torch.stack([s.cfg_scale.mean() for s in edit.trace]).mean())
        constant = kv.Constant(lock=min(lock, 1.0), cfg_scale=scale)
        options = {"policy": constant, "composite": True, "cfg_floor": 0.0}
        _, fixed = compare(task, video, {"c": options}, steps=steps, seed=FIRST_SCENE)["c"]
        difference = score.inside_psnr - fixed.inside_psnr
        rows.append(
            {
                "policy": name,
                "mean lock": lock,
                "mean scale": scale,
                **summary(score),
                **{f"constant {k}": v for k, v in summary(fixed).items()},
                "difference dB": float(difference.mean()),
                "error dB": float(difference.std() / math.sqrt(len(difference))),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def summary(score: Score) -> dict[str, float]:
    return {
        "in-mask PSNR": float(score.inside_psnr.mean()),
        "both right": float((score.colour * score.shape).mean()),
    }


def prediction(video, scenes: int, steps: int, batch: int = 40) -> list[dict]:
    """AUROC of risk at 25, 50, 75 and 100% of a run against failure: wrong colour or shape; low in-mask PSNR."""
    rows = []
    for title, estimator in ESTIMATORS.items():
        logs, wrong, quality = [], [], []
        for first in range(0, scenes, batch):
            task = task_of(batch, FIRST_SCENE + 1000 + first)
            options = {"policy": Measured(0.0, 3.0), "estimator": estimator, "composite": True}
            edit, score = compare(task, video, {"x": options}, steps=steps, seed=FIRST_SCENE + first)["x"]
            logs.append(signal(edit)[1])
            wrong.append(score.colour * score.shape < 1)
            quality.append(score.inside_psnr)
        values, failed, psnr = torch.cat(logs, 1), torch.cat(wrong), torch.cat(quality)
        worst = psnr < psnr.quantile(0.25)
        for share in (0.25, 0.5, 0.75, 1.0):
            at = values[min(len(values) - 1, round(share * (len(values) - 1)))]
            rows.append(
                {
                    "estimator": title,
                    "of the run": share,
                    "failed": int(failed.sum()),
                    "AUROC failed": auroc(at, failed),
                    "AUROC lowest quarter of quality": auroc(at, worst),
                }
            )
    return rows


def auroc(score: torch.Tensor, bad: torch.Tensor) -> float:
    positives, negatives = score[bad].numpy(), score[~bad].numpy()
    if len(positives) < 3 or len(negatives) < 3:
        return float("nan")
    return float(stats.mannwhitneyu(positives, negatives).statistic / (len(positives) * len(negatives)))


def markdown(rows: list[dict]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--predict", type=int, default=160, help="scenes of part 3")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    video, task = load(), task_of(given.scenes, FIRST_SCENE)
    parts = {
        "open loop": open_loop(video, task, given.steps),
        "closed loop against constants": closed_loop(video, task, given.steps),
        "prediction of failure": prediction(video, given.predict, given.steps),
    }
    text = "\n\n".join(f"## {title}\n\n{markdown(rows)}" for title, rows in parts.items()) + "\n"
    print(text)
    record = {"scenes": given.scenes, "steps": given.steps, **parts}
    write_atomically(ROOT / "benchmarks/results/loops.json", json.dumps(record, indent=1) + "\n")
    write_atomically(ROOT / "benchmarks/results/loops.md", text)


if __name__ == "__main__":
    main()
