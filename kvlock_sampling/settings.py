"""Resolve and check every option of a lock, once: explicit > preset > default. Code behind this module trusts it.

An option that certainly has no effect raises an error. An option that has no effect under the given policy warns, so
that policies can be exchanged; options that describe the clip or the model (source_args, noise, branch) do not even
warn, so that a script compares with policy="off" by changing one word.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import guidance
from .attention import AttentionLayers, find_layers
from .attention.compat.context_parallel import is_cut
from .batching import take
from .kv_cache import KVCache, uncacheable
from .masks.fill import fill
from .masks.fitted import FittedMask, as_transition
from .masks.tokens import Grid, on_latents, token_grid
from .policy import Clamped, Constant, Policy, Sigmoid
from .policy.base import nothing_to_lock_to
from .policy.wrappers import innermost
from .presets import Preset, load_preset
from .source import Source
from .types import AttentionError, Denoiser, EstimatorError, KVLockError, PolicyError, RunError, Scalar, SourceError
from .utils.denoiser import accepts, check_no_lock_inside, method_of, on_clock, parameters_of
from .utils.fields import check_number
from .utils.modules import reachable_modules
from .utils.warn import warn
from .variance import Estimator
from .variance.sparse import sparsely
from .variance.thresholds import DEFAULT_ESTIMATOR, DEFAULT_THRESHOLD


@dataclass(frozen=True)
class LockSettings:
    """The resolved options of a `KVLock`, which explains them. `layers` is None if nothing can be locked, `foreground`
    says whether fully locked tokens may be left out, `default_scale` is the model's own default guidance.
    """

    model: Denoiser
    policy: Policy
    estimator: Estimator
    threshold: float | Callable[[float], float]
    cfg_floor: float
    rescale: bool
    source: Source | None
    mask: FittedMask | None
    source_args: Mapping[str, Any]
    erase: bool
    composite: float
    layers: AttentionLayers | None
    patch: Grid | None
    transition: tuple[float, float] | None
    foreground: bool
    schedule: tuple[float, ...] | None
    scale_arg: str | None
    default_scale: Scalar
    branch: Denoiser | None
    batched: bool
    kv_cache: KVCache | None

    @property
    def tokens(self) -> int | None:
        """The number of video tokens per clip; None without a source or a patch."""
        if self.source is None or self.patch is None:
            return None
        return math.prod(token_grid(self.source.latents.shape, self.patch))

    def composited(self, denoised: Tensor, weight: Scalar) -> Tensor:
        """The prediction with the source, by this weight, (batch,) or (batch, tokens), in its background."""
        if self.source is None or self.mask is None or (not isinstance(weight, Tensor) and weight == 0):
            return denoised
        if isinstance(weight, Tensor):
            weight = on_latents(weight.to(denoised), denoised.shape, self.patch)
        return guidance.composite(denoised, self.source.matching(denoised), self.mask.latent(denoised), weight)

    def kept(self, weight: Scalar | None, like: Tensor) -> Scalar:
        """The source's weight in the background of latents like these, 1 beyond the reach of what a policy decides."""
        none = weight is None and not self.composite and not self.policy.may_lock
        weight = self.composite if weight is None else weight
        return weight if none or self.mask is None or self.patch is None else self.mask.kept(weight, like, self.patch)

    def subset(self, index: Tensor, batch: int) -> "LockSettings":
        """The settings for the clips `index` of a batch of `batch`: source, mask and the source's arguments cut."""
        source = None if self.source is None else self.source.subset(index, batch)
        videos = self.source is not None and self.source.latents.ndim == 5
        mask = None if self.mask is None else self.mask.subset(index, batch, videos=videos)
        return replace(self, source=source, mask=mask, source_args=take(self.source_args, index, batch))


