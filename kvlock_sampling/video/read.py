"""Read clips and masks. Pixels are float32 (3, T, H, W) in [-1, 1]; masks are (1, T, H, W), 1 = edit."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..utils.extras import require
from .pixels import VideoError

if TYPE_CHECKING:
    from PIL import Image

PathLike: TypeAlias = str | os.PathLike[str]
Array: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Conform: TypeAlias = Callable[["Image.Image"], Array]

FILMS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
IMAGE_FPS = 8.0  # images' files do not store a rate


class Clip(NamedTuple):
    """A clip from a file: pixels (3, T, H, W), float32 in [-1, 1], and frames per second."""

    pixels: Tensor
    fps: float


def read_clip(
    path: PathLike,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    pad: bool = False,
) -> Clip:
    """Read a film, a folder of images, or an image. Rotation tags are applied; alpha is composited on black.

    Args:
        path: The file or folder.
        frames: Pick this many, evenly from first to last. Default: all.
        size: (height, width) in pixels; the centre is cropped, antialiased. Default: the file's.
        fps: Resample a film to this rate; assume it for images. Default: the file's fastest rate; 8 for images.
        pad: Repeat the last frame if the file has fewer than `frames`.

    Raises:
        VideoError: The file does not exist, cannot be decoded, or has too few frames, or an argument is invalid.
        KVLockError: The extra `video` is not installed.
    """
    if fps is not None and not fps > 0:
        raise VideoError(f"read_clip({str(path)!r}) got fps={fps}; expected frames per second > 0, such as fps=8.")
    images, rate = _load(Path(path), fps, _conform(size))
    if len(shapes := {image.shape for image in images}) > 1:
        raise VideoError(
            f"the frames of {str(path)!r} have different sizes, such as {sorted(shapes)[:2]}; "
            "give one: read_clip(path, size=(height, width))."
        )
    chosen, rate = _pick(images, rate, frames, pad, path)
    pixels = torch.from_numpy(np.stack(chosen)).permute(3, 0, 1, 2).float()
    return Clip((pixels / 127.5 - 1).contiguous(), rate)


def read_mask(path: PathLike, *, frames: int, size: tuple[int, int], pad: bool = False) -> Tensor:
    """Read a mask (1, frames, height, width) in {0, 1}: white = edit, black = keep, and grey splits at 0.5.

    Args:
        path: A film, a folder of images, or an image, which holds for all frames.
        frames: Number of frames.
        size: (height, width) in pixels. In a larger file a pixel is 1 if any part of it is white.
        pad: As for the clip; see `read_clip`.

    Raises:
        VideoError: As in `read_clip`, or the brightest value is a dark grey, as in masks of object indices.
        KVLockError: The extra `video` is not installed.
    """
    images, rate = _load(Path(path), None, _conform_mask(size))
    brightest = max(int(image.max()) for image in images)
    if 26 <= brightest < 128:  # Below 26 it may be black with compression noise.
        raise VideoError(
            f"read_mask({str(path)!r}): nothing is white; the brightest value is {brightest} of 255. Expected white = "
            "edit; save a mask of object indices as (index > 0) * 255."
        )
    chosen = images * frames if len(images) == 1 else _pick(images, rate, frames, pad, path)[0]
    return (torch.from_numpy(np.stack(chosen)) >= 128).float().unsqueeze(0)


def _pick(images: list[Array], rate: float, frames: int | None, pad: bool, path: PathLike) -> tuple[list[Array], float]:
    """Pick `frames` images evenly, and the rate at which they last as long as before."""
    have = len(images)
    if frames is None or frames == have:
        return images, rate
    if frames < 1:
        raise VideoError(f"{str(path)!r}: got frames={frames}; expected 1 or more.")
    if frames > have:
        if not pad:
            raise VideoError(f"{str(path)!r} has {have} frames; expected at least frames={frames}, or pass pad=True.")
        return images + images[-1:] * (frames - have), rate
    chosen = [images[round(i * (have - 1) / max(frames - 1, 1))] for i in range(frames)]
    return chosen, rate * max(frames - 1, 1) / (have - 1)


def _conform(size: tuple[int, int] | None) -> Conform:
    """Return a function that crops the centre of an image and resizes it to `size`, antialiased, as bytes (H, W, 3)."""

    def shrink(image: "Image.Image") -> Array:
        if size is None or (image.height, image.width) == size:
            return np.asarray(image)
        lanczos = require("PIL.Image", "video").Resampling.LANCZOS
        return np.asarray(image.resize(size[::-1], lanczos, box=_box(image, size)))

    return shrink


def _conform_mask(size: tuple[int, int]) -> Conform:
    """The same by maximum, as bytes (H, W)."""

    def shrink(image: "Image.Image") -> Array:
        left, top, right, bottom = _box(image, size)
        grey = torch.from_numpy(np.array(image.convert("L")))
        grey = grey[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)]
        return F.adaptive_max_pool2d(grey[None].float(), size)[0].byte().numpy()

    return shrink


def _box(image: "Image.Image", size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest part (left, top, right, bottom) of this aspect ratio in the middle of the image."""
    if len(size) != 2 or min(size) < 1:
        raise VideoError(f"got size={size!r}; expected (height, width) in pixels, such as size=(480, 832).")
    h, w, (height, width) = image.height, image.width, size
    shrink = min(h / height, w / width)
    left, top = max((w - width * shrink) / 2, 0.0), max((h - height * shrink) / 2, 0.0)
    return left, top, w - left, h - top


