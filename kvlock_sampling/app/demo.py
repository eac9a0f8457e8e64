"""The demo: five edits whose true results are known, and what becomes of the shadow or the light beside the object."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..policy import Constant, ReleaseBelow
from ..tiny import load, render, sample_edit
from ..tiny.world import EDITS, regions
from ..utils.extras import require
from ..utils.files import check_writable, write_atomically
from ..video.metrics import masked_psnr
from ..video.write import side_by_side, write_clip
from .edit import Edit, edit_video

FILES = ("edits.png", "edits.gif", "edits.mp4", "trace.png", "trace.csv", "metrics.json")
VARIANTS: dict[str, dict[str, Any]] = {
    "composited": {"policy": Constant(lock=0.0), "composite": True},
    "let go": {"policy": ReleaseBelow(lock=0.0)},
    "release": {"policy": "release"},
}
CAPTIONS = ("the clip", "background pasted", "let go, not locked", "locked, effects let go", "what is right")
STILL = 4  # the frame of the still picture


def run_demo(
    out: Path, *, seed: int, steps: int, sampler: str, on_variant: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Write `FILES` into the folder `out`; return the mean PSNRs (dB), nfe and seconds of each variant."""
    for module, extra in (("av", "video"), ("matplotlib", "plot")):
        require(module, extra)
    model = load()
    for name in FILES:
        check_writable(out / name)
    pairs = [sample_edit(1000 * seed + i, kind) for i, kind in enumerate(EDITS)]
    sources, targets = [s for s, _ in pairs], [t for _, t in pairs]
    source, truth, (mask, effect, _) = render(sources), render(targets), regions(sources, targets)
    prompts: dict[str, Any] = {"prompt": [t.prompt for t in targets], "source_prompt": [s.prompt for s in sources]}
    beside = effect.flatten(1).any(dim=1)  # which edits have an effect outside their mask
    edits: dict[str, Edit] = {}
    metrics: dict[str, dict[str, float]] = {}
    for name, options in VARIANTS.items():
        edit = edit_video(source, mask, model=model, steps=steps, sampler=sampler, seed=seed, **prompts, **options)
        psnr = {
            "psnr": masked_psnr(edit.pixels, truth, torch.ones_like(mask)),
            "inside_psnr": masked_psnr(edit.pixels, truth, mask),
            "effect_psnr": masked_psnr(edit.pixels[beside], truth[beside], effect[beside]),
        }
        edits[name] = edit
        metrics[name] = {key: float(value.mean()) for key, value in psnr.items()}
        metrics[name] |= {"nfe": edit.nfe, "seconds": edit.seconds}
        on_variant(name)

    columns = (source, *(edit.pixels for edit in edits.values()), truth)
    tiles = [clips[i] for i in range(len(pairs)) for clips in columns]
    sheet = side_by_side(tiles, CAPTIONS * len(pairs), scale=3, columns=len(columns))
    files = [out / name for name in FILES]
    write_clip(files[0], sheet[:, STILL : STILL + 1])
    for path in files[1:3]:
        write_clip(path, sheet, fps=6)
    trace = edits["release"].trace
    trace.plot(files[3], title=f"release, {sampler}, {steps} steps, one line per edit")
    trace.to_csv(files[4])
    edited = [f"{s.prompt} -> {t.prompt}" for s, t in pairs]
    record = {"seed": seed, "sampler": sampler, "steps": steps, "edits": edited, "variants": metrics}
    write_atomically(files[5], json.dumps(record, indent=1))
    return metrics
