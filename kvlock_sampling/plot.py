"""The figure of a run: variance and risk above, lock and CFG scale below, all over sigma, which falls to the right."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .types import KVLockError
from .utils.files import write_atomically

if TYPE_CHECKING:
    from .trace import Trace

COLOURS = {"variance": "#4477aa", "risk": "#cc3311", "lock": "#228833", "cfg_scale": "#aa3377"}
LABELS = {"variance": "variance of $\\hat{x}_0$", "risk": "risk", "lock": "lock", "cfg_scale": "CFG scale"}


def figure_format(path: str | os.PathLike[str]) -> str:
    """ "png", "svg" or "pdf", by the path's suffix; without one "png". Raises KVLockError for another suffix."""
    suffix = Path(path).suffix.lstrip(".").lower() or "png"
    if suffix not in ("png", "svg", "pdf"):
        raise KVLockError(f"a figure cannot be written as {Path(path).name!r}; expected .png, .svg or .pdf.")
    return suffix


def plot_trace(trace: Trace, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write the figure of `trace` to `path` (PNG, SVG or PDF by suffix). One thin line per clip, at most eight.

    A panel says "not measured" where the run measured nothing, under a policy that reads no risk for one.
    """
    suffix = figure_format(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = trace.rows()
    clips = sorted({int(r["clip"]) for r in rows})[:8]
    figure = Figure(figsize=(7.2, 7.6), dpi=130, layout="constrained")
    axes: Sequence = figure.subplots(4, 1, sharex=True)
    for axis, name in zip(axes, LABELS, strict=True):
        for clip in clips:
            mine = [r for r in rows if r["clip"] == clip]
            axis.plot(
                [r["sigma"] for r in mine],
                [r[name] for r in mine],
                color=COLOURS[name],
                marker="o",
                markersize=2.5,
                linewidth=1.3,
                alpha=1.0 if len(clips) == 1 else 0.6,
            )
        axis.set_ylabel(LABELS[name])
        axis.grid(alpha=0.25)
        if name in ("variance", "risk") and any(r[name] > 0 for r in rows):
            axis.set_yscale("log")
            if name == "risk":  # a ratio, read as 0.2 or 5
                axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(NullFormatter())
        if rows and all(math.isnan(r[name]) for r in rows):
            axis.set_yticks([])  # a scale of nothing would look like a measured 0
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="0.45")
    if any(r["risk"] > 0 for r in rows):
        axes[1].axhline(1.0, color="0.35", linewidth=0.9, linestyle="--")
        axes[1].set_ylim(top=max(axes[1].get_ylim()[1], 2.0))  # room for the word
        axes[1].annotate("threshold", (0.01, 1.0), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    axes[2].set_ylim(-0.04, 1.04)
    if rows:
        axes[-1].set_xscale("log")
        axes[-1].xaxis.set_minor_formatter(NullFormatter())
        axes[-1].invert_xaxis()
    axes[-1].set_xlabel(r"noise level $\sigma$  (sampling runs left to right)")
    figure.suptitle(title or f"{len(trace)} evaluations, {trace.evaluations} model passes per clip", fontsize=11)
    out = io.BytesIO()
    figure.savefig(out, format=suffix)
    return write_atomically(path, out.getvalue())
