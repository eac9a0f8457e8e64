"""Write docs/measured.md and its figures from benchmarks/results/*.json:  python benchmarks/report.py"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from kvlock_sampling.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
SHOWN = (
    "trajectory, last 10 (paper)",
    "trajectory, sigma window",
    "trajectory, all, / sigma^2",
    "solver disagreement, last",
    "renoise x1 at 0.1",
    "renoise x2 at 0.06",
    "renoise x4 at 0.1",
    "renoise x32 at 0.1",
    "posterior x1 at 0.06",
    "posterior x2 at 0.06",
)


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def embedded_model() -> str:
    r = load("embedded_model")
    return (
        f"{r['clips']} clips from prompts of held-out scenes, {r['sampler']}, {r['steps']} steps, guidance "
        f"{r['cfg_scale']:g}: colour right in {r['colour']:.1%}, shape in {r['shape']:.1%}, both in {r['both']:.1%}, "
        f"motion in {r['motion']:.1%}. Edges are softer than a render's: the judge's strict test for an unblemished "
        f"shape (quality 0.97) passes {r['clean']:.0%}, median quality {r['median_quality']:.3f}.\n\n"
        "![Samples of the embedded model](images/samples.png)"
    )


def spread(values: list[float]) -> str:
    return f"{np.nanmean(values):.3f} ({np.nanmin(values):.3f} to {np.nanmax(values):.3f})"


def detection(title: str, rows: list[dict]) -> str:
    parts = []
    for sampler, steps in (("euler", 50), ("euler_ancestral", 50), ("dpmpp_2m", 50), ("DDPM", None)):
        mine = [r for r in rows if r["sampler"].startswith(sampler) and (steps is None or r["steps"] == steps)]
        if sampler == "euler":
            mine = [r for r in mine if r["sampler"] == "euler"]
        rates = sorted({(r["seed"], r["rate"]) for r in mine})
        name = f"{sampler}, {steps or mine[0]['steps']} steps"
        body = []
        for estimator in SHOWN:
            group = [r for r in mine if r["estimator"] == estimator]
            body.append(
                [
                    estimator,
                    f"{group[0]['extra_evaluations']:+.1%}",
                    spread([r["auroc"] for r in group]),
                    spread([r["recall_at_96_retention"] for r in group]),
                    spread([r["specificity_at_95_recall"] for r in group]),
                ]
            )
        said = ", ".join(f"{rate:.2%}" for _, rate in rates)
        header = ["estimator", "extra evaluations", "AUROC", "recall at 96% retention", "specificity at 95% recall"]
        parts.append(f"**{name}.** Hallucinated, by seed: {said}.\n\n{table(header, body)}")
    return f"### {title}: detection\n\nMean over three networks (lowest to highest).\n\n" + "\n\n".join(parts)


def control(title: str, rows: list[dict]) -> str:
    body = []
    for sampler in ("euler", "dpmpp_2m"):
        base = {r["seed"]: r for r in rows if r["sampler"] == sampler and r["control"] == "none"}
        names = dict.fromkeys(r["control"] for r in rows if r["sampler"] == sampler)
        for name in names:
            mine = [r for r in rows if r["sampler"] == sampler and r["control"] == name]
            ratio = [r["rate"] / base[r["seed"]]["rate"] for r in mine]
            kept = [r["spread"] / base[r["seed"]]["spread"] for r in mine]
            body.append(
                [
                    sampler,
                    name,
                    " / ".join(f"{r['rate']:.2%}" for r in mine),
                    f"{np.mean(ratio):.2f}",
                    f"{np.mean(kept):.3f}",
                    " / ".join(f"{r['chi2_p']:.2g}" for r in mine),
                    f"{mine[0]['extra']:+.1%}",
                ]
            )
    header = ["sampler", "control", "rate by seed", "of the base", "spread, of the base", "p of equal counts", "extra"]
    return f"### {title}: control\n\n{table(header, body)}"


def figure(results: dict) -> None:
    from matplotlib.figure import Figure

    plot = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    for axis, (title, parts) in zip(plot.subplots(1, 2, sharey=True), results.items(), strict=True):
        for family, colour in (("trajectory", "#4477aa"), ("renoise", "#cc3311"), ("posterior", "#228833")):
            mine = [r for r in parts["detection"] if r["estimator"].startswith(family)]
            mine = [r for r in mine if r["sampler"] == "dpmpp_2m"]
            for steps, marker in ((20, "o"), (50, "s"), (100, "^")):
                rows = [r for r in mine if r["steps"] == steps]
                x = [100 * r["extra_evaluations"] + 0.25 for r in rows]
                axis.scatter(x, [r["auroc"] for r in rows], c=colour, marker=marker, s=16, alpha=0.6)
            axis.plot([], [], "o", color=colour, label=family)
        axis.axvline(5.25, color="0.5", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", xlabel="extra evaluations, % (left edge: none)", title=title)
        axis.grid(alpha=0.25)
    plot.axes[0].set_ylabel("AUROC, dpmpp_2m")
    plot.axes[0].legend(loc="lower right")
    plot.savefig(ROOT / "docs/images/hallucination.png")


def loops() -> str:
    record = load("loops")
    open_rows = [
        [r["estimator"], r["actuator"], r["sigma"], f"{r['mean']:+.3f} ± {r['error']:.3f}"] for r in record["open loop"]
    ]
    closed = [
        [
            r["policy"],
            f"{r['mean lock']:.2f}",
            f"{r['mean scale']:.2f}",
            f"{r['in-mask PSNR']:.2f}",
            f"{r['both right']:.0%}",
            f"{r['constant in-mask PSNR']:.2f}",
            f"{r['constant both right']:.0%}",
            f"{r['difference dB']:+.2f} ± {r['error dB']:.2f}",
        ]
        for r in record["closed loop against constants"]
    ]
    predicted = [
        [
            r["estimator"],
            f"{r['of the run']:.0%}",
            str(r["failed"]),
            f"{r['AUROC failed']:.2f}",
            f"{r['AUROC lowest quarter of quality']:.2f}",
        ]
        for r in record["prediction of failure"]
    ]
    return "\n\n".join(
        [
            "### Open loop: how the signal answers\n\nd(log variance) per unit of lock, and of guidance scale, "
            f"mean ± standard error over {record['scenes']} edits.",
            table(["estimator", "actuator", "sigma", "slope"], open_rows),
            "### Closed loop against constants\n\nEvery scheduling preset beside a constant setting with the same mean "
            "lock and mean scale, paired by scene and noise.",
            table(
                ["policy", "mean lock", "scale", "PSNR", "both right", "constant PSNR", "both right", "difference, dB"],
                closed,
            ),
            "### Does risk predict failure?\n\nAUROC of the variance at a share of the run against failed edits "
            "(colour or shape wrong) and against the quarter of edits with the lowest shape quality.",
            table(["estimator", "of the run", "failed", "AUROC failed", "AUROC low quality"], predicted),
        ]
    )


def transfer() -> str:
    rows = json.loads((RESULTS / "transfer.json").read_text())
    body = [[r["sampler"], str(r["steps"]), f"{r['default']:.1%}", f"{r['paper']:.1%}"] for r in rows]
    return table(["sampler", "steps", "default thresholds", "window 10, fixed 0.01"], body)


def main() -> None:
    grid = load("hallucination")
    figure(grid)
    parts = [
        "# Measured\n\nEvery number on this page is written by a script in `benchmarks/`, as it came out; "
        "`python benchmarks/report.py` makes the page from `benchmarks/results/`.",
        "## The embedded model\n\n`python benchmarks/embedded_model.py`\n\n" + embedded_model(),
        "## Edits\n\n`python benchmarks/edits.py`. 32 held-out scenes, five kinds of edit, the same noise for every "
        "variant; mean ± standard error. PSNR in dB; 100 dB is exact. The in-mask PSNR compares with the true render "
        "of the edit. Passes are evaluations of the model per clip; seconds on two idle CPU "
        "cores.\n\n" + (RESULTS / "edits.md").read_text(),
        "## When and where to lock\n\n`python benchmarks/when.py`. Other scenes, 20 steps; gain over compositing, "
        "paired by scene and noise, ± standard error.\n\n" + (RESULTS / "when.md").read_text(),
        "## Does a threshold transfer?\n\n`python benchmarks/transfer.py`. Share of measurements of calm runs with "
        "risk above 1. The default thresholds were calibrated to 5% with dpmpp_2m in 30 steps, on other scenes.\n\n"
        + transfer()
        + "\n\nA stochastic sampler needs a calibration of its own, best with `integral=False`: see "
        "[estimators](estimators.md).",
        "## Loops\n\n`python benchmarks/loops.py`\n\n" + loops(),
        "## Hallucination on the 2D grid\n\n`python benchmarks/hallucination.py`. The 25-mode Gaussian grid of "
        "arXiv 2406.09358 and its sharper variant of arXiv 2605.06831, networks trained here (12,000 steps of batch "
        "2,048; the papers train 100,000 steps of batch 10,000). A sample further than 5 standard deviations from "
        "every mode is a hallucination.\n\n![AUROC over cost](images/hallucination.png)",
    ]
    for title, rows in grid.items():
        parts += [detection(title, rows["detection"]), control(title, rows["control"])]
    parts.append(
        "## Posterior variance against exact values\n\n`python benchmarks/posterior.py`\n\n"
        "![Bias and spread over the number of probes](images/posterior.png)"
    )
    write_atomically(ROOT / "docs/measured.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
