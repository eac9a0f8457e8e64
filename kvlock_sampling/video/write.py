"""Write clips as films, gifs or contact sheets, and put clips side by side."""

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.extras import require
from ..utils.fields import check_number
from ..utils.files import atomic
from ..utils.warn import warn
from .media import FILMS, IMAGES, PathLike, VideoError, film, is_film
from .read import Array, as_clips

# x264's macroblock tree reads memory that it never wrote, so the same frames would make other files.
_X264 = {"crf": "12", "preset": "medium", "mbtree": "0"}
_H264 = (("libx264", _X264), ("mpeg4", {"qmin": "1", "qmax": "3", "b": "20M"}))
_VP9 = (("libvpx-vp9", {"crf": "12", "b": "0", "cpu-used": "4"}), ("libvpx", {"crf": "4", "b": "8M"}))
ENCODERS = {".mp4": ("mp4", _H264), ".mov": ("mov", _H264), ".webm": ("webm", _VP9)}  # in order of preference
# Without these tags players guess the colour space, each differently, and where a colour of 2 x 2 pixels lies.
_TAGS = {"color_primaries": "bt709", "color_trc": "bt709", "colorspace": "bt709", "color_range": "tv"}
_TAGS["chroma_sample_location"] = "center"
_MEAN = 0x42020  # AREA | FULL_CHR_H_INT | ACCURATE_RND of swscale, which puts it there
DARK, LIGHT = (22, 22, 28), (235, 235, 235)  # RGB of the ground behind tiles and captions, and of the text on it


def write_clip(path: PathLike, pixels: Any, fps: float = 8, scale: int = 1, sound: PathLike | None = None) -> str:
    """Write a clip in the format of the suffix: .mp4 or .mov (H.264), .webm (VP9), .gif, .png (a contact sheet).

    Args:
        path: The file to write.
        pixels: (3, T, H, W), floats, a tensor or array; values are clamped to [-1, 1].
        fps: Frames per second, > 0; films hold 1/655 to 1000, a gif up to 50, and an image none.
        scale: Whole factor of enlargement, nearest neighbour.
        sound: A film whose sound to keep, cut to the length of the clip.

    Returns:
        What became of the sound, e.g. "sound copied"; "" if there is none.

    Raises:
        SourceError: The pixels are no floats.
        VideoError: Wrong suffix, shape or range, pixels that are not finite, or the encoder or the disk refuses.
        KVLockError: The extra `video` is not installed.
    """
    path, kind = Path(path), check_suffix(path)
    fps = check_number("fps", fps, VideoError, above=0.0)
    check_number("scale", scale, VideoError, at_least=1, whole=True)
    images = to_bytes(pixels, "write_clip got pixels").repeat(scale, 1).repeat(scale, 2)
    if sound is not None and not (is_film(sound) or os.path.isdir(sound) or str(sound).lower().endswith(IMAGES)):
        warn(f"without sound: sound={str(sound)!r} is no film; expected one that ends in {', '.join(FILMS)}.")
    sound = sound if sound is not None and is_film(sound) else None
    most = 50 if kind == ".gif" else 1000  # Shorter frames would be lost, and longer ones than 655 s.
    if kind != ".png" and (held := min(max(fps, 1 / 655), most)) != fps:
        warn(f"a {kind} holds 1/655 to at most {most} frames per second, not {fps:g}: {held:g}")
        fps = held
    try:
        with atomic(path) as temporary:
            if kind in ENCODERS:
                try:
                    return _write_film(temporary, images, fps, kind, sound)
                except (VideoError, OSError, require("av.error", "video").FFmpegError) as error:
                    if sound is None:
                        raise
                    # A model has worked on the pictures, so they are written without it.
                    warn(f"without sound: {error}")
                    return _write_film(temporary, images, fps, kind, None)
            if kind == ".png":
                sheet = _grid(images, min(len(images), 8), gap=0 if len(images) == 1 else 2)
                require("PIL.Image", "video").fromarray(sheet).save(temporary, format="PNG")
            else:
                _write_gif(temporary, images, fps)
    except (OSError, require("av.error", "video").FFmpegError) as error:
        raise VideoError(f"cannot write {str(path)!r}: {error}. Is the disk full, or the size unusual?") from error
    if sound is not None:
        with suppress(VideoError), film(sound) as (container, _):
            return f"a {kind} holds no sound" * bool(container.streams.audio)
    return ""


