"""The lock as a guider of modular pipelines: it records a step's branches, and evaluates them under a `KVLock`."""

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from ...attention import AttentionLayers
from ...masks.fitted import FittedMask, as_transition
from ...policy import as_policy
from ...presets import load_policy, to_toml
from ...source import Source, check_noise
from ...trace import Trace
from ...types import PipelineError, PolicyError, RunError
from ...utils.modules import signature_of
from .calls import Call, intercepted
from .schedule import time_of
from .session import Session

_NOT_SAVED = ("source", "mask", "noise", "source_embeds", "scheduler", "estimator", "threshold", "kv_cache")
_EDITED = (*_NOT_SAVED, "layers")
_SAVED = ("composite", "rescale", "cfg_floor", "transition", "foreground", "batched")


class KVLockGuider(ClassifierFreeGuidance):
    """Classifier-free guidance with the lock inside. `trace` says what happened in the latest run.

        pipe.update_components(guider=KVLockGuider(source=latents, mask=mask, scheduler=pipe.scheduler))

    Diffusers saves and loads the settings, but no tensors and objects: pass those to `edit(...)` after loading.

    Args:
        guidance_scale: The requested scale; the policy may schedule it.
        policy: A Policy, or the name or path of a preset, or TOML text.
        composite: As in `KVLock`; so are rescale, cfg_floor, transition, foreground, noise, estimator, threshold,
            kv_cache and layers, of which only indices are saved. Reach and erase are a preset's.
        batched: As in `locked`.
        start: Fraction of the steps at which guidance begins. The lock acts in all steps.
        stop: Fraction of the steps at which guidance ends.
        enabled: False turns off guidance and lock, as `disable()` does.
        source: Clean latents of the clip, (1 or batch, channels, time, height, width): `encode_clip(pipe.vae, clip)`.
            Where the pipeline packs its own, as LTX, (1 or batch, tokens, channels): `latents.flatten(2).mT`.
        mask: 1 = edit, at the clip's or the latents' size; packed as the source is.
        source_embeds: As in `locked`; a guider cannot encode a `source_prompt`, and raises PipelineError for one.
        scheduler: The pipeline's. Required if timesteps are integers (UniPC): those do not give the exact noise level.

    Raises:
        PolicyError: The policy does not exist, or (on saving) it is code.
        SourceError, MaskError: Source or noise is no tensor, the mask a path, the transition no (width, fraction).
        RunError: At a step: an integer timestep without a scheduler, or another run's scheduler.
        KVLockError: At the first step: as `KVLock` raises.
    """

    ignore_for_config = [*_NOT_SAVED, "source_prompt"]  # noqa: RUF012 - diffusers' own form

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
        source_prompt: str | None = None,
        scheduler: Any = None,
        estimator: Any = None,
        threshold: Any = None,
        kv_cache: Any = None,
    ) -> None:
        if source_prompt is not None:
            raise PipelineError(
                f"source_prompt={source_prompt!r}: a guider sees no text encoder. Encode what the clip shows as the "
                "pipeline encodes its prompt: KVLockGuider(source_embeds=embeds). `locked(pipe, ...)` takes a text."
            )
        # Not ClassifierFreeGuidance's own __init__: it would register settings that this guider does not have.
        BaseGuidance.__init__(self, start, stop, enabled)
        self.guidance_scale, self.guidance_rescale, self.use_original_formulation = guidance_scale, 0.0, False
        named = isinstance(policy, (str, os.PathLike))
        checked = load_policy(policy) if named else as_policy(policy)
        text = os.fspath(policy) if named and not os.path.isfile(policy) else None  # a file may change
        with suppress(PolicyError):  # a policy that is code has no text
            text = text or to_toml(checked)
        self.register_to_config(policy=text)
        as_transition(transition)
        self._policy = policy
        self._given: dict[str, Any] = dict.fromkeys(_EDITED)
        self._session = Session()
        self._recording = ExitStack()
        self._calls: list[Call] = []
        self._latents = self._times = None
        self.edit(source=source, mask=mask, noise=noise, source_embeds=source_embeds, scheduler=scheduler)
        self.edit(estimator=estimator, threshold=threshold, kv_cache=kv_cache, layers=layers)

    def edit(self, **given: Any) -> "KVLockGuider":
        """Replace some of what is not saved, and return this guider: source, mask, noise, source_embeds, scheduler,
        estimator, threshold, kv_cache or layers. Raises SourceError or MaskError for what is no tensor.
        """
        if wrong := sorted(given.keys() - set(_EDITED)):
            raise TypeError(f"edit() takes {', '.join(_EDITED)}; got {', '.join(wrong)}")
        if given.get("source") is not None:
            Source(given["source"])
        if not isinstance(noise := given.get("noise"), Tensor | None):
            check_noise(noise)
        if given.get("mask") is not None:
            FittedMask(given["mask"])
        if "layers" in given:
            layers = given["layers"]
            saved = None if isinstance(layers, AttentionLayers | slice | None) else np.atleast_1d(layers).tolist()
            given["layers"] = layers if saved is None else saved
            self.register_to_config(layers=saved)
        self._given |= given
        options = {name: value for name, value in self._given.items() if name != "scheduler"}
        self._session.edit(policy=self._policy, **{name: self.config[name] for name in _SAVED}, **options)
        return self

    def new(self, **changes: Any) -> "KVLockGuider":
        """Return a guider with these settings and tensors, some of them changed."""
        given = {name: changes.pop(name) for name in _EDITED if name in changes}
        # The config holds no policy that is code.
        return super().new(**{"policy": self._policy, **changes}).edit(**{**self._given, **given})

    def partner(self, guidance_scale: float) -> "KVLockGuider":
        """Return the guider of this scale for the second expert of Wan 2.2; both share lock, state and trace.

        pipe.update_components(guider=guider, guider_2=guider.partner(3.0))
        """
        other = self.new(guidance_scale=guidance_scale)
        other._session, other._given = self._session, self._given
        return other

    @property
    def trace(self) -> Trace:
        """The trace of the latest run."""
        return self._session.trace

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step. The first one begins a run of this thread or task; a run of another is over."""
        if step == 0:
            self._session.begin(None)
        self._session.mine()
        super().set_state(step, num_inference_steps, timestep)
        self._calls, self._latents, self._times = [], None, None

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """Return the branches of a step, from a modular pipeline's state, which holds latents in full precision."""
        self._session.mine()
        self._latents, self._times = getattr(data, "latents", None), getattr(data, "timesteps", None)
        return super().prepare_inputs_from_block_state(data, input_fields)

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Record the transformer's calls until `cleanup_models`."""
        super().prepare_models(denoiser)
        if self._enabled and "hidden_states" not in signature_of(denoiser).parameters:
            raise PipelineError(
                f"{type(denoiser).__name__} takes no hidden_states; expected a transformer of Wan, LTX or HunyuanVideo "
                "1.5. Others need a denoiser with a lock around it: kv.KVLock(model, source=latents, mask=mask)."
            )
        self._recording.close()  # A run may have ended in an exception between prepare_models and cleanup_models.
        if self._enabled:
            self._recording.enter_context(intercepted(denoiser, self._record))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Leave the transformer as it was."""
        self._recording.close()

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """Return the guided, composited velocity: the recorded branches are evaluated here, the arguments are blank."""
        if not self._enabled:
            return super().forward(pred_cond, pred_uncond)
        session, run = self._session, self._session.mine()
        calls, self._calls = self._calls, []
        if len(calls) != self.num_conditions:
            raise RunError(
                f"{len(calls)} branches were recorded in this step; expected {self.num_conditions}: this pipeline does "
                "not call prepare_models. For a classic one: with kv.diffusers.locked(pipe, ...): pipe(...)."
            )
        time = time_of(self._given["scheduler"], torch.as_tensor(self._timestep))
        if not len(run.trace):
            known, scheduler = None if self._times is None else self._times / 1000.0, self._given["scheduler"]
            begun = 0 if scheduler is None else getattr(scheduler, "begin_index", None) or 0
            session.begin(known if scheduler is None else scheduler.sigmas[begun:])
        uncond = calls[1] if len(calls) == 2 else None
        requested = 1.0 if uncond is None else float(self.guidance_scale)
        answers = session.evaluate(calls[0], uncond, time=time, requested=requested, latents=self._latents)
        if self._step == (self._num_inference_steps if self._times is None else len(self._times)) - 1:
            session.end(complete=True)
        # The pipeline keeps its latents as it showed them, also in bfloat16.
        if self._latents is None and answers[0] is answers[1]:
            answers = answers[0].to(calls[0].hidden.dtype), answers[1].to(calls[0].hidden.dtype)
        return super().forward(*answers)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **options: Any) -> None:
        """Write the settings as JSON. Raises PolicyError if the policy is code."""
        if self.config["policy"] is None:
            raise PolicyError(
                f"{self._policy!r} cannot be written to a file, so the guider cannot be saved.\n"
                "  Use a policy of this library, or the path of a TOML file: KVLockGuider(policy='mine.toml')."
            )
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **options)

    def _record(self, call: Call) -> Tensor:
        self._calls.append(call)
        return call.blank(call.hidden.dtype)
