"""Do presets do harm on a second model?  python benchmarks/harm.py [--scenes 96]

Held-out scenes of the first world, on whose model nothing is tuned and where nothing outside the mask depends on the
edit: the composited edit has the right background, so whatever is let go can only do harm. Five kinds of edit, every
way of locking from the same noise. Writes benchmarks/results/harm.json and harm.md, the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import first_world
import torch
from release import difference, mean
from world.compare import VARIANTS, compare, make_task

from kvlock_sampling.utils.files import write_atomically

RESULTS = Path(__file__).resolve().parent / "results"
FIRST_SCENE, BATCH = 700_000, 16
FIELDS = ("background_psnr", "inside_psnr", "colour", "shape")


def measure(names: list[str], scenes: int, steps: int, sampler: str) -> dict[str, dict[str, Any]]:
    """Scores per clip of these variants, their passes, and how much of the background was composited."""
    video, rows = first_world.load(), {name: {field: [] for field in (*FIELDS, "composite")} for name in names}
    variants = {name: VARIANTS[name] for name in names}
    for first in range(0, scenes, BATCH):
        seeds = range(FIRST_SCENE + first, FIRST_SCENE + min(first + BATCH, scenes))
        pairs = [first_world.sample_edit(seed, first_world.EDITS[seed % len(first_world.EDITS)]) for seed in seeds]
        task = make_task(pairs, first_world.FIRST_WORLD)
        for name, (edit, score) in compare(
            task, video, variants, steps=steps, sampler=sampler, seed=FIRST_SCENE + first
        ).items():
            weights = torch.stack([step.composite.reshape(len(pairs), -1).mean(1) for step in edit.trace])
            for field in FIELDS:
                rows[name][field] += [round(v, 4) for v in getattr(score, field).tolist()]
            rows[name]["composite"] += [round(v, 4) for v in weights.mean(0).tolist()]
            rows[name]["passes"] = score.nfe
        print(f"{min(first + BATCH, scenes)} of {scenes} scenes", flush=True)
    return rows


def right(row: dict[str, Any]) -> list[float]:
    """1 where the judge reads the right colour and the right shape."""
    return [colour * shape for colour, shape in zip(row["colour"], row["shape"], strict=True)]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown. Gained and lost: edits that are right where the composited one is not, and the reverse."""
    titles = ["background", "in the mask", "to composited", "right", "gained", "lost", "kept", "outside", "passes"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    base = rows["composited"]
    for name, row in rows.items():
        pairs = list(zip(right(row), right(base), strict=True))
        cells = [f"{mean(row['inside_psnr']):.2f}", difference(row["inside_psnr"], base["inside_psnr"])]
        cells += [f"{mean(right(row)):.0%}"]
        cells += [str(sum(mine > other for mine, other in pairs)), str(sum(mine < other for mine, other in pairs))]
        cells += [f"{mean(row['composite']):.1%}", f"{mean(row['background_psnr']):.1f}", str(row["passes"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="rows to measure; keeps the others")
    given = parser.parse_args()
    about = {"scenes": given.scenes, "first_scene": FIRST_SCENE, "steps": given.steps, "sampler": given.sampler}
    record = json.loads((RESULTS / "harm.json").read_text()) if (RESULTS / "harm.json").exists() else {}
    known = record["rows"] if record.get("about") == about else {}
    known |= measure(given.only, given.scenes, given.steps, given.sampler)
    rows = {name: known[name] for name in VARIANTS if name in known}
    text = (
        f"{given.scenes} held-out edits of the first world, {given.sampler}, {given.steps} steps, guidance 3, the same "
        "noise for every row. PSNR in dB: in the mask against the true render, paired with compositing, ± standard "
        "error; *outside* against the source, 100 is exact. *Right*: colour and shape, by the judge; *gained* and "
        "*lost*: edits that are right and the composited one is not, and the reverse. *Kept*: how much of the "
        "background is composited, over the run. Passes are per clip.\n\n"
    ) + table(rows)
    print(text)
    write_atomically(RESULTS / "harm.json", json.dumps({"about": about, "rows": rows}) + "\n")
    write_atomically(RESULTS / "harm.md", text + "\n")


if __name__ == "__main__":
    main()