def check_suffix(path: PathLike) -> str:
    """Return the suffix of a file to write in lower case; raise VideoError if `write_clip` has no such format."""
    kind, known = Path(path).suffix.lower(), (*ENCODERS, ".gif", ".png")
    if kind not in known:
        raise VideoError(f"{os.path.basename(path)!r} has the suffix {kind!r}; expected one of {', '.join(known)}.")
    return kind


def side_by_side(
    clips: Sequence[Tensor | np.ndarray], labels: Sequence[str], *, scale: int = 6, columns: int | None = None
) -> Tensor:
    """Put clips side by side as labelled tiles of one clip, float32 (3, T, height, width) in [-1, 1].

    Args:
        clips: One or more clips of one shape (3, T, H, W) in [-1, 1].
        labels: One per clip. A label that does not fit is set smaller, then cut.
        scale: Whole factor of enlargement.
        columns: Tiles per row. Default: all in one row.

    Raises:
        VideoError: The clips differ in shape, or their number differs from that of the labels.
        KVLockError: The extra `video` is not installed.
    """
    if not len(clips) or len(clips) != len(labels) or len({tuple(clip.shape) for clip in clips}) > 1:
        raise VideoError(
            f"side_by_side got clips {[tuple(clip.shape) for clip in clips]} and {len(labels)} labels; expected one "
            "shape (3, T, H, W) and a label for each."
        )
    check_number("scale", scale, VideoError, at_least=1, whole=True)
    if columns is not None:
        check_number("columns", columns, VideoError, at_least=1, whole=True)
    tiles = []
    for clip, label in zip(clips, labels, strict=True):
        tile = to_bytes(clip, "side_by_side got a clip").repeat(scale, 1).repeat(scale, 2)
        tiles.append(np.concatenate([np.repeat(_caption(str(label), tile.shape[2])[None], len(tile), 0), tile], 1))
    sheets = [_grid(np.stack(moment), columns or len(tiles), gap=8) for moment in zip(*tiles, strict=True)]
    return torch.from_numpy(np.stack(sheets)).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_bytes(pixels: Any, got: str) -> Array:
    """Pixels (3, T, H, W) in [-1, 1] as bytes (T, H, W, 3). Raises VideoError, which begins with `got`."""
    clip = as_clips(pixels)[0] if getattr(pixels, "ndim", 4) == 4 else as_clips(pixels)
    if clip.ndim != 4 or clip.shape[0] != 3 or 0 in clip.shape:
        hint = " For a batch of clips pass clips[0]." if clip.ndim == 5 else ""
        raise VideoError(f"{got} of shape {tuple(clip.shape)}; expected (3, T, H, W).{hint}")
    clip = clip.detach().float().cpu()
    if bad := int((~torch.isfinite(clip)).sum()):
        raise VideoError(f"{got} with {bad} nan or inf values; expected numbers in [-1, 1].")
    if (most := max(map(abs, torch.stack(clip.aminmax()).tolist()))) > 8:  # A decoder overshoots by less.
        raise VideoError(f"{got} up to {most:.3g}; expected [-1, 1]: pixels / 127.5 - 1 for [0, 255].")
    return clip.clamp(-1, 1).add_(1).mul_(127.5).round_().byte().permute(1, 2, 3, 0).contiguous().numpy()


def _grid(tiles: Array, columns: int, *, gap: int) -> Array:
    """Place tiles (n, H, W, 3) row by row on a dark ground, `gap` pixels apart and from the border."""
    n, height, width = tiles.shape[:3]
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), DARK, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def _caption(text: str, width: int) -> Array:
    """Draw one line of text on a dark bar (height, width, 3), as large as fits, else cut with an ellipsis."""
    pil, draw, fonts = (require(f"PIL.{name}", "video") for name in ("Image", "ImageDraw", "ImageFont"))
    sizes = [fonts.load_default(points) for points in (15, 13, 11)]
    font = next((font for font in sizes if font.getlength(text) <= width - 4), sizes[-1])
    while len(text) > 1 and font.getlength(text) > width - 4:
        text = text.rstrip("…")[:-1].rstrip() + "…"
    bar = pil.new("RGB", (width, 22), DARK)
    draw.Draw(bar).text((width / 2, 11), text, fill=LIGHT, font=font, anchor="mm")
    return np.asarray(bar)


