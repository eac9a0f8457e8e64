"""Detection, the paper's setting and control on the 2D grid, as tables and a figure for benchmarks/measured.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LEVELS = "euler_ancestral over the training levels"
# What control may cost in evaluations, change in the within-mode spread, and add to chi-square / 24: the standard
# deviation that this ratio has for counts of 25 equal modes, sqrt(2 / 24).
COST, SPREAD, SKEW = 0.05, 0.05, 0.3
SHOWN = (
    "trajectory, last 10 (paper)",
    "trajectory, sigma window",
    "trajectory, all, / sigma^2",
    "solver disagreement, last",
    "renoise x1 at 0.1",
    "renoise x2 at 0.06",
    "renoise x2 at 0.1",
    "renoise x4 at 0.1",
    "renoise x32 at 0.1",
    "posterior x1 at 0.04",
    "posterior x1 at 0.06",
    "posterior x2 at 0.06",
)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values: list[float]) -> str:
    return f"{np.nanmean(values):.3f} ({np.nanmin(values):.3f} to {np.nanmax(values):.3f})"


def detection(title: str, rows: list[dict]) -> str:
    parts = []
    for sampler, steps in (("euler", 50), ("euler_ancestral", 50), ("dpmpp_2m", 50), (LEVELS, None)):
        mine = [r for r in rows if r["sampler"] == sampler and steps in (None, r["steps"])]
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
                    " / ".join(f"{k:.3f}" for k in kept),
                    " / ".join(f"{r['chi2_ratio']:.1f}" for r in mine),
                    " / ".join(f"{r['moved_p']:.2g}" for r in mine),
                    f"{mine[0]['extra']:+.1%}",
                    f"{sum(map(holds, mine, (base[r['seed']] for r in mine)))} of {len(mine)}",
                ]
            )
    header = [
        "sampler",
        "control",
        "rate by seed",
        "of the base",
        "spread, of the base",
        "chi-square / 24",
        "p of no shift",
        "extra",
        "holds",
    ]
    return (
        f"### {title}: control\n\nBy network: rate; within-mode spread over the base's; chi-square of the mode counts "
        "against equal ones over its 24 degrees of freedom (1 ± 0.3 if they are equal, which a trained network's "
        "are not); p value that control moved no net share of samples between modes, a paired test that sees shifts "
        "far smaller than the network's own skew. *Holds*: on how many networks the rate is at most half, at "
        f"{COST:+.0%} evaluations or fewer, the spread within {SPREAD:.0%}, and the counts no further from equal than "
        f"the base's (chi-square / 24 up by {SKEW} at most).\n\n{table(header, body)}"
    )


def holds(row: dict, base: dict) -> bool:
    """Whether control did all that was asked of it."""
    return (
        row["rate"] <= base["rate"] / 2
        and row["extra"] <= COST
        and abs(row["spread"] / base["spread"] - 1) <= SPREAD
        and row["chi2_ratio"] <= base["chi2_ratio"] + SKEW
    )


def paper(title: str, rows: list[dict]) -> str:
    """Recall at 96% retention in the setting of arXiv 2406.09358, by network."""
    body = []
    for window in dict.fromkeys(r["window"] for r in rows):
        mine = [r for r in rows if r["window"] == window]
        low, high = mine[0]["sigmas"]
        body.append(
            [
                window,
                f"{low:.3f} to {high:.3f}",
                *(" / ".join(f"{r[k]:.3f}" for r in mine) for k in ("auroc", "recall_at_96_retention")),
                " / ".join(f"{r['specificity_at_95_recall']:.3f}" for r in mine),
            ]
        )
    rates = " / ".join(f"{r['rate']:.2%}" for r in rows if r["window"] == rows[0]["window"])
    header = ["window", "sigma", "AUROC", "recall at 96% retention", "specificity at 95% recall"]
    return (
        f"### {title}: the paper's own setting\n\n1,000 ancestral steps with added variance beta_t, the population "
        f"variance of the last predictions, {rows[0]['samples']:,} samples of each network; by network. Hallucinated: "
        f"{rates}.\n\n{table(header, body)}"
    )


def verdict(title: str, parts: dict[str, list[dict]]) -> str:
    """What holds on which network, in three sentences of figures."""
    networks = len({r["seed"] for r in parts["paper"]})
    recalls = {w: [r["recall_at_96_retention"] for r in parts["paper"] if r["window"] == w] for w in windows(parts)}
    best = max(recalls, key=lambda w: float(np.mean(recalls[w])))

    def claim(window: str) -> str:
        values = recalls[window]
        listed = " / ".join(f"{v:.1%}" for v in values)
        return f"{listed} in the window *{window}* (above 95% on {sum(v > 0.95 for v in values)} of {networks})"

    found = []
    for sampler in ("euler", "euler_ancestral", "dpmpp_2m"):
        rows = [r for r in parts["detection"] if r["sampler"] == sampler and r["steps"] == 50]
        affordable = [r for r in rows if r["extra_evaluations"] <= COST]
        scores = {
            e: [r["auroc"] for r in affordable if r["estimator"] == e] for e in {r["estimator"] for r in affordable}
        }
        name = max(sorted(scores), key=lambda e: min(scores[e]))
        good = sum(v >= 0.99 for v in scores[name])
        listed = " / ".join(f"{v:.3f}" for v in scores[name])
        found.append(f"{sampler} {listed} (*{name}*, at least 0.99 on {good} of {networks})")
    controls = []
    for sampler in ("euler", "dpmpp_2m"):
        mine = [r for r in parts["control"] if r["sampler"] == sampler]
        base = {r["seed"]: r for r in mine if r["control"] == "none"}
        wins = {}
        for row in mine:
            wins[row["control"]] = wins.get(row["control"], 0) + holds(row, base[row["seed"]])
        most = max(wins.values())
        names = "; ".join(f"*{name}*" for name, count in wins.items() if count == most)
        controls.append(f"{sampler} on {most} of {networks} with {names if most else 'none'}")
    claims = ["last 10 (paper)"] if best == "last 10 (paper)" else ["last 10 (paper)", best]
    lines = [
        "Recall above 95% at 96% retention under the paper's own sampler, its claim, by network: "
        + ", ".join(map(claim, claims)),
        f"AUROC of the best estimator at {COST:+.0%} evaluations or fewer, 50 steps, by network: " + "; ".join(found),
        f"The rate at most halved at {COST:+.0%} evaluations or fewer, the spread within {SPREAD:.0%} and the counts "
        "no further from equal: " + ". ".join(controls),
    ]
    return f"### {title}: what holds\n\n" + "\n".join(f"- {line}." for line in lines)


def windows(parts: dict[str, list[dict]]) -> list[str]:
    """The windows that were read, in their order."""
    return list(dict.fromkeys(r["window"] for r in parts["paper"]))


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
