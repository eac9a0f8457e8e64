"""Uploads: what is refused before anything is decoded; and lossless files, which are read back bit for bit."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from ...utils.extras import require
from ...utils.files import atomic
from ...video.media import FORMATS, IMAGES, VideoError, decoding, film, is_film, shown
from ...video.read import Array

LARGEST_FILE = "256mb"
LARGEST_FRAME = 4096 * 4096  # pixels
LARGEST_CLIP = 2**31  # pixels of all frames together: 1,035 frames of 1080p

# ffmpeg recognises formats by their content, and some name other files or addresses to read (playlists, ffconcat).
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # of mp4 and mov, after a length of four bytes
_MARKS = ((0, b"\x1a\x45\xdf\xa3"), (8, b"AVI "), *((4, box) for box in _BOXES))  # the first: Matroska and WebM


def check_upload(path: str | os.PathLike[str]) -> None:
    """Raise VideoError for a file that is no clip or no image by its header, or is too large to be decoded."""
    path = Path(path)
    if is_film(path):
        with open(path, "rb") as file:
            head = file.read(16)
        if not any(head[at : at + len(mark)] == mark for at, mark in _MARKS):
            raise VideoError(f"{path.name!r} is no film: its content is not that of mp4, mov, webm, mkv or avi.")
        with film(path) as (_, stream):
            height, width, frames = stream.height, stream.width, 1
        _check_size(path, height, width, frames)
        frames = len(shown(path)[0]) - 1
    else:
        if path.suffix.lower() not in IMAGES:
            shown(path)  # raises, with the known suffixes
        with decoding(path), require("PIL.Image", "video").open(path, formats=FORMATS) as image:
            (width, height), frames = image.size, getattr(image, "n_frames", 1)
    _check_size(path, height, width, frames)


def _check_size(path: Path, height: int, width: int, frames: int) -> None:
    if height * width > LARGEST_FRAME or frames * height * width > LARGEST_CLIP:
        raise VideoError(
            f"{path.name!r} has {frames} frames of {height} x {width}; expected at most {LARGEST_FRAME:,} pixels a "
            f"frame, {LARGEST_CLIP:,} in all. Cut or shrink it, or use `kvlock edit`, which has no limit."
        )


def write_lossless(path: Path, frames: Array, fps: float) -> None:
    """Write (T, H, W, 3) bytes as FFV1 in Matroska, from which `read_clip` reads the same bytes and rate."""
    av = require("av", "video")
    with atomic(path) as temporary, av.open(str(temporary), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