def _write_film(path: Path, images: Array, fps: float, kind: str, sound: PathLike | None) -> str:
    """Encode (T, H, W, 3). 4:2:0 needs even sizes, so odd ones are padded by repeating the edge."""
    av = require("av", "video")
    container_format, encoders = ENCODERS[kind]
    images = np.pad(images, [(0, 0), (0, images.shape[1] % 2), (0, images.shape[2] % 2), (0, 0)], mode="edge")
    codec, options = next(((n, o) for n, o in encoders if n in av.codecs_available), encoders[-1])
    # Sound comes first. By default ffmpeg writes 10 s of it, and what players need together lies far apart.
    extra = {"max_interleave_delta": "0", "fflags": "+bitexact"}  # no random number, such as webm's name of a film
    extra |= {"movflags": "faststart"} if container_format != "webm" else {}
    with av.open(str(path), "w", format=container_format, options=extra) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options | _TAGS)
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        said = "" if sound is None else _add_sound(sound, container, len(images) / fps)
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", interpolation=_MEAN)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return said


def _add_sound(path: PathLike, written: Any, seconds: float) -> str:
    with film(path) as (container, pictures):
        # The names of decoders are those of codecs, save "mp3float" and "libopus".
        tracks = {t: t.codec_context.name if t.codec_context else "an unknown codec" for t in container.streams.audio}
        tracks = {t: name.removeprefix("lib").removesuffix("float") for t, name in tracks.items()}
        held = [_holds(path, number, written.format.name, codec) for number, codec in enumerate(tracks.values())]
        kept = {t: written.add_stream_from_template(t) for t, holds in zip(tracks, held, strict=True) if holds}
        if not kept:
            names = " and ".join(dict.fromkeys(tracks.values()))
            return f"sound left out, as this container does not hold {names}" if names else ""
        for track, copied in kept.items():
            copied.metadata.update({k: v for k, v in track.metadata.items() if k in ("language", "title")})
        start = (pictures.start_time or 0) * pictures.time_base
        for packet in (p for p in container.demux(*kept) if p.pts is not None):
            begins, lasts = packet.pts * packet.time_base - start, (packet.duration or 0) * packet.time_base
            if begins + lasts >= 0 and begins < seconds:  # the packet before the first that is heard primes a decoder
                packet.pts = packet.dts = packet.pts - round(start / packet.time_base)
                packet.stream = kept[packet.stream]
                written.mux(packet)
    return "sound copied" if len(kept) == len(tracks) else f"sound copied, {len(kept)} of {len(tracks)} tracks"


def _holds(path: PathLike, number: int, container_format: str, codec: str) -> bool:
    """Whether a container takes a sound track. Some refuse what they list, at its header or at its first packet."""
    av = require("av", "video")
    with suppress(Exception), film(path) as (source, _), av.open(io.BytesIO(), "w", format=container_format) as trial:
        packet = next(source.demux(audio=number))
        packet.stream = trial.add_stream_from_template(packet.stream)
        trial.mux(packet)
        return codec in trial.supported_codecs
    return False


def _write_gif(path: Path, images: Array, fps: float) -> None:
    """Write a looping gif with one palette, exact up to 256 colours, else by median cut without dither."""
    av, pil = require("av", "video"), require("PIL.Image", "video")
    sheet = pil.fromarray(images.reshape(-1, images.shape[2], 3))
    sheet = sheet.quantize(256, method=pil.Quantize.MEDIANCUT, dither=pil.Dither.NONE)
    palette = np.array(sheet.getpalette(), np.uint8).reshape(-1, 3)
    table = np.full((256, 4), 255, np.uint8)
    table[: len(palette), 1:] = palette
    edges = [round(i * 100 / fps) for i in range(len(images) + 1)]  # The format has steps of 10 ms.
    # Pillow would merge repeated frames into one that lasts longer.
    with av.open(str(path), "w", format="gif", options={"final_delay": str(edges[-1] - edges[-2])}) as container:
        stream = container.add_stream("gif", rate=100)
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "pal8"
        for index, pts in zip(np.asarray(sheet).reshape(images.shape[:3]), edges, strict=False):
            frame = av.VideoFrame.from_ndarray((np.ascontiguousarray(index), table), format="pal8")
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
