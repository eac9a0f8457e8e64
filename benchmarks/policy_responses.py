"""Draw docs/images/policies.png, what every policy of the shelf answers:  python benchmarks/policy_responses.py

For each preset two panels: above against a risk that stays (every point a run of its own, lock and scale at its end),
below over one run whose risk rises to a bump and falls again. No model runs: risk, and an effect as large, are made up.
"""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path

import torch

from kvlock_sampling import load_policy
from kvlock_sampling.policy import Policy
from kvlock_sampling.presets import preset_names
from kvlock_sampling.types import Observation
from kvlock_sampling.utils.files import write_atomically

PICTURE = Path(__file__).resolve().parent.parent / "docs/images/policies.png"
STEPS, HIGH, LOW = 30, 80.0, 0.05
ORDER = ("default", "release", "static", "sigmoid", "threshold", "paper", "pid", "steady", "full", "half", "off")
"""Alike beside alike; a preset that is not here comes last."""
COLUMNS = 5
LOCK, GUIDANCE, COMPOSITE, RISK = "#228833", "#aa3377", "#4477aa", "#ddaa33"


def schedule(steps: int = STEPS) -> list[float]:
    return torch.linspace(math.log(HIGH), math.log(LOW), steps, dtype=torch.float64).exp().tolist()


def bump(sigma: float) -> float:
    """Risk over a run: 0.2, with a bump to 4 at sigma = 2."""
    return 0.2 * 20.0 ** math.exp(-0.5 * (math.log(sigma / 2.0) / 0.8) ** 2)


def play(policy: Policy, risks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lock in force, multiple of the caller's guidance, and composite, (evaluations, clips), for `risks` of that shape.

    Every clip has one token, so that a policy decides by its effect alone.
    """
    one = torch.ones_like(risks[0])
    state, locks, scales, weights = policy.init(), [], [], []
    lock = None
    for i, (sigma, risk) in enumerate(zip(schedule(), risks, strict=True)):
        unknown = risk * math.nan
        if lock is None:
            lock = policy.start(Observation(sigma, unknown, unknown, 0 * one, one, STEPS)).lock
            lock = 0.0 if lock is None else lock
        locks.append(torch.as_tensor(lock, dtype=risk.dtype).expand_as(risk))
        state, control = policy.step(state, Observation(sigma, risk, risk, locks[-1], one, STEPS - i, risk))
        lock = lock if control.lock is None else control.lock
        scale = 1.0 if control.cfg_scale is None else control.cfg_scale
        scales.append(torch.as_tensor(scale, dtype=risk.dtype).expand_as(risk))
        weight = 1.0 if control.composite is None else control.composite
        weights.append(torch.as_tensor(weight, dtype=risk.dtype).expand_as(risk))
    return torch.stack(locks), torch.stack(scales), torch.stack(weights)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter
    from PIL import Image

    still = torch.logspace(-1, 1, 161, dtype=torch.float64)
    moving = torch.tensor([[bump(sigma)] for sigma in schedule()], dtype=torch.float64)
    fine = schedule(200)
    names = [n for n in ORDER if n in preset_names()] + [n for n in preset_names() if n not in ORDER]
    bands = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(11, 0.5 + 4.1 * bands), dpi=90, layout="constrained")
    grid = figure.subplots(2 * bands, COLUMNS, sharey=True, squeeze=False)
    for index, name in enumerate(names):
        band, column = divmod(index, COLUMNS)
        static, dynamic = grid[2 * band][column], grid[2 * band + 1][column]
        policy = load_policy(name)
        for axis, x, (lock, scale, weight) in (
            (static, still, [values[-1] for values in play(policy, still.expand(STEPS, -1))]),
            (dynamic, schedule(), [values[:, 0] for values in play(policy, moving)]),
        ):
            axis.plot(
                x, scale, color=GUIDANCE, linestyle=(0, (4, 1.5)), linewidth=1.5, label="guidance, of the caller's"
            )
            axis.plot(x, lock, color=LOCK, linewidth=2.2, label="lock")
            axis.plot(x, weight, color=COMPOSITE, linestyle=":", linewidth=1.8, label="composite")
            axis.set(xscale="log", ylim=(-0.08, 2.15), yticks=[0, 0.5, 1, 1.5, 2])
            axis.grid(alpha=0.22)
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(labelsize=8)
        static.set_title(name, fontsize=12, fontweight="bold")
        static.axvline(1.0, color=RISK, linewidth=1.4, zorder=0)
        static.set_xlabel("risk, or effect, that stays", fontsize=8.5)
        dynamic.fill_between(
            fine, [bump(s) / 2 for s in fine], -0.08, color=RISK, alpha=0.3, linewidth=0, label="risk / 2"
        )
        dynamic.set_xlabel(r"$\sigma$, a run from left to right", fontsize=8.5)
        dynamic.invert_xaxis()
    for axis in grid.flat:
        axis.set_visible(axis.has_data())
    handles, labels = grid[1][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=4, frameon=False, fontsize=10.5)
    raw, out = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png")
    Image.open(raw).convert("RGB").quantize(48).save(out, format="png", optimize=True)
    write_atomically(PICTURE, out.getvalue())
    print(f"{PICTURE.name}: {len(out.getvalue()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
