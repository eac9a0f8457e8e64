"""Clips and masks, to and from files.  Pixels are float32 (3, T, H, W) in [-1, 1]; masks (1, T, H, W), 1 = edit.

Films (mp4, mov, webm, mkv, avi, gif) are read through PyAV; images, and folders of images in natural order, through
Pillow. Files are written under a temporary name beside the target and then renamed, so none is ever half-written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ..utils.files import atomic
from ._codecs import ENCODERS, Array, Conform, VideoError, load, write_film, write_gif

__all__ = ["Clip", "VideoError", "read_clip", "read_mask", "side_by_side", "write_clip"]

Fit: TypeAlias = Literal["crop", "pad", "stretch"]
PathLike: TypeAlias = "str | os.PathLike[str]"
DARK, LIGHT = (22, 22, 28), (235, 235, 235)  # behind tiles and captions, and the writing on it


class Clip(NamedTuple):
    """pixels: float32 (3, T, H, W) in [-1, 1]. fps: frames per second."""

    pixels: Tensor
    fps: float


def read_clip(
    path: PathLike,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    fit: Fit = "crop",
    pad: bool = False,
) -> Clip:
    """Read a film, a folder of images, or a single image. Rotation tags are obeyed; alpha is composited on black.

    frames: pick this many, evenly from the first to the last; fewer in the file is an error, unless `pad` repeats the
        last one. size: (height, width) in pixels, antialiased. fit: how another aspect ratio gets there: "crop" the
        centre, "pad" with black, or "stretch". fps: resample a film to this rate by its time stamps (films of varying
        rate are always resampled, by default to their fastest); for images, the rate to assume (default 8).
    Raises VideoError: no such file, not a video, no frames, unknown suffix.
    """
    if fps is not None and not fps > 0:
        raise VideoError(f"read_clip({str(path)!r}) got fps={fps}; expected frames per second > 0, such as fps=8.")
    images, rate = load(Path(path), fps, _conform(size, fit))
    if len(shapes := {image.shape for image in images}) > 1:
        raise VideoError(
            f"the frames of {str(path)!r} have different sizes, such as {sorted(shapes)[:2]}; "
            "give one: read_clip(path, size=(height, width))."
        )
    chosen, rate = _pick(images, rate, frames, pad, path)
    pixels = torch.from_numpy(np.stack(chosen)).permute(3, 0, 1, 2).float()
    return Clip((pixels / 127.5 - 1).contiguous(), rate)


def read_mask(path: PathLike, *, frames: int, size: tuple[int, int], fit: Fit = "crop", pad: bool = False) -> Tensor:
    """Read a mask as (1, frames, height, width) in {0, 1}: white = edit, grey splits at 0.5.

    A single image holds for all frames. Where the file is larger than `size`, a pixel is 1 as soon as any part of it is
    white: small regions survive.
    Options as in `read_clip`; use the same ones for a clip and its mask. Raises VideoError, also for a mask that has
    something dark grey in it and nothing white, as index-coloured masks have.
    """
    images, rate = load(Path(path), None, _conform_mask(size, fit))
    brightest = max(int(image.max()) for image in images)
    if 26 <= brightest < 128:  # below: black with compression noise
        raise VideoError(
            f"read_mask({str(path)!r}): nothing is white; the brightest value is {brightest} of 255. Expected white = "
            "edit, black = keep. If this is a mask of object indices, save it as (index > 0) * 255 first."
        )
    chosen = images * frames if len(images) == 1 else _pick(images, rate, frames, pad, path)[0]
    return (torch.from_numpy(np.stack(chosen)) >= 128).float().unsqueeze(0)


def write_clip(path: PathLike, pixels: Tensor, fps: float = 8, scale: int = 1) -> None:
    """Write (3, T, H, W) in [-1, 1] as what the suffix says: .mp4 or .mov (H.264), .webm (VP9), .gif, .png (all frames
    on one contact sheet).

    fps: frames per second, > 0. scale: whole-number enlargement, nearest neighbour; films store colour at half
    resolution, so 2 or more keeps the edges of small clips crisp. Odd sizes are padded to even ones by repeating the
    edge (films only). Values outside [-1, 1] are clamped. Missing folders are made.
    Raises VideoError: unknown suffix, wrong shape, nan or inf.
    """
    path, kind = Path(path), check_suffix(path)
    if fps <= 0 or scale < 1 or scale != int(scale):
        raise VideoError(f"write_clip got fps={fps}, scale={scale}; expected fps > 0 and a whole scale >= 1.")
    images = _to_bytes(pixels, "write_clip", "pixels").repeat(int(scale), 1).repeat(int(scale), 2)
    with atomic(path) as temporary:
        if kind == ".png":
            Image.fromarray(_grid(images, min(len(images), 8), gap=0 if len(images) == 1 else 2)).save(
                temporary, format="PNG"
            )
        elif kind == ".gif":
            write_gif(temporary, images, fps)
        else:
            write_film(temporary, images, fps, kind)


def check_suffix(path: PathLike) -> str:
    """The suffix of a file to write, lower case. Raises VideoError if `write_clip` cannot write such a file."""
    path = Path(path)
    kind, known = path.suffix.lower(), (*ENCODERS, ".gif", ".png")
    if kind not in known:
        raise VideoError(f"{path.name!r} has the suffix {kind!r}; expected one of {', '.join(known)}.")
    return kind


def side_by_side(
    clips: Sequence[Tensor], labels: Sequence[str], *, scale: int = 6, columns: int | None = None
) -> Tensor:
    """Clips (3, T, H, W) of one shape as labelled tiles of one clip: float32 (3, T, height, width) in [-1, 1].

    scale: whole-number enlargement of each clip. columns: tiles per row; None puts them all in one row. Labels that do
    not fit their tile are set smaller, then cut.
    """
    if not len(clips) or len(clips) != len(labels) or len({tuple(clip.shape) for clip in clips}) > 1:
        raise VideoError(
            f"side_by_side got clips {[tuple(clip.shape) for clip in clips]} and {len(labels)} labels; expected one or "
            "more clips of one shape (3, T, H, W) and a label for each."
        )
    tiles = [_to_bytes(clip, "side_by_side", "a clip").repeat(scale, 1).repeat(scale, 2) for clip in clips]
    tiles = [
        np.concatenate([np.repeat(_caption(label, tile.shape[2])[None], len(tile), 0), tile], 1)
        for label, tile in zip(labels, tiles, strict=True)
    ]
    sheets = [_grid(np.stack(moment), columns or len(tiles), gap=8) for moment in zip(*tiles, strict=True)]
    return torch.from_numpy(np.stack(sheets)).permute(3, 0, 1, 2).float() / 127.5 - 1


def _pick(images: list[Array], rate: float, frames: int | None, pad: bool, path: PathLike) -> tuple[list[Array], float]:
    """`frames` of the images, evenly from first to last, and the rate at which they take as long as before."""
    have = len(images)
    if frames is None or frames == have:
        return images, rate
    if frames < 1:
        raise VideoError(f"{str(path)!r}: got frames={frames}; expected 1 or more.")
    if frames > have:
        if not pad:
            raise VideoError(
                f"{str(path)!r} has {have} frames; expected at least frames={frames}. "
                f"Ask for frames={have}, or repeat the last one with pad=True."
            )
        return images + images[-1:] * (frames - have), rate
    chosen = [images[round(i * (have - 1) / max(frames - 1, 1))] for i in range(frames)]
    return chosen, rate * max(frames - 1, 1) / (have - 1)


def _conform(size: tuple[int, int] | None, fit: Fit) -> Conform:
    """What brings one image to `size`, antialiased, as bytes (H, W, 3)."""
    _check_fit(size, fit)

    def shrink(image: Image.Image) -> Array:
        if size is None or (image.height, image.width) == size:
            return np.asarray(image)
        (left, top, right, bottom), (height, width) = _geometry((image.height, image.width), size, fit)
        small = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
        return _centred(np.asarray(small), size)

    return shrink


def _conform_mask(size: tuple[int, int], fit: Fit) -> Conform:
    """What brings one image to `size` by maximum, as bytes (H, W): bright wherever anything under a pixel is."""
    _check_fit(size, fit)

    def shrink(image: Image.Image) -> Array:
        grey = torch.from_numpy(np.array(image.convert("L")))
        (left, top, right, bottom), small = _geometry((image.height, image.width), size, fit)
        grey = grey[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)]
        return _centred(F.adaptive_max_pool2d(grey[None].float(), small)[0].byte().numpy(), size)

    return shrink


def _check_fit(size: tuple[int, int] | None, fit: Fit) -> None:
    if fit not in ("crop", "pad", "stretch"):
        raise VideoError(f"got fit={fit!r}; expected 'crop', 'pad' or 'stretch'.")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise VideoError(f"got size={size!r}; expected (height, width) in pixels, such as size=(480, 832).")


def _geometry(
    have: tuple[int, int], want: tuple[int, int], fit: Fit
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """The part (left, top, right, bottom) of the image to take, and the (height, width) to give it."""
    (h, w), (H, W) = have, want
    if fit == "crop":
        shrink = min(h / H, w / W)
        left, top = (w - W * shrink) / 2, (h - H * shrink) / 2
        return (max(left, 0.0), max(top, 0.0), min(w - left, w), min(h - top, h)), want
    if fit == "pad":
        shrink = max(h / H, w / W)
        return (0, 0, w, h), (max(1, round(h / shrink)), max(1, round(w / shrink)))
    return (0, 0, w, h), want


def _centred(image: Array, size: tuple[int, int]) -> Array:
    """The image in the middle of black of this size; as it is where it fills it."""
    if image.shape[:2] == size:
        return image
    canvas = np.zeros((*size, *image.shape[2:]), np.uint8)
    top, left = (size[0] - image.shape[0]) // 2, (size[1] - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def _to_bytes(pixels: Tensor, caller: str, what: str) -> Array:
    """(3, T, H, W) in [-1, 1] to (T, H, W, 3) in 0..255."""
    if pixels.ndim != 4 or pixels.shape[0] != 3 or 0 in pixels.shape:
        hint = " For a batch of clips pass clips[0]." if pixels.ndim == 5 else ""
        raise VideoError(f"{caller} got {what} of shape {tuple(pixels.shape)}; expected (3, T, H, W).{hint}")
    pixels = pixels.detach().float().cpu()
    if not torch.isfinite(pixels).all():
        bad = int((~torch.isfinite(pixels)).sum())
        raise VideoError(f"{caller} got {what} with {bad} nan or inf values; expected numbers in [-1, 1].")
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous().numpy()


def _grid(tiles: Array, columns: int, *, gap: int) -> Array:
    """Tiles (n, H, W, 3) row by row on a dark ground, `gap` pixels apart and from the border."""
    n, height, width = tiles.shape[:3]
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), DARK, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def _caption(text: str, width: int) -> Array:
    """A dark bar (height, width, 3) with one line of text: as large as fits, cut with an ellipsis at the smallest."""
    for points in (15, 13, 11):
        font = ImageFont.load_default(points)
        if font.getlength(text) <= width - 4:
            break
    while len(text) > 1 and font.getlength(text) > width - 4:
        text = text.rstrip("…")[:-1].rstrip() + "…"
    bar = Image.new("RGB", (width, 22), DARK)
    ImageDraw.Draw(bar).text((width / 2, 11), text, fill=LIGHT, font=font, anchor="mm")
    return np.asarray(bar)
