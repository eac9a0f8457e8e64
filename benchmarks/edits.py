"""The table of edits:  python benchmarks/edits.py [--scenes 32] [--model first_world]

Held-out scenes of the procedural world, edits of five kinds, every way of locking from the same noise. Writes
benchmarks/results/edits.json and edits.md, the table; for the first world edits_first_world.json and .md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import first_world
import torch
from world.compare import STAGE, VARIANTS, Score, compare, make_task

from kvlock_sampling import tiny
from kvlock_sampling.tiny.world import EDITS
from kvlock_sampling.utils.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
FIRST_SCENE = 700_000


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean over clips and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def table(scores: dict[str, Score]) -> str:
    """The scores as Markdown, mean ± standard error over the scenes."""
    lines = [
        "| variant | background PSNR | SSIM | in-mask PSNR | temporal error | colour | shape | passes | s per clip |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, score in scores.items():
        cells = []
        for field, form in (
            ("background_psnr", "{:.1f}"),
            ("background_ssim", "{:.3f}"),
            ("inside_psnr", "{:.2f}"),
            ("temporal", "{:.4f}"),
        ):
            mean, error = mean_and_error(getattr(score, field))
            cells.append(f"{form} ± {form}".format(mean, error) if error > 1e-4 else form.format(mean))
        cells += [f"{float(getattr(score, field).mean()):.0%}" for field in ("colour", "shape")]
        per_clip = score.seconds / len(score.colour)
        lines.append(f"| {name} | {' | '.join(cells)} | {score.nfe} | {per_clip:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--model", default="tiny", help="weights of the embedded model, or first_world")
    parser.add_argument("--dry", action="store_true", help="print only; write nothing")
    given = parser.parse_args()
    first = given.model == "first_world"
    world, video = (first_world, first_world.load()) if first else (tiny, tiny.load(given.model))
    edits = first_world.EDITS if first else EDITS
    kinds = [edits[i % len(edits)] for i in range(given.scenes)]
    pairs = [world.sample_edit(FIRST_SCENE + i, kind) for i, kind in enumerate(kinds)]
    task = make_task(pairs, first_world.FIRST_WORLD if first else STAGE)
    variants = {n: o for n, o in VARIANTS.items() if not given.only or n in given.only}
    started = time.perf_counter()
    results = compare(
        task,
        video,
        variants,
        steps=given.steps,
        sampler=given.sampler,
        seed=FIRST_SCENE,
        on_variant=lambda name: print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True),
    )
    scores = {name: score for name, (_, score) in results.items()}
    text = table(scores)
    paired = {
        name: dict(
            zip(("mean", "error"), mean_and_error(s.inside_psnr - scores["composited"].inside_psnr), strict=True)
        )
        for name, s in scores.items()
        if "composited" in scores
    }
    print(text)
    print("in-mask PSNR against composited, paired:", json.dumps(paired, indent=1))
    if given.dry:
        return
    record = {
        "scenes": given.scenes,
        "first_scene": FIRST_SCENE,
        "kinds": kinds,
        "sampler": given.sampler,
        "steps": given.steps,
        "mean": {name: s.summary() for name, s in scores.items()},
        "per_clip": {
            name: {f: [round(v, 4) for v in getattr(s, f).tolist()] for f in Score._fields[:6]}
            for name, s in scores.items()
        },
        "inside_psnr_against_composited": paired,
        "locks": {name: [round(float(s.lock.mean()), 4) for s in edit.trace] for name, (edit, _) in results.items()},
    }
    target = ROOT / f"benchmarks/results/edits{'_first_world' * first}"
    write_atomically(target.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_atomically(target.with_suffix(".md"), text + "\n")


if __name__ == "__main__":
    main()
