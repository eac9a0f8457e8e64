"""Can edited tokens skip evaluations?  python benchmarks/step_cache.py [--edits 20]

A step cache inside the edited region keeps the last prediction of a token that hardly changes. Here every evaluation is
computed whole and the predictions of skipped tokens are then replaced, so that attention always sees fresh keys and
values: an upper bound on what such a cache can keep. Skipped predictions are held, or follow the line in log sigma
through the last two.

Which tokens are computed: those whose predicted change since the last time is above a threshold; as many at random; and
all of them at searched evaluations (dynamic programming over the change of the predictions of other edits). Beside them
stands the honest baseline: all of them in fewer steps, of euler and of dpmpp_2m. Full lock, composited. Cost is in
evaluations of edited tokens, relative to all of them in 30 steps of euler. Writes benchmarks/results/step_cache.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from release import CFG_SCALE, Batch, Bfloat16, batches, difference, psnr, tokens
from torch import Tensor, nn

import kvlock_sampling as kv
from kvlock_sampling import samplers
from kvlock_sampling.denoisers import FlowDenoiser
from kvlock_sampling.masks.tokens import on_latents
from kvlock_sampling.tiny import load, tokenize
from kvlock_sampling.tiny.model import PATCH
from kvlock_sampling.utils.files import write_atomically

RESULT = Path(__file__).resolve().parent / "results/step_cache.json"
FIRST_SCENE, SEARCHED_SCENE = 840_000, 850_000
STEPS = 30
SEARCHED = 20  # edits whose predictions the static schedules are searched on
THRESHOLDS = (0.02, 0.05, 0.1)
FEWER, FEWER_2M, KEPT = (24, 20, 15, 10, 8, 6), (15, 10, 6), (20, 15, 10)

Rule = Callable[["Held", int, float], Tensor]
"""Which tokens an evaluation computes, (batch, tokens), from the index of the evaluation and its noise level."""


class Held:
    """A locked denoiser in which the tokens that a rule leaves out keep an older prediction."""

    def __init__(self, lock: kv.KVLock, rule: Rule, line: bool, steps: int) -> None:
        self.lock, self.rule, self.line, self.steps = lock, rule, line, steps
        self.past: list[tuple[Tensor, Tensor]] = []  # the last two predictions of each token, with their log sigmas
        self.active: list[Tensor] = []
        self.predictions: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        now, index = math.log(float(sigma[0])), len(self.active)
        active = self.rule(self, index, now).to(x.device)
        if index in (0, 1, self.steps - 1):
            active = torch.ones_like(active)
        self.active.append(active)
        fresh = self.lock(x, sigma, **args) if active.any() else x
        if self.past:
            (older, before), (last, then) = self.past
            held = last
            if self.line:
                slope = (now - then) / (then - before).where(then != before, torch.inf)
                held = last + on_latents(slope.clamp(0, 2), x.shape, PATCH) * (last - older)
            chosen = on_latents(active.float(), x.shape, PATCH)
            out = fresh * chosen + held * (1 - chosen)
            level = then.where(active == 0, now)
            self.past = [
                (last * chosen + older * (1 - chosen), then.where(active > 0, before)),
                (fresh * chosen + last * (1 - chosen), level),
            ]
        else:
            out = fresh
            self.past = [(out, torch.full_like(active, now)), (out, torch.full_like(active, now))]
        self.predictions.append(out)
        return out

    def rate(self) -> Tensor:
        """How fast each token's prediction changed between its last two, RMS per unit of log sigma, (batch, tokens)."""
        (older, before), (last, then) = self.past
        change = nn.functional.avg_pool3d((last - older).square().mean(1, keepdim=True), PATCH).flatten(1).sqrt()
        return change / (before - then).clamp_min(1e-6)


def everything(batch: Batch) -> Tensor:
    return torch.ones(len(batch.mask), tokens(batch.mask).shape[1])


def above(threshold: float, batch: Batch) -> Rule:
    """Tokens whose prediction would have changed by more than this at the rate that was last seen."""

    def rule(held: Held, index: int, now: float) -> Tensor:
        if index < 2:
            return everything(batch)
        return (held.rate() * (held.past[1][1] - now) > threshold).float()

    return rule


def at_random(shares: list[float], batch: Batch) -> Rule:
    """As many tokens in each evaluation, drawn anew."""
    generator = torch.Generator().manual_seed(0)

    def rule(held: Held, index: int, now: float) -> Tensor:
        whole = everything(batch)
        return (torch.rand(whole.shape, generator=generator) < shares[index]).float()

    return rule


def at_evaluations(kept: list[int], batch: Batch) -> Rule:
    return lambda held, index, now: everything(batch) * (index in kept)


@torch.no_grad()
def edit(
    network: nn.Module, batch: Batch, rule: Rule | None, steps: int, sampler: str = "euler", line: bool = False
) -> tuple[Tensor, Held]:
    """Edit a batch; returns the clips on the host and what was held."""
    device = next(network.parameters()).device
    source, mask, noise = (part.to(device) for part in (batch.source, batch.mask, batch.noise))
    words = {"cond": tokenize([scene.prompt for scene in batch.sources])}
    denoiser = FlowDenoiser(network, prediction="x0")
    lock = kv.KVLock(denoiser, source=source, mask=mask, policy=kv.Constant(lock=1.0), source_args=words)
    cond = tokenize([scene.prompt for scene in batch.targets])
    args = {"cond": cond, "uncond": torch.zeros_like(cond), "cond_scale": CFG_SCALE}
    sigmas = samplers.flow_sigmas(steps, shift=3.0, t_max=0.98).to(device)
    held = Held(lock, rule or (lambda held, index, now: everything(batch)), line, steps)
    with lock:
        out = samplers.run(sampler, held, noise * sigmas[0], sigmas, extra_args=args, disable=True)
    return out.clamp(-1, 1).cpu(), held


