"""The options of a lock that cannot be meant, or would do nothing. What is certainly a slip is refused; what is only
without effect under this policy is told.

Clip and model may be described to a lock that never locks (`source_args`, `noise`, `layers`, `branch`): a script that
compares with policy="off" changes one word. What asks for something (`KV cache`, `layers`, `ring`, `foreground=True`) is
told there that it will not have it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any

from .policy import Constant, Policy
from .presets import Preset
from .types import EstimatorError, KVLockError, PolicyError, RunError, SourceError
from .variance import Estimator

_INSIDE = ("inner_model", "model")
"""Attributes under which a wrapper keeps the denoiser it wraps."""


def named(given: Mapping[str, Any]) -> str:
    """The names of what was given, "a=, b="; "" for nothing. None, False and an empty mapping count as not given."""
    absent = [v is None or v is False or (isinstance(v, Mapping) and not v) for v in given.values()]
    return ", ".join(f"{name}=" for name, no in zip(given, absent, strict=True) if not no)


def check_flags(**flags: Any) -> None:
    """Raises KVLockError for what is neither True, False nor None: "no" would count as True."""
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise KVLockError(f"{name}={value!r}; expected True or False.")


def check_floor(cfg_floor: Any) -> None:
    """Raises PolicyError for what is no guidance scale >= 0."""
    number = isinstance(cfg_floor, Real) and not isinstance(cfg_floor, bool)
    if not number or not (math.isfinite(cfg_floor) and cfg_floor >= 0):
        raise PolicyError(
            f"cfg_floor={cfg_floor!r}; expected the least guidance scale a policy may ask for, a finite number >= 0: "
            "1.0, or 0.0 as in the paper."
        )


def check_estimator(estimator: Any) -> None:
    """Raises EstimatorError for what is no estimator, its class or its name included."""
    if estimator is not None and not isinstance(estimator, Estimator):
        given = estimator.__name__ if isinstance(estimator, type) else repr(estimator)
        hint = f"{given}()" if isinstance(estimator, type) else "kv.RenoiseVariance(passes=1)"
        raise EstimatorError(f"estimator={given}; expected an Estimator, e.g. estimator={hint}.")


def check_unlocked(model: Any, kind: type) -> None:
    """Raises RunError where `model` is a lock, or a wrapper around one. kind: the class of locks."""
    seen, inside = set(), model
    while inside is not None and id(inside) not in seen:
        seen.add(id(inside))
        if isinstance(inside, kind):
            where = "model is a KVLock" if inside is model else f"model is a {type(model).__name__} around a KVLock"
            raise RunError(
                f"{where}; expected the denoiser itself: two locks would fuse, guide and composite twice.\n"
                "  Make one lock of it: KVLock(lock.model, source=..., mask=..., policy=...)\n"
                "  Two policies in one: kv.LockAbove(kv.Sigmoid(), above=4.0)."
            )
        held = [vars(inside), vars(inside).get("_modules", {})] if hasattr(inside, "__dict__") else []
        inside = next((place[name] for name in _INSIDE for place in held if name in place), None)


def check_scale_arg(model: Any, name: str | None) -> None:
    """Raises RunError for a guidance scale that the denoiser's own signature has no room for."""
    if name is None:
        return
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):  # nothing to read: the model will say so
        return
    if name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise RunError(
            f"scale_arg={name!r} is no argument of {type(model).__name__}, which takes {', '.join(parameters)}; "
            "expected the name of its guidance scale.\n"
            "  A model that does no guidance needs none: leave scale_arg away, and the lock does it."
        )


def check_needs_source(**given: Any) -> None:
    """Raises SourceError for options that are about a source, where there is none."""
    if names := named(given):
        raise SourceError(
            f"{names} without source=: there is no clip to lock to, and nothing would come of it.\n"
            "  Pass source=latents and mask=mask too, or leave that away: KVLock(model, policy=...) schedules guidance."
        )


