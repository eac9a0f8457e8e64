"""Batches of edits: each job is done once. A batch that was stopped or killed goes on where it was.

An output gets its name when it is whole, and after it its record, `<output>.json`. A job is done while its record has
its fingerprint, and its output has the digest that the record names; else it is done again.
"""

import base64
import csv
import glob
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..integrations.ray import run_on_ray
from ..kv_cache import KVCache
from ..types import SourceError
from ..utils.extras import require
from ..utils.files import write_atomically
from ..utils.warn import warn
from ..video.write import to_bytes, write_clip
from .edit import edit_video
from .jobs import Job, digest, message
from .models import VideoModel, open_model, read_pair

Record: TypeAlias = dict[str, Any]
"""What became of a job. "status": "done", "kept" from an earlier run, or "failed", which has only an "error" beside."""

LARGEST = 16_384  # pixels a side that encoders take
STILL = 128  # pixels a side of a still


def run_batch(
    jobs: Sequence[Job],
    model: Mapping[str, Any],
    *,
    workers: int | None = None,
    address: str | None = None,
    on_job: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Do the jobs that are not done, and return the record of each.

    Args:
        jobs: From `read_jobs`.
        model: The arguments of `open_model`.
        workers: Processes that edit. Default: one per GPU, or one.
        address: A Ray cluster; None: this machine, on Ray if there are several workers.
        on_job: Called after each job.
    """
    records: dict[int, Record] = {}
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if job.error:
            records[job.row] = {"status": "failed", "error": job.error}
        elif (record := done(job)) is not None:
            records[job.row] = {"status": "kept"} | record
            job.claim.unlink(missing_ok=True)
        else:
            names = (f".{glob.escape(p.stem)}.{'[0-9a-f]' * 8}.tmp{p.suffix}" for p in (job.output, job.record))
            leftovers = [p for name in names for p in job.output.parent.glob(name)]  # of a run that was killed
            if job.output.exists() and not (leftovers or job.record.exists() or _reported(job)):
                text = f"{str(job.output)!r} exists, and no record says that a batch made it"
                records[job.row] = {"status": "failed", "error": f"{text}. Move it, or give the row another name."}
            else:
                groups.setdefault(job.options["clip"], []).append(job)
                for leftover in {*leftovers} - {job.claim}:  # the claim is proof, should this run end early too
                    leftover.unlink(missing_ok=True)
        if job.row in records:
            on_job()
    for job, record in _run(list(groups.values()), dict(model), workers, address):
        records[job.row] = {"status": "failed" if "error" in record else "done"} | record
        on_job()
    return [records[job.row] for job in jobs]


def _reported(job: Job) -> bool:
    """Whether the last report of its folder says that a batch made the output, whose record is gone."""
    try:
        with open(job.output.with_name("results.csv"), encoding="utf-8-sig", newline="") as file:
            return any(
                r.get("output") == job.output.name and r.get("status") in ("done", "kept") for r in csv.DictReader(file)
            )
    except (OSError, ValueError, csv.Error):
        return False


def _run(
    groups: list[list[Job]], model: dict[str, Any], workers: int | None, address: str | None
) -> Iterator[tuple[Job, Record]]:
    workers = workers or (None if address else torch.cuda.device_count() or 1)
    if groups and (address is not None or (workers or 1) > 1):
        if address is not None or find_spec("ray"):
            # Jobs that share a KV cache stay in their order on one actor.
            share = not any(job.options["kv_cache"] for group in groups for job in group)
            arguments = (model, torch.get_num_threads())
            yield from run_on_ray(Editor, arguments, groups, workers=workers, address=address, share=share)
            return
        install = "pip install 'kvlock-sampling[batch]'"
        warn(f"{workers} workers need ray, which is not installed: jobs run one by one.\n  {install}")
    editor = Editor(model)
    for job in (job for group in groups for job in group):
        editor.open()
        yield job, editor.edit(job)


class Editor:
    """Holds the model, and the KV cache that serves the further jobs of a clip. On Ray it is an actor.

    Args:
        model: The arguments of `open_model`.
        threads: Of torch; sums over another number of threads are rounded otherwise. None: as it is.
    """

    def __init__(self, model: dict[str, Any], threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._model = model
        self._video: VideoModel | None = None
        self._cache: tuple[Path, KVCache] | None = None

    def open(self) -> None:
        """Load the model unless it is loaded. Raises KVLockError if that fails."""
        self._video = open_model(**self._model) if self._video is None else self._video

    def edit(self, job: Job) -> Record:
        """Do a job unless it is done, and return its record, with the error if it fails."""
        try:
            if (record := done(job)) is None:
                with warnings.catch_warnings(record=True) as told:
                    record = self._edit(job)
                record["warnings"] = [str(warning.message) for warning in told]
                write_atomically(job.record, json.dumps(record, indent=1))
                job.claim.unlink(missing_ok=True)
            return record
        except Exception as error:
            if not job.output.exists():
                job.claim.unlink(missing_ok=True)
            return {"error": message(error)}

    def _edit(self, job: Job) -> Record:
        self.open()
        options, video = {**job.options, "policy": job.policy}, cast(VideoModel, self._video)
        clip, mask, frames, size, scale = (options.pop(name) for name in ("clip", "mask", "frames", "size", "scale"))
        source, region = read_pair(video, clip, mask, frames=frames, size=size)
        scale = fitting_scale(scale, video, source.pixels)
        if (folder := options.pop("kv_cache")) is not None:
            options["kv_cache"] = self._cache_in(Path(folder, *(str(options[n]) for n in ("sampler", "steps"))))
        edit = edit_video(source.pixels, region.unsqueeze(0), options.pop("prompt"), model=video, **options)
        write_atomically(job.claim, "")
        sound = write_clip(job.output, edit.pixels[0], source.fps, scale, sound=clip)
        return {
            "fingerprint": job.fingerprint,
            "digest": digest(job.output),
            "options": dict(job.options),
            "nfe": edit.nfe,
            "seconds": round(edit.seconds, 3),
            "background_psnr": round(float(edit.background_psnr[0]), 4),
            "lost": [source.note] * (", cut to" in source.note or "; 0 left out" not in source.note)
            + [sound] * (sound not in ("", "sound copied")),
            "still": _still(source.pixels, edit.pixels[0]),
        }

    def _cache_in(self, folder: Path) -> KVCache:
        """A cache whose levels serve their own noise levels alone, so that no job depends on the jobs before it."""
        if self._cache is None or self._cache[0] != folder:
            self._cache = folder, KVCache(folder, every=None, ratio=1.0)
        return self._cache[1]


def done(job: Job) -> Record | None:
    """The record of a job that is done; None if it is still to do."""
    try:
        record = json.loads(job.record.read_bytes())
        whole = record["fingerprint"] == job.fingerprint and record["digest"] == digest(job.output)
    except (OSError, ValueError, LookupError, TypeError):  # VideoError, if the output is missing, is a ValueError
        return None
    return record if whole else None


def fitting_scale(scale: int | None, video: VideoModel, pixels: Tensor) -> int:
    """The factor of enlargement; default: 4 for the embedded model. Raises SourceError if encoders cannot take it."""
    scale = scale or (4 if video.frames is not None else 1)
    if (largest := max(pixels.shape[2:]) * scale) > LARGEST:
        raise SourceError(f"--scale {scale} makes {largest} pixels a side; expected at most {LARGEST}. Take less.")
    return scale


def _still(*clips: Tensor) -> str:
    """The middle frames of clips (3, T, H, W) in [-1, 1], side by side: a PNG in base64."""
    frames = torch.cat([clip[:, clip.shape[1] // 2, None] for clip in clips], dim=3)
    image, buffer = require("PIL.Image", "video").fromarray(to_bytes(frames, "the still has pixels")[0]), io.BytesIO()
    image.thumbnail((len(clips) * STILL, STILL))
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
