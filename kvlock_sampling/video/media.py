"""Films, images with frames, and folders of images alike: when each frame is shown, and its picture, decoded alone."""

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..types import KVLockError
from ..utils.extras import require
from ..utils.warn import warn

PathLike: TypeAlias = str | os.PathLike[str]
Seconds: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Times: TypeAlias = tuple[Seconds, float | None]

FILMS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
STILLS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
IMAGES = (".gif", ".apng", *STILLS)
IMAGE_FPS = 8.0  # images' files do not store a rate
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP", "AVIF")  # by content; for others Pillow may start a program
EXACT = 0x42004  # BICUBIC | FULL_CHR_H_INT | ACCURATE_RND of swscale, whose default reads films up to 3 of 255 too dark


class VideoError(KVLockError, ValueError):
    """A file that cannot be read or written as a clip, or pixels that cannot be written."""


def is_film(path: PathLike) -> bool:
    return os.fspath(path).lower().endswith(FILMS) and not os.path.isdir(path)


@contextmanager
def decoding(path: PathLike) -> Iterator[None]:
    """Raise VideoError for whatever a decoder raises on a damaged file."""
    try:
        yield
    except (KVLockError, Warning):
        raise
    except Exception as error:  # of any kind: struct.error, TypeError, UnicodeDecodeError, MemoryError
        kind = "a film" if is_film(path) else "text" if str(path).endswith(".txt") else "an image"
        said = f"{type(error).__name__}: {error}"
        raise VideoError(f"cannot read {str(path)!r} as {kind}: {said}. Is it complete?") from error


@contextmanager
def film(path: PathLike) -> Iterator[tuple[Any, Any]]:
    """Open a film: its container and its video stream."""
    av = require("av", "video")
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}  # later always so
    with decoding(path), av.open(os.path.abspath(os.path.expanduser(path)), **lenient) as container:
        if not container.streams.video:
            raise VideoError(f"{str(path)!r} has no video stream; expected a film.")
        yield container, container.streams.best("video")


def shown(path: PathLike) -> Times:
    """When each frame begins and the last one ends, in seconds, and the mean rate: None where a file has no times."""
    if (files := files_of(Path(path))) is None:
        return _film_times(path)
    if os.path.isdir(path):
        _name_what_is_odd(Path(path), files)
    durations = [None] * len(files) if os.path.isdir(path) else [page.info.get("duration") for page in _pages(files[0])]
    if not any(durations):
        return np.arange(len(durations) + 1) / IMAGE_FPS, None
    lasting = [d if d and d > 10 else 100 for d in durations]  # Browsers slow down frames of 10 ms or less so.
    return np.cumsum([0, *lasting]) / 1000, 1000 * len(lasting) / sum(lasting)


def pictures(path: PathLike, times: Seconds) -> Iterator[tuple[int, Callable[[], Any]]]:
    """The index of each frame in `times`, and a call that makes its picture: upright, of square pixels, on black."""
    if (files := files_of(Path(path))) is not None:
        if os.path.isdir(path):
            yield from enumerate(partial(_still, file) for file in files)
        else:
            yield from enumerate(partial(_upright, page) for page in _pages(files[0]))
        return
    middles, index = (times[:-2] + times[1:-1]) / 2, -1
    with film(path) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if frame.is_corrupt:
                warn(f"{str(path)!r} has damaged frames, of which a decoder guesses parts. Is it complete?")
            if index < 0:
                _name_what_is_lost(path, stream, frame)
            # A decoder may leave frames out. The times that ffmpeg makes up for an avi are out of order.
            counted = frame.time is None or container.format.name == "avi"
            picture = partial(_film_picture, frame, float(stream.sample_aspect_ratio or 1))
            before, index = index, index + 1 if counted else max(index + 1, int(np.searchsorted(middles, frame.time)))
            if before < 0 < index:  # The film was cut between key frames.
                warn(f"the first {index} frames of {str(path)!r} need others that it lacks; the next one is held.")
                yield from ((early, picture) for early in range(index))
            yield index, picture