def nothing_to_lock_to(policy: Policy, lock: float) -> SourceError:
    """The error of a policy that asks for `lock`, in (0, 1], where there is no source."""
    bare = "policy.policy" if isinstance(policy, Preset) else "policy"  # a Preset cannot be wrapped
    return SourceError(
        f"the policy {policy!r} asks for lock {lock:.3g}, but there is nothing to lock to.\n"
        f"  Pass source=latents, mask=mask, or forbid locking: Clamped({bare}, lock=(0.0, 0.0))."
    )


def check_needs_no_lock(policy: Policy) -> None:
    """Raises SourceError, where there is no source, for a Constant that locks, from a preset or not.

    Nothing else is certain before the run: an Early lock never acts in a run that begins below it, a Windowed one not
    outside its window, and what reads risk may find none.
    """
    bare = policy.policy if isinstance(policy, Preset) else policy
    if type(bare) is Constant and bare.lock > 0:  # a subclass may step otherwise
        raise nothing_to_lock_to(policy, bare.lock)


def check_branch(branch: Any, scale_arg: str | None) -> None:
    """Raises SourceError for the inner denoiser of a model that has none."""
    if branch is not None and scale_arg is None:
        raise SourceError(
            "branch was given, the denoiser inside a model that does its own guidance; this model takes no cond_scale, "
            "so the lock does the guidance and calls it branch by branch already.\n"
            "  Leave branch away, or name the model's guidance scale: scale_arg='guidance'."
        )


def check_source_args(source_args: Mapping[str, Any], scale_arg: str | None) -> None:
    """Raises SourceError for arguments of guidance, where the source is evaluated in one branch, unguided."""
    extra = [name for name in ("uncond", "cond_scale") if name in source_args]
    if extra and scale_arg is None:
        raise SourceError(
            f"source_args holds {' and '.join(extra)}; the source is evaluated once and without guidance.\n"
            '  Give what the model itself takes: source_args={"cond": source_prompt}.'
        )


def tell_never_locks(policy: Policy, **given: Any) -> None:
    """Warn of options that ask for something of a lock, under a policy that never locks."""
    if names := named(given):
        _tell(f"{names} without effect: the policy {policy!r} never locks.")


def tell_unmeasured(policy: Policy, **given: Any) -> None:
    """Warn of options that are about measuring, under a policy that never looks at it."""
    if not policy.uses_risk and (names := named(given)):
        _tell(
            f"{names} without effect: the policy {policy!r} reads no risk, so nothing is measured. "
            "To measure and hold a lock L take kv.PID(kp=0.0, ki=0.0, bias=L)."
        )


def tell_guided(scale_arg: str | None, *, rescale: bool, batched: bool) -> None:
    """Warn of options that are about branches, for a model that evaluates its branches itself."""
    requested = ", ".join(["rescaled guidance"] * rescale + ["batched=False"] * (not batched))
    if scale_arg is not None and requested:
        _tell(f"{requested} without effect: this model takes {scale_arg} and does its own guidance.")


def tell_unguided(extra_args: Mapping[str, Any]) -> None:
    """Warn of an unconditional prompt that no scale makes use of."""
    if "uncond" in extra_args and "cond_scale" not in extra_args:
        _tell(
            "uncond was given without cond_scale: guidance is 1 then, the conditional prediction alone, and uncond is "
            'not used. Pass extra_args={"cond": ..., "uncond": ..., "cond_scale": 5.0}.'
        )


def tell_never_measured(policy: Policy, estimator: Any, evaluations: int) -> None:
    """Warn of a run in which the policy waited for a measurement that never came. evaluations: of that run."""
    _tell(
        f"nothing was measured in a run of {evaluations} evaluations, so {policy!r} never took a step in it: "
        f"{estimator!r} did not report. A gap needs uncond and a guidance other than 1; Sparse needs noise levels "
        "within the schedule."
    )


def _tell(text: str) -> None:
    warnings.warn(text, stacklevel=4)  # _tell, tell_*, KVLock's own method, the caller
