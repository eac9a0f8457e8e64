"""The demo: three edits whose true results are known, each made in five ways and shown side by side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..policy import Constant
from ..samplers import get
from ..tiny import edit_mask, load, render, sample_edit
from ..utils.extras import require
from ..utils.files import write_atomically
from ..video.metrics import masked_psnr
from ..video.write import side_by_side, write_clip
from .edit import Edit, edit_video

FILES = ("side_by_side.mp4", "side_by_side.gif", "trace.png", "trace.csv", "metrics.json")
KINDS = ("remove", "glow", "reshape")
VARIANTS: dict[str, dict[str, Any]] = {
    "unlocked": {"policy": Constant(lock=0.0)},
    "composited": {"policy": Constant(lock=0.0), "composite": True},
    "fixed 0.5": {"policy": Constant(lock=0.5)},
    "full lock": {"policy": Constant(lock=1.0)},
    "default": {"policy": "default"},
}


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    steps: int = 30,
    sampler: str = "dpmpp_2m",
    on_variant: Callable[[str], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Write `FILES` into the folder `out`; return the mean PSNRs (dB), nfe and seconds of each variant."""
    get(sampler)  # Errors come before the folder is created.
    for module, extra in (("av", "video"), ("matplotlib", "plot")):
        require(module, extra)
    model = load()
    out.mkdir(parents=True, exist_ok=True)
    pairs = [sample_edit(1000 * seed + i, kind) for i, kind in enumerate(KINDS)]
    sources, targets = [s for s, _ in pairs], [t for _, t in pairs]
    source, truth, mask = render(sources), render(targets), edit_mask(sources, targets)
    prompts: dict[str, Any] = {"prompt": [t.prompt for t in targets], "source_prompt": [s.prompt for s in sources]}
    edits: dict[str, Edit] = {}
    metrics: dict[str, dict[str, float]] = {}
    for name, options in VARIANTS.items():
        edit = edit_video(source, mask, model=model, steps=steps, sampler=sampler, seed=seed, **prompts, **options)
        inside = masked_psnr(edit.pixels, truth, mask)
        psnr = {"background_psnr": float(edit.background_psnr.mean()), "inside_psnr": float(inside.mean())}
        edits[name], metrics[name] = edit, {**psnr, "nfe": edit.nfe, "seconds": edit.seconds}
        if on_variant is not None:
            on_variant(name)

    columns = {"source": source, "mask": (mask * 2 - 1).expand_as(source), "ground truth": truth}
    columns |= {name: edit.pixels for name, edit in edits.items()}
    tiles = [clips[i] for i in range(len(pairs)) for clips in columns.values()]
    sheet = side_by_side(tiles, list(columns) * len(pairs), scale=2, columns=len(columns))
    files = [out / name for name in FILES]
    for path in files[:2]:
        write_clip(path, sheet, fps=6)
    trace = edits["default"].trace
    trace.plot(files[2], title=f"default policy, {sampler}, {steps} steps, one line per clip")
    trace.to_csv(files[3])
    edited = [f"{s.prompt} -> {t.prompt}" for s, t in pairs]
    record = {"seed": seed, "sampler": sampler, "steps": steps, "edits": edited, "variants": metrics}
    write_atomically(files[4], json.dumps(record, indent=1))
    return metrics
