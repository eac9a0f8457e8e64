"""What happened in a run, per evaluation: rows, JSON, CSV, and a figure over sigma."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .types import StepInfo
from .utils.files import write_atomically

_OF_CLIPS = ("variance", "risk", "lock", "next_lock", "cfg_scale")
_OF_STEPS = ("evaluations", "fused_layers", "computed")
COLUMNS = ("call", "clip", "sigma", *_OF_CLIPS, *_OF_STEPS)


def _per_clip(value: Any, clip: int) -> float:
    """One clip's number; a per-token row is shown by its mean."""
    return float(value[clip].mean()) if isinstance(value, Tensor) else float(value)


class Trace:
    """The steps of one run, in the order they happened. Tensors stay on their device until somebody reads them.

    steps: one `StepInfo` per evaluation, also by iterating over the trace: sigma, variance, risk, lock, next_lock and
        cfg_scale, (batch,); model passes, fused layers, share of the tokens that was computed. `rows()` has the same as
        plain numbers, one row per evaluation and clip; `to_csv`, `to_json` and `plot` write them.

    Raises:
        KVLockError: a figure of another kind than png, svg or pdf.  OSError: a file that cannot be written.
    """

    def __init__(self) -> None:
        self.steps: list[StepInfo] = []

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[StepInfo]:
        return iter(self.steps)

    def __repr__(self) -> str:
        return f"Trace({len(self)} evaluations, {self.evaluations} model passes)"

    @property
    def evaluations(self) -> int:
        """Passes of the model per clip, over the whole run: cond, uncond, source and probes."""
        return sum(s.evaluations for s in self.steps)

    def rows(self) -> list[dict[str, float | int]]:
        """One dict per evaluation and clip, with the keys of `COLUMNS`. Variance and risk are NaN while unknown."""
        rows: list[dict[str, float | int]] = []
        for step in self.steps:
            for clip in range(len(step.variance)):
                row: dict[str, float | int] = {"call": step.call, "clip": clip, "sigma": step.sigma}
                row |= {name: _per_clip(getattr(step, name), clip) for name in _OF_CLIPS}
                rows.append(row | {name: getattr(step, name) for name in _OF_STEPS})
        return rows

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The rows as JSON (NaN as null), also written to `path` if given."""
        rows = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in self.rows()]
        text = json.dumps({"evaluations": self.evaluations, "rows": rows}, indent=1)
        if path is not None:
            write_atomically(path, text)
        return text

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
        """Draw variance, risk, lock and CFG scale over sigma into a PNG, SVG or PDF, by suffix."""
        from .plot import plot_trace

        return plot_trace(self, path, title=title)