def resolve(model: Any, given: Mapping[str, Any]) -> LockSettings:
    """The settings of a lock with these options; see `KVLock` for the options and the errors."""
    source, layers, branch = given["source"], given["layers"], given["branch"]
    for name, denoiser in ({"model": model} | ({} if branch is None else {"branch": branch})).items():
        if not callable(denoiser) or isinstance(denoiser, type):
            raise KVLockError(f"{name}={denoiser!r}; expected a denoiser, {name}(x, sigma, **extra_args) -> x0-hat.")
        check_no_lock_inside(denoiser)
    for name in ("rescale", "batched", "foreground", "erase"):
        if given[name] is not None and not isinstance(given[name], bool):
            raise KVLockError(f"{name}={given[name]!r}; expected True or False.")
    preset = _preset(given["policy"], locks=source is not None)
    policy = preset.policy
    measure, limit, floor = _measuring(model, preset, given)
    rescale = bool(_first(given["rescale"], preset.rescale, False))
    scale_arg, default_scale = _scale(model, given["scale_arg"])
    erase = bool(_first(given["erase"], preset.erase, False))
    reach = _first(given["reach"], preset.reach, math.inf)
    clip, fitted = _source(model, given, reach, erase)
    if clip is None:
        _check_needs_source(policy, measure, given)
    locks = clip is not None and policy.may_lock
    composite = _composite(given["composite"], locks, clip)
    transition = as_transition(given["transition"])
    chosen, patch = None, measure.patch
    in_tokens = locks or reach < math.inf or (patch == "model" and policy.uses_risk)
    if clip is not None and fitted is not None and in_tokens:
        found = layers if isinstance(layers, AttentionLayers) else find_layers(model).select(layers)
        measure, patch = measure.on_tokens(found.patch), found.patch
        fitted.kept(0.0, clip.latents, patch)  # a reach needs a grid of tokens
        chosen = found if locks and _leaves_tokens(found, clip, fitted, transition) else None
    if clip is not None and not locks:
        describes = isinstance(layers, AttentionLayers)  # describes the model, and asks for nothing
        asking = ("layers", "erase", "transition", "foreground", "kv_cache")[describes:]
        if asked := _named({name: given[name] for name in asking}):
            warn(f"{asked} without effect: the policy {policy!r} never locks.")
    if branch is not None and scale_arg is None:
        raise SourceError(
            "branch was given, the denoiser inside a model that does its own guidance; this model takes no cond_scale, "
            "so the lock guides it already.\n  Leave branch away, or name the guidance scale: scale_arg='guidance'."
        )
    _warn_unused(policy, scale_arg, given, rescale=rescale)
    return LockSettings(
        model=model,
        policy=policy,
        estimator=measure,
        threshold=limit,
        cfg_floor=floor,
        rescale=rescale,
        source=clip,
        mask=fitted,
        source_args=_source_args(model, given, scale_arg),
        erase=erase,
        composite=composite,
        layers=chosen,
        patch=None if patch == "model" else patch,
        transition=transition,
        foreground=_foreground(given["foreground"], chosen, measure if policy.uses_risk else None, composite, rescale),
        schedule=None if given["sigmas"] is None else on_clock(model, given["sigmas"]),
        scale_arg=scale_arg,
        default_scale=default_scale,
        branch=branch,
        batched=given["batched"],
        kv_cache=_kv_cache(given["kv_cache"], preset, chosen),
    )


def _preset(policy: Any, *, locks: bool) -> Preset:
    if not isinstance(policy, (str, os.PathLike)):
        return policy if isinstance(policy, Preset) else Preset(policy)
    preset = load_preset(policy)
    if policy != "default" or locks:
        return preset
    # Without a source the default measures, and changes nothing in the background.
    if preset.estimator is not None and preset.estimator.needs_source:
        return Preset(Sigmoid(lock_range=(0.0, 0.0)))
    return replace(preset, policy=Clamped(preset.policy, lock=(0.0, 0.0), composite=(0.0, 0.0)))


