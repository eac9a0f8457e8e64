"""Does risk tell failed edits, and how early?  python benchmarks/risk.py [--edits 200]

Held-out edits of the stage under `release`. Several estimators watch the same runs and are read after a quarter, a half
and three quarters of the steps. An edit has failed if the judge reads a wrong attribute, or if anything else is not
right. AUROC is the chance that a failed edit has a higher reading than one that is right: 0.5 is chance. Its standard
error is from resampling the edits. Writes benchmarks/results/risk.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from grid_runs import auroc
from release import CFG_SCALE, STEPS, Bfloat16, batches, edit, psnr
from transfer import Panel
from world.judge import judge_edits

import kvlock_sampling as kv
from kvlock_sampling import samplers
from kvlock_sampling.tiny import load
from kvlock_sampling.tiny.model import PATCH
from kvlock_sampling.utils.files import write_atomically
from kvlock_sampling.variance import Divergence, DropoutVariance, Estimator, PosteriorVariance, RenoiseVariance, Sparse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "policies" / "recipes"))

from guidance_gap import GuidanceGap

RESULT = Path(__file__).resolve().parent / "results/risk.json"
FIRST_SCENE = 810_000
READ_AT = (0.25, 0.5, 0.75)  # of the steps


def watchers(network: torch.nn.Module, at: tuple[float, ...]) -> dict[str, Estimator]:
    """The estimators that only watch; those that evaluate the model do so only where they are read."""
    return {
        "trajectory (default)": kv.variance.thresholds.DEFAULT_ESTIMATOR,
        "trajectory, last 10 (paper)": kv.TrajectoryVariance(window=10),
        "divergence in the mask": Divergence(),
        "guidance gap": GuidanceGap(),
        "renoise x1": Sparse(RenoiseVariance(passes=1), sigmas=at),
        "posterior x1": Sparse(PosteriorVariance(), sigmas=at),
        "dropout x4": Sparse(DropoutVariance(model=network), sigmas=at),
    }


def with_error(reading: np.ndarray, failed: np.ndarray) -> list[float]:
    """AUROC and its standard error over resampled edits."""
    rows = np.random.default_rng(0).integers(0, len(failed), (500, len(failed)))
    again = [auroc(reading[picked], failed[picked]) for picked in rows]
    return [round(auroc(reading, failed), 4), round(float(np.nanstd(again)), 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--dry", action="store_true", help="print only; write nothing")
    given = parser.parse_args()
    network: torch.nn.Module = load(device=given.device).network
    network = Bfloat16(network) if given.bfloat16 else network
    preset, sigmas = kv.presets.load_preset("release"), samplers.flow_sigmas(STEPS, shift=3.0, t_max=0.98)
    at = tuple(float(sigmas[round(STEPS * share)]) for share in READ_AT)
    readings: list[dict[str, list[float]]] = [{} for _ in READ_AT]
    found: dict[str, list[float]] = {"wrong attribute": [], "anything wrong": [], "in-mask PSNR": []}
    for batch in batches(FIRST_SCENE, given.edits):
        panel = Panel({"release": preset.estimator.on_tokens(PATCH), **watchers(network, at)})
        options = {"policy": preset.policy, "estimator": panel, "erase": True}
        clips, _ = edit(network, batch, options, given.sampler)
        verdicts = judge_edits(clips, batch.sources, batch.targets)
        found["wrong attribute"] += [float(bool(v.wrong)) for v in verdicts]
        found["anything wrong"] += [float(not v.right) for v in verdicts]
        found["in-mask PSNR"] += psnr(clips, batch.target, batch.mask)
        seen = [read for sigma, read in panel.seen if any(abs(sigma / level - 1) < 1e-3 for level in at)]
        for share, read in zip(readings, seen, strict=True):
            for name in watchers(network, at):
                share.setdefault(name, []).extend(read[name].tolist())
    wrong, anything, quality = (np.array(values) for values in found.values())
    fates = {
        "wrong attribute": wrong > 0,
        "anything wrong": anything > 0,
        "lowest quarter in the mask": quality <= np.quantile(quality, 0.25),
    }
    rows = [
        {
            "estimator": name,
            "extra passes": watchers(network, at)[name].cost,
            "of the run": share,
            **{fate: with_error(np.array(values), failed) for fate, failed in fates.items()},
        }
        for name in readings[0]
        for share, reading in zip(READ_AT, readings, strict=True)
        for values in (reading[name],)
    ]
    record = {
        "edits": given.edits,
        "first_scene": FIRST_SCENE,
        "sampler": given.sampler,
        "steps": STEPS,
        "guidance": CFG_SCALE,
        "bfloat16": given.bfloat16,
        "sigmas": at,
        "failed": {fate: int(failed.sum()) for fate, failed in fates.items()},
        "rows": rows,
    }
    print(json.dumps(record, indent=1))
    if not given.dry:
        write_atomically(RESULT, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
