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
from ...video.write import to_bytes
from ..models import VideoModel
from ._session import Session, to_clips

EDITED, BAND, KEPT, RELEASED = (230, 159, 0), (240, 228, 66), (0, 114, 178), (0, 158, 115)  # Okabe and Ito's colours
SHOWN = 384  # least width in pixels of a picture; smaller frames are enlarged by a whole factor

CSS = """
.kv-figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11rem), 1fr)); gap: 1rem }
.kv-figures figure { margin: 0; max-width: 30rem; min-width: 0 }
.kv-figures img { width: 100%; display: block; image-rendering: pixelated }
.kv-figures figcaption, .kv-note { font-size: .9rem; margin-top: .3rem }
.kv-wipe { position: relative }
.kv-wipe input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize }
.kv-wipe:focus-within { outline: 2px solid }
.kv-wipe img + img { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at, 50%)) }
.kv-wipe::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--at, 50%); border-left: 2px solid #fff;
  box-shadow: 0 0 2px #000 }
.kv-scroll { overflow-x: auto }
.kv-scroll table { border-collapse: collapse; border: 0; width: 100% }
.kv-scroll th, .kv-scroll td { padding: .3rem .5rem; text-align: right; border: 0;
  border-bottom: 1px solid #8886;
  white-space: nowrap }
.kv-scroll th:first-child { text-align: left; font-weight: normal; white-space: normal }
.kv-scroll th[colspan] { font-weight: bold; padding-top: .8rem }
.kv-key { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 .6em; vertical-align: -.1em;
  border: 1px solid #888 }
.kv-text textarea { font-family: ui-monospace, monospace; font-size: .85rem }
#status { min-height: 5rem }
.kv-wide { grid-template-columns: minmax(0, 1fr) }
.kv-wide figure { max-width: none }
.kv-wide div { overflow-x: auto }
.kv-wide img { width: max(100%, 26rem); max-width: none; image-rendering: auto }
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
    where = f"drawn on frame {drawn}" if drawn else session.origin
    alt = f"Frame {frame} with its tokens tinted"
    return _figures([(picture, alt, f"{key} of the clip's {weight.shape[1]} tokens. The mask is {where}.")])


def frame_view(session: Session, video: VideoModel, name: str, frame: int) -> str:
    """One frame of a result: the wipe, the difference, and the tokens that were let go."""
    assert session.results is not None
    edit, edited = session.results.edits[name], session.results.weight == 0
    before, after = session.frames[frame], to_bytes(edit.pixels[0, :, frame : frame + 1], "the edit has pixels")[0]
    pair = "".join(f'<img src="{_uri(_enlarged(p))}" alt="{alt}">' for p, alt in ((before, "source"), (after, "edit")))
    move = "this.parentElement.style.setProperty('--at', this.value + '%')"
    label = f"Wipe of frame {frame}: source to the left, {name} to the right"
    wipe = (
        f'<figure><div class="kv-wipe">{pair}<input type="range" min="0" max="100" value="50" '
        f'aria-label="{escape(label)}" oninput="{move}"></div><figcaption>Left of the line the source, right of it the '
        "edit. Drag it with the mouse or a finger, or press the arrow keys.</figcaption></figure>"
    )
    gap = np.abs(after.astype(np.int16) - before).max(-1, keepdims=True)
    difference = np.repeat((gap * 4).clip(0, 255).astype(np.uint8), 3, axis=-1)
    let_go = torch.stack([(step.composite < 1).cpu().expand_as(edited) & ~edited for step in edit.trace])
    tints = [(edited, EDITED), (let_go.float().mean(0), RELEASED)]
    told = (
        f"{_key(RELEASED)}{int(let_go.any(0).sum())} of the clip's {edited.shape[1]} tokens let go at some step, the "
        f"more the greener; {int(let_go[-1].sum())} at the last one. {_key(EDITED)}Edited. The rest keeps the source's "
        "pixels."
    )
    views = [
        (_enlarged(difference), f"Difference of frame {frame}", "Difference from the source, four times as bright."),
        (_tinted(session, video, frame, tints), f"Tokens let go in frame {frame}", told),
    ]
    return _figures(views, wipe)


def numbers_view(session: Session, video: VideoModel) -> str:
    """PSNR by region, passes and time of every result, as a table."""
    assert session.results is not None
    edits, weight, region = session.results.edits, session.results.weight, session.results.region
    source, between = to_clips(session.frames), session.on_frames((weight > 0) & (weight < 1), video)
    band = torch.from_numpy(between)[None, None] * (1 - region)
    regions = {"in the mask": region, "in the transition band": band, "elsewhere": 1 - region - band}
    body = ""
    for against, clip in (("the clip", source), ("the true result", session.truth)):
        if clip is not None:
            rows: dict[str, list[str]] = {}
            for name, where in {"whole frame": torch.ones_like(region), **regions}.items():
                if where.any():
                    psnrs = [float(masked_psnr(edit.pixels, clip, where)) for edit in edits.values()]
                    rows[name] = ["exact" if psnr >= 100 else f"{psnr:.2f} dB" for psnr in psnrs]
            body += _rows(f"PSNR to {against}: more is nearer", rows)
    made = edits.values()
    cost = {"model passes": [str(e.nfe) for e in made], "seconds of sampling": [f"{e.seconds:.1f}" for e in made]}
    body += _rows("Cost", cost | {"seed": [str(edit.seed) for edit in made]})
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *edits))
    return f'<div class="kv-scroll"><table><tr>{head}</tr>{body}</table></div>'


def _rows(title: str, rows: Mapping[str, Sequence[str]]) -> str:
    lines = [
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
    ]
    span = 1 + max(map(len, rows.values()))
    return f'<tr><th colspan="{span}">{title}</th></tr>{"".join(lines)}'


def files_view(files: Mapping[str, Path]) -> str:
    """Pictures from files, by caption."""
    return _figures([(path.read_bytes(), name, escape(name)) for name, path in files.items()], kind=" kv-wide")


def _figures(pictures: Sequence[tuple[Array | bytes, str, str]], first: str = "", kind: str = "") -> str:
    """Pictures with their text for readers who do not see them, and their captions in HTML."""
    parts = [
        f'<figure><div><img src="{_uri(picture)}" alt="{escape(alt)}"></div><figcaption>{caption}</figcaption></figure>'
        for picture, alt, caption in pictures
    ]
    return f'<div class="kv-figures{kind}">{first}{"".join(parts)}</div>'


def _tinted(session: Session, video: VideoModel, frame: int, tints: Sequence[tuple[Tensor, Any]]) -> Array:
    """A frame, enlarged, with tokens coloured by a weight in [0, 1], and with their borders."""
    picture = _enlarged(session.frames[frame]).astype(np.float32)
    factor = len(picture) // session.frames.shape[1]
    ids = torch.arange(tints[0][0].shape[1])[None]
    for which, colour in tints:
        alpha = 0.45 * session.on_frames(which, video)[frame].repeat(factor, 0).repeat(factor, 1)[..., None]
        picture = (1 - alpha) * picture + alpha * np.array(colour)
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
