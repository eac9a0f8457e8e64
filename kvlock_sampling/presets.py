"""Presets: a policy and the settings that belong to it, in TOML files such as those of `policies/`. Data only."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from . import policy as policies
from . import variance
from .kv_cache import KVCache
from .policy import Policy, as_policy
from .types import KVLockError, PolicyError
from .utils.fields import flag, number
from .utils.tables import from_table, nearest, read_toml, to_table, write_toml
from .variance import Estimator
from .variance.thresholds import ThresholdCurve

_KINDS = [getattr(room, name) for room in (policies, variance) for name in room.__all__]
_BASES = (Policy, policies.PolicyWrapper, policies.Stateless, Estimator)
POLICIES = {k.__name__: k for k in _KINDS if isinstance(k, type) and issubclass(k, Policy) and k not in _BASES}
ESTIMATORS = {k.__name__: k for k in _KINDS if isinstance(k, type) and issubclass(k, Estimator) and k not in _BASES}


@dataclass(frozen=True)
class Preset:
    """A policy and the settings of a lock that belong to it. `KVLock(policy=preset)` uses those that it is not given.

    Args:
        policy: The policy, or a function of an Observation.
        estimator: How variance is measured. Defaults to None, the lock's default.
        threshold: Variance at risk 1, > 0, or a curve over sigma. Defaults to None, the estimator's.
        cfg_floor: Lower bound >= 0 of a scheduled guidance scale. Defaults to None, the lock's default.
        rescale: Whether guidance is s*-rescaled. Defaults to None, the lock's default.
        erase: Whether keys and values come from a source without the old object. Defaults to None, the lock's default.
        reach: How far from the mask anything may be released, > 0. Defaults to None, the lock's default.
        kv_cache: Settings of a `KVCache` by name. Defaults to None, no cache.

    Raises:
        PolicyError: A setting that is out of range, or has no effect on this policy.
    """

    policy: Policy
    estimator: Estimator | None = None
    threshold: float | ThresholdCurve | None = None
    cfg_floor: float | None = None
    rescale: bool | None = None
    erase: bool | None = None
    reach: float | None = None
    kv_cache: Mapping[str, Any] | None = None

    _error = PolicyError

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", as_policy(self.policy))
        if not isinstance(self.threshold, ThresholdCurve):
            number(self, "threshold", above=0.0, optional=True)
        number(self, "cfg_floor", at_least=0.0, optional=True)
        if not (isinstance(self.reach, float) and self.reach == math.inf):  # anywhere
            number(self, "reach", above=0.0, optional=True)
        flag(self, "rescale", "erase", optional=True)
        if self.kv_cache is not None and not isinstance(self.kv_cache, Mapping):
            raise PolicyError(f"kv_cache={self.kv_cache!r}; expected a table of settings, e.g. kv_cache={{'every': 3}}")
        measuring = [name for name in ("threshold", "estimator") if getattr(self, name) is not None]
        if measuring and not self.policy.uses_risk:
            raise PolicyError(
                f"{' and '.join(measuring)}: {self.policy!r} reads no risk, so nothing would be measured. "
                'Remove it, or take a policy that reads risk, e.g. { type = "Sigmoid" }'
            )
        if self.kv_cache and not self.policy.may_lock:
            raise PolicyError(f"kv_cache: {self.policy!r} never locks, so nothing would be kept. Remove it.")
        if self.kv_cache is not None:
            self.cache()  # checks the settings

    def cache(self) -> KVCache:
        """Return the cache that `kv_cache` asks for, in memory. Raises PolicyError for a setting that no preset gives.

        A preset may come from elsewhere, so it names no folder.
        """
        known = ("every", "ratio", "format", "budget")
        for key in self.kv_cache or {}:
            if key not in known:
                raise PolicyError(f"kv_cache: {key} is not a setting that a preset may give; {nearest(key, known)}")
        try:
            return KVCache(**(self.kv_cache or {}))
        except (KVLockError, TypeError, ValueError) as error:
            raise PolicyError(f"kv_cache: {error}") from error


def load_preset(name_or_path: str | os.PathLike[str]) -> Preset:
    """Load a preset.

    Args:
        name_or_path: A name ("paper") of a preset of this package or in a folder that the environment variable
            KVLOCK_POLICIES lists; a path ("mine.toml"); or TOML text, which has a line break.

    Raises:
        PolicyError: An unknown name, key or type, a setting out of range, or a file that cannot be read.
    """
    name = os.fspath(name_or_path) if isinstance(name_or_path, str | os.PathLike) else repr(name_or_path)
    if "\n" in name:
        return _from_text(name, "text")
    is_path = name.endswith(".toml") or os.sep in name or isinstance(name_or_path, os.PathLike)
    if (path := Path(os.path.expanduser(name)) if is_path else _shelf().get(name)) is None:
        raise PolicyError(f"no policy {name!r} on the shelf; {nearest(name, _shelf())}. A file ends in .toml.")
    return _from_text(_text_of(path), str(path))


def load_policy(name_or_path: str | os.PathLike[str]) -> Policy:
    """Load the policy of a preset alone. Takes `name_or_path` and raises PolicyError as `load_preset` does."""
    return load_preset(name_or_path).policy


def to_toml(policy: Policy | Preset) -> str:
    """Return TOML text: `load_policy(to_toml(policy)) == policy`, and `load_preset(to_toml(preset)) == preset`.

    Args:
        policy: A policy of this library, or a preset with one.

    Raises:
        PolicyError: A policy or estimator that is code.
    """
    preset = policy if isinstance(policy, Preset) else Preset(policy)
    table = {field.name: getattr(preset, field.name) for field in fields(preset)}
    table["policy"] = to_table(preset.policy, POLICIES)
    if preset.estimator is not None:
        table["estimator"] = to_table(preset.estimator, ESTIMATORS)
    if isinstance(preset.threshold, ThresholdCurve):
        table["threshold"] = {"sigmas": preset.threshold.sigmas, "values": preset.threshold.values}
    return write_toml({name: value for name, value in table.items() if value is not None})


def preset_names() -> list[str]:
    """Return the names that `load_preset` knows, sorted."""
    return sorted(_shelf())


def describe() -> list[tuple[str, str, str]]:
    """Return (name, classes such as "Windowed(Linear)", first comment line) of every preset on the shelf."""
    rows = []
    for name, path in sorted(_shelf().items()):
        try:
            comments = (line[1:].strip() for line in _text_of(path).splitlines() if line.startswith("#"))
            rows.append((name, _classes(load_policy(path)), next(comments, "")))
        except PolicyError as error:  # The others are of use.
            rows.append((name, "error", str(error)))
    return rows


def _text_of(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise OSError("it is not a regular file")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a zero byte in the path
        raise PolicyError(f"cannot read the policy file {str(path)!r}: {error}") from error


def _from_text(text: str, where: str) -> Preset:
    table = read_toml(text, where)
    known = [field.name for field in fields(Preset)]
    for key in table:
        if key not in known:
            raise PolicyError(f"{where}: {key} is not a key of a preset; {nearest(key, known)}")
    if "policy" not in table:
        raise PolicyError(f'{where}: no [policy] table; the least that works is\n  [policy]\n  type = "Linear"')
    table["policy"] = from_table(table["policy"], POLICIES, f"{where}: policy")
    if "estimator" in table:
        table["estimator"] = from_table(table["estimator"], ESTIMATORS, f"{where}: estimator")
    if isinstance(kv_cache := table.get("kv_cache"), Mapping):
        table["kv_cache"] = {name: None if value == "none" else value for name, value in kv_cache.items()}
    if isinstance(curve := table.get("threshold"), Mapping):
        curve = {"type": "ThresholdCurve", **curve}
        table["threshold"] = from_table(curve, {"ThresholdCurve": ThresholdCurve}, f"{where}: threshold")
    try:
        return Preset(**table)
    except KVLockError as error:
        raise PolicyError(f"{where}: {error}") from None


def _shelf() -> dict[str, Path]:
    """Every preset by name; a user's folders come before the package's presets."""
    package = Path(__file__).resolve().parent
    installed = package / "_presets"  # in a wheel; an editable install has the folder beside the package instead
    folders = [installed if installed.is_dir() else package.parent / "policies"]
    named = os.environ.get("KVLOCK_POLICIES", "").split(os.pathsep)
    folders += [Path(os.path.expanduser(folder)) for folder in reversed(named) if folder]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def _classes(policy: Any) -> str:
    name = type(policy).__name__
    return f"{name}({_classes(policy.policy)})" if hasattr(policy, "policy") else name
