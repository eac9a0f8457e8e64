"""What the page shows, as HTML: frames with tokens tinted, the wipe between source and result, numbers, figures."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...utils.extras import require
from ...video.metrics import masked_psnr
from ...video.read import Array
from ..models import VideoModel
from ._session import Session, to_bytes, to_clips

EDITED, BAND, KEPT, RELEASED = (230, 159, 0), (240, 228, 66), (0, 114, 178), (0, 158, 115)  # Okabe and Ito's colours
SHOWN = 384  # least width in pixels of a picture; smaller frames are enlarged by a whole factor

CSS = """
.kv-figures { display: flex; flex-wrap: wrap; gap: 1rem }
.kv-figures figure { margin: 0; flex: 1 1 16rem; max-width: 34rem; min-width: 0 }
.kv-figures img { width: 100%; display: block; image-rendering: pixelated }
.kv-figures figcaption, .kv-note { font-size: .9rem; margin-top: .3rem }
.kv-wipe { position: relative }
.kv-wipe img + img { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at, 50%)) }
.kv-wipe::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--at, 50%); border-left: 2px solid #fff;
  box-shadow: 0 0 2px #000 }
.kv-figures input[type=range] { width: 100%; min-height: 2rem }
.kv-scroll { overflow-x: auto }
.kv-scroll table { border-collapse: collapse; width: 100% }
.kv-scroll th, .kv-scroll td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #8886 }
.kv-scroll th:first-child { text-align: left; font-weight: normal }
.kv-scroll caption { text-align: left; font-size: .9rem; padding-bottom: .3rem }
.kv-key { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 .6em; vertical-align: -.1em;
  border: 1px solid #888 }
.kv-text textarea { font-family: ui-monospace, monospace; font-size: .85rem }
#status { min-height: 1.5rem }
"""


def tokens_view(session: Session, video: VideoModel, frame: int, transition: tuple[float, float] | None) -> str:
    """One frame with its tokens tinted by how much of the lock they take."""
    weight = session.tokens(video, transition)
    tints = [(weight == 0, EDITED), ((weight > 0) & (weight < 1), BAND), (weight >= 1, KEPT)]
    names = ("edited", "in the transition band", "locked")
    key = "".join(
        f"{_key(colour)}{int(which.sum())} {name}" for (which, colour), name in zip(tints, names, strict=True)
    )
    picture = _tinted(session, video, frame, tints)
    drawn = ", ".join(map(str, sorted(session.drawn)))
    where = f"drawn on frame {drawn}" if drawn else "not drawn, but given"
    alt = f"Frame {frame} with its tokens tinted"
    return _figures([(picture, alt, f"{key} of {weight.shape[1]} tokens. The mask is {where}.")])


def frame_view(session: Session, video: VideoModel, name: str, frame: int) -> str:
    """One frame of a result: the wipe, the difference, and the tokens that were let go."""
    edit = session.results[name]
    before, after = session.frames[frame], to_bytes(edit.pixels[0, :, frame : frame + 1])[0]
    pair = "".join(f'<img src="{_uri(_enlarged(p))}" alt="{alt}">' for p, alt in ((before, "source"), (after, "edit")))
    move = "this.previousElementSibling.style.setProperty('--at', this.value + '%')"
    label = f"Wipe of frame {frame}: source to the left, {name} to the right"
    wipe = (
        f'<figure><div class="kv-wipe">{pair}</div><input type="range" min="0" max="100" value="50" '
        f'aria-label="{escape(label)}" oninput="{move}"><figcaption>Left of the line the source, right of it the '
        "edit. Move it with the mouse, a finger or the arrow keys.</figcaption></figure>"
    )
    gap = np.abs(after.astype(np.int16) - before).max(-1, keepdims=True)
    difference = np.repeat((gap * 4).clip(0, 255).astype(np.uint8), 3, axis=-1)
    weight = edit.trace.steps[-1].composite.float().cpu()
    assert session.weight is not None
    edited = session.weight == 0
    let_go = (weight < 1).expand_as(edited) & ~edited
    tints = [(edited, EDITED), (let_go, RELEASED)]
    count = f"{_key(RELEASED)}{int(let_go.sum())} of {edited.shape[1]} tokens let go at the last step, "
    told = f"{count}{_key(EDITED)}edited. The others keep the source's pixels."
    views = [
        (_enlarged(difference), f"Difference of frame {frame}", "Difference from the source, four times as bright."),
        (_tinted(session, video, frame, tints), f"Tokens let go in frame {frame}", told),
    ]
    return _figures(views, wipe)


def numbers_view(session: Session, video: VideoModel) -> str:
    """PSNR by region, passes and time of every result, as a table."""
    assert session.region is not None
    assert session.weight is not None
    source, region = to_clips(session.frames), session.region
    between = session.on_frames((session.weight > 0) & (session.weight < 1), video)
    band = torch.from_numpy(between)[None, None] * (1 - region)
    regions = {"in the mask": region, "in the transition band": band, "elsewhere": 1 - region - band}
    rows: dict[str, list[str]] = {}
    for against, clip in (("source", source), ("true result", session.truth)):
        for name, where in {"whole frame": torch.ones_like(region), **regions}.items():
            if clip is not None and where.any():
                psnrs = [float(masked_psnr(e.pixels, clip, where)) for e in session.results.values()]
                rows[f"{name}, to the {against}"] = ["exact" if p >= 100 else f"{p:.2f} dB" for p in psnrs]
    rows["model passes"] = [str(edit.nfe) for edit in session.results.values()]
    rows["time"] = [f"{edit.seconds:.1f} s" for edit in session.results.values()]
    rows["seed"] = [str(edit.seed) for edit in session.results.values()]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *session.results))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
    )
    caption = "PSNR of each region; more is nearer"
    return f'<div class="kv-scroll"><table><caption>{caption}</caption><tr>{head}</tr>{body}</table></div>'


def files_view(files: Mapping[str, Path]) -> str:
    """Pictures from files, by caption."""
    return _figures([(path.read_bytes(), caption, escape(caption)) for caption, path in files.items()])


def _figures(pictures: Sequence[tuple[Array | bytes, str, str]], first: str = "") -> str:
    """Pictures with their text for readers who do not see them, and their captions in HTML."""
    parts = [
        f'<figure><img src="{_uri(picture)}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'
        for picture, alt, caption in pictures
    ]
    return f'<div class="kv-figures">{first}{"".join(parts)}</div>'


def _tinted(session: Session, video: VideoModel, frame: int, tints: Sequence[tuple[Tensor, Any]]) -> Array:
    """A frame, enlarged, with the tokens of each tint coloured and the borders of tokens drawn."""
    picture = _enlarged(session.frames[frame]).astype(np.float32)
    factor = len(picture) // session.frames.shape[1]
    ids = torch.arange(tints[0][0].shape[1])[None]
    for which, colour in tints:
        here = session.on_frames(which, video)[frame].repeat(factor, 0).repeat(factor, 1) > 0
        picture[here] = 0.6 * picture[here] + 0.4 * np.array(colour)
    cells = session.on_frames(ids, video)[frame].repeat(factor, 0).repeat(factor, 1)
    picture[1:][cells[1:] != cells[:-1]] *= 0.75
    picture[:, 1:][cells[:, 1:] != cells[:, :-1]] *= 0.75
    return picture.astype(np.uint8)


def _enlarged(frame: Array) -> Array:
    factor = max(1, SHOWN // frame.shape[1])
    return frame.repeat(factor, 0).repeat(factor, 1)


def _key(colour: tuple[int, int, int]) -> str:
    return f'<span class="kv-key" style="background: rgb{colour}"></span>'


def _uri(picture: Array | bytes) -> str:
    if isinstance(picture, bytes):
        return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    buffer = io.BytesIO()
    require("PIL.Image", "video").fromarray(picture).save(buffer, format="WEBP", lossless=picture.size < 1_000_000)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
