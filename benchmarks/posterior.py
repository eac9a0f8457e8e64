"""Is PosteriorVariance right, and how many probes does it take?  python benchmarks/posterior.py

Measures it on 20 Gaussian mixtures whose posterior variance is known exactly: bias and spread against the number of
probes, for forward mode and for finite differences on models in float32 and bfloat16; and against the step of the
differences. Writes benchmarks/results/posterior.json and docs/images/posterior.png, and prints a table.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn
from torch.autograd import forward_ad

from kvlock_sampling import FlowDenoiser
from kvlock_sampling.testing import MixtureDenoiser
from kvlock_sampling.types import Evaluation
from kvlock_sampling.utils.files import write_atomically
from kvlock_sampling.variance import PosteriorVariance
from kvlock_sampling.variance.base import draw

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATIONS, CLIPS, SIZE = 20, 256, 64
PROBES = (1, 2, 4, 8, 16, 32)
STEP = PosteriorVariance().step_size
STEPS = tuple(2.0**-k for k in range(10))
KINDS = {
    "forward mode": ("float32", "forward"),
    "differences, float32": ("float32", "finite"),
    "differences, bf16 predicting x0": ("x0", "finite"),
    "differences, bf16 predicting velocity": ("velocity", "finite"),
    "differences, bf16 latents too": ("latents", "finite"),
}


def mixture(index: int) -> tuple[MixtureDenoiser, Tensor, float]:
    """A mixture whose modes are 1 to 4 noise widths apart, where its gate is soft; points x0 + sigma * noise; sigma."""
    g = torch.Generator().manual_seed(index)
    sigma, std = (0.05, 0.2, 0.5, 1.0, 3.0)[index % 5], (0.1, 0.3, 0.6)[index % 3]
    width, modes = math.hypot(sigma, std), 2 + index % 4
    apart = (1.0, 2.0, 3.0, 4.0)[index % 4] * width
    means = 0.7 * torch.randn(SIZE, generator=g) + torch.randn(modes, SIZE, generator=g) * apart / (2 * SIZE) ** 0.5
    x = means[torch.randint(modes, (CLIPS,), generator=g)] + width * torch.randn(CLIPS, SIZE, generator=g)
    return MixtureDenoiser(means, std=std), x, sigma


def in_bfloat16(exact: nn.Module, prediction: str) -> nn.Module:
    """The same as a network in bfloat16 would answer, behind latents of any dtype: input and output are rounded."""

    def network(z: Tensor, t: Tensor) -> Tensor:
        sigma = (t / (1 - t)).view(-1, 1)
        clean = exact(z.float() * (1 + sigma), sigma)
        return (clean if prediction == "x0" else (z.float() - clean) / t.view(-1, 1)).bfloat16()

    return FlowDenoiser(network, prediction, model_dtype=torch.bfloat16)  # type: ignore[arg-type]


def exactly(probe: Any, x: Tensor, sigma: float, probes: int, seed: int) -> Tensor:
    """The same estimate along the same directions with exact derivatives, by forward-mode differentiation."""
    v = draw("signs", probes, x, seed, 0)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(probe(forward_ad.make_dual(torch.cat([x] * probes), v), sigma)).tangent
    products = (v * tangent).unflatten(0, (probes, len(x))).mean(0)  # type: ignore[operator]
    return (sigma**2 * products.flatten(1).mean(1)).clamp_min(0.0)


def errors(index: int, precision: str, method: str, probes: int, step: float = STEP) -> Tensor:
    """Estimate minus exact value over the mean exact value, (CLIPS,), float64."""
    exact, x, sigma = mixture(index)
    x = x.bfloat16() if precision in ("latents", "rounded") else x
    x = x.float() if precision == "rounded" else x
    model: nn.Module = exact
    if precision in ("x0", "velocity", "latents"):
        model = in_bfloat16(exact, "x0" if precision == "x0" else "velocity")

    def probe(at: Tensor, level: float) -> Tensor:
        return model(at, torch.full((len(at),), level))

    measured, predictions = [], probe(x, sigma)
    for clip in range(CLIPS):  # directions of its own for each, so that their errors are independent
        rows = slice(clip, clip + 1)
        if method == "forward":
            measured.append(exactly(probe, x[rows], sigma, probes, clip))
            continue
        estimator = PosteriorVariance(probes, seed=clip, step_size=step)
        evaluation = Evaluation(sigma, x[rows], predictions[rows], None, probe)
        measured.append(estimator.step(estimator.init(), evaluation)[1])
    found = torch.cat(measured)  # type: ignore[arg-type]
    truth = exact.double().variance(x.double(), sigma).mean(1)
    return (found.double() - truth) / truth.mean()


def by_probes(kind: str, probes: int) -> dict[str, float]:
    """bias: mean relative error over all mixtures, with its 99% half-width; spread: median relative std of one clip;
    inside: mixtures of 20 whose exact value lies inside the 99% interval of the mean over clips."""
    runs = torch.stack([errors(i, *KINDS[kind], probes) for i in range(CONFIGURATIONS)])
    half = stats.t.ppf(0.995, CLIPS - 1) * runs.std(1) / CLIPS**0.5
    return {
        "probes": probes,
        "bias": float(runs.mean()),
        "bias_99": float(half.square().sum().sqrt() / CONFIGURATIONS),
        "worst_bias": float(runs.mean(1).abs().max()),
        "spread": float(runs.std(1).median()),
        "inside": int((runs.mean(1).abs() <= half).sum()),
    }


def by_step(kind: str, step: float) -> dict[str, float]:
    """Gap of differences to forward mode along the same directions, at the same points, relative; mean over clips."""
    precision, reference = KINDS[kind][0], "rounded" if KINDS[kind][0] == "latents" else "float32"
    gaps = [
        float((errors(i, precision, "finite", 1, step) - errors(i, reference, "forward", 1)).mean())
        for i in range(CONFIGURATIONS)
    ]
    return {"step": step, "bias": sum(map(abs, gaps)) / CONFIGURATIONS, "worst_bias": max(map(abs, gaps))}


def figure(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    colours = dict(zip(KINDS, ("#222222", "#4477aa", "#228833", "#cc3311", "#aa3377"), strict=True))
    fig = Figure(figsize=(8.4, 3.7), dpi=110, layout="constrained")
    left, right = fig.subplots(1, 2)
    for kind, rows in result["probes"].items():
        dashed = "--" if kind == "forward mode" else "-"
        left.loglog(PROBES, [r["spread"] for r in rows], dashed, marker="o", ms=3, color=colours[kind], label=kind)
    first = result["probes"]["forward mode"][0]["spread"]
    left.loglog(PROBES, [first / k**0.5 for k in PROBES], ":", color="grey", label="1 / sqrt(probes)")
    left.set(xlabel="probes = extra evaluations", ylabel="relative spread of one clip (median)")
    fig.legend(loc="outside lower center", ncols=3, fontsize=7)
    for kind, rows in result["steps"].items():
        right.loglog(STEPS, [r["bias"] for r in rows], marker="o", ms=3, color=colours[kind])
    right.axvline(STEP, color="grey", lw=0.8, ls=":")
    right.set(xlabel="step / sigma (dotted: default)", ylabel="mean relative gap to forward mode")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both", lw=0.4)
        axis.spines[["top", "right"]].set_visible(False)
    drawn, packed = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(48).save(packed, format="png", optimize=True)
    write_atomically(path, packed.getvalue())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dry", action="store_true", help="print only; write nothing")
    given = parser.parse_args()
    started = time.perf_counter()
    result: dict[str, Any] = {
        "configurations": CONFIGURATIONS,
        "clips": CLIPS,
        "elements": SIZE,
        "probes": {kind: [by_probes(kind, k) for k in PROBES] for kind in KINDS},
        "steps": {k: [by_step(k, s) for s in STEPS] for k, (_, method) in KINDS.items() if method == "finite"},
    }
    result["seconds"] = round(time.perf_counter() - started, 1)
    print(f"{'':40}{'probes':>7}{'bias':>9}{'+- 99%':>8}{'worst':>8}{'spread':>8}{'inside 99%':>12}")
    for kind, rows in result["probes"].items():
        for r in rows:
            numbers = f"{r['bias']:9.2%}{r['bias_99']:8.2%}{r['worst_bias']:8.2%}{r['spread']:8.2%}"
            print(f"{kind:40}{r['probes']:7}{numbers}{r['inside']:9} / {CONFIGURATIONS}")
    for kind, rows in result["steps"].items():
        print(
            f"gap to forward mode by step, {kind}: " + "  ".join(f"1/{1 / r['step']:.0f} {r['bias']:.2%}" for r in rows)
        )
    print(f"{result['seconds']} s")
    if not given.dry:
        write_atomically(ROOT / "benchmarks/results/posterior.json", json.dumps(result, indent=1) + "\n")
        figure(result, ROOT / "docs/images/posterior.png")


if __name__ == "__main__":
    main()
