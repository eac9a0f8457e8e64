"""Read clips and masks with the memory of the result; `app.read_pair` reads both, at the clip's times and size."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..types import SourceError
from ..utils.extras import require
from ..utils.fields import check_number, within
from ..utils.warn import warn
from . import media
from .media import IMAGE_FPS, PathLike, Seconds, Times, VideoError, decoding, is_film, pictures, shown

Array: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Size: TypeAlias = tuple[int, int]

_EXPECTED = "expected pixels in [-1, 1], (3, frames, height, width) or (batch, 3, frames, height, width)"
WITHIN = 0.55  # of a frame's time: when it is read. Its middle lies between two frames of twice the rate.
NOISE, WHITE, LOSS = 26, 128, 8  # of 255: less is black with noise; from here on edited; what compression may take


class Clip(NamedTuple):
    """Pixels (3, T, H, W), float32 in [-1, 1], and frames per second; from `read_pair` also what was taken and left."""

    pixels: Tensor
    fps: float
    note: str = ""


def read_clip(
    path: PathLike, *, frames: int | None = None, size: Size | None = None, fps: float | None = None, pad: bool = False
) -> Clip:
    """Read a film, a folder of images, or an image: upright, with square pixels, and with alpha composited on black.

    Args:
        path: The file or folder.
        frames: Pick this many, evenly from first to last. Default: all.
        size: (height, width) in pixels; the centre is cropped, antialiased. Default: the file's.
        fps: Resample a film to this rate; assume it for images. Default: the file's; 8 for images without durations.
        pad: Repeat the last frame if the file has fewer than `frames`.

    Raises:
        VideoError: The file does not exist, cannot be decoded, or has too few frames, or an argument is invalid.
        KVLockError: The extra `video` is not installed.
    """
    if fps is not None:
        fps = check_number("fps", fps, VideoError, above=0.0)
    times = shown(path := Path(os.path.expanduser(path)))
    at, rate = pick(*ticks(path, times, fps), frames, pad, path)
    return Clip(clip_at(path, times, at, size, mixed=size is not None), rate)


def read_mask(path: PathLike, *, frames: int, size: Size, pad: bool = False) -> Tensor:
    """Read a mask (1, frames, height, width) in {0, 1}: 1 = edit where the brightest channel is half or more,
    47% in a film, jpg or webp, which lose some.

    Args:
        path: A film, a folder of images, or an image, which holds for all frames.
        frames: Number of frames.
        size: (height, width) in pixels; the centre is cropped. Of a larger file a pixel is 1 if any part is white.
        pad: As for the clip; see `read_clip`.

    Raises:
        VideoError: As in `read_clip`, or something is not black, but nothing white, as in masks of object indices.
        KVLockError: The extra `video` is not installed.
    """
    times = shown(path := Path(os.path.expanduser(path)))
    at, _ = pick(*ticks(path, times), frames, pad or len(times[0]) == 2, path)
    left, top, *_ = box(frame := displayed(path, times), size)
    if max(left / frame[1], top / frame[0]) > 0.025:  # less is the rounding of sides
        warn(f"{str(path)!r}, {frame}, is cut to its middle for {size}; app.read_pair(model, clip, mask) stretches it.")
    return mask_at(path, times, at, size, frame)


def displayed(path: PathLike, times: Times) -> Size:
    """(height, width) of the first picture."""
    return _sample(path, times, np.zeros(1), lambda image: (image.height, image.width))[0]


def ticks(path: PathLike, times: Times, fps: float | None = None) -> tuple[Seconds, float]:
    """Moments within frames at a constant rate, in seconds from the first frame, and that rate."""
    starts, have = times[0] - times[0][0], len(times[0]) - 1
    inside = starts[:-1] + WITHIN * np.diff(starts)
    if times[1] is None:
        return inside, fps or IMAGE_FPS
    total, count = float(starts[-1]), _beats(starts)
    if is_film(path) and (have == 1 or (count == have and abs(count / total / times[1] - 1) < 0.02)):
        rate = times[1]
    else:  # The time stamps of a gif are rounded to 10 ms, so the usual rate that would give the same is meant.
        whole = [r for r in range(1, 61) if abs(count / r - total) < 0.006]
        rate = float(min(whole, key=lambda r: (1200 % r > 0, abs(r * total - count)), default=count / total))
    if fps is not None and abs(fps - rate) > 1e-3 * rate:
        count, rate = max(1, round(total * fps)), fps
    elif count == have:
        return inside, rate
    if count > 10_000 + 100 * have:
        raise VideoError(f"{str(path)!r} has {have} frames at times that make {count} of {rate:.4g} fps; give fps=1.")
    return (np.arange(count) + WITHIN) * (total / count), rate


def _beats(starts: Seconds) -> int:
    """The smallest number of equal frames that shows nearly all stored ones in their places."""
    have, total = len(starts) - 1, float(starts[-1])
    even = np.abs(starts[:-1] * (have / total) - np.arange(have)).max()
    if have > 8 and even <= min(0.45, max(0.25, 0.011 * have / total)):  # as of a gif, in hundredths of a second
        return have
    some = have // 4  # not the mean rate: a film's first or last frame may be shorter or longer than the others
    scale = some / np.median(starts[some:have] - starts[: have - some]) if have > 8 else have / total
    off = starts[:-1] * scale - np.arange(have)
    late = np.abs(off - np.median(off)) > 0.25
    if late.sum() <= (have // 4 if have > 4 else 0) and -1.25 < total * scale - have < 0.75:
        return have
    gaps = np.diff(starts) / np.median(np.diff(starts))
    beats = np.append(0, gaps.round().clip(1).cumsum())
    apart = np.abs(starts / total - beats / beats[-1]).max() * beats[-1]
    if have > 8 and (np.abs(gaps - 1) < 0.25).mean() > 0.9 and apart < 1:  # one pace, with pauses
        return int(beats[-1])
    some = starts[np.linspace(0, have - 1, min(have, 1000)).astype(int)]
    gaps = np.sort(np.diff(starts))
    fast = [round(total / gaps[have // 2])] if gaps[have // 2] < 1 / 61 else []
    for count in (*fast, *range(have + 1, min(have + 5000, int(60 * total) + 1))):
        places = some * (count / total)
        fit = np.abs(places - places.round()) <= np.clip(0.006 * count / total, 0.1, 0.3)
        if len(np.unique(places[fit].round())) >= len(some) * 0.9 - (have > 4):
            return count
    return max(have, round(total * min(60.0, 1 / gaps[have // 10])))


def pick(at: Seconds, rate: float, frames: int | None, pad: bool, path: PathLike) -> tuple[Seconds, float]:
    """Pick `frames` times evenly, and the rate at which they last as long as before."""
    have = len(at)
    if frames is None or check_number("frames", frames, VideoError, at_least=1, whole=True) == have:
        return at, rate
    if frames > have and not pad:
        raise VideoError(f"{str(path)!r} has {have} frames; expected at least frames={frames}, or pass pad=True.")
    if frames > have:
        return at[np.minimum(np.arange(frames), have - 1)], rate
    chosen = [round(i * (have - 1) / max(frames - 1, 1)) for i in range(frames)]
    return at[chosen], rate * max(frames - 1, 1) / (have - 1)


def clip_at(path: PathLike, times: Times, at: Seconds, size: Size | None, *, mixed: bool = False) -> Tensor:
    """The frames on screen at these seconds as pixels; `mixed` allows for several sizes of frames."""
    size = None if size is None else check_size(size)

    def shrink(image: Any) -> Array:
        if size is None or (image.height, image.width) == size:
            return np.asarray(image)
        lanczos = require("PIL.Image", "video").Resampling.LANCZOS
        return np.asarray(image.resize(size[::-1], lanczos, box=box((image.height, image.width), size)))

    chosen = _sample(path, times, at, shrink, mixed)
    return torch.from_numpy(np.stack(chosen)).permute(3, 0, 1, 2).contiguous().float().div_(127.5).sub_(1)


def mask_at(path: PathLike, times: Times, at: Seconds, size: Size, frame: Size) -> Tensor:
    """The mask at these seconds, stretched to a clip displayed as `frame` and cut as that is to `size`."""
    left, top, right, bottom = box(frame, size)
    kinds = {file.suffix.lower() for file in media.files_of(Path(path)) or [Path(path)]}
    lossy = not kinds.isdisjoint((*media.FILMS, ".jpg", ".jpeg", ".webp"))  # pixels may be off by some levels
    dark, brightest, clear, white = list[int](), list[int](), list[bool](), WHITE - LOSS * lossy

    def shrink(image: Any) -> Array:
        page = np.maximum.reduce([np.asarray(band) for band in image.split()])
        levels = np.bincount(page.ravel(), minlength=256)
        brightest.append(int(page.max()))
        level, least = NOISE + int(levels[NOISE:white].argmax()), 0.003 * page.size
        if levels[level - 4 : level + 5].sum() > max(least, 0.35 * levels[NOISE:white].sum()):
            near = (page >= level - 4) & (page <= level + 4)
            inner = near[1:-1, 1:-1] & near[2:, 1:-1] & near[:-2, 1:-1] & near[1:-1, 2:] & near[1:-1, :-2]
            dark.extend([level] if inner.sum() > least else [])  # else it is the rim of a soft mask
        if not (dark or is_film(path)) and levels[NOISE:white].sum() > least:  # a soft region without white is no rim
            regions, _ = ndimage.label(page >= NOISE)
            sizes = np.bincount((regions * ndimage.binary_erosion(regions > 0, iterations=2)).ravel())  # no hair
            sizes[0] = sizes[regions[page >= white]] = 0
            dark.extend([int(page[regions == sizes.argmax()].max())] if sizes.max() > least else [])
        few = white == WHITE and np.count_nonzero(levels) <= 32 and levels[0] > 0.1 * page.size
        if few and levels[1:NOISE].max() > 0.02 * page.size:  # indices, beside white for what no object is
            dark.append(1 + int(levels[1:NOISE].argmax()))
        solid = np.asarray(image.info.get("alpha", 255)) >= WHITE
        if 0 < solid.mean() < 0.99 and (page[solid] < WHITE).mean() > 0.1:  # a picture, or black on nothing
            clear.append(np.count_nonzero(levels) > 32 or int(page.max()) < WHITE)
        y, x = image.height / frame[0], image.width / frame[1]
        return _pooled(_pooled(page, top * y, bottom * y, size[0]).T, left * x, right * x, size[1]).T

    pages = np.stack(_sample(path, times, at, shrink))
    advice = "Expected white = edit; save a mask of object indices as (index > 0) * 255."
    if (NOISE if is_film(path) else 1) <= max(brightest) < white:
        said = f"{max(brightest)} of 255, or with 16 bits {257 * max(brightest)} of 65535"
        raise VideoError(f"{str(path)!r}: nothing is white; the brightest value is {said}. {advice}")
    if any(clear):
        warn(f"{str(path)!r} has transparent parts, kept like black. If they mean edit, save its alpha as a grey mask.")
    if dark:
        warn(f"{str(path)!r} has areas of grey {dark[0]} of 255, kept like black. {advice}")
    if max(brightest) >= white > pages.max():
        raise VideoError(f"{str(path)!r} is white only beside the middle, to which it is cut: nothing to edit.")
    return torch.from_numpy(pages >= white).float().unsqueeze(0)


def match(mask: PathLike, clip: PathLike, times: Times, at: Seconds, frame: Size) -> tuple[Times, Seconds]:
    """A mask's times, and the moments of its clock that belong to those `at` of a clip of these `times` and `frame`."""
    (theirs, rate), (ours, own), (height, width) = shown(mask), times, frame
    (h, w), count, frames, told = displayed(mask, (theirs, rate)), len(theirs) - 1, len(ours) - 1, []
    lasts, length, moments = theirs[-1] - theirs[0], ours[-1] - ours[0], at
    pair = f"the mask {str(mask)!r} is {h} x {w}, and the clip {str(clip)!r} is displayed as {height} x {width}"
    if min(abs(w - width * h / height), abs(h - height * w / width)) > 2:  # Tools round sides to even numbers.
        across = min(w / h, height / width) > 1.05 or min(h / w, width / height) > 1.05
        told.append(f"{pair}: it is stretched" + ", though one is upright: turn it as the clip is shown" * across)
    middles, mine, found = (theirs[1:] + theirs[:-1]) / 2 - theirs[0], media.numbers(clip), media.numbers(mask)
    if mine and found:
        pairs = dict(zip(mine, found if len(mine) == len(found) else mine, strict=True))
        if len(mine) == len(found) and mine != found:
            told.append(f"{str(mask)!r} begins with number {found[0]}, the clip with {mine[0]}: matched one by one")
        wanted = [pairs[mine[i]] for i in np.searchsorted(ours[1:-1] - ours[0], at, side="right")]
        if lost := sorted(set(wanted) - set(found)):
            pair = f"{str(mask)!r} lacks {len(lost)} masks for {str(clip)!r}, of the numbers {lost[:9]}"
            raise VideoError(f"{pair}; expected the numbers of the clip's frames. Add them, or give one still for all.")
        lasts, moments = length, middles[np.searchsorted(found, wanted)]
    elif count != frames and len(read := ticks(clip, times)[0]) == len(marks := ticks(mask, (theirs, rate))[0]) > 1:
        lasts, moments = length, marks[np.searchsorted((read[1:] + read[:-1]) / 2, at)]  # as many as are read
    elif count > 1 and (count == frames or own is None or rate is None):
        if found and count != frames:
            told.append(f"numbers {found[0]} to {found[-1]} of {str(mask)!r} are not looked at: the clip has none")
        if own and rate and abs(lasts / length - 1) > 0.1:
            told.append(f"{str(mask)!r} has another rate, but as many frames, so they are matched one by one")
        clock = np.append(ours, ours[-1] + (ours[-1] - ours[-2]) * np.arange(1, count + 1))[: count + 1]
        lasts = clock[-1] - clock[0]
        moments = middles[np.searchsorted(clock[1:-1] - clock[0], at, side="right")]
    apart = abs(lasts - length) > 0.75 * max(lasts / count, length / frames)
    if count > 1 and apart and (lasts > length or (at >= lasts).any()):
        pair = f"{str(mask)!r} has {count} frames, {lasts:.3g} s, and {str(clip)!r} has {length:.3g} s"
        if (at < lasts).mean() < 0.5:
            raise VideoError(f"{pair}: the mask ends before half of it. Give one of the whole clip, or a still.")
        told.append(f"{pair}: matched by time, {'its last frame is held' if lasts < length else 'its end is left'}")
    if told:
        warn("; ".join(told) + ".")
    return (theirs, rate), moments


