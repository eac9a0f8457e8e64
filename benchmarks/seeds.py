"""Several seeds of one edit, the weak ones stopped: which score finds the best?  python benchmarks/seeds.py

Every held-out edit of the stage is sampled from four seeds at full lock, where only the edited tokens are computed, or
under `--policy release`, where effects can be right, and free scores are read at every noise level. Then, for each
score and each noise level at which all but one seed stop: the quality of the seed that goes on, beside the first seed,
one by chance, one seed in more steps at the same cost, and the best by the truth (the oracle). Costs are in
token-passes of an unlocked edit, with a filled KV cache; under another policy in those of one edit under it.
Writes benchmarks/results/seeds.json, or seeds_release.json; of other scenes, `--first 821350`, seeds_more.json.
Runs over parts of the scenes, `--first 820450 --dry > part.json`, become one with `--join part.json ...`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from release import CFG_SCALE, STEPS, Bfloat16, batches, edit, psnr, tokens
from torch.nn import functional as F
from torch.nn.functional import max_pool3d
from transfer import Panel
from world.judge import judge_edits, trained_judge
from world.train_judge import classes

import kvlock_sampling as kv
from kvlock_sampling.tiny import Scene, load
from kvlock_sampling.tiny.model import PATCH
from kvlock_sampling.utils.files import write_atomically
from kvlock_sampling.variance import Divergence, Estimator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "policies" / "recipes"))

from guidance_gap import GuidanceGap

RESULTS = Path(__file__).resolve().parent / "results"
FIRST_SCENE = 820_000
SEEDS = 4
MORE_STEPS = 40  # of one seed, for the cost of four seeds of which three stop at half the steps
HIGHER_IS_BETTER = {"gap": True, "gap so far": True}


@dataclass(frozen=True)
class Border(Estimator):
    """How far the prediction jumps over the mask's border, beyond what the source does there: mean square."""

    needs_source = True

    def step(self, state, evaluation):
        if evaluation.source is None or evaluation.mask is None:
            return state, None
        mask = evaluation.mask.float().expand(len(evaluation.x), *evaluation.mask.shape[1:])
        ring = max_pool3d(mask, (1, 3, 3), 1, (0, 1, 1)) * max_pool3d(1 - mask, (1, 3, 3), 1, (0, 1, 1))
        ring = ring * mask  # the edited side
        gap = (evaluation.denoised - evaluation.source).square().mean(1, keepdim=True) * ring
        return state, gap.flatten(1).sum(1) / ring.flatten(1).sum(1).clamp_min(1)


@dataclass(frozen=True, eq=False)
class Judged(Estimator):
    """How unlikely the target's attributes are in the prediction, by the judge that also counts what is right."""

    targets: Sequence[Scene]

    def step(self, state, evaluation):
        logits, asked = trained_judge()(evaluation.denoised.float().cpu()), [classes(scene) for scene in self.targets]
        wanted = {name: torch.tensor([each[name] for each in asked]) for name in logits}
        losses = [F.cross_entropy(logits[name], wanted[name], reduction="none") for name in logits]
        return state, torch.stack(losses).sum(0).to(evaluation.denoised.device)


def watchers(targets: Sequence[Scene] = ()) -> dict[str, Estimator]:
    """The free scores, and for comparison the judge's, which reads what no sampler knows."""
    return {
        "variance": kv.variance.thresholds.DEFAULT_ESTIMATOR,
        "gap": GuidanceGap(),
        "divergence": Divergence(),
        "border": Border(),
        "judge": Judged(targets),
    }


def under(policy: str) -> tuple[dict[str, Any], dict[str, Estimator]]:
    """The options of an edit and what its policy reads, which is measured beside the watchers."""
    if policy == "full":
        return {"policy": kv.PID(kp=0.0, ki=0.0, bias=1.0)}, {}  # full lock, and measured all the same
    preset = kv.presets.load_preset(policy)
    assert preset.estimator is not None
    return {"policy": preset.policy, "erase": preset.erase}, {policy: preset.estimator.on_tokens(PATCH)}


