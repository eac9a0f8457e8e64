"""Write benchmarks/measured.md and its figures from benchmarks/results/*.json:  python benchmarks/report.py"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import release
from report_cost import page, quality, speed
from report_grid import control, detection, figure, paper, table, verdict
from seeds import FIRST_SCENE

from kvlock_sampling.utils.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
BOTH = ("border", "judge", "border and judge", "ranks of both")


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def embedded_model() -> str:
    r, first = load("embedded_model"), load("first_world_model")
    names = list(r["right"])
    rates = [[title, *(f"{r[title][name]:.1%}" for name in names)] for title in ("right", "right on true renders")]
    return (
        f"{r['clips']} clips from prompts of held-out scenes, {r['sampler']}, {r['steps']} steps, guidance "
        f"{r['guidance']:g}; what the judge reads right, and what it reads right on the scenes' true renders.\n\n"
        f"{table(['clips', *names], rates)}\n\n![Samples of the embedded model](../docs/images/samples.png)\n\n"
        f"The model of the first world, from {first['clips']} prompts: colour right in {first['colour']:.1%}, shape in "
        f"{first['shape']:.1%}, motion in {first['motion']:.1%}."
    )


def risk() -> str:
    r = load("risk")
    fates = list(r["failed"])
    failed = ", ".join(f"{count} with {fate}" for fate, count in r["failed"].items())
    body = [
        [
            row["estimator"],
            f"{row['extra passes']:g}",
            f"{row['of the run']:.0%}",
            *("{:.2f} ± {:.2f}".format(*row[fate]) for fate in fates),
        ]
        for row in r["rows"]
    ]
    return (
        f"{r['edits']} further edits under the preset `release`, {r['sampler']}, {r['steps']} steps; {failed}. AUROC: "
        "the chance that a failed edit reads higher than another; 0.5 is chance. ± standard error over resampled "
        "edits. Passes are extra ones at each reading. *Anything wrong* also counts effects that are left over, and "
        "what should not be there.\n\n" + table(["estimator", "passes", "of the run", *fates], body)
    )


def transfer() -> str:
    record = load("transfer")
    names = list(record["rows"][0]["meters"])
    parts = []
    for key, said in (("rate", "{:.1%}"), ("ratio", "{:.2f}")):
        body = []
        for name in names:
            cells = [name]
            for r in record["rows"]:
                m = r["meters"][name]
                low, high = (said.format(v) for v in m[f"{key} interval"])
                fixed = key == "ratio" and r is record["rows"][0]
                cells.append(said.format(m[key]) + ("" if fixed else f" ({low} to {high})"))
            body.append(cells)
        parts.append(table(["threshold", *(f"{r['sampler']} {r['steps']}" for r in record["rows"])], body))
    return (
        f"Rates, on {record['clips']} clips, the same ones in every column:\n\n{parts[0]}\n\n"
        f"Ratios to the rate of the calibrated setting, the first column, on the same clips:\n\n{parts[1]}"
    )


def seeds(record: dict[str, Any], only: Sequence[str] = ()) -> str:
    """Which score finds the better seed, when all but one stop at half of the steps. only: some scores; default all."""
    first, chance, oracle = record["first seed"], record["chance"], record["oracle"]
    policy = record.get("policy", "full")
    more, where, unit = f" --policy {policy}", f"under `{policy}`", "edits of one seed"
    if policy == "full":
        more, where, unit = "", "at full lock", "token-passes of an unlocked edit, with a filled KV cache"
    if record["first_scene"] != FIRST_SCENE:
        more += f" --first {record['first_scene']}"
    lines = [
        f"`python benchmarks/seeds.py --edits {record['edits']} --bfloat16{more}`. {record['edits']} further "
        f"edits {where}, {record['sampler']}, {record['steps']} steps; {record['seeds']} seeds, all but one stop after "
        f"half of the steps. Cost in {unit}. First seed {first['psnr']:.2f} dB, by chance {chance['psnr']:.2f}, "
        f"the best by the truth {oracle['psnr']:.2f}; right {chance['right']:.1%} by chance, at most "
        f"{oracle['right']:.1%}.\n",
        "| score | cost | dB to the first seed | to chance | to one seed in 40 steps "
        "| right, to the first seed | to chance | to one seed in 40 steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        if row["after"] == record["steps"] // 2 and (not only or row["score"] in only):
            gaps = [f"{row[to]['psnr'][0]:+.2f} ± {row[to]['psnr'][1]:.2f}" for to in row if to.startswith("to ")]
            right = ["{:+.1%} ± {:.1%}".format(*row[to]["right"]) for to in row if to.startswith("to ")]
            lines.append(f"| {row['score']} | {row['cost']:.2f} | {' | '.join(gaps + right)} |")
    return "\n".join(lines)


def step_cache() -> str:
    r = load("step_cache")
    rows = [
        [name, f"{row['cost']:.2f}", f"{row['to the whole run']:.1f}", f"{row['mask']:.2f}", row["mask, gain"]]
        for name, row in sorted(r["rows"].items(), key=lambda pair: -pair[1]["cost"])
    ]
    about = r["about"]
    return (
        f"{about['edits']} further edits at full lock, composited, euler, {about['steps']} steps. Cost: evaluations of "
        "edited tokens over those of the whole run. PSNR in the mask against the whole run, and against the true "
        "render. An upper bound: attention sees fresh keys and values of skipped tokens. *Held* keeps a token's "
        "last prediction, *line* extends its last two in log sigma; *above* computes tokens whose predicted change is "
        "larger, *random* as many in each evaluation; *searched* computes all of them in the best evaluations of "
        "other edits.\n\n" + table(["tokens", "cost", "dB to the whole run", "dB to the truth", "gain"], rows)
    )


def main() -> None:
    grid = load("hallucination")
    figure(grid)
    speeds = (load(name) for name in ("speed", "speed_large", "speed_gpu"))
    page(*speeds, load("storing_gpu"), load("where_time_goes"))
    parts = [
        "# Measured\n\nScripts in `benchmarks/` write every number on this page, without selection. "
        "`python benchmarks/report.py` builds the page from `benchmarks/results/`. The *stage* is the embedded model's "
        "world, and a *post* an object on it. In the older *first world* nothing outside the mask depends on the edit. "
        "The *judge* is a classifier that reads the attributes of a clip.",
        "## The embedded model\n\n`python benchmarks/embedded_model.py`\n\n" + embedded_model(),
        "## Who may touch the background, and when\n\n`python benchmarks/release.py --edits 300 --bfloat16`. "
        + release.report(load("release")),
        "The same with another sampler, seed and number of steps, `python benchmarks/release.py --edits 300 --bfloat16 "
        "--sampler dpmpp_2m --seed 1 --steps 12 --name release_dpmpp`. " + release.report(load("release_dpmpp")),
        "## Several seeds of one edit\n\nBy a score's last value, or its mean *so far*. *Chance* is the mean over the "
        "seeds.\n\n" + seeds(load("seeds")),
        seeds(load("seeds_release")),
        "Border and judge together, on other scenes: as log-likelihoods (*border and judge*), so that the judge's nats "
        "count once it doubts, and by ranks. Both were fixed before any run.\n\n" + seeds(load("seeds_more"), BOTH),
        seeds(load("seeds_release_more"), BOTH),
        "## Can edited tokens skip evaluations?\n\n`python benchmarks/step_cache.py --edits 20 --bfloat16`. "
        + step_cache(),
        "## Do the presets do harm on a second model?\n\n`python benchmarks/harm.py`. "
        + (RESULTS / "harm.md").read_text(),
        "## Does risk tell failed edits?\n\n`python benchmarks/risk.py --bfloat16`. " + risk(),
        "## Does a threshold transfer?\n\n`python benchmarks/transfer.py`. "
        "Fraction of measurements of calm runs with "
        "risk above 1. Curves and numbers were calibrated to 5% with dpmpp_2m in 30 steps, on other scenes; the "
        "built-in curve by `kvlock calibrate` on 128 scenes. 95% intervals from resampling the clips. "
        "*default* is `TrajectoryVariance` as a lock takes it where its preset names no estimator.\n\n" + transfer(),
        "## What a locked edit costs\n\n`python benchmarks/speed.py`. " + speed(load("speed")),
        "`python benchmarks/speed.py --device cuda --dtype bfloat16 --layers 30 --latents 21 60 104 --rounds 5 "
        "--shares 0.25 --name speed_gpu`. " + speed(load("speed_gpu")),
        "All layers of the whole network, on a CPU, with four times as many tokens, `python benchmarks/speed.py "
        "--layers 30 --latents 5 64 96 --shares 0.25 --rounds 1 --name speed_large --ways foreground "
        "'foreground, KV cache every 3' 'foreground, filled KV cache'`. " + speed(load("speed_large")),
        "Edited tokens alone over ten evaluations, `python benchmarks/speed.py --layers 2 8 --latents 5 64 96 "
        "--shares 0.25 --rounds 1 --evaluations 10 --name speed_line --ways foreground`. " + speed(load("speed_line")),
        "## What keeping the source's K/V costs\n\n`python benchmarks/cost.py`. "
        "On the model of the first world, 32 further scenes, full lock, 30 "
        "steps. Gain over compositing, and difference from the full lock, both paired by scene and noise, ± standard "
        "error; change of pixels from the full lock's, relative to the change that the lock makes: mean, maximum.\n\n"
        + quality(load("cost")),
        "## Hallucination on the 2D grid\n\n`python benchmarks/hallucination.py`. The 25-mode Gaussian grid of "
        "arXiv 2406.09358 and its sharper variant of arXiv 2605.06831, networks trained here ("
        + " and ".join(f"{parts['training_steps']:,}" for parts in grid.values())
        + " steps of batch 2,048; the papers train 100,000 steps of batch 10,000). A sample further than 5 standard "
        "deviations from every mode is a hallucination.\n\n![AUROC over cost](../docs/images/hallucination.png)",
    ]
    for title, rows in grid.items():
        parts += [
            verdict(title, rows),
            detection(title, rows["detection"]),
            paper(title, rows["paper"]),
            control(title, rows["control"]),
        ]
    parts.append(
        "## Posterior variance against exact values\n\n`python benchmarks/posterior.py`\n\n"
        "![Bias and spread over the number of probes](../docs/images/posterior.png)"
    )
    write_atomically(ROOT / "benchmarks/measured.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