def _sample(path: PathLike, times: Times, at: Seconds, make: Callable[[Any], Any], mixed: bool = False) -> list[Any]:
    """What `make` makes of the pictures on screen at these seconds from the first; others are not kept."""
    wanted = np.searchsorted(times[0][1:-1] - times[0][0], at, side="right").tolist()
    made, sizes = dict.fromkeys(wanted), set[Size]()
    with decoding(path):
        for index, picture in pictures(path, times[0]):
            if index in made:
                made[index] = make(image := picture())
                sizes.add((image.height, image.width))
            if index >= wanted[-1]:
                break
    if lost := [index for index, frame in made.items() if frame is None]:
        raise VideoError(f"{len(lost)} frames of {str(path)!r} cannot be decoded, first {lost[0]}. Is it complete?")
    if len(sizes) > 1 and not mixed:
        pair = f"{str(path)!r} has frames of different sizes, {sorted(sizes)[:2]}; expected one"
        raise VideoError(f"{pair}. Save all at one size; read_clip(path, size=(height, width)) cuts them to one.")
    return [made[index] for index in wanted]


def _pooled(page: Array, low: float, high: float, count: int) -> Array:
    """The maximum over rows of `count` equal, touching bands from row `low` to row `high`."""
    bands = np.linspace(low, high, count + 1).round(6)
    first, last = np.floor(bands[:-1]).astype(int), np.ceil(bands[1:]).astype(int) - 1
    return np.maximum(np.maximum.reduceat(page[: last[-1] + 1], first), page[last])


