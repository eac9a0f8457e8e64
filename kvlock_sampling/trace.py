"""What happened in a run, per evaluation: rows, CSV, and a figure over sigma."""

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .types import KVLockError, Observation, Scalar, StepInfo
from .utils.extras import require
from .utils.files import write_atomically

COLUMNS = ("call", "clip", *StepInfo._fields[1:])

_CURVES = {
    "variance": ("variance of $\\hat{x}_0$", "#4477aa"),
    "risk": ("risk", "#cc3311"),
    "effect": ("effect", "#ee7733"),
    "lock": ("lock", "#228833"),
    "composite": ("composite", "#009988"),
    "cfg_scale": ("CFG scale", "#aa3377"),
}


def rows_of(value: Scalar, like: Tensor) -> Tensor:
    """A value per clip or token, or one for all, as float32 rows: (batch,) as `like`, or (batch, tokens)."""
    found = torch.as_tensor(value, dtype=torch.float32, device=like.device)
    return found if found.ndim > 1 else found.reshape(-1).expand(len(like))


class Trace:
    """The steps of one run, in the order in which they happened. Tensors stay on their device until they are read.
    Raises KVLockError for a figure of another kind than png, svg or pdf, and OSError if a file cannot be written.

    Attributes:
        steps: One `StepInfo` per evaluation; iterating over the trace gives the same.
    """

    def __init__(self) -> None:
        self.steps: list[StepInfo] = []

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[StepInfo]:
        return iter(self.steps)

    def __repr__(self) -> str:
        routes = ", ".join(f"{name} x {count}" for name, count in self.routes.items())
        return f"Trace({len(self)} evaluations, nfe {self.nfe}, routes: {routes or 'none'})"

    @property
    def nfe(self) -> int:
        """Function evaluations over the whole run: model passes per clip, counting cond, uncond, source and probes."""
        return sum(step.nfe for step in self.steps)

    @property
    def routes(self) -> dict[str, int]:
        """How many evaluations took each route, in the order in which the routes first occurred."""
        return dict(Counter(step.route for step in self.steps))

    def record(
        self, observation: Observation, next_lock: Scalar, cfg_scale: Scalar, composite: Scalar, **counts: Any
    ) -> None:
        """Add the row of one evaluation: what the policy saw, what it decided, and what ran."""
        sigma, variance, risk, lock, like, _, effect = observation
        acted = lock if counts["fused_layers"] else torch.zeros_like(lock)  # a step cache may skip every layer
        decided = {"next_lock": next_lock, "cfg_scale": cfg_scale, "composite": composite}
        counts |= {name: rows_of(value, like) for name, value in decided.items()}
        self.steps.append(StepInfo(len(self), sigma, variance, risk, effect, acted, **counts))

    def rows(self) -> list[dict[str, Any]]:
        """One dict per evaluation and clip, with the keys of `COLUMNS`, and NaN for what was not measured."""
        rows: list[dict[str, Any]] = []
        for step in self.steps:
            for clip in range(len(step.variance)):
                given = {"call": step.call, "clip": clip} | step._asdict()  # of tokens the mean
                rows.append({k: float(v[clip].mean()) if isinstance(v, Tensor) else v for k, v in given.items()})
        return rows

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """The rows as CSV with a header line, also written to `path` if given."""
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        if path is not None:
            write_atomically(path, out.getvalue())
        return out.getvalue()

    def plot(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """Draw variance, risk, effect, lock, composite and CFG scale of up to eight clips as PNG, SVG or PDF."""
        suffix = figure_format(path)
        ticker = require("matplotlib.ticker", "plot")
        rows = self.rows()
        clips = sorted({int(row["clip"]) for row in rows})[:8]
        style = {"marker": "o", "markersize": 2.5, "linewidth": 1.3, "alpha": 1.0 if len(clips) == 1 else 0.6}
        curves = [name for name in _CURVES if name != "effect" or any(r[name] >= 0 for r in rows)]
        figure = require("matplotlib.figure", "plot").Figure((7.2, 1.9 * len(curves)), dpi=130, layout="constrained")
        axes: Sequence[Any] = figure.subplots(len(curves), 1, sharex=True)
        for axis, name in zip(axes, curves, strict=True):
            label, colour = _CURVES[name]
            for clip in clips:
                mine = [row for row in rows if row["clip"] == clip]
                axis.plot([row["sigma"] for row in mine], [row[name] for row in mine], color=colour, **style)
            axis.set_ylabel(label)
            axis.grid(alpha=0.25)
            if name in ("variance", "risk", "effect") and any(r[name] > 0 for r in rows):
                axis.set_yscale("log")
            if name in ("risk", "effect") and any(r[name] > 0 for r in rows):
                axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(ticker.NullFormatter())
            if name in ("lock", "composite"):
                axis.set_ylim(-0.04, 1.04)
            if rows and all(math.isnan(r[name]) for r in rows):
                axis.set_yticks([])  # a scale of nothing would look like a measured 0
                axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="0.45")
        risk, last = axes[1], axes[-1]
        if any(r["risk"] > 0 for r in rows):
            risk.axhline(1.0, color="0.35", linewidth=0.9, linestyle="--")
            risk.set_ylim(top=max(risk.get_ylim()[1], 2.0))  # room for the word
            risk.annotate("threshold", (0.01, 1.0), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
        if rows:
            last.set_xscale("log")
            last.xaxis.set_minor_formatter(ticker.NullFormatter())
            last.invert_xaxis()
        last.set_xlabel(r"noise level $\sigma$  (sampling runs left to right)")
        figure.suptitle(title or f"{len(self)} evaluations, {self.nfe} model passes per clip", fontsize=11)
        out = io.BytesIO()
        figure.savefig(out, format=suffix)
        return write_atomically(path, out.getvalue())


def figure_format(path: str | os.PathLike[str]) -> str:
    """The format "png", "svg" or "pdf" by the path's suffix; "png" without one. Needs matplotlib."""
    require("matplotlib", "plot")
    suffix = Path(path).suffix.lstrip(".").lower() or "png"
    if suffix not in ("png", "svg", "pdf"):
        raise KVLockError(f"a figure cannot be written as {Path(path).name!r}; expected .png, .svg or .pdf.")
    return suffix
