"""Can risk or timing beat a constant lock after all?  python benchmarks/ideas.py

Ideas that `when.py` and `loops.py` leave open, each beside the constant, or the choice without risk, that spends the
same: guidance within an interval of noise, a lock per token by its own risk, stochastic sampling, sending the clips at
risk back up, and keeping the calmer of two. Paired by scene and noise. Writes benchmarks/results/ideas.json.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from world.compare import Score, Task, compare, make_task, score

import kvlock_sampling as kv
from kvlock_sampling import masks
from kvlock_sampling.app.edit import Edit, start_noise
from kvlock_sampling.policy import Policy
from kvlock_sampling.restart import last_risk
from kvlock_sampling.tiny import TinyVideo, load, sample_edit
from kvlock_sampling.tiny.model import PATCH
from kvlock_sampling.tiny.world import EDITS
from kvlock_sampling.types import Control, Evaluation, Observation
from kvlock_sampling.utils.files import write_atomically
from kvlock_sampling.variance.base import pooled

ROOT = Path(__file__).resolve().parent.parent
FIRST_SCENE, CONFIRMING_SCENE = 730_000, 740_000
CONFIRMED = 1.0  # the end of guidance that did best on the first scenes
STEPS = 20
FULL = kv.Constant(lock=1.0)
MOVES = kv.TrajectoryVariance(window=None, span=8.0, normalise=True, patch=PATCH)


@dataclass(frozen=True)
class PerToken(kv.variance.EstimatorWrapper):
    """Every token in units of the median background token: risk 1 has half of the background on either side."""

    needs_background = True

    def step(self, state: Any, evaluation: Evaluation) -> tuple[Any, Tensor | None]:
        state, variance = self.estimator.step(state, evaluation)
        if variance is None:
            return state, None
        mask = torch.broadcast_to(torch.as_tensor(evaluation.mask), evaluation.denoised.shape).float()
        background = torch.where(pooled(mask, None, self.patch) > 0, torch.nan, variance)
        return state, variance / background.nanquantile(0.5, dim=1, keepdim=True).clamp_min(1e-12)


LOCAL = PerToken(MOVES)


@kv.stateless
def watched(obs: Observation) -> Control:
    """A full lock that measures."""
    return Control(lock=1.0)


def interval(low: float, high: float) -> Policy:
    """Full lock, guidance at low <= sigma < high only."""

    @kv.stateless(uses_risk=False)
    def policy(obs: Observation) -> Control:
        return Control(lock=1.0, cfg_scale=None if low <= obs.sigma < high else 1.0)

    return policy


@kv.stateless
def moving(obs: Observation) -> Control:
    """Lock the background tokens that still move."""
    return Control(lock=obs.risk.clamp(0, 1))


@kv.stateless
def resting(obs: Observation) -> Control:
    """Lock the background tokens that have come to rest."""
    return Control(lock=1 / (1 + obs.risk))


class Result(NamedTuple):
    """What one way of editing reached, per clip: in-mask PSNR in dB, colour and shape right, and passes."""

    psnr: Tensor
    right: Tensor
    passes: float


def result(found: Score) -> Result:
    return Result(found.inside_psnr, found.colour * found.shape, found.nfe)


def done(task: Task, video: TinyVideo, seed: int = FIRST_SCENE, **options: Any) -> tuple[Edit, Result]:
    """One way of doing the task. Everything is composited."""
    options = {"composite": True, "steps": STEPS, "seed": seed} | options
    edit, found = compare(task, video, {"x": options})["x"]
    return edit, result(found)


def mean_lock(task: Task, edit: Edit) -> float:
    """Mean over clips, evaluations and background tokens."""
    latent = masks.latent_mask(task.mask, temporal=1, spatial=(1, 1))
    keep = (~masks.token_mask(latent, PATCH)).float()
    rows = [(s.lock * keep).sum(1) / keep.sum(1) if s.lock.ndim > 1 else s.lock for s in edit.trace]
    return float(torch.stack(rows).mean())


def mean_scale(edit: Edit) -> float:
    return float(torch.stack([s.cfg_scale.mean() for s in edit.trace]).mean())


def row(idea: str, against: str, mine: Result, other: Result) -> dict[str, Any]:
    """Both sides of one comparison, and the paired difference with its standard error."""
    gap = mine.psnr - other.psnr
    return {
        "idea": idea,
        "against": against,
        "in-mask PSNR": float(mine.psnr.mean()),
        "difference": float(gap.mean()),
        "error": float(gap.std() / math.sqrt(len(gap))),
        "both right": float(mine.right.mean()),
        "both right, against": float(other.right.mean()),
        "passes": mine.passes,
        "passes, against": other.passes,
    }


def timing(task: Task, video: TinyVideo, full: Result, ends: tuple[float, ...] = (0.5, 1.0)) -> list[dict[str, Any]]:
    """No guidance at low noise, against guidance throughout, also at the same mean scale."""
    rows = []
    for low in ends:
        title, high = f"sigma >= {low:g}", math.inf
        edit, mine = done(task, video, policy=interval(low, high))
        scale = mean_scale(edit)
        same = done(task, video, policy=kv.Constant(lock=1.0, cfg_scale=scale))[1]
        rows.append(row(f"guidance at {title} only", "guidance throughout", mine, full))
        rows.append(row(f"guidance at {title} only", f"guidance {scale:.2f} throughout", mine, same))
    return rows


def local(task: Task, video: TinyVideo) -> list[dict[str, Any]]:
    """A lock per token, against a constant of the same mean."""
    rows = []
    for title, policy in (("tokens that still move", moving), ("tokens at rest", resting)):
        edit, mine = done(task, video, policy=policy, estimator=LOCAL, threshold=1.0)
        level = mean_lock(task, edit)
        rows.append(
            row(f"lock {title}", f"constant {level:.2f}", mine, done(task, video, policy=kv.Constant(level))[1])
        )
    return rows


def stochastic(task: Task, video: TinyVideo, full: Result) -> list[dict[str, Any]]:
    """Fresh noise at every step, locked and not."""
    noisy = done(task, video, policy=FULL, sampler="euler_ancestral")[1]
    free = done(task, video, policy=kv.Constant(lock=0.0), sampler="euler_ancestral")[1]
    return [
        row("euler_ancestral, full lock", "dpmpp_2m, full lock", noisy, full),
        row("euler_ancestral, full lock", "euler_ancestral, no lock", noisy, free),
    ]


def chosen(task: Task, video: TinyVideo) -> list[dict[str, Any]]:
    """Two edits of everything: keep the one with the lower risk at the end, against either one."""
    runs = [done(task, video, seed=FIRST_SCENE + s, policy=watched) for s in (0, 50_000)]
    psnr, right = torch.stack([r.psnr for _, r in runs]), torch.stack([r.right for _, r in runs])
    passes, rows = 2 * runs[0][1].passes, []
    either = Result(psnr.mean(0), right.mean(0), passes)
    best = Result(psnr.amax(0), right.amax(0), passes)
    pick = torch.stack([last_risk(e.trace) for e, _ in runs]).argmin(0, keepdim=True)
    calmer = Result(psnr.gather(0, pick)[0], right.gather(0, pick)[0], passes)
    rows.append(row("the calmer of two", "either of two", calmer, either))
    rows.append(row("the better of two, if one knew", "either of two", best, either))
    return rows


def sent_back(task: Task, video: TinyVideo, back_to: float = 2.0, share: float = 0.25) -> list[dict[str, Any]]:
    """A quarter of the clips goes back up to `back_to`: the quarter at highest risk, against any quarter.

    Every clip is sent back, so that what a random quarter gains is known without drawing one.
    """
    conditioning = {"cond": video.prompt(task.prompts), "uncond": video.prompt([""] * len(task.prompts))}
    arguments = {**conditioning, "cond_scale": video.cfg_scale}
    lock = kv.KVLock(
        video.denoiser, source=task.source, mask=task.mask, policy=watched, composite=True,
        source_args={"cond": video.prompt(task.source_prompts)},
    )  # fmt: skip
    sigmas, seeds = video.sigmas(STEPS), [FIRST_SCENE + i for i in range(len(task.prompts))]
    with torch.inference_mode():
        x = lock.sample("dpmpp_2m", start_noise(task.source, seeds) * sigmas[0], sigmas, extra_args=arguments)
        risk, passes = last_risk(lock.trace), lock.trace.nfe
        again = kv.restart(lock, "dpmpp_2m", x, sigmas, back_to=back_to, limit=-1.0, extra_args=arguments)
    extra = sum(t.nfe for t in again.traces)
    first, second = (result(score(task, finished(task, video, z, lock))) for z in (x, again.x))
    flagged = torch.zeros(len(risk)).index_fill(0, risk.topk(round(share * len(risk))).indices, 1.0)
    mixed = Result(
        torch.where(flagged > 0, second.psnr, first.psnr),
        torch.where(flagged > 0, second.right, first.right),
        passes + share * extra,
    )
    random = Result(
        torch.lerp(first.psnr, second.psnr, share), torch.lerp(first.right, second.right, share), mixed.passes
    )
    title = f"quarter at highest risk back to sigma {back_to:g}"
    return [
        row(title, "any quarter", mixed, random),
        row(title, "none sent back", mixed, first._replace(passes=passes)),
    ]


def finished(task: Task, video: TinyVideo, latents: Tensor, lock: kv.KVLock) -> Edit:
    """Latents as `edit_video` hands them over: decoded, the source pasted back outside a feathered mask."""
    pixels = torch.lerp(task.source, video.decode(latents).clone(), masks.feather(task.mask, 2.0).to(task.source))
    nothing = torch.zeros(len(pixels))
    return Edit(pixels, lock.trace, 0.0, lock.trace.nfe, nothing, nothing)


def edits(first: int, count: int) -> Task:
    return make_task([sample_edit(first + i, EDITS[i % len(EDITS)]) for i in range(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument(
        "--confirm", type=int, metavar="SCENES", help="only repeat the best one on so many other scenes"
    )
    given = parser.parse_args()
    path, video = ROOT / "benchmarks/results/ideas.json", load()
    if given.confirm:
        task = edits(CONFIRMING_SCENE, given.confirm)
        rows = timing(task, video, done(task, video, policy=FULL)[1], ends=(CONFIRMED,))
        record = json.loads(path.read_text()) | {"confirmed": {"scenes": given.confirm, "rows": rows}}
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        return
    task = edits(FIRST_SCENE, given.scenes)
    full = done(task, video, policy=FULL)[1]
    rows = []
    for part in (partial(timing, full=full), local, chosen, sent_back, partial(stochastic, full=full)):
        found = part(task, video)
        rows += found
        print("\n".join(map(json.dumps, found)), flush=True)
        record = {"scenes": given.scenes, "first_scene": FIRST_SCENE, "steps": STEPS, "rows": rows}
        write_atomically(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