def check_size(size: Any) -> Size:
    sides = size if isinstance(size, tuple | list) else ()
    if len(sides) != 2 or any(within(side, at_least=1, whole=True) is None for side in sides):
        raise VideoError(f"got size={size!r}; expected (height, width) in pixels, such as size=(480, 832).")
    return int(sides[0]), int(sides[1])


def box(frame: Size, size: Size) -> tuple[float, float, float, float]:
    """The largest part (left, top, right, bottom) of this aspect ratio in the middle of a frame."""
    (h, w), (height, width) = frame, check_size(size)
    shrink = min(h / height, w / width)
    left, top = max((w - width * shrink) / 2, 0.0), max((h - height * shrink) / 2, 0.0)
    return left, top, w - left, h - top


def as_clips(clip: Any) -> Tensor:
    """Floats, a tensor or array, as clips (batch, channels, frames, height, width); other numbers of axes stay."""
    if isinstance(clip, str | os.PathLike):
        name = os.fspath(clip)
        raise SourceError(
            f"clip is the path {name!r}; {_EXPECTED}. Read it first:\n"
            f"  from kvlock_sampling.video import read_clip\n  clip = read_clip({name!r}).pixels"
        )
    if isinstance(clip, np.ndarray) and clip.dtype.kind in "fiub":
        # Torch does not accept read-only arrays, negative strides or other orders of bytes; `require` copies those.
        dtype = np.float32 if clip.dtype.kind == "f" and clip.dtype.itemsize > 4 else clip.dtype.newbyteorder("=")
        clip = torch.from_numpy(np.require(clip, dtype, ["C", "W"]))
    if not isinstance(clip, Tensor):
        hint = "\n  clip = read_clip(path).pixels" if hasattr(clip, "pixels") else ""
        raise SourceError(f"clip is a {type(clip).__name__}; {_EXPECTED}, as a tensor or an array.{hint}")
    if not clip.is_floating_point():
        raise SourceError(f"clip is of {clip.dtype}; expected floats in [-1, 1]: clip / 127.5 - 1.")
    return clip.unsqueeze(0) if clip.ndim == 4 else clip


def check_pixels(clips: Tensor) -> None:
    """Raise SourceError for pixels that are not finite or outside [-1, 1]; 1% more is accepted as rounding.

    Warns of a clip without a pixel darker than mid-grey, which is most often one in [0, 1].
    """
    if not torch.isfinite(clips).all():
        raise SourceError("clip holds NaN or inf; expected pixels in [-1, 1].")
    if clips.abs().max() > 1.01:
        raise SourceError(
            f"clip runs from {float(clips.min()):.3g} to {float(clips.max()):.3g}; expected pixels in [-1, 1]: "
            "clip / 127.5 - 1 for bytes, clip * 2 - 1 for [0, 1]."
        )
    if clips.min() >= 0 and clips.max() > 0.5:
        warn("the clip has no pixel below mid-grey, 0; if it is in [0, 1], pass clip * 2 - 1.")