def _measuring(model: Any, preset: Preset, given: Mapping[str, Any]) -> tuple[Estimator, Any, float]:
    estimator, chosen = given["estimator"], _first(given["estimator"], preset.estimator, DEFAULT_ESTIMATOR)
    if not isinstance(chosen, Estimator):
        name = chosen.__name__ if isinstance(chosen, type) else repr(chosen)
        hint = f"{name}()" if isinstance(chosen, type) else "kv.variance.RenoiseVariance(passes=1)"
        raise EstimatorError(f"estimator={name}; expected an Estimator, e.g. estimator={hint}.")
    measure = chosen.bound(reachable_modules(model))
    policy, kind = preset.policy, sparsely(measure)
    # As far as the code of its step, or of the function that it was made of, tells.
    step = getattr(inner := innermost(policy), "function", type(inner).step)
    reads = "effect" in getattr(getattr(step, "__code__", None), "co_names", ())
    if policy.uses_risk and reads and type(kind).effect is Estimator.effect:
        text = f"{policy!r} reads obs.effect, which {kind!r} does not measure: it is NaN."
        warn(f"{text}\n  Pass estimator=kv.variance.Divergence(patch='model').")
    usual = DEFAULT_THRESHOLD if kind == DEFAULT_ESTIMATOR else measure.default_threshold
    mine = estimator is None or sparsely(estimator) == sparsely(preset.estimator or DEFAULT_ESTIMATOR)
    limit = _first(given["threshold"], preset.threshold if mine else None, usual)  # it belongs to its estimator
    if not callable(limit):
        limit = check_number("threshold", limit, EstimatorError, " Or a function of sigma.", above=0.0)
    floor = _first(given["cfg_floor"], preset.cfg_floor, 1.0)
    check_number("cfg_floor", floor, PolicyError, " The least guidance scale a policy may ask for.", at_least=0.0)
    return measure, limit, floor


def _source(model: Any, given: Mapping[str, Any], reach: Any, erase: Any) -> tuple[Source | None, FittedMask | None]:
    source, mask = given["source"], given["mask"]
    if source is None:
        return None, None if mask is None else FittedMask(mask)
    if mask is None:
        raise SourceError("source was given without mask; pass mask=..., 1 = edit, at the clip's or latents' size.")
    clip = Source(source, noise=given["noise"], add_noise=method_of(model, "add_noise"))
    fitted = FittedMask(mask, reach)
    region = fitted.latent(clip.latents)
    if erase:
        with torch.inference_mode(False):
            clip.reference = fill(clip.latents, region)
    return clip, fitted


def _check_needs_source(policy: Policy, measure: Estimator, given: Mapping[str, Any]) -> None:
    """Refuse options about a source without one, a policy that is certain to lock, and an estimator that compares."""
    about = ("source_args", "erase", "noise", "reach", "layers", "transition", "branch", "foreground", "kv_cache")
    if names := _named({name: given[name] for name in about}):
        raise SourceError(
            f"{names} without source=: there is no clip to lock to, so it would have no effect.\n"
            "  Pass source=latents and mask=mask too, or leave that away: KVLock(model, policy=...) schedules guidance."
        )
    if type(policy) is Constant and policy.lock > 0:  # of others without a mask only the run can tell
        raise nothing_to_lock_to(policy, "lock", policy.lock)
    named = "the default policy" if given["policy"] == "default" else repr(policy)
    if given["mask"] is not None and (policy.may_lock or given["policy"] == "default"):
        raise SourceError(
            f"mask= without source=: {named} may lock, and there is no clip to lock to.\n  Pass source=latents too. Or "
            "measure in the mask, and schedule guidance alone: policy=kv.Sigmoid(lock_range=(0.0, 0.0))."
        )
    if policy.uses_risk and measure.needs_source:
        raise EstimatorError(
            f"{measure!r} compares with the source, and there is none.\n"
            "  Pass the clip that is edited: KVLock(model, source=latents, mask=mask, estimator=Divergence())."
        )


def _composite(composite: Any, locks: bool, clip: Source | None) -> float:
    if composite is None:
        return 1.0 if locks else 0.0
    hint = " The weight of the source in the background, or True or False."
    if not isinstance(composite, bool):
        composite = check_number("composite", composite, KVLockError, hint, at_least=0.0, at_most=1.0)
    if composite and clip is None:
        raise SourceError(f"composite={composite} needs source= and mask=.")
    return float(composite)


def _leaves_tokens(layers: AttentionLayers, clip: Source, fitted: FittedMask, transition: Any) -> bool:
    """Check that mask, clip and layers fit, and warn if every token is edited."""
    token_grid(clip.latents.shape, layers.patch)
    free = (fitted.background(clip.latents, layers.patch, transition) > 0).any(1)
    if not free.all():
        warn(
            f"no token is left to lock: with tokens of {layers.patch} latents the mask or the transition reaches into "
            "every token of a clip. Nothing will be locked there; a smaller mask, or a larger clip, leaves some."
        )
    return bool(free.any())