def sampled(network: torch.nn.Module, first: int, count: int, sampler: str, policy: str) -> dict[str, np.ndarray]:
    """Quality (edits, seeds) and readings (edits, seeds, levels) of every run."""
    found: dict[str, list] = {"psnr": [], "mask": [], "right": [], "more": [], "more mask": [], "more right": []}
    readings: dict[str, list] = {name: [] for name in watchers()}
    computed = []
    options, read_by_policy = under(policy)
    for batch in batches(first, count):
        computed += tokens(batch.mask).mean(1).tolist()  # of a clip alone; a batch computes the union
        per_seed: dict[str, list] = {name: [] for name in ("psnr", "mask", "right")}
        seen_by: dict[str, list] = {name: [] for name in readings}
        for seed in range(SEEDS):
            panel = Panel(read_by_policy | watchers(batch.targets))
            clips, _ = edit(network, batch, options | {"estimator": panel}, sampler, seed)
            add(per_seed, batch, clips)
            for name in readings:
                rows = [read[name].cpu().numpy() for _, read in panel.seen if name in read]
                short = STEPS - len(rows)
                seen_by[name].append(np.stack([np.full(len(batch.mask), np.nan)] * short + rows, 1))
        for name in per_seed:
            found[name].append(np.stack(per_seed[name], 1))
        for name in readings:
            readings[name].append(np.stack(seen_by[name], 1))
        more: dict[str, list] = {name: [] for name in ("psnr", "mask", "right")}
        clips, _ = edit(network, batch, {"policy": policy, "steps": MORE_STEPS}, sampler, 0)
        add(more, batch, clips)
        for name, key in (("psnr", "more"), ("mask", "more mask"), ("right", "more right")):
            found[key].append(more[name][0])
        print(f"{len(np.concatenate(found['psnr']))} edits", flush=True)
    out = {name: np.concatenate(parts) for name, parts in (found | readings).items()}
    return out | {"computed": np.array(computed) if policy == "full" else np.ones(count)}


def add(into: dict[str, list], batch, clips: torch.Tensor) -> None:
    into["psnr"].append(np.array(psnr(clips, batch.target)))
    into["mask"].append(np.array(psnr(clips, batch.target, batch.mask)))
    into["right"].append(np.array([float(v.right) for v in judge_edits(clips, batch.sources, batch.targets)]))


