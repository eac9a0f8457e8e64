"""The lock as a guider of diffusers: for modular pipelines, with their own loop and scheduler.

A guider is told the step, sees the latents before the branches run and their predictions afterwards, and may hook the
transformer around each branch. This one lets the branches be recorded, and evaluates them under a `KVLock` when the
pipeline asks for guidance: source K/V, risk, policy, guidance and compositing in one place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import AttentionLayers
from ...masks.fitted import FittedMask, as_transition
from ...policy import Policy, as_policy
from ...presets import load_policy, to_toml
from ...source import Source, check_noise
from ...trace import Trace
from ...types import PolicyError, RunError
from ...utils.torchvision import broken_torchvision_hidden
from .calls import Call, Interception, intercept, release
from .session import Session
from .time import time_of, time_without_scheduler

with broken_torchvision_hidden():
    from diffusers.configuration_utils import register_to_config
    from diffusers.guiders import ClassifierFreeGuidance
    from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput

_GIVEN = (
    "source",
    "mask",
    "noise",
    "source_embeds",
    "scheduler",
    "estimator",
    "layers",
    "threshold",
    "kv_cache",
)


class KVLockGuider(ClassifierFreeGuidance):
    """Classifier-free guidance with the lock inside.

        pipe.update_components(guider=KVLockGuider(source=latents, mask=mask, scheduler=pipe.scheduler))

    Args:
        guidance_scale: the scale asked for; the policy may schedule it.
        policy: a Policy, or the name or path of a preset, or TOML text.
        source: clean latents of the clip, (1 or batch, channels, time, height, width): `encode_clip(pipe.vae, clip)`.
        mask: 1 = edit, at the clip's or the latents' size.
        scheduler: the pipeline's. Needed where timesteps are integers (UniPC), which do not tell the noise level.
        source_embeds: text of the source's own pass, (1 or batch, tokens, dim), or several of the transformer's
            arguments by name, e.g. with their masks; default: the edit's prompt.
        noise, estimator, threshold, composite, rescale, cfg_floor, layers, ring, layers, foreground, kv_cache: as in
            `KVLock`.
        batched: True runs branches and source as rows of one call; False one after another; default: True if the
            policy may lock, else as the pipeline does.
        start, stop, enabled: as in `ClassifierFreeGuidance`: outside of these steps there is no guidance, while the
            lock goes on; `disable()` turns both off.

    Settings are saved and loaded by diffusers (`save_pretrained`, `new`); tensors and objects are not: give them to
    `edit(...)`. `trace` tells what happened in the latest run.

    Raises:
        PolicyError: a policy that is not there, or saving one that is code.
        SourceError, MaskError: a source or noise that is no tensor, a path as mask, a ring that cannot be meant.
        RunError: at a step, an integer timestep without a scheduler, or another run's scheduler.
        KVLockError: at the first step, whatever `KVLock` refuses.
    """

    ignore_for_config = list(_GIVEN)  # noqa: RUF012 - diffusers' own form

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 5.0,
        *,
        policy: Any = "default",
        composite: bool | None = None,
        rescale: bool | None = None,
        cfg_floor: float | None = None,
        layers: Any = None,
        transition: tuple[float, float] | None = None,
        batched: bool | None = None,
        foreground: bool | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        source: Tensor | None = None,
        mask: Any = None,
        noise: Tensor | None = None,
        source_embeds: Tensor | Mapping[str, Tensor] | None = None,
        scheduler: Any = None,
        estimator: Any = None,
        threshold: Any = None,
        kv_cache: Any = None,
    ) -> None:
        # Not ClassifierFreeGuidance's own: it would note settings that are none of this guider's.
        BaseGuidance.__init__(self, start, stop, enabled)
        self.guidance_scale, self.guidance_rescale, self.use_original_formulation = guidance_scale, 0.0, False
        named = isinstance(policy, (str, os.PathLike))
        checked = load_policy(policy) if named else as_policy(policy)
        saved = None if isinstance(layers, AttentionLayers) else layers
        self.register_to_config(policy=os.fspath(policy) if named else _as_text(checked), layers=saved)
        self._settings: dict[str, Any] = {
            "policy": policy,
            "composite": composite,
            "rescale": rescale,
            "cfg_floor": cfg_floor,
            "layers": saved,
            "transition": as_transition(transition),
            "foreground": foreground,
            "batched": batched,
        }
        self._given: dict[str, Any] = dict.fromkeys(_GIVEN)
        self._run = _Run()
        self._calls: list[Call] = []
        self._latents: Tensor | None = None
        self._times: Tensor | None = None
        self.edit(
            source=source,
            mask=mask,
            noise=noise,
            source_embeds=source_embeds,
            scheduler=scheduler,
            estimator=estimator,
            threshold=threshold,
            layers=layers if isinstance(layers, AttentionLayers) else None,
            kv_cache=kv_cache,
        )

    # -- what is edited -----------------------------------------------------------------------------------------------

    def edit(self, **given: Any) -> KVLockGuider:
        """Set source, mask, noise, source_embeds, scheduler, estimator, threshold, layers or KV cache; the others stay.
        Returns the guider.

        Raises:
            SourceError, MaskError: what is no tensor; whether shapes fit is known at the first step.
        """
        if wrong := sorted(given.keys() - set(_GIVEN)):
            raise TypeError(f"edit() takes {', '.join(_GIVEN)}; got {', '.join(wrong)}")
        if given.get("source") is not None:
            Source(given["source"])
        noise = given.get("noise")
        if noise is not None and not isinstance(noise, Tensor):
            check_noise(noise)
        if given.get("mask") is not None:
            FittedMask(given["mask"])
        self._given |= given
        self._run.session = None
        return self

    def new(self, **changes: Any) -> KVLockGuider:
        """A guider with these settings and tensors, some of them changed."""
        given = {name: changes.pop(name) for name in _GIVEN if name in changes}
        return super().new(**changes).edit(**{**self._given, **given})

    def partner(self, guidance_scale: float) -> KVLockGuider:
        """The guider for the second expert of Wan 2.2, with a scale of its own: both share one lock, one policy's
        state and one trace, so that the lock goes on across the boundary.

            pipe.update_components(guider=guider, guider_2=guider.partner(3.0))
        """
        other = self.new(guidance_scale=guidance_scale)
        other._run, other._given = self._run, self._given
        return other

    @property
    def trace(self) -> Trace:
        """What happened in the latest run; empty before the first."""
        return Trace() if self._run.session is None else self._run.session.trace

    # -- one step -----------------------------------------------------------------------------------------------------

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Told by the pipeline before each step."""
        super().set_state(step, num_inference_steps, timestep)
        self._calls = []
        if step == 0:
            self._run.fresh = True

    def prepare_inputs(self, data: Any) -> list[Any]:
        """The branches of a step, from a dictionary of (conditional, unconditional) pairs."""
        self._latents = self._times = None
        return super().prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The branches of a step, from a modular pipeline's state, which holds the latents in full precision."""
        self._latents, self._times = getattr(data, "latents", None), getattr(data, "timesteps", None)
        return super().prepare_inputs_from_block_state(data, input_fields)

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Called before each branch: the transformer's next call is recorded."""
        super().prepare_models(denoiser)
        if self._enabled:
            release(denoiser)  # of a run that ended in an exception between the branches
            intercept(denoiser, Interception(self._record, lambda: False))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Called after each branch: the transformer is as it was."""
        release(denoiser)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided, composited velocity of this step. The predictions given are blanks: the branches are evaluated
        here, under the lock.
        """
        if not self._enabled:
            return super().forward(pred_cond, pred_uncond)
        calls, self._calls = self._calls, []
        if len(calls) != self.num_conditions:
            raise RunError(
                f"{len(calls)} branches were recorded in this step, {self.num_conditions} were expected: the pipeline "
                "does not call prepare_models and cleanup_models around its transformer.\n"
                "  Modular pipelines do; for a classic one: with kv.diffusers.locked(pipe, ...): pipe(...)."
            )
        session, time = self._session(calls[0]), self._time(calls[0])
        if self._run.fresh:
            session.begin(self._schedule())
            self._run.fresh = False
        uncond = calls[1] if len(calls) == 2 else None
        requested = 1.0 if uncond is None else float(self.guidance_scale)
        answer = session.evaluate(calls[0], uncond, time=time, requested=requested, latents=self._latents)
        if self._step == self._num_inference_steps - 1:
            session.end()
        if answer.guided is None:
            assert answer.cond is not None
            return super().forward(answer.cond, answer.uncond)
        return GuiderOutput(pred=answer.guided, pred_cond=answer.cond, pred_uncond=answer.uncond)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **options: Any) -> None:
        """Write the settings as JSON. Raises PolicyError for a policy that is code."""
        if self.config["policy"] is None:
            raise PolicyError(
                f"{self._settings['policy']!r} cannot be written to a file, so the guider cannot be saved.\n"
                "  Use a policy of this library, or the path of a TOML file: KVLockGuider(policy='mine.toml')."
            )
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **options)

    def _record(self, call: Call) -> Tensor:
        self._calls.append(call)
        return call.blank(call.hidden.dtype)

    def _session(self, call: Call) -> Session:
        if self._run.session is None:
            given = {k: v for k, v in self._given.items() if k != "scheduler"}
            self._run.session, self._run.fresh = Session(**self._settings, **given), True
        return self._run.session

    def _time(self, call: Call) -> float:
        timestep = torch.as_tensor(self._timestep)
        scheduler = self._given["scheduler"]
        return time_without_scheduler(timestep) if scheduler is None else time_of(scheduler, timestep)

    def _schedule(self) -> Tensor | None:
        scheduler = self._given["scheduler"]
        if scheduler is not None:
            return scheduler.sigmas[getattr(scheduler, "begin_index", None) or 0 :]
        return None if self._times is None else self._times / 1000.0


class _Run:
    """What two guiders of one pipeline share."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.fresh = True


def _as_text(policy: Policy) -> str | None:
    """A policy as TOML; None where it is code."""
    try:
        return to_toml(policy)
    except PolicyError:
        return None
