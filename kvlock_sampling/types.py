"""The words every room shares: what a policy sees and says, what an estimator sees, and the errors users meet.

Shape letters: batch = independent clips, tokens = video tokens, "..." = the latent's own axes, e.g. channels time
height width. Every tensor here that says (batch,) may also be (batch, tokens) where an estimator is local.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Scalar: TypeAlias = float | Tensor


@runtime_checkable
class Denoiser(Protocol):
    """k-diffusion's only contract: `denoised = model(x, sigma, **extra_args)`, x = x0 + sigma * noise."""

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor: ...


class Observation(NamedTuple):
    """What a policy sees, once per evaluation of the model.

    sigma: noise level of this evaluation, a float > 0 (variance exploding). The clock of every policy.
    variance: estimate of Var[x0-hat] over the masked region, (batch,), latent units squared, >= 0.
    risk: variance divided by its threshold at this sigma, (batch,), dimensionless, 1 = at the threshold.
    lock: the lock in force during this evaluation, (batch,), in [0, 1].
    cfg_scale: the guidance scale the caller asked for, (batch,). Scale it or pass it on.
    steps_left: steps of the schedule after this noise level, counting this one; None where the schedule is unknown.
    """

    sigma: float
    variance: Tensor
    risk: Tensor
    lock: Tensor
    cfg_scale: Tensor
    steps_left: int | None = None


class Control(NamedTuple):
    """What a policy says: `cfg_scale` acts on this evaluation, `lock` on the next one.

    lock: fusion ratio in [0, 1]; 0 = the edit's own K/V, 1 = the source's, for background tokens. (batch,) or a float.
    cfg_scale: guidance weight w in  eps = (1 - w) * s * eps_u + w * eps_c;  1 = conditional only. (batch,) or a float.
    """

    lock: Scalar
    cfg_scale: Scalar


class Evaluation(NamedTuple):
    """What an estimator sees, once per evaluation of the model.

    sigma: noise level, a float > 0.
    x: the sampler's input, (batch, ...).
    denoised: conditional x0-hat before guidance and compositing, (batch, ...).
    mask: latent mask broadcastable to `x`, 1 = edit; None means everywhere.
    probe: evaluates the conditional model again, `probe(x, sigma) -> x0-hat`; rows may be any multiple of batch,
        clip-major copies as made by `x.repeat(k, ...)`. Every row is counted and paid for.
    uncond: unconditional x0-hat at the same point, (batch, ...); None where it was not evaluated.
    """

    sigma: float
    x: Tensor
    denoised: Tensor
    mask: Tensor | None
    probe: Callable[[Tensor, float], Tensor]
    uncond: Tensor | None = None


class StepInfo(NamedTuple):
    """One row of the trace: everything that happened in one evaluation. Tensors are (batch,).

    computed: the share of the video's tokens that the edit's branches ran on; 1 = all of them.
    """

    call: int
    sigma: float
    variance: Tensor
    risk: Tensor
    lock: Tensor
    next_lock: Tensor
    cfg_scale: Tensor
    evaluations: int
    fused_sites: int
    computed: float = 1.0


class KVLockError(Exception):
    """Base of every error this library raises on purpose: of MaskError, SourceError, PolicyError, EstimatorError,
    SiteError, RunError, SamplerError and, each in its module, DenoiserError, BankError, VideoError and PipelineError.
    """


class MaskError(KVLockError, ValueError):
    """A mask that cannot be meant: wrong shape, wrong polarity, not in [0, 1]."""


class SourceError(KVLockError, ValueError):
    """Source latents that do not fit the run: wrong shape, not finite."""


class PolicyError(KVLockError, ValueError):
    """A policy, or a preset file, that breaks the contract."""


class EstimatorError(KVLockError, ValueError):
    """An estimator that breaks the contract."""


class SiteError(KVLockError, RuntimeError):
    """No attention site, a site that never fired, or tokens that do not fit the mask."""


class RunError(KVLockError, RuntimeError):
    """A lock used outside its `with` block, or twice at once."""


class SamplerError(KVLockError, ValueError):
    """A sampler or schedule that is not there."""
