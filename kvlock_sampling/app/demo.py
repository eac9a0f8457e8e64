"""The demo: three edits with a known right answer, locked in five ways, side by side, with the run's figure."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..samplers import get
from ..tiny import load
from ..tiny.compare import DEMO_VARIANTS, VARIANTS, Score, Task, compare, make_task
from ..tiny.world import sample_edit
from ..trace import Trace
from ..utils.files import write_atomically
from ..video.files import side_by_side, write_clip

KINDS = ("replace", "recolour", "insert")


class Demo(NamedTuple):
    """What a demo made: the files it wrote, the scores per variant, and the time it took, in seconds."""

    files: list[Path]
    scores: dict[str, Score]
    seconds: float


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    steps: int = 30,
    sampler: str = "dpmpp_2m",
    on_variant: Callable[[str], None] | None = None,
) -> Demo:
    """Run the demo into folder `out`: side_by_side.mp4 and .gif, trace.png, trace.csv, metrics.json."""
    started = time.perf_counter()
    get(sampler)  # before a folder is made
    out.mkdir(parents=True, exist_ok=True)
    task = make_task([sample_edit(1000 * seed + i, kind) for i, kind in enumerate(KINDS)])
    variants: Mapping[str, Mapping[str, Any]] = {name: VARIANTS[name] for name in DEMO_VARIANTS}
    results = compare(task, load(), variants, steps=steps, sampler=sampler, seed=seed, on_variant=on_variant)
    sheet = contact(task, {name: edit.pixels for name, (edit, _) in results.items()})
    files = [out / "side_by_side.mp4", out / "side_by_side.gif", out / "trace.png", out / "trace.csv"]
    for path in files[:2]:
        write_clip(path, sheet, fps=6)
    trace: Trace = results["default"][0].trace
    trace.plot(files[2], title=f"default policy, {sampler}, {steps} steps, one line per clip")
    trace.to_csv(files[3])
    scores = {name: result for name, (_, result) in results.items()}
    metrics = {
        "seed": seed,
        "sampler": sampler,
        "steps": steps,
        "edits": [f"{s} -> {t}" for s, t in zip(task.source_prompts, task.prompts, strict=True)],
        "variants": {name: result.summary() for name, result in scores.items()},
    }
    files.append(write_atomically(out / "metrics.json", json.dumps(metrics, indent=1)))
    return Demo(files, scores, time.perf_counter() - started)


def contact(task: Task, edits: Mapping[str, Tensor]) -> Tensor:
    """All clips of a task as one labelled clip, (3, frames, height, width): a row per edit, a column per variant."""
    tiles, labels = [], []
    for i in range(len(task.source)):
        mask = (task.mask[i] * 2 - 1).expand(3, -1, -1, -1)
        tiles += [task.source[i], mask, task.truth[i], *(clips[i] for clips in edits.values())]
        labels += ["source", "mask", "ground truth", *edits]
    return side_by_side(tiles, labels, scale=4, columns=3 + len(edits))
