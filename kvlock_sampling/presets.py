"""Policies by name: reads and writes the TOML files of the shelf `policies/`. Data only, never code.

A file holds a `[policy]` table, `type` = its class and the fields of that class, and may advise on measuring:

    threshold = 0.01                # variance at which risk is 1; without it the calibrated one
    cfg_floor = 0.0                 # least guidance scale that a schedule may reach
    rescale = true                  # s*-rescaled guidance
    [kv_cache]                          # keep the source's K/V from one evaluation to the next: settings of a KVCache
    every = 3
    [estimator]                     # how to measure
    type = "TrajectoryVariance"
    window = 10
    [policy]                        # what to do
    type = "Linear"
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kv_cache import KVCache
from .policy import Policy, Wrapper
from .policy._checks import flag, number
from .policy.table import from_table, nearest, to_table
from .types import KVLockError, PolicyError
from .utils.files import write_atomically
from .variance.thresholds import ThresholdCurve

_ADVICE = ("threshold", "cfg_floor", "rescale", "kv_cache", "estimator")


@dataclass(frozen=True)
class Preset(Wrapper):
    """A policy together with advice on how to measure; used in place of the policy, it acts exactly as that does.

    policy: the policy. threshold: variance at risk 1, > 0, in the estimator's units: a number, or a curve over sigma
        (in TOML a table of `sigmas` and `values`); None = the estimator's own.
    cfg_floor: lower bound of a scheduled cfg_scale; None = the lock's default. rescale: s*-rescaled guidance, or None.
    kv_cache: settings of a `KVCache` in memory as (key, value) pairs, used where none is given; () = none.
    estimator: `type` and settings of the estimator as (key, value) pairs, `dict(preset.estimator)`; () = the default.
    Raises PolicyError for advice that cannot be meant, and for advice on what this policy never does: a threshold or
    an estimator where it reads no risk, a KV cache where it never locks.
    """

    threshold: float | ThresholdCurve | None = None
    cfg_floor: float | None = None
    rescale: bool | None = None
    kv_cache: tuple[tuple[str, Any], ...] = ()
    estimator: tuple[tuple[str, Any], ...] = ()

    outermost = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.threshold, Mapping):
            object.__setattr__(self, "threshold", _curve(self.threshold))
        if not isinstance(self.threshold, ThresholdCurve):
            number(self, "threshold", above=0.0, optional=True)
        number(self, "cfg_floor", at_least=0.0, optional=True)
        if self.rescale is not None:
            flag(self, "rescale")
        object.__setattr__(self, "kv_cache", _bank_settings(self.kv_cache))
        try:
            estimator = {key: _frozen(value) for key, value in dict(self.estimator).items()}
        except (TypeError, ValueError):
            estimator = {"": self.estimator}
        if estimator and not isinstance(estimator.get("type"), str):
            raise PolicyError(
                f"Preset(policy, estimator={self.estimator!r}): expected a table that names its class. "
                'This works: estimator={"type": "TrajectoryVariance", "window": 10}'
            )
        object.__setattr__(self, "estimator", tuple(estimator.items()))
        self._check_use()

    def _check_use(self) -> None:
        measuring = [name for name in ("threshold", "estimator") if getattr(self, name) not in (None, ())]
        if measuring and not self.policy.uses_risk:
            raise PolicyError(
                f"{' and '.join(measuring)}: {self.policy!r} reads no risk, so nothing would be measured; leave that "
                'away, or take a policy that does, e.g.\n  [policy]\n  type = "Sigmoid"'
            )
        if self.kv_cache and self.policy.never_locks:
            raise PolicyError(f"kv_cache: {self.policy!r} never locks, so nothing would be kept; leave it away.")


def load_policy(name_or_path: str | os.PathLike[str]) -> Policy:
    """A policy from the shelf by name ("paper"), from a file ("mine.toml"), or from TOML text (has a line break).

    name_or_path: which of these; a name with the suffix .toml or with a separator in it is a path.
    Returns the bare policy, or a Preset, which is a policy too, where the file also advises on measuring. Names are
    looked up in the folders that the environment variable KVLOCK_POLICIES lists, then on the shelf of this package.
    Raises PolicyError for an unknown name, key or type, naming the nearest known one.

    >>> load_policy("half")
    Constant(lock=0.5, cfg_scale=None)
    """
    name = os.fspath(name_or_path)
    if "\n" in name:
        return load_policy_text(name)
    if name.endswith(".toml") or os.sep in name or isinstance(name_or_path, os.PathLike):
        path = Path(name).expanduser()
    else:
        shelf = _shelf()
        if name not in shelf:
            raise PolicyError(
                f"no policy {name!r} on the shelf; {nearest(name, shelf)}.\n"
                f"  A file is named with its suffix, e.g. {name + '.toml'!r}."
            )
        path = shelf[name]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"cannot read the policy file {name!r}: {error}") from error
    # Two folders may hold a file of one name, so the folder is part of what is wrong with it.
    return load_policy_text(text, where=str(path))


def load_policy_text(text: str, where: str = "text") -> Policy:
    """As `load_policy`, from TOML text. where: what to call it in errors."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"{where} is not valid TOML: {error}") from error
    for key in table:
        if key not in (*_ADVICE, "policy"):
            raise PolicyError(f"{where}: {key} is not a key of a preset; {nearest(key, (*_ADVICE, 'policy'))}")
    if "policy" not in table:
        raise PolicyError(f'{where}: no [policy] table; the least that works is\n  [policy]\n  type = "Linear"')
    policy = from_table(table.pop("policy"), f"{where}: policy")
    if not table:
        return policy
    try:
        return Preset(policy, **table)
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None