def _foreground(
    asked: bool | None, layers: AttentionLayers | None, estimator: Estimator | None, composite: float, rescale: bool
) -> bool:
    """Whether fully locked tokens may be left out. Warns if that was asked for and cannot be."""
    if layers is None:
        return False
    flowless = f"{layers.architecture!r} declares no token flow, a block is not its own, or not every layer is locked"
    reasons = {
        "it needs composite=True": composite != 1,
        f"{estimator!r} measures the background too": estimator is not None and estimator.patch is not None,
        "rescaled guidance measures the whole prediction": rescale,
        flowless: not layers.narrows,
        "context parallelism leaves each process some of the tokens": is_cut(layers.networks),
    }
    why = next((reason for reason, applies in reasons.items() if applies), None)
    if asked and why:
        warn(f"foreground=True: every token is computed all the same; {why}.")
    return asked is not False and why is None


def _kv_cache(kv_cache: Any, preset: Preset, layers: AttentionLayers | None) -> KVCache | None:
    """The cache that was given, or the one that a preset asks for, where these layers can have one."""
    if not isinstance(kv_cache, KVCache | None):
        raise AttentionError(f"kv_cache={kv_cache!r}; expected a KVCache, e.g. kv_cache=kv.KVCache('cache').")
    why = None if layers is None else uncacheable(layers)
    if kv_cache is not None and why is not None:
        raise AttentionError(why)
    if layers is None or why is not None:
        return None
    return preset.cache() if kv_cache is None and preset.kv_cache is not None else kv_cache


def _scale(model: Any, name: str | None) -> tuple[str | None, Any]:
    """The name of the guidance scale of a model that guides, and the default of it, 1 without one."""
    parameters = parameters_of(model)
    if name is None:
        if (name := "cond_scale" if "cond_scale" in parameters else None) is None and "uncond" in parameters:
            given = f"{type(model).__name__} takes uncond, so it guides by itself, but no cond_scale"
            raise RunError(f"{given}; expected the name of its guidance scale, e.g. scale_arg='guidance'.")
    elif not accepts(model, name):
        raise RunError(
            f"scale_arg={name!r} is no argument of {type(model).__name__}, which takes {', '.join(parameters)}; "
            "expected the name of its guidance scale.\n"
            "  A model that does no guidance needs none: leave scale_arg away, and the lock does it."
        )
    found = parameters.get(name or "")
    return name, 1.0 if found is None or found.default is None or found.default is found.empty else found.default


def _source_args(model: Any, given: Mapping[str, Any], scale_arg: str | None) -> dict[str, Any]:
    if not isinstance(source_args := given["source_args"], Mapping | None):
        raise SourceError(f"source_args={type(source_args).__name__}; expected a dict: source_args={{'cond': prompt}}.")
    source_args = dict(source_args or {})
    if "cond" in source_args and scale_arg and given["branch"] is None and "uncond" not in parameters_of(model):
        text = "the source's prompt counts if the model's last branch is its conditional one: [uncond, cond]."
        warn(f"{text}\n  In any other order pass branch=, the denoiser inside the model that guides itself.")
    if scale_arg is None and (extra := [name for name in ("uncond", "cond_scale") if name in source_args]):
        raise SourceError(
            f"source_args holds {' and '.join(extra)}; the source is evaluated once and without guidance.\n"
            '  Give what the model itself takes: source_args={"cond": source_prompt}.'
        )
    return source_args


def _warn_unused(policy: Policy, scale_arg: str | None, given: Mapping[str, Any], *, rescale: bool) -> None:
    asked = ", ".join(["rescaled guidance"] * rescale + ["batched=False"] * (not given["batched"]))
    if scale_arg is not None and asked:
        warn(f"{asked} without effect: this model takes {scale_arg} and does its own guidance.")
    measuring = {name: given[name] for name in ("estimator", "threshold", *(["mask"] * (given["source"] is None)))}
    if not policy.uses_risk and (names := _named(measuring)):
        warn(
            f"{names} without effect: the policy {policy!r} reads no risk, so nothing is measured. "
            "To measure and hold a lock L take kv.PID(kp=0.0, ki=0.0, bias=L)."
        )


def _named(given: Mapping[str, Any]) -> str:
    """The names of the options that were given, as "a=, b=". None, False and an empty mapping count as not given."""
    here = (name for name, v in given.items() if not (v is None or v is False or (isinstance(v, Mapping) and not v)))
    return ", ".join(f"{name}=" for name in here)


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)
