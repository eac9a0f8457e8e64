"""The shared vocabulary: what a policy sees and returns, what an estimator sees, one row of the trace, and the errors.

`batch` counts clips, `tokens` video tokens, `...` stands for the latent's own axes, usually channels, time, height,
width. A tensor documented as (batch,) may be (batch, tokens) under a local estimator.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Scalar: TypeAlias = float | Tensor

SAME_SIGMA = 1e-4
"""Noise levels that differ by less than this fraction are the same level."""


@runtime_checkable
class Denoiser(Protocol):
    """The k-diffusion contract: `denoised = model(x, sigma, **extra_args)` with x = x0 + sigma * noise."""

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor: ...


class Observation(NamedTuple):
    """What a policy sees, once per evaluation of the model.

    Attributes:
        sigma: Noise level of this evaluation, a float > 0 (variance exploding). The clock of every policy.
        variance: Var[x0-hat] over the masked region, (batch,), latent units squared, >= 0; NaN until measured.
        risk: Variance over its threshold at this sigma, (batch,); 1 = at the threshold, NaN until measured.
        lock: The lock in force during this evaluation, (batch,), in [0, 1].
        requested_cfg_scale: The guidance scale that the caller passed, (batch,). A policy may return a multiple of it.
        steps_left: Steps of the schedule that remain, counting this one; None if the schedule is unknown.
        effect: Square of the change that the edit makes on average, over the same threshold as risk, (batch,), >= 0;
            effect / risk is its signal-to-noise ratio. NaN until measured, and under estimators without it.
    """

    sigma: float
    variance: Tensor
    risk: Tensor
    lock: Tensor
    requested_cfg_scale: Tensor
    steps_left: int | None = None
    effect: Tensor = torch.tensor(math.nan)


class Control(NamedTuple):
    """What a policy returns. `None` leaves that actuator as it is.

    Attributes:
        lock: Fusion ratio in [0, 1] for background tokens, a float, (batch,) or (batch, tokens): 0 keeps the edit's own
            K/V, 1 takes the source's. Acts on the next evaluation. None keeps the lock in force.
        cfg_scale: Guidance weight w in  eps = (1 - w) * s * eps_u + w * eps_c,  a float or (batch,); 1 = conditional
            only. Acts on this evaluation. None uses the scale that the caller requested, unchanged.
        composite: Weight in [0, 1] of the source in the background, shaped like lock: 1 = exactly the source,
            0 = the edit's own prediction. Acts on this evaluation. None uses the lock's `composite` option.
    """

    lock: Scalar | None = None
    cfg_scale: Scalar | None = None
    composite: Scalar | None = None


class Evaluation(NamedTuple):
    """What an estimator sees, once per evaluation of the model.

    Attributes:
        sigma: Noise level, a float > 0.
        x: The sampler's input in variance-exploding form, (batch, ...).
        denoised: Conditional x0-hat before guidance and compositing, (batch, ...); the estimator's own, to keep.
        mask: Latent mask broadcastable to `x`, 1 = edit; None means everywhere.
        probe: Evaluates the conditional model again, `probe(x, sigma) -> x0-hat`, on any multiple of batch rows, in the
            order of `x.repeat(k, ...)`, each one evaluation; at another sigma only for variance exploding levels.
        uncond: Unconditional x0-hat at the same point, (batch, ...); None if it was not evaluated.
        source: The source's x0-hat at the same sigma and noise, (batch, ...); None if it was not evaluated.
    """

    sigma: float
    x: Tensor
    denoised: Tensor
    mask: Tensor | None
    probe: Callable[[Tensor, float], Tensor]
    uncond: Tensor | None = None
    source: Tensor | None = None


class StepInfo(NamedTuple):
    """One row of the trace: everything that happened in one evaluation.

    Attributes:
        call: Index of the evaluation in its run, from 0.
        sigma: Noise level (variance exploding).
        variance: Var[x0-hat], (batch,), latent units squared; NaN until measured.
        risk: Variance over its threshold, (batch,), dimensionless; NaN until measured.
        effect: The edit's mean change, squared, over the same threshold, (batch,); NaN until measured.
        lock: The lock that acted in this evaluation, (batch,), in [0, 1]; 0 if no layer was fused.
        next_lock: The lock for the next evaluation, (batch,), in [0, 1].
        cfg_scale: The guidance scale that was used, (batch,).
        composite: The weight of the source in the background of the result, (batch,) or (batch, tokens), in [0, 1].
        nfe: Function evaluations: model passes per clip, counting cond, uncond, source and probes.
        fused_layers: Attention layers in which source K/V were fused.
        route: How the source was evaluated, a `Route` by name.
        computed: Fraction of the video's tokens that the edit's branches ran on; 1 = all of them.
    """

    call: int
    sigma: float
    variance: Tensor
    risk: Tensor
    effect: Tensor
    lock: Tensor
    next_lock: Tensor
    cfg_scale: Tensor
    composite: Tensor
    nfe: int
    fused_layers: int
    route: str
    computed: float = 1.0


class KVLockError(Exception):
    """Base of every error that this library raises on purpose.

    Subclasses are the errors below, and, each in its own module, DenoiserError and VideoError.
    """


class MaskError(KVLockError, ValueError):
    """The mask has a wrong shape, a wrong polarity, or values outside [0, 1]."""


class SourceError(KVLockError, ValueError):
    """The source latents have a wrong shape, or are not finite."""


class PolicyError(KVLockError, ValueError):
    """A policy, or a preset file, breaks the contract."""


class EstimatorError(KVLockError, ValueError):
    """An estimator breaks the contract."""


class AttentionError(KVLockError, RuntimeError):
    """No attention layer was found, a layer never fired, or its tokens do not fit the mask."""


class RunError(KVLockError, RuntimeError):
    """A lock was called outside its `with` block, or with arguments that do not fit."""


class SamplerError(KVLockError, ValueError):
    """A sampler or schedule does not exist or cannot be used."""


class KVCacheError(KVLockError, RuntimeError):
    """A wrong setting, an unusable directory, or K/V that are not complete."""


class KVCacheWarning(UserWarning):
    """A level cannot be kept or used: its file is damaged or cannot be written, or the budget is too small."""


class PipelineError(KVLockError, ValueError):
    """A pipeline cannot be loaded, is of no known family, or was given an argument that does not fit it."""