def to_toml(policy: Policy) -> str:
    """The TOML text of a built-in policy or Preset: `load_policy(to_toml(policy)) == policy`.

    Raises PolicyError for a policy that is code.

    >>> from kvlock_sampling.policy import Constant
    >>> print(to_toml(Constant(lock=0.5)), end="")
    [policy]
    type = "Constant"
    lock = 0.5
    """
    if not isinstance(policy, Preset):
        return _table_text(to_table(policy), "policy")
    advice = {key: value for key in _ADVICE[:3] if (value := getattr(policy, key)) is not None}
    curve = advice.pop("threshold") if isinstance(policy.threshold, ThresholdCurve) else None
    parts = [_table_text(advice, "")] if advice else []
    if curve is not None:
        parts.append(_table_text({"sigmas": curve.sigmas, "values": curve.values}, "threshold"))
    if policy.kv_cache:
        parts.append(_table_text(dict(policy.kv_cache), "kv_cache"))
    if policy.estimator:
        parts.append(_table_text(_thawed(policy.estimator), "estimator"))
    return "\n".join([*parts, _table_text(to_table(policy.policy), "policy")])


def save_policy(policy: Policy, path: str | os.PathLike[str]) -> None:
    """Writes `to_toml(policy)` to `path`, whole or not at all."""
    write_atomically(path, to_toml(policy))


def preset_names() -> list[str]:
    """The names that `load_policy` knows, sorted."""
    return sorted(_shelf())


def describe() -> list[tuple[str, str, str]]:
    """(name, classes from outside in such as "Windowed(Linear)", first comment line) of every policy on the shelf."""
    rows = []
    for name, path in sorted(_shelf().items()):
        comments = (line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        rows.append((name, _classes(load_policy(path)), next(comments, "")))
    return rows


def _shelf() -> dict[str, Path]:
    """Every preset by name. A user's folder goes before the package's own."""
    package = Path(__file__).resolve().parent
    installed = package / "_presets"  # in a wheel; an editable install has the folder beside the package instead
    folders = [installed if installed.is_dir() else package.parent / "policies"]
    folders += [Path(f).expanduser() for f in reversed(os.environ.get("KVLOCK_POLICIES", "").split(os.pathsep)) if f]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def _classes(policy: Policy) -> str:
    if isinstance(policy, Preset):
        return _classes(policy.policy)
    inner = f"({_classes(policy.policy)})" if isinstance(policy, Wrapper) else ""
    return type(policy).__name__ + inner


def _bank_settings(given: Any) -> tuple[tuple[str, Any], ...]:
    """Settings of a KV cache that a file may hold: everything but where it keeps things."""
    try:
        settings = dict(given)
    except (TypeError, ValueError):
        raise PolicyError(
            f"kv_cache={given!r}; expected a table of settings, e.g.\n  [kv_cache]\n  every = 3"
        ) from None
    known = ("every", "ratio", "format", "interpolate", "budget", "tier")
    for key in settings:
        if key not in known:
            raise PolicyError(f"kv_cache: {key} is not a setting that a preset may give; {nearest(key, known)}")
    try:
        KVCache(**settings)  # refuses what cannot be meant, with its own message
    except (KVLockError, TypeError, ValueError) as error:
        raise PolicyError(f"kv_cache: {error}") from error
    return tuple((key, _frozen(value)) for key, value in settings.items())


def _curve(table: Mapping[str, Any]) -> ThresholdCurve:
    """A curve from a TOML table."""
    if set(table) != {"sigmas", "values"}:
        raise PolicyError(
            f"threshold has the keys {', '.join(table)}; a curve has sigmas and values, e.g.\n"
            "  [threshold]\n  sigmas = [10.0, 1.0, 0.1]\n  values = [0.001, 0.01, 0.02]"
        )
    try:
        return ThresholdCurve(tuple(table["sigmas"]), tuple(table["values"]))
    except (TypeError, ValueError) as error:  # EstimatorError is a ValueError
        raise PolicyError(f"threshold: {error}") from None


def _frozen(value: Any) -> Any:
    """Tables as tuples of pairs and lists as tuples, so that a Preset can be hashed and never changes."""
    if isinstance(value, Mapping):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    pairs = isinstance(value, tuple) and all(
        isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) for v in value
    )
    return {key: _thawed(item) for key, item in value} if pairs and value else value


def _table_text(table: Mapping[str, Any], name: str) -> str:
    """A TOML table: first its values, then a table of its own for every nested policy."""
    nested = {key: value for key, value in table.items() if isinstance(value, Mapping) and "type" in value}
    lines = [f"[{name}]"] * bool(name)
    lines += [f"{_key_text(key)} = {_value_text(value)}" for key, value in table.items() if key not in nested]
    return "\n".join(["\n".join(lines) + "\n", *(_table_text(v, f"{name}.{k}") for k, v in nested.items())])


def _key_text(key: str) -> str:
    return key if key.isidentifier() and key.isascii() else _value_text(key)


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key_text(key)} = {_value_text(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value_text, value)) + "]"
    raise PolicyError(f"{value!r} cannot be written as TOML; expected a number, text, True or False, or lists of them")