def numbers(path: PathLike) -> list[int]:
    """The numbers of a folder's images in order, if their names differ in that one number alone; else none."""
    names = [re.split(r"(\d+)", f.stem.lower()) for f in files_of(Path(path)) or [] if os.path.isdir(path)]
    changing = [column for column in zip(*names, strict=False) if len(set(column)) > 1]
    alike = len({len(parts) for parts in names}) == len(changing) == 1 and changing[0][0].isdecimal()
    found = [int(number) for number in changing[0]] if alike else []
    return found if len(set(found)) == len(found) else []


def _name_what_is_odd(path: Path, files: list[Path]) -> None:
    others = (f.name for f in path.iterdir() if not (f.suffix.lower() in STILLS or f.is_dir() or f.name[0] == "."))
    left = sorted(name for name in others if name.lower() not in ("thumbs.db", "desktop.ini"))  # of file managers
    kinds = {f.name: re.sub(r"\d+", "#", f.name.lower()) for f in files}
    [(usual, count)] = Counter(kinds.values()).most_common(1)
    strays = [name for name, kind in kinds.items() if "#" in usual and kind != usual and 2 * count >= len(files)]
    found = numbers(path)
    gaps = [n for n, step in zip(found, np.diff(found), strict=False) if step > 1.5 * np.median(np.diff(found))]
    told = [f"{len(left)} files are no images and left out: {left[:5]}"] * bool(left)
    told += [f"{len(strays)} images are named unlike the others, but read as frames: {strays[:5]}"] * bool(strays)
    told += [f"frames are missing after the numbers {gaps[:5]}; those around them follow one another"] * bool(gaps)
    if told:
        warn(f"the folder {str(path)!r}: {'; '.join(told)}.")


def files_of(path: Path) -> list[Path] | None:
    """The images of a folder in natural order, the image itself, or None for a film."""
    if path.is_dir():
        found = [f for f in path.iterdir() if f.suffix.lower() in STILLS and f.name[0] != "." and f.is_file()]
        if not found:
            raise VideoError(f"the folder {str(path)!r} holds no images; expected some of {', '.join(STILLS)}.")
        return sorted(found, key=lambda f: [int(p) if p.isdecimal() else p.lower() for p in re.split(r"(\d+)", f.name)])
    if not path.is_file():  # A pipe or a device may never end.
        raise VideoError(f"no such file or folder: {str(path)!r} (that is {str(path.absolute())!r}).")
    if (suffix := path.suffix.lower()) not in (*FILMS, *IMAGES):
        raise VideoError(f"{path.name!r} has unknown suffix {suffix!r}; expected {', '.join(FILMS + IMAGES)}.")
    return [path] if suffix in IMAGES else None


def _pages(file: Path) -> Iterator[Any]:
    """The frames of an image file, decoded; each is valid until the next."""
    # By its path, Pillow would map an uncompressed TIFF into memory, whatever its orientation.
    with decoding(file), open(file, "rb") as raw, require("PIL.Image", "video").open(raw, formats=FORMATS) as image:
        # An MPO is a photograph with its preview or depth map. An APNG may begin with a picture for other viewers.
        count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        for index in range(bool(image.info.get("default_image")), count):
            image.seek(index)
            image.load()
            yield image


def _still(file: Path) -> Any:
    for page in _pages(file):
        if page.format != "MPO" and getattr(page, "n_frames", 1) > 1:
            warn(f"{str(file)!r} holds {page.n_frames} frames; of a folder's images the first is read. Pass it alone.")
        return _upright(page)


