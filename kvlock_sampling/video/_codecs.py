"""Picture files to and from 8-bit RGB frames: what `video` needs from PyAV and Pillow, and nothing about tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps, ImageSequence
from scipy.spatial import cKDTree

from ..types import KVLockError

FILMS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
IMAGE_FPS = 8.0  # frames per second of images, which do not say
_H264 = (("libx264", {"crf": "12", "preset": "medium"}), ("mpeg4", {"qmin": "1", "qmax": "3"}))
_VP9 = (("libvpx-vp9", {"crf": "12", "b": "0", "cpu-used": "4"}), ("libvpx", {"crf": "4", "b": "8M"}))
ENCODERS = {".mp4": ("mp4", _H264), ".mov": ("mov", _H264), ".webm": ("webm", _VP9)}  # in order of preference

Array = np.ndarray[Any, np.dtype[np.uint8]]
Conform = Callable[[Image.Image], Array]


class VideoError(KVLockError, ValueError):
    """A file that cannot be read or written as a clip, or pixels that are not one."""


def load(path: Path, fps: float | None, conform: Conform) -> tuple[list[Array], float]:
    """All frames of a film, folder or image, each through `conform` as it is decoded, and the frames per second."""
    if not path.exists():
        raise VideoError(f"no such file or folder: {str(path)!r} (that is {str(path.absolute())!r}).")
    if path.is_dir():
        files = [f for f in path.iterdir() if f.suffix.lower() in IMAGES and not f.name.startswith(".")]
        if not files:
            raise VideoError(f"the folder {str(path)!r} holds no images; expected some of {', '.join(IMAGES)}.")
        frames = [conform(image) for file in sorted(files, key=_natural) for image in _images(file)[:1]]
        return frames, fps or IMAGE_FPS
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        return [conform(image) for image in _images(path)], fps or IMAGE_FPS
    if suffix in FILMS:
        return _film(path, fps, conform)
    raise VideoError(
        f"cannot read {path.name!r}: unknown suffix {suffix!r}; expected a film ({', '.join(FILMS)}), an image "
        f"({', '.join(IMAGES)}), or a folder of images."
    )


def _natural(file: Path) -> list[tuple[int, int, str]]:
    """Sort key under which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", file.name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part.lower()) for part in parts]


def _images(file: Path) -> list[Image.Image]:
    """The frames of an image file, upright and on black; one unless it is animated."""
    try:
        with Image.open(file) as image:
            if image.format == "MPO":  # a photograph with its preview or depth, not two moments
                return [_on_black(image)]
            return [_on_black(frame) for frame in ImageSequence.Iterator(image)]
    except (OSError, SyntaxError, ValueError) as error:
        raise VideoError(f"cannot read {str(file)!r} as an image: {error}.") from error


def _on_black(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip rather than scale
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")


def _film(path: Path, fps: float | None, conform: Conform) -> tuple[list[Array], float]:
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
                image = Image.fromarray(frame.to_ndarray(format="rgba" if alpha else "rgb24"))
                # The tag says how far to turn, counter-clockwise; so does Pillow.
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
    merged = path.suffix.lower() == ".gif"  # a gif stores repeated frames as one that lasts longer
    return _even(frames, times, last or 1 / guess, merged, guess, fps)


def _even(
    frames: list[Array], times: list[float], last: float, merged: bool, guess: float, fps: float | None
) -> tuple[list[Array], float]:
    """Frames at a constant rate: as they are where they already have it, else what is on screen at each tick."""
    order = np.argsort(times, kind="stable")
    shown = np.asarray(times)[order] - min(times)
    gaps = np.append(np.diff(shown), last) if merged else np.diff(shown)
    gaps = gaps[gaps > 1e-6]
    constant = not len(gaps) or gaps.max() < 1.6 * gaps.min()  # time stamps are rounded, to 10 ms in a gif
    rate = guess if constant else min(60.0, 1 / float(gaps.min()))
    if constant and merged:
        rate = len(frames) / (float(shown[-1]) + last)  # exact over the clip, whatever each frame was rounded to
    elif constant and len(gaps) and not 0.8 < guess * gaps.mean() < 1.25:
        rate = 1 / float(gaps.mean())  # the header is wrong
    if constant and (fps is None or abs(fps - rate) < 1e-3 * rate):
        return [frames[i] for i in order], rate
    rate = fps or rate
    count = max(1, round((shown[-1] + last) * rate))
    ticks = (np.arange(count) + 0.5) / rate
    return [frames[order[i]] for i in np.searchsorted(shown, ticks, side="right") - 1], rate


def write_film(path: Path, images: Array, fps: float, kind: str) -> None:
    """Encode (T, H, W, 3); odd sizes grow to even ones by repeating the edge, as 4:2:0 needs."""
    container_format, encoders = ENCODERS[kind]
    images = np.pad(images, [(0, 0), (0, images.shape[1] % 2), (0, images.shape[2] % 2), (0, 0)], mode="edge")
    codec, options = next(((n, o) for n, o in encoders if n in av.codecs_available), encoders[-1])
    extra = {"movflags": "faststart"} if container_format != "webm" else {}
    with av.open(str(path), "w", format=container_format, options=extra) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=dict(options))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if codec == "mpeg4":
            stream.bit_rate = 20_000_000
        # Say which colours these are; players guess differently when nobody does.
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
        context.color_range = 1  # limited
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_gif(path: Path, images: Array, fps: float) -> None:
    """A looping gif under one palette for all frames: exact up to 256 colours, else median cut; no dither.

    Frames that repeat the one before are stored as its longer duration.
    """
    colours, indices = np.unique(images.reshape(-1, 3), axis=0, return_inverse=True)
    palette = colours
    if len(colours) > 256:
        step = max(1, images.size // 30_000_000)  # enough pixels to choose from
        sheet = Image.fromarray(images.reshape(-1, 1, 3)[::step])
        chosen = sheet.quantize(256, method=Image.Quantize.MEDIANCUT).getpalette() or []
        palette = np.array(chosen, np.uint8).reshape(-1, 3)
        indices = cKDTree(palette.astype(float)).query(colours.astype(float))[1][indices.reshape(-1)]
    frames = []
    for index in indices.reshape(images.shape[:3]).astype(np.uint8):
        frame = Image.fromarray(index, "P")
        frame.putpalette(palette.tobytes())
        frames.append(frame)
    edges = [round(i * 100 / fps) * 10 for i in range(len(frames) + 1)]  # milliseconds, in the format's steps of 10
    durations = [max(20, b - a) for a, b in pairwise(edges)]  # browsers slow down anything below 20
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
