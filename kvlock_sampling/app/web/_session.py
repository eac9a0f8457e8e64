"""What one browser tab works on. Its files are in a folder of its own, which is deleted when the tab is closed."""

import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import masks
from ...attention import find_layers
from ...masks.fitted import FittedMask, as_transition
from ...masks.tokens import Grid, on_latents, on_pixels
from ...tiny import edit_mask, render, sample_edit
from ...types import SourceError
from ...utils.extras import require
from ...video.media import shown
from ...video.read import Array, displayed
from ...video.write import to_bytes
from ..edit import Edit
from ..models import VideoModel, read_pair
from ._keyframes import Region, over_time
from ._uploads import check_upload, write_lossless

EXAMPLES = {
    "a cyan ball becomes a blue flower": (6, "reshape"),
    "a red ball becomes cyan": (12, "recolour"),
    "a cyan ball becomes blue and glows": (6, "glow"),
    "a glowing red box is removed": (5, "remove"),
    "a cyan box appears": (4, "insert"),
}
MOST = 32  # sessions that are kept at once


@dataclass(frozen=True)
class Results:
    """What a run made.

    Attributes:
        edits: By policy.
        region: Their mask, (1, 1, T, H, W).
        weight: The fraction of the lock that each token took, (1, tokens).
        folder: Holds their files.
        mask: The file of the mask.
    """

    edits: dict[str, Edit]
    region: Tensor
    weight: Tensor
    folder: Path
    mask: Path