def _load(path: Path, fps: float | None, conform: Conform) -> tuple[list[Array], float]:
    if not path.exists():
        raise VideoError(f"no such file or folder: {str(path)!r} (that is {str(path.absolute())!r}).")
    if path.is_dir():
        files = [f for f in path.iterdir() if f.suffix.lower() in IMAGES and not f.name.startswith(".")]
        if not files:
            raise VideoError(f"the folder {str(path)!r} holds no images; expected some of {', '.join(IMAGES)}.")
        return [conform(i) for file in sorted(files, key=_natural) for i in _images(file)[:1]], fps or IMAGE_FPS
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        return [conform(image) for image in _images(path)], fps or IMAGE_FPS
    if suffix in FILMS:
        return _film(path, fps, conform)
    known = ", ".join((*FILMS, *IMAGES))
    raise VideoError(f"cannot read {path.name!r}: unknown suffix {suffix!r}; expected {known}, or a folder of images.")


def _natural(file: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part.lower()) for part in parts]


def _images(file: Path) -> "list[Image.Image]":
    pil, sequence = require("PIL.Image", "video"), require("PIL.ImageSequence", "video")
    try:
        with pil.open(file) as image:
            if image.format == "MPO":  # A photograph with its preview or depth map, not two moments.
                return [_on_black(image)]
            return [_on_black(frame) for frame in sequence.Iterator(image)]
    except (OSError, SyntaxError, ValueError) as error:
        raise VideoError(f"cannot read {str(file)!r} as an image: {error}.") from error


def _on_black(image: "Image.Image") -> "Image.Image":
    pil = require("PIL.Image", "video")
    image = require("PIL.ImageOps", "video").exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey instead of scaling it.
        image = pil.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return pil.alpha_composite(pil.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")


def _film(path: Path, fps: float | None, conform: Conform) -> tuple[list[Array], float]:
    av, pil = require("av", "video"), require("PIL.Image", "video")
    frames: list[Array] = []
    times: list[float] = []
    last = 0.0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{str(path)!r} has no video stream; expected a film.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            guess = float(stream.average_rate or IMAGE_FPS)
            for frame in container.decode(stream):
                alpha = any(component.is_alpha for component in frame.format.components)
                image = pil.fromarray(frame.to_ndarray(format="rgba" if alpha else "rgb24"))
                # The rotation tag counts counter-clockwise, and so does Pillow.
                turn = round(getattr(frame, "rotation", 0) / 90) % 4 * 90
                frames.append(conform(_on_black(image.rotate(turn, expand=True) if turn else image)))
                times.append(frame.time if frame.time is not None else len(times) / guess)
                last = float((getattr(frame, "duration", 0) or 0) * (frame.time_base or 0))
    except (av.FFmpegError, OSError) as error:
        raise VideoError(
            f"cannot read {str(path)!r} as a film: {error} (after {len(frames)} frames). Is it complete, and a video?"
        ) from error
    if not frames:
        raise VideoError(f"{str(path)!r} has no frames; expected at least one.")
    merged = path.suffix.lower() == ".gif"  # A gif stores repeated frames as one that lasts longer.
    return _even(frames, times, last or 1 / guess, merged, guess, fps)


def _even(
    frames: list[Array], times: list[float], last: float, merged: bool, guess: float, fps: float | None
) -> tuple[list[Array], float]:
    """Resample frames to a constant rate by what is on screen at each tick; frames of that rate are kept."""
    order = np.argsort(times, kind="stable")
    shown = np.asarray(times)[order] - min(times)
    gaps = np.append(np.diff(shown), last) if merged else np.diff(shown)
    gaps = gaps[gaps > 1e-6]
    constant = not len(gaps) or gaps.max() < 1.6 * gaps.min()  # Time stamps are rounded, to 10 ms in a gif.
    rate = guess if constant else min(60.0, 1 / float(gaps.min()))
    if constant and merged:
        rate = len(frames) / (float(shown[-1]) + last)  # Exact over the clip, whatever each frame was rounded to.
    elif constant and len(gaps) and not 0.8 < guess * gaps.mean() < 1.25:
        rate = 1 / float(gaps.mean())  # The header is wrong.
    if constant and (fps is None or abs(fps - rate) < 1e-3 * rate):
        return [frames[i] for i in order], rate
    rate = fps or rate
    count = max(1, round((shown[-1] + last) * rate))
    ticks = (np.arange(count) + 0.5) / rate
    return [frames[order[i]] for i in np.searchsorted(shown, ticks, side="right") - 1], rate