def _upright(image: Any) -> Any:
    pil = require("PIL.Image", "video")
    with suppress(Exception):  # broken tags: every viewer leaves them out
        image = require("PIL.ImageOps", "video").exif_transpose(image)
    to_srgb = _to_srgb(image.info.get("icc_profile") or b"")
    if image.mode == "F":
        raise ValueError("its pixels are floats, of which no range is known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey. Rounded up, so that no number becomes black.
        image = pil.fromarray((-(-np.asarray(image).astype(np.int64) // 257)).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return to_srgb(image.convert("RGB"))
    image = image.convert("RGBA")
    shown = to_srgb(pil.alpha_composite(pil.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB"))
    shown.info["alpha"] = image.getchannel("A")
    return shown


@cache
def _to_srgb(icc: bytes) -> Callable[[Any], Any]:
    cms = require("PIL.ImageCms", "video")
    with suppress(OSError, ImportError, cms.PyCMSError):  # broken, or not of RGB: viewers leave it out too
        profile = cms.ImageCmsProfile(io.BytesIO(icc))
        if "srgb" not in cms.getProfileDescription(profile).lower():
            return cms.buildTransform(profile, cms.createProfile("sRGB"), "RGB", "RGB").apply
    return lambda image: image


def _film_times(path: PathLike) -> tuple[Seconds, float]:
    stamps, spans = list[tuple[int, int]](), list[tuple[float, float]]()
    with film(path) as (container, stream):
        rate, base = float(stream.average_rate or IMAGE_FPS), float(stream.time_base or 0)
        avi = container.format.name == "avi"
        # Else the file's own length, which ends with the last of all its streams. ffmpeg shortens that of an avi.
        stated = stream.frames / rate if avi else float(stream.duration or 0) * base
        streams = [stream] if stated else []
        for p in container.demux(*streams):
            if (at := p.dts if avi else p.pts) is not None and p.time_base is not None:
                spans.append((float(at * p.time_base), float((at + (p.duration or 0)) * p.time_base)))
            if at is not None and p.stream.index == stream.index and not p.is_discard:
                stamps.append((at, p.duration or 0))
        if not stamps or not rate > 0:
            raise VideoError(f"{str(path)!r} has no frames; expected at least one.")
        before = max(container.start_time or 0, 0) * ("matroska" in container.format.name)  # which counts from 0
        stated = stated or ((container.duration or 0) - before) / 1e6
    have = max((end for _, end in spans), default=stated) - min((begin for begin, _ in spans), default=0.0)
    said = f"{str(path)!r} ends after {have:.4g} of {stated:.4g} seconds. Is it complete?"
    if have < stated - max(2 / rate, min(0.05 * stated, 0.5)):
        raise VideoError(said)
    if streams and have < stated - 2 / rate:
        warn(said)
    begins = np.unique([pts * base for pts, _ in stamps])
    begins = begins[np.diff(begins, prepend=-np.inf) > min(0.002, 0.5 / rate)]  # VP8 has frames never shown, 1 ms off.
    last = max(stamps)[1] * base or (float(np.median(np.diff(begins))) if len(begins) > 1 else 1 / rate)
    return np.append(begins, begins[-1] + last), rate


def _film_picture(frame: Any, ratio: float) -> Any:
    alpha = any(component.is_alpha for component in frame.format.components)
    guess = {"src_colorspace": "ITU709"} if frame.colorspace == 2 and frame.height >= 720 else {}  # as players do
    pixels = frame.to_ndarray(format="rgba" if alpha else "rgb24", interpolation=EXACT, **guess)
    image = require("PIL.Image", "video").fromarray(pixels)
    if ratio != 1 and 0.25 < ratio < 4:
        image = image.resize((round(image.width * ratio), image.height))
    image = _turned(image, frame.side_data.get("DISPLAYMATRIX"))
    return _upright(image) if alpha else image


def _turned(image: Any, matrix: Any) -> Any:
    """A picture turned and mirrored as its film says: a point (x, y) is shown at (a x + c y, b x + d y)."""
    if matrix is None:
        return image
    how = require("PIL.Image", "video").Transpose
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        image, a, d = image.transpose(how.TRANSPOSE), c, b
    image = image.transpose(how.FLIP_LEFT_RIGHT) if a < 0 else image
    return image.transpose(how.FLIP_TOP_BOTTOM) if d < 0 else image


def _name_what_is_lost(path: PathLike, stream: Any, frame: Any) -> None:
    wide = stream.codec_context.color_trc in (16, 18) or stream.codec_context.color_primaries in (9, 11, 12)
    lost = ["HDR or a wide gamut, without tone mapping"] if wide else []
    lost += ["interlaced lines, as they are"] if frame.interlaced_frame else []
    layer = {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") == "1"
    lost += ["alpha in a layer of its own, not at all"] if layer else []
    if lost:
        warn(f"{str(path)!r} is read with limits: {'; '.join(lost)}. Convert it first.")