def scores(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each score (edits, seeds, levels), lower is better: as it is, and its mean over the levels so far.

    The border and the judge together, in two ways that were fixed before any run: as log-likelihoods, where the judge's
    nats count once it doubts and the border decides among seeds that it is sure of; and by their ranks.
    """
    made = {}
    for name in watchers():
        reading = np.log(np.maximum(found[name], 1e-12))
        known = np.where(np.isnan(reading), 0.0, reading)
        count = np.maximum((~np.isnan(reading)).cumsum(-1), 1)
        made[name], made[f"{name} so far"] = reading, known.cumsum(-1) / count
    made["border and judge"] = made["border"] + found["judge"]
    ranks = [made[name].argsort(1).argsort(1) for name in ("border", "judge")]
    ranked = ranks[0] * (1 + 1e-3) + ranks[1]  # of equal sums the better border
    made["ranks of both"] = np.where(np.isnan(made["border"]), np.nan, ranked)
    return {name: -value if HIGHER_IS_BETTER.get(name) else value for name, value in made.items()}


def against(values: np.ndarray, base: np.ndarray) -> list[float]:
    gaps = values - base
    return [round(float(gaps.mean()), 4), round(float(gaps.std(ddof=1) / len(gaps) ** 0.5), 4)]


def pooled(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record of all edits of several runs that share everything but their scenes."""
    counts = np.array([record["edits"] for record in records])

    def pool(parts: Sequence[Any], key: str = "") -> Any:
        first = parts[0]
        if isinstance(first, dict):
            return {name: pool([part[name] for part in parts], name) for name in first}
        if key == "rows":
            return [pool(rows) for rows in zip(*parts, strict=True)]
        if isinstance(first, list):  # mean and standard error of a difference
            mean, error = np.array(parts).T
            squares = error**2 * counts * (counts - 1) + counts * (mean - np.average(mean, weights=counts)) ** 2
            total = counts.sum()
            spread = float((squares.sum() / (total - 1) / total) ** 0.5)
            return [round(float(np.average(mean, weights=counts)), 4), round(spread, 4)]
        if isinstance(first, float) and key != "guidance":
            return round(float(np.average(parts, weights=counts)), 4)
        if len(set(parts)) > 1:
            raise SystemExit(f"the runs differ in {key!r}: {sorted(set(parts))}")
        return first

    scenes = sorted((record["first_scene"], record["edits"]) for record in records)
    if any(start + count != after for (start, count), (after, _) in pairwise(scenes)):
        raise SystemExit(f"the runs are not of scenes that follow one another: (first, edits) {scenes}")
    own = ("edits", "first_scene")
    same = [{name: value for name, value in record.items() if name not in own} for record in records]
    return {"edits": int(counts.sum()), "first_scene": scenes[0][0], **pool(same)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--policy", default="full", help="full, or a preset with an estimator")
    parser.add_argument("--first", type=int, default=FIRST_SCENE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--dry", action="store_true", help="print only; write nothing")
    parser.add_argument("--join", nargs="+", type=Path, metavar="JSON", help="make one record of those of other scenes")
    given = parser.parse_args()
    if given.join:
        keep(pooled([json.loads(text[text.index("{") :]) for text in map(Path.read_text, given.join)]), given.dry)
        return
    network: torch.nn.Module = load(device=given.device).network
    network = Bfloat16(network) if given.bfloat16 else network
    found = sampled(network, given.first, given.edits, given.sampler, given.policy)
    part = float(found["computed"].mean())
    rows = []
    quality = {"psnr": found["psnr"], "mask": found["mask"], "right": found["right"]}
    for name, score in scores(found).items():
        for level in (3, 5, 7, 9, 11, STEPS - 1):  # after so many evaluations, less one
            if np.isnan(score[..., level]).any():
                continue
            chosen = score[..., level].argmin(1)
            picked = {key: np.take_along_axis(value, chosen[:, None], 1)[:, 0] for key, value in quality.items()}
            share = (level + 1) / STEPS
            rows.append(
                {
                    "score": name,
                    "after": level + 1,
                    "cost": round(part * (SEEDS * share + 1 - share), 3),
                    **{key: round(float(value.mean()), 4) for key, value in picked.items()},
                    "to the first seed": {key: against(picked[key], quality[key][:, 0]) for key in quality},
                    "to chance": {key: against(picked[key], quality[key].mean(1)) for key in quality},
                    "to more steps": {
                        key: against(picked[key], found[more])
                        for key, more in (("psnr", "more"), ("mask", "more mask"), ("right", "more right"))
                    },
                }
            )
    oracle = np.take_along_axis(found["psnr"], found["psnr"].argmax(1)[:, None], 1)[:, 0]
    record = {
        "edits": given.edits,
        "first_scene": given.first,
        "sampler": given.sampler,
        "policy": given.policy,
        "steps": STEPS,
        "guidance": CFG_SCALE,
        "seeds": SEEDS,
        "bfloat16": given.bfloat16,
        "computed": round(part, 4),
        "first seed": {key: round(float(value[:, 0].mean()), 4) for key, value in quality.items()},
        "chance": {key: round(float(value.mean()), 4) for key, value in quality.items()},
        f"one seed, {MORE_STEPS} steps": {
            key: round(float(found[more].mean()), 4)
            for key, more in (("psnr", "more"), ("mask", "more mask"), ("right", "more right"))
        },
        "oracle": {"psnr": round(float(oracle.mean()), 4), "right": round(float(found["right"].max(1).mean()), 4)},
        "rows": rows,
    }
    keep(record, given.dry)


def keep(record: dict[str, Any], dry: bool) -> None:
    print(json.dumps(record, indent=1))
    if not dry:
        name = "seeds" if record["policy"] == "full" else f"seeds_{record['policy']}"
        name += "_more" * (record["first_scene"] != FIRST_SCENE)
        write_atomically(RESULTS / f"{name}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