class Session:
    """The clip, the mask and the results of one tab.

    Attributes:
        folder: Holds its files.
        clip: The clip at the size that the model edits, lossless; None before one is loaded.
        original: The clip as it was uploaded, which an uploaded mask is matched to.
        frames: Its pixels, (T, H, W, 3) bytes.
        drawn: Drawn regions by frame. Where there are any, they are the mask.
        given: The mask of an upload or an example, (T, H, W).
        origin: Which of the two it is.
        truth: The true result of an example, (1, 3, T, H, W) in [-1, 1]; None for other clips.
        results: What the last run made; None before.
        cancel: Set to end the last run that was started.
        trouble: What went wrong with the last run, as HTML.
        runs: How many runs are going on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cancel, self.trouble, self.runs = threading.Event(), "", 0
        self.clear()

    @contextmanager
    def running(self) -> Iterator[None]:
        self.runs += 1
        try:
            yield
        finally:
            self.runs -= 1

    def clear(self) -> None:
        """Forget the clip and everything that belongs to it."""
        self.clip: Path | None = None
        self.original: Path | None = None
        self.frames: Array = np.zeros((1, 8, 8, 3), np.uint8)
        self.fps, self.note = 8.0, ""
        self.drawn: dict[int, Region] = {}
        self.given: Region | None = None
        self.origin = "empty"
        self.truth: Tensor | None = None
        self.results: Results | None = None
        self._latents = torch.zeros(0)
        self._patch: Grid = (1, 1, 1)

    def load_example(self, name: str, video: VideoModel) -> tuple[str, str]:
        """Take a clip of the embedded world, with its mask. Returns the prompts of the edit and of the clip."""
        before, after = (([scene]) for scene in sample_edit(*EXAMPLES[name]))
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "example.mkv"
        write_lossless(path, to_bytes(render(before)[0], "the example has pixels"), 8.0)
        self._take(path, video)
        self.given, self.origin = edit_mask(before, after)[0, 0].numpy() > 0, "the example's"
        self.truth = render(after)
        return after[0].prompt, before[0].prompt

    def load_clip(self, path: str | os.PathLike[str], video: VideoModel) -> None:
        """Take a copy of an uploaded clip. Raises VideoError if it cannot be used."""
        self._take(self._copied(path), video)

    def load_mask(self, path: str | os.PathLike[str], video: VideoModel) -> None:
        """Take an uploaded mask, which is matched to the uploaded clip. Raises VideoError if it cannot be used."""
        kept = self._copied(path)
        try:
            check_upload(kept)
            region = read_pair(video, self._loaded(self.original), kept)[1]
        finally:
            shutil.rmtree(kept.parent)
        self.given, self.origin = region[0].numpy() > 0, "uploaded"
        self.drawn.clear()

    def draw(self, frame: int, layers: list[Any]) -> None:
        """Take what was drawn on a frame: layers (height, width, 4) of any size; nothing drawn frees the frame."""
        height, width = self.frames.shape[1:3]
        drawn = np.zeros((height, width), bool)
        for layer in layers:
            opaque = torch.from_numpy(np.ascontiguousarray(np.asarray(layer)[..., 3] >= 128))
            drawn |= masks.resize(opaque, 1, height, width)[0, 0, 0].numpy() > 0
        if drawn.any():
            self.drawn[frame] = drawn
        else:
            self.drawn.pop(frame, None)

    def mask(self) -> Region:
        """The mask, (T, H, W)."""
        if self.drawn:
            return over_time(self.drawn, len(self.frames))
        return np.zeros(self.frames.shape[:3], bool) if self.given is None else self.given

    def write_mask(self, folder: Path) -> Path:
        """Write the mask: an image if it holds still, else a film."""
        mask = self.mask()
        still = bool((mask == mask[0]).all())
        path = folder / ("mask.png" if still else "mask.mkv")
        pages = np.repeat(mask[..., None], 3, axis=-1).astype(np.uint8) * np.uint8(255)
        if still:
            require("PIL.Image", "video").fromarray(pages[0]).save(path)
        else:
            write_lossless(path, pages, self.fps)
        return path

    def tokens(self, video: VideoModel, transition: tuple[float, float] | None, mask: Tensor | None = None) -> Tensor:
        """The fraction of the lock that each token takes, (1, tokens). Raises MaskError for a mask of one value."""
        region = masks.check_mask(torch.from_numpy(self.mask())[None, None].float() if mask is None else mask)
        self.clip_file()
        fitted = FittedMask(video.lock_mask(region) if hasattr(video, "lock_mask") else region)
        return fitted.background(self._latents, self._patch, as_transition(transition)).cpu()

    def on_frames(self, values: Tensor, video: VideoModel) -> Array:
        """Values of tokens, (1, tokens), on the pixels of the clip, (T, H, W)."""
        latents = on_latents(values.float().cpu(), self._latents.shape, self._patch)
        latents = video.unpadded(latents) if hasattr(video, "unpadded") else latents
        return on_pixels(latents, *self.frames.shape[:3])[0, 0].numpy()

    def clip_file(self) -> Path:
        """The clip at the size that the model edits. Raises SourceError if none is loaded."""
        return self._loaded(self.clip)

    def _take(self, path: Path, video: VideoModel) -> None:
        """Read a clip that is alone in a folder of its own, and put it in place of the one before."""
        try:
            check_upload(path)
            # The library reads a clip together with a mask, here an image that is white everywhere.
            made = Path(tempfile.mkdtemp(dir=path.parent))  # whatever the name of the upload is
            size, white = displayed(path, shown(path)), made / "white.png"
            require("PIL.Image", "video").new("L", size[::-1], 255).save(white)
            found, _ = read_pair(video, path, white)
            frames, clip = to_bytes(found.pixels, "the upload has pixels"), made / "clip.mkv"
            write_lossless(clip, frames, found.fps)
            with torch.no_grad():
                latents = video.encode(to_clips(frames))
        except BaseException:
            shutil.rmtree(path.parent)
            raise
        if self.original is not None:
            shutil.rmtree(self.original.parent)
        self.clear()
        self.original, self.clip = path, clip
        self.frames, self.fps, self.note = frames, found.fps, found.note
        self._latents, self._patch = latents, find_layers(video.denoiser).patch

    def _copied(self, path: str | os.PathLike[str]) -> Path:
        # Tabs that upload the same bytes are given the same file.
        return Path(shutil.copyfile(path, Path(tempfile.mkdtemp(dir=self.folder)) / Path(path).name))

    def _loaded(self, path: Path | None) -> Path:
        if path is None:
            raise SourceError(
                "there is no clip yet, or the connection broke: pick an example, or upload a film or an image."
            )
        return path


class Sessions:
    """The sessions of a server by the hash of their tab, in folders below `root`. The least used make way.

    `model` is a lock, because one edit runs at a time.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.model, self._lock = root, threading.Lock(), threading.Lock()
        self._open: OrderedDict[str, Session] = OrderedDict()

    def of(self, key: str | None) -> Session:
        """The session of a tab, new if the tab is."""
        with self._lock:
            session = self._open.get(str(key)) or Session(Path(tempfile.mkdtemp(dir=self.root)))
            self._open[str(key)] = session
            self._open.move_to_end(str(key))
            idle = [name for name in list(self._open)[:-MOST] if not self._open[name].runs]
        for other in idle:
            self.close(other)
        return session

    def close(self, key: str | None) -> None:
        """End the run of a tab, and delete its files."""
        with self._lock:
            session = self._open.pop(str(key), None)
        if session is not None:
            session.cancel.set()
            shutil.rmtree(session.folder, ignore_errors=True)

    def close_all(self) -> None:
        for key in list(self._open):
            self.close(key)


def to_clips(frames: Array) -> Tensor:
    """Bytes (T, H, W, 3) as clips (1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)[None]
