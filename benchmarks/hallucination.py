"""Which estimator sees hallucinations, and what controlling them costs:  python benchmarks/hallucination.py

The 2D Gaussian grid of `grid.py`, trained networks, three seeds. Part one: AUROC, recall at 96% retention,
specificity at 95% recall, effect size and extra evaluations, for every estimator, sampler and number of steps. Part
two: flagged samples are sent back up to a higher noise level and resampled; rate, spread and mode counts before and
after. Writes benchmarks/results/hallucination.json and .md, and docs/images/hallucination.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from grid import Grid, GridDenoiser, label, train
from scipy import stats
from torch import Tensor

import kvlock_sampling as kv
from kvlock_sampling import samplers
from kvlock_sampling.files import write_atomically
from kvlock_sampling.types import Evaluation
from kvlock_sampling.variance import Estimator, PosteriorVariance, SolverDisagreement

ROOT = Path(__file__).resolve().parent.parent
SIGMA_MAX = 8.2
BAND = 0.138 / 0.0316  # the noise levels of the last 10 of 1000 training steps, as a ratio


class Probe(NamedTuple):
    """An estimator and where it is read: at the last evaluation, or at the first one at or below `at`."""

    estimator: Estimator
    at: float | None = None


PROBES: dict[str, Probe] = {
    "trajectory, last 10 (paper)": Probe(kv.TrajectoryVariance(window=10)),
    "trajectory, sigma window": Probe(kv.TrajectoryVariance(window=None, span=BAND)),
    "trajectory, sigma window, / sigma^2": Probe(kv.TrajectoryVariance(window=None, span=BAND, normalise=True)),
    "trajectory, all, / sigma^2": Probe(kv.TrajectoryVariance(window=None, normalise=True)),
    **{
        f"renoise x{passes} at {at}": Probe(kv.RenoiseVariance(passes=passes), at)
        for passes, at in ((1, 0.05), (1, 0.1), (1, 0.2), (2, 0.06), (2, 0.1), (4, 0.1), (32, 0.1))
    },
    **{
        f"posterior x{probes} at {at}": Probe(PosteriorVariance(probes=probes, method="finite"), at)
        for probes, at in ((1, 0.04), (1, 0.06), (1, 0.1), (2, 0.06), (1, 0.2))
    },
    "solver disagreement, last": Probe(SolverDisagreement()),
}


class Record(torch.nn.Module):
    """Notes every evaluation of a denoiser."""

    def __init__(self, model: GridDenoiser) -> None:
        super().__init__()
        self.model = model
        self.calls: list[tuple[float, Tensor, Tensor]] = []

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        denoised = self.model(x, sigma)
        self.calls.append((float(sigma[0]), x, denoised))
        return denoised


def read(probe: Probe, calls: list[tuple[float, Tensor, Tensor]], model: GridDenoiser) -> tuple[Tensor, int]:
    """The variance per sample that an estimator reports on a recorded run, and how many evaluations it took."""
    state, variance, rows = probe.estimator.init(), None, model.rows

    def again(x: Tensor, sigma: float) -> Tensor:
        return model(x, torch.full((len(x),), sigma))

    for sigma, x, denoised in calls:
        if probe.at is not None and sigma > probe.at:
            continue
        state, variance = probe.estimator.step(state, Evaluation(sigma, x, denoised, None, again))
        if probe.at is not None:
            break
    assert variance is not None
    return variance, (model.rows - rows) // len(calls[0][1])


def detection(score: Tensor, bad: Tensor) -> dict[str, float]:
    """How well a score separates hallucinated samples (bad) from the rest."""
    s, b = score.double().numpy(), bad.numpy()
    positives, negatives = s[b], s[~b]
    if len(positives) < 5:
        return {"auroc": float("nan"), "recall_at_96_retention": float("nan"), "specificity_at_95_recall": float("nan")}
    u = stats.mannwhitneyu(positives, negatives).statistic / (len(positives) * len(negatives))
    order = np.argsort(-s)
    hits = b[order].cumsum()
    precision = hits / np.arange(1, len(s) + 1)
    pooled = np.sqrt((np.log(positives + 1e-12).var() + np.log(negatives + 1e-12).var()) / 2)
    return {
        "auroc": float(u),
        "auprc": float((precision * b[order]).sum() / b.sum()),
        "recall_at_96_retention": float((positives > np.quantile(negatives, 0.96)).mean()),
        "specificity_at_95_recall": float((negatives < np.quantile(positives, 0.05)).mean()),
        "cohens_d_of_log": float((np.log(positives + 1e-12).mean() - np.log(negatives + 1e-12).mean()) / pooled),
    }


def run(model: GridDenoiser, sampler: str, sigmas: Tensor, count: int, seed: int) -> tuple[Tensor, Record]:
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(10_000 + seed)) * sigmas[0]
    record = Record(model)
    return samplers.run(sampler, record, x, sigmas, seed=seed), record


def karras(steps: int, grid: Grid) -> Tensor:
    """Down to 1.79 standard deviations of a mode: 0.0316 on the standard grid."""
    return samplers.get_sigmas_karras(steps, 1.79 * grid.mode_std, SIGMA_MAX)


@torch.inference_mode()
def part_one(grid: Grid, seeds: int, count: int, say: Callable[[str], None]) -> list[dict]:
    """Detection: every estimator, sampler and number of steps."""
    rows = []
    for seed in range(seeds):
        model = GridDenoiser(train(grid, seed), grid)
        settings = [(n, s, karras(n, grid)) for n in (20, 50, 100) for s in ("euler", "euler_ancestral", "dpmpp_2m")]
        ddpm = torch.cat([model.log_sigmas.exp().flip(0), torch.zeros(1)])
        settings.append((len(ddpm) - 1, "DDPM (ancestral over the training levels)", ddpm))
        for steps, name, sigmas in settings:
            sampler = name if " " not in name else "euler_ancestral"
            samples, record = run(model, sampler, sigmas, count if " " not in name else count // 2, seed)
            judged = label(grid, samples)
            rate = float(judged.hallucinated.float().mean())
            say(f"seed {seed} {name} {steps}: {rate:.2%} hallucinated")
            for title, probe in PROBES.items():
                score, extra = read(probe, record.calls, model)
                rows.append(
                    {
                        "seed": seed,
                        "sampler": name,
                        "steps": steps,
                        "estimator": title,
                        "rate": rate,
                        "extra_evaluations": extra / steps,
                        **detection(score, judged.hallucinated),
                    }
                )
    return rows


def spread(grid: Grid, samples: Tensor) -> float:
    """Within-mode standard deviation over the true one, of samples within 5 standard deviations of a mode."""
    judged = label(grid, samples)
    kept = ~judged.hallucinated
    offset = samples[kept] - grid.modes[judged.mode[kept]]
    return float(offset.std() / grid.mode_std)


def skew(grid: Grid, samples: Tensor) -> tuple[float, float]:
    """Chi-square of the mode counts against equal ones, and its p value."""
    counts = torch.bincount(label(grid, samples).mode, minlength=25).numpy()
    test = stats.chisquare(counts)
    return float(test.statistic), float(test.pvalue)


@torch.inference_mode()
def part_two(grid: Grid, seeds: int, count: int, say: Callable[[str], None]) -> list[dict]:
    """Control: a share of the samples with the highest risk goes back up to `back` and is sampled again from there."""
    rows = []
    steps, sigmas = 50, karras(50, grid)
    for seed in range(seeds):
        model = GridDenoiser(train(grid, seed), grid)
        for sampler in ("euler", "dpmpp_2m"):
            model.rows = 0
            samples, record = run(model, sampler, sigmas, count, seed)
            base = model.rows
            before = float(label(grid, samples).hallucinated.float().mean())
            chi = skew(grid, samples)
            common = {"seed": seed, "sampler": sampler, "steps": steps}
            rows.append(
                {
                    **common,
                    "control": "none",
                    "rate": before,
                    "spread": spread(grid, samples),
                    "chi2_p": chi[1],
                    "extra": 0.0,
                }
            )
            say(f"seed {seed} {sampler}: {before:.2%} before")
            for title in (
                "trajectory, sigma window",
                "renoise x1 at 0.1",
                "renoise x2 at 0.06",
                "posterior x1 at 0.06",
            ):
                model.rows = base
                score, _ = read(PROBES[title], record.calls, model)
                for share, back in ((0.04, 0.5), (0.06, 0.5), (0.08, 0.3), (0.12, 0.3)):
                    flagged = score.topk(int(share * count)).indices
                    again = sigmas[sigmas <= back]
                    noise = torch.randn(len(flagged), 2, generator=torch.Generator().manual_seed(seed + 5))
                    start = samples[flagged] + again[0] * noise
                    rows_before = model.rows
                    redone = samplers.run(sampler, model, start, again)
                    result = samples.clone()
                    result[flagged] = redone
                    chi = skew(grid, result)
                    rows.append(
                        {
                            **common,
                            "control": f"{title}; {share:.0%} back to {back}",
                            "rate": float(label(grid, result).hallucinated.float().mean()),
                            "spread": spread(grid, result),
                            "chi2_p": chi[1],
                            "extra": (model.rows - base) / base,
                        }
                    )
                    model.rows = rows_before
    return rows


def mean_table(rows: list[dict], keys: tuple[str, ...], values: tuple[str, ...]) -> list[dict]:
    """Rows averaged over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    return [
        dict(zip(keys, key, strict=True)) | {v: float(np.nanmean([r[v] for r in group])) for v in values}
        for key, group in groups.items()
    ]


def markdown(table: list[dict]) -> str:
    names = list(table[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in table:
        lines.append("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=20_000)
    given = parser.parse_args()
    results = {}
    text = []
    for grid in (Grid(), Grid(std=0.02, beta_start=1e-4, beta_end=0.02)):
        title = f"std {grid.std}, betas {grid.beta_start} to {grid.beta_end}"
        one = part_one(grid, given.seeds, given.samples, lambda s: print(s, flush=True))
        two = part_two(grid, given.seeds, given.samples, lambda s: print(s, flush=True))
        results[title] = {"detection": one, "control": two}
        keys = ("sampler", "steps", "estimator")
        values = ("rate", "auroc", "recall_at_96_retention", "specificity_at_95_recall", "extra_evaluations")
        text += [f"## {title}", "", markdown(mean_table(one, keys, values)), ""]
        text += [markdown(mean_table(two, ("sampler", "control"), ("rate", "spread", "chi2_p", "extra"))), ""]
    write_atomically(ROOT / "benchmarks/results/hallucination.json", json.dumps(results, indent=1) + "\n")
    write_atomically(ROOT / "benchmarks/results/hallucination.md", "\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
