"""What an edit needs from a model, how to open one, and how to read clips at a size that it can edit."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..types import Denoiser, KVLockError, SourceError
from ..utils.fields import check_number
from ..video.media import PathLike, shown
from ..video.read import Clip, box, check_size, clip_at, displayed, mask_at, match, pick, ticks


class VideoModel(Protocol):
    """A denoiser with its codec, prompts and schedule: the model that `edit_video` and `calibrate` take.

    `tiny.TinyVideo` is one; `kv.from_pipeline(pipe)` makes one. Optional members: `negative_prompt` (default ""),
    `usual`, the (frames, height, width) that it was trained for; `given(clips, mask)`, this model prepared for these
    clips; `lock_mask(mask)`, the mask at the latents' size; `unpadded(latents)`, without frames that no clip has. A
    model of free size has frames = size = None, and `fit(frames, height, width)`, the largest within that it can edit.

    Attributes:
        denoiser: `denoiser(x, sigma, cond=...) -> x0-hat` in variance-exploding form.
        frames: Length of its clips.
        size: (height, width) of its clips in pixels.
        cfg_scale: Its usual guidance scale.
    """

    @property
    def denoiser(self) -> Denoiser: ...
    @property
    def frames(self) -> int | None: ...
    @property
    def size(self) -> tuple[int, int] | None: ...
    @property
    def cfg_scale(self) -> float: ...

    def encode(self, pixels: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def prompt(self, texts: Sequence[str]) -> Any: ...
    def sigmas(self, steps: int, strength: float = 1.0) -> Tensor: ...


def open_model(model: str | os.PathLike[str], **options: Any) -> VideoModel:
    """Load a model by its name or folder.

    Args:
        model: "tiny" (the embedded model), a folder or file of its weights, or a folder of a diffusers pipeline.
        options: Options of `kv.diffusers.load_pipeline`. None and offload="none" count as not given.

    Raises:
        KVLockError: There is no model, or the options are for a pipeline and the model is not one.
    """
    from ..integrations.diffusers.models.load import INDEX, load_pipeline
    from ..tiny import load

    given = {k: v for k, v in options.items() if v is not None and (k, v) != ("offload", "none")}
    path = Path(os.path.expanduser(model))
    if (path / INDEX).is_file():
        return load_pipeline(path, **given)
    if str(model) != "tiny" and not path.is_file() and not (path / "weights.safetensors").is_file():
        hint = "" if path.is_dir() else "\n  Models are not downloaded: hf download NAME --local-dir FOLDER."
        raise KVLockError(
            f"no model at {str(model)!r}; expected 'tiny' (the embedded model), a folder of a diffusers pipeline "
            f"({INDEX}), or a folder with weights.safetensors of the embedded architecture.{hint}"
        )
    if given:
        name = min(given)
        raise KVLockError(f"{name}={given[name]!r} is for a pipeline of diffusers: leave it out, or name its folder.")
    return load(model if str(model) == "tiny" else path)


def check_video_model(model: Any) -> None:
    """Raise KVLockError if members of a `VideoModel` are missing, as in a bare denoiser."""
    wanted = ("denoiser", "frames", "size", "cfg_scale", "encode", "decode", "prompt", "sigmas")
    if missing := [name for name in wanted if not hasattr(model, name)]:
        raise KVLockError(
            f"{type(model).__name__} lacks {', '.join(missing)}; expected a model of videos: 'tiny', a folder, "
            "kv.from_pipeline(pipe), or an object with these members.\n"
            "  To lock a denoiser of latents: kv.KVLock(model, source=latents, mask=mask)."
        )


def editable(model: VideoModel, frames: int, height: int, width: int) -> tuple[int, tuple[int, int]]:
    """The frames and (height, width) that this model edits for a clip of the given length and size."""
    if model.frames is not None and model.size is not None:
        return model.frames, (model.size[0], model.size[1])
    count, *size = model.fit(frames, height, width)  # type: ignore[attr-defined]  # see VideoModel
    return count, (size[0], size[1])


def read_pair(
    model: VideoModel,
    clip: PathLike,
    mask: PathLike,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    pad: bool = True,
) -> tuple[Clip, Tensor]:
    """Read a clip (3, frames, height, width) and its mask (1, frames, height, width) as a model can edit them.

    For a model of one size, frames are picked evenly and the centre is cropped. A model of free size gets the first
    frames at the clip's own size, rounded down to what it accepts and to its usual number of pixels. The mask is
    stretched to the clip's frame and cut like it. Its frames are matched by time, one to one where both have as many or
    one is a folder of images, or by the numbers of two folders; a shorter mask holds its last. `Clip.note` tells more.

    Args:
        model: The model that will edit the clip.
        clip: A film, an image, or a folder of images.
        mask: An image, film or folder; white = edit, see `video.read_mask`.
        frames: Length to edit; frames are then picked evenly.
        size: (height, width) to edit at, in pixels.
        pad: Repeat the last frame of a clip that is too short for a model of one size.

    Raises:
        SourceError: The model cannot edit this number of frames or this size.
        VideoError: A file cannot be read, frames differ in size, or masks lack a number or more than half of the clip.
    """
    model = open_model(model) if isinstance(model, str | os.PathLike) else model
    if not hasattr(model, "frames"):
        check_video_model(model)
    frames = None if frames is None else check_number("frames", frames, SourceError, at_least=1, whole=True)
    size = None if size is None else check_size(size)
    clip, mask = (Path(os.path.expanduser(path)) for path in (clip, mask))
    times = shown(clip)
    own, (at, rate) = displayed(clip, times), ticks(clip, times)
    have, usual, even = len(at), getattr(model, "usual", None), frames is not None or model.frames is not None
    most = frames if frames is not None else have if usual is None else min(have, usual[0])
    shrink = 1.0 if usual is None else min(1.0, math.sqrt(usual[1] * usual[2] / math.prod(own)))
    count, sides = editable(model, most, *(size or (round(own[0] * shrink), round(own[1] * shrink))))
    if frames not in (None, count) or size not in (None, sides):
        raise SourceError(f"frames={frames}, size={size}: this model edits e.g. frames={count}, size={sides}.")
    at, rate = pick(at, rate, count, pad, clip) if even else (at[:count], rate)
    pixels = clip_at(clip, times, at, sides)
    region = mask_at(mask, *match(mask, clip, times, at, own), sides, own)
    how = "the last one repeated" if count > have else "picked evenly" if even else "the first ones"
    left, top, right, bottom = map(round, box(own, sides))
    cut = f", cut to the middle {bottom - top} x {right - left}" * ((bottom - top, right - left) != own)
    note = f"{have} frames of {own[0]} x {own[1]} read{cut}; {count} edited, {how}; {max(0, have - count)} left out"
    note += f". Edited at {sides[0]} x {sides[1]}, {rate:.4g} fps"
    return Clip(pixels, rate, note), region