def cost(held: Held, batch: Batch) -> tuple[float, list[float]]:
    """Evaluations of edited tokens relative to all of them in STEPS steps, and the share in each evaluation."""
    edited = tokens(batch.mask)
    shares = [float((active.cpu() * edited).sum() / edited.sum()) for active in held.active]
    return sum(shares) / STEPS, shares


def searched(network: nn.Module, edits: list[Batch]) -> dict[int, list[int]]:
    """The best evaluations of each number in KEPT when predictions are held in between, by dynamic programming.

    Holding prediction i at step k puts (1 - sigma_k+1 / sigma_k) |x0_k - x0_i| into x.
    """
    sigmas = samplers.flow_sigmas(STEPS, shift=3.0, t_max=0.98)
    weight = (1 - sigmas[1:] / sigmas[:-1]).square()
    change = torch.zeros(STEPS, STEPS)
    for batch in edits:
        _, held = edit(network, batch, None, STEPS)
        mask = batch.mask.to(held.predictions[0].device)
        rows = torch.stack([(p * mask).flatten() for p in held.predictions])
        change += torch.cdist(rows, rows).cpu().square()
    apart = [[float((weight[i:j] * change[i, i:j]).sum()) for j in range(STEPS + 1)] for i in range(STEPS)]
    # best[n][j]: the least error of steps before j with n evaluations, and the last of these evaluations.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, -1)}]
    for _ in range(STEPS):
        ends = range(1, STEPS + 1)
        best.append(
            {
                j: min((best[-1][i][0] + apart[i][j], i) for i in range(j) if i in best[-1])
                for j in ends
                if any(i in best[-1] for i in range(j))
            }
        )
    found = {}
    for count in KEPT:
        kept, end = [], STEPS
        for n in range(count, 0, -1):
            end = best[n][end][1]
            kept.append(end)
        found[count] = sorted({*kept, 1, STEPS - 1})
    return found


def summary(row: dict[str, Any], base: list[float]) -> dict[str, Any]:
    """Cost, mean scores, and what the mask gains on the whole run against the truth."""
    scores = {name: round(statistics.mean(row[name]), 3) for name in ("all", "mask", "to the whole run")}
    return {"cost": row["cost"], **scores, "mask, gain": difference(row["mask"], base)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--dry", action="store_true", help="print only; write nothing")
    given = parser.parse_args()
    network: nn.Module = load(device=given.device).network
    network = Bfloat16(network) if given.bfloat16 else network
    edits = list(batches(FIRST_SCENE, given.edits))
    rows: dict[str, dict[str, Any]] = {}
    whole: list[Tensor] = []

    def measure(name: str, make: Callable[[Batch], Rule | None], steps: int = STEPS, **options: Any) -> list[float]:
        found: dict[str, list[float]] = {"all": [], "mask": [], "to the whole run": []}
        costs, shares = [], []
        for i, batch in enumerate(edits):
            clips, held = edit(network, batch, make(batch), steps, **options)
            if len(whole) == i:
                whole.append(clips)
            found["all"] += psnr(clips, batch.target)
            found["mask"] += psnr(clips, batch.target, batch.mask)
            found["to the whole run"] += psnr(clips, whole[i], batch.mask)
            share, by_step = cost(held, batch)
            costs.append(share)
            shares.append(by_step)
        rows[name] = {"cost": round(statistics.mean(costs), 4), **found}
        print(f"{name}: {rows[name]['cost']:.2f}", *(f"{statistics.mean(v):.2f}" for v in found.values()), flush=True)
        return [statistics.mean(column) for column in zip(*shares, strict=True)]

    measure("whole", lambda _: None)
    for steps in FEWER:
        measure(f"{steps} steps", lambda _: None, steps)
    for steps in FEWER_2M:
        measure(f"dpmpp_2m, {steps} steps", lambda _: None, steps, sampler="dpmpp_2m")
    schedules = searched(network, list(batches(SEARCHED_SCENE, SEARCHED)))
    for count, kept in schedules.items():
        measure(f"searched, {count} evaluations", lambda batch, kept=kept: at_evaluations(kept, batch))
    for line in (False, True):
        title = "line" if line else "held"
        for threshold in THRESHOLDS:
            shares = measure(f"{title}, above {threshold}", lambda batch, t=threshold: above(t, batch), line=line)
            measure(f"{title}, random as {threshold}", lambda batch, s=shares: at_random(s, batch), line=line)
    about = {"edits": given.edits, "first_scene": FIRST_SCENE, "steps": STEPS, "guidance": CFG_SCALE}
    about |= {"bfloat16": given.bfloat16, "searched": schedules}
    base = rows["whole"]["mask"]
    record = {"about": about, "rows": {name: summary(row, base) for name, row in rows.items()}}
    print(json.dumps(record, indent=1))
    if not given.dry:
        write_atomically(RESULT, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
