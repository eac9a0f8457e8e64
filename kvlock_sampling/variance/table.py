"""Estimators from plain tables, as presets hold them: `{"type": "TrajectoryVariance", "window": 10}`. Data only.

A combinator's `estimator` is again a table, its `estimators` a list of tables:
    {"type": "Held", "estimator": {"type": "Sparse", "sigmas": [1.0, 0.3], "estimator": {"type": "RenoiseVariance"}}}
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ..types import EstimatorError
from .base import Estimator
from .combined import Max, Mean, Weighted
from .disagreement import SolverDisagreement
from .dropout import DropoutVariance
from .gap import GuidanceGap
from .posterior import PosteriorVariance
from .relative import Relative
from .renoise import RenoiseVariance
from .sparse import Sparse
from .trajectory import TrajectoryVariance
from .wrappers import Held

ESTIMATORS: dict[str, type[Estimator]] = {
    kind.__name__: kind
    for kind in (
        TrajectoryVariance,
        RenoiseVariance,
        PosteriorVariance,
        DropoutVariance,
        SolverDisagreement,
        GuidanceGap,
        Sparse,
        Held,
        Relative,
        Max,
        Mean,
        Weighted,
    )
}


def make_estimator(settings: Any, where: str = "estimator") -> Estimator:
    """An estimator from a table of its class under "type" and its fields; span 0 and window 0 mean none.

    where: the path of keys to this table, for errors. A table may also be a tuple of (key, value) pairs.

    Raises:
        EstimatorError: unknown type or key, naming the nearest known one; a missing or impossible setting.
    """
    if isinstance(settings, Estimator):
        return settings
    table = _table(settings)
    if table is None:
        raise EstimatorError(f'{where} = {settings!r}: expected a table, e.g. {{"type": "TrajectoryVariance"}}')
    name = table.pop("type", None)
    kind = ESTIMATORS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise EstimatorError(
            f"{where}: unknown estimator type {name!r}; expected one of {', '.join(ESTIMATORS)}."
            f"{_nearest(name, ESTIMATORS)}"
        )
    fields = {f.name: f for f in dataclasses.fields(kind) if f.repr}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            raise EstimatorError(
                f"{where}: {name} has no setting {key!r}; it has {', '.join(fields)}.{_nearest(key, fields)}"
            )
        if key == "estimator":
            value = make_estimator(value, f"{where}.{key}")
        elif key == "estimators":
            parts = value if isinstance(value, (list, tuple)) else [value]
            value = tuple(make_estimator(v, f"{where}.{key}[{i}]") for i, v in enumerate(parts))
        elif key in ("window", "span") and value == 0:  # TOML has no null
            value = None
        given[key] = tuple(value) if isinstance(value, list) else value
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given]
    if missing:
        raise EstimatorError(f'{where}: {name} needs {missing[0]}, a table such as {{"type": "RenoiseVariance"}}.')
    try:
        return kind(**given)
    except EstimatorError as error:
        raise EstimatorError(f"{where}: {error}") from None


def _table(settings: Any) -> dict[str, Any] | None:
    """A mapping, or pairs as a frozen preset holds them, as a new dict; None for anything else."""
    if isinstance(settings, Mapping):
        return dict(settings)
    try:
        return {str(key): value for key, value in settings}
    except (TypeError, ValueError):
        return None


def _nearest(word: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def estimator_table(estimator: Estimator) -> dict[str, Any]:
    """The table of a built-in estimator, settings that differ from the default only:
    `make_estimator(estimator_table(e)) == e`. Limits that are off are written as 0, for TOML has no null.

    Raises:
        EstimatorError: an estimator that is code.
    """
    name = type(estimator).__name__
    if ESTIMATORS.get(name) is not type(estimator):
        raise EstimatorError(
            f"{name} is not a built-in estimator, so it has no table; name one of {', '.join(ESTIMATORS)}."
        )
    table: dict[str, Any] = {"type": name}
    for field in dataclasses.fields(estimator):  # type: ignore[arg-type]
        value = getattr(estimator, field.name)
        if value == field.default:
            continue
        if isinstance(value, Estimator):
            value = estimator_table(value)
        elif isinstance(value, (list, tuple)):
            value = [estimator_table(v) if isinstance(v, Estimator) else v for v in value]
        table[field.name] = 0 if value is None else value
    # As TOML orders them: plain settings first, tables last.
    return dict(sorted(table.items(), key=lambda item: isinstance(item[1], dict)))
