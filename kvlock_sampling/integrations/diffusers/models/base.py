"""What the families share: a diffusers pipeline with everything an edit needs around its denoiser.

A family says how its transformer is called (a `Branch`), how its text is encoded, and what its VAE's latents look like
to the transformer. Latents here are always (batch, channels, time, height, width), float32, normalised as the
transformer sees them, in variance-exploding form; packing, axis order, rotary tables and masks are inside the branch.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....denoisers import FlowDenoiser, Preconditioned
from ....samplers import flow_sigmas
from ..errors import PipelineError
from ..schedule import check_flow, flow_times, levels

Conditioning = dict[str, Tensor]


class Branch(nn.Module):
    """A transformer behind one call for all families: `branch(z, time, cond) -> prediction`, shaped like z.

    z: (batch, channels, time, height, width), the model's own noisy latents.  time: (batch,), in training steps.
    cond: what `PipelineVideo.prompt` returned.  The weights may be of any dtype: z is cast to theirs, time stays float.
    """

    def __init__(self, transformer: nn.Module, channels: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.channels = channels

    def forward(self, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        if z.ndim != 5 or z.shape[1] != self.channels:
            raise PipelineError(
                f"the sampler's x has shape {tuple(z.shape)}; expected latents (batch, {self.channels}, time, height, "
                "width). Start from torch.randn_like(video.encode(clip)) * sigmas[0]."
            )
        network = self.expert(time)
        dtype = getattr(network, "dtype", z.dtype)
        # Masks and indices keep their type; what was encoded in another precision takes the weights'.
        own = {k: v.to(z.device, dtype if v.is_floating_point() else v.dtype) for k, v in cond.items()}
        return self.call(network, z, time, own, dtype)

    def expert(self, time: Tensor) -> nn.Module:
        """The transformer in charge at this time."""
        return self.transformer

    def call(self, network: nn.Module, z: Tensor, time: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        """Call the transformer; z and time are float32 or finer, cond has the weights' dtype."""
        raise NotImplementedError


def finite(name: str, value: Any) -> float:
    """An option that is a number. Raises PipelineError for anything else."""
    if isinstance(value, bool) or not (isinstance(value, Real) and math.isfinite(value)):
        raise PipelineError(f"{name}={value!r}; expected a finite number, e.g. {name}=6.0.")
    return float(value)


class PipelineVideo:
    """A diffusers pipeline as a `VideoModel`: hand it to `edit_video`, or use its parts in your own script.

    Args:
        pipe: the pipeline. It stays yours: weights, scheduler and offloading are used as they are, nothing is copied.
        cfg_scale: guidance where none is asked for; default: that of the pipeline's own call.
        negative_prompt: what the unconditional branch reads; default: nothing, "".
        shift: a static flow shift in place of the scheduler's schedule.
        max_sequence_length: text tokens per prompt, padded or cut; default: the pipeline's.
        t_max: flow time at which schedules begin that would begin at pure noise, t = 1, which is sigma = infinity.
            The default is sigma = 9999; from about 1e6 on, rounding of a float32 state costs more than it brings.

    denoiser: `denoiser(x, sigma, cond=video.prompt(text)) -> x0-hat`, for any k-diffusion sampler and for `KVLock`.
    """

    family: ClassVar[str]
    scale_name: ClassVar[str] = "guidance_scale"
    frames: int | None = None
    size: tuple[int, int] | None = None
    denoiser: Preconditioned

    def __init__(
        self,
        pipe: Any,
        *,
        cfg_scale: float | None = None,
        negative_prompt: str | None = None,
        shift: float | None = None,
        max_sequence_length: int | None = None,
        t_max: float = 0.9999,
    ) -> None:
        self.pipe = pipe
        self.transformer = self._component("transformer")
        self._component("vae")
        self.cfg_scale = finite("cfg_scale", self._default(self.scale_name, 5.0) if cfg_scale is None else cfg_scale)
        self.negative_prompt = negative_prompt or ""
        self.shift, self.t_max = shift, t_max
        self.max_sequence_length = max_sequence_length or self._default("max_sequence_length", 512)
        self._texts: dict[str, Conditioning] = {}
        self._clips: Conditioning = {}
        self._shape: tuple[int, ...] | None = None
        self._check_scheduler()
        self.denoiser = self._denoiser()

    # -- what a family says -------------------------------------------------------------------------------------------

    def _denoiser(self) -> Preconditioned:
        """The family's branch as a denoiser."""
        raise NotImplementedError

    def _encode_text(self, text: str) -> Conditioning:
        """What the transformer reads for one prompt; every tensor has a first axis of 1."""
        raise NotImplementedError

    def _normalise(self, latents: Tensor) -> Tensor:
        """The VAE's latents as the transformer sees them; float32."""
        raise NotImplementedError

    def _denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `_normalise`."""
        raise NotImplementedError

    def _condition(self, clips: Tensor, mask: Tensor) -> Conditioning:
        """What the transformer reads of the clips themselves, one row per clip; nothing by default."""
        return {}

    @property
    def usual(self) -> tuple[int, int, int]:
        """The clips this model makes if not told otherwise, (frames, height, width)."""
        return self._default("num_frames", 49), self._default("height", 480), self._default("width", 832)

    @property
    def compression(self) -> tuple[int, int]:
        """Pixels per latent of the VAE, (time, space)."""
        return int(self.pipe.vae_scale_factor_temporal), int(self.pipe.vae_scale_factor_spatial)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latents per token, (time, height, width)."""
        t, h, w = self.transformer.config.patch_size
        return t, h, w

    # -- VideoModel ---------------------------------------------------------------------------------------------------

    def fit(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The largest clip (frames, height, width) this model can edit that is no larger than this one; at least one
        token. Frames are 1 + a multiple of the VAE's temporal compression, sides whole patches."""
        (t, s), (_, ph, pw) = self.compression, self.patch
        latents = self._latent_frames((max(frames, 1) - 1) // t + 1)
        return 1 + (latents - 1) * t, max(1, height // (s * ph)) * s * ph, max(1, width // (s * pw)) * s * pw

    def _latent_frames(self, most: int) -> int:
        """The largest number of latent frames this model takes, up to `most`, but at least the smallest it takes."""
        return max(1, most // self.patch[0]) * self.patch[0]

    def lock_mask(self, mask: Any) -> Any:
        """The mask that a lock wants beside `encode(clips)`: the same, unless the latents hold frames of their own."""
        return mask

    def given(self, clips: Tensor, mask: Any = None) -> PipelineVideo:
        """The same model for these clips: it knows their size, which some schedules need, and reads what its
        transformer wants of them (a first frame, an inpainting condition). Prompts of one text count for all of them.

        clips: (3, frames, height, width) or (batch, 3, ...), in [-1, 1].  mask: 1 = edit, as `masks.as_mask` reads;
        default: everything. Raises PipelineError for a size the model cannot edit.
        """
        from ....masks import as_mask

        clips = clips if clips.ndim == 5 else clips.unsqueeze(0)
        frames, height, width = clips.shape[2:]
        if self.fit(frames, height, width) != (frames, height, width):
            fitting = self.fit(frames, height, width)
            raise PipelineError(
                f"a clip of {frames} frames of {height} x {width}; {self.family} edits e.g. {fitting[0]} of "
                f"{fitting[1]} x {fitting[2]}.\n"
                f"  clip = kvlock_sampling.video.read_clip(path, frames={fitting[0]}, size={fitting[1:]}, pad=True)"
                ".pixels"
            )
        region = torch.ones(1, 1, frames, height, width) if mask is None else as_mask(mask, frames=frames).float()
        if region.shape[2:] != clips.shape[2:] or len(region) not in (1, len(clips)):
            raise PipelineError(
                f"the mask has shape {tuple(region.shape)}; expected that of the clip's pixels, (batch or 1, 1, "
                f"{frames}, {height}, {width}).\n"
                f"  mask = kv.masks.resize(mask, {frames}, {height}, {width})"
            )
        bound = copy.copy(self)
        bound._shape = tuple(clips.shape)
        with torch.no_grad():
            bound._clips = self._condition(clips, region.expand(len(clips), -1, frames, height, width))
        return bound

    def encode(self, pixels: Tensor) -> Tensor:
        """Clips (batch, 3, frames, height, width) in [-1, 1] to latents: the mode of the VAE's posterior, so the same
        clip gives the same latents, float32, on the pipeline's device."""
        vae = self.pipe.vae
        with torch.no_grad():
            latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
            return self._normalise(latents.float())

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to clips in [-1, 1], float32."""
        with torch.no_grad():
            raw = self._denormalise(latents.to(self.device).float()).to(self.pipe.vae.dtype)
            return self._decode(raw).float().clamp(-1, 1)

    def _decode(self, raw: Tensor) -> Tensor:
        return self.pipe.vae.decode(raw, return_dict=False)[0]

    def prompt(self, texts: str | Sequence[str]) -> Conditioning:
        """Prompts as the denoiser's `cond`: a dictionary of tensors, one row per text. A text is encoded once.

        After `given(clips)` one text stands for all clips, and what the transformer reads of them is in there, too.
        """
        count = self._shape[0] if self._shape is not None else 1
        texts = [texts] * count if isinstance(texts, str) else list(texts)
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                if getattr(self.pipe, "text_encoder", None) is None:
                    raise PipelineError(
                        f"prompt {text!r} was not encoded before the text encoder was released; encode all prompts "
                        "first: video.prompt([...]), also the negative one."
                    )
                with torch.no_grad():
                    self._texts[text] = self._encode_text(text)
        rows = [self._texts[text] for text in texts]
        encoded = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        if wrong := [k for k, v in self._clips.items() if len(v) != len(texts)]:
            raise PipelineError(
                f"{len(texts)} prompts for {len(self._clips[wrong[0]])} clips; give one text, or one per clip."
            )
        return encoded | self._clips

    def release_text_encoder(self) -> None:
        """Drop the text encoders from the pipeline; prompts encoded before still work."""
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(self.pipe, name, None) is not None:
                setattr(self.pipe, name, None)

    def sigmas(self, steps: int, strength: float = 1.0) -> Tensor:
        """The schedule of the pipeline's scheduler: `steps` noise levels and a final 0.

        strength: 1 starts where the scheduler does; less starts at that flow time.
        """
        if self.shift is not None:
            return flow_sigmas(steps, shift=self.shift, t_max=min(self.t_max, strength))
        return levels(self._times, steps, strength, self.t_max)

    def _times(self, steps: int) -> Tensor:
        """The flow times of a schedule of so many steps."""
        return flow_times(self.pipe.scheduler, num_inference_steps=steps)

    def _check_scheduler(self) -> None:
        if self.shift is None:
            check_flow(self.pipe.scheduler, self.family)

    # -- help for the families ----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, also while its weights are offloaded."""
        return torch.device(self.pipe._execution_device)

    @property
    def train_steps(self) -> float:
        """What flow time 1 is called in the transformer's own time."""
        return float(self.pipe.scheduler.config.get("num_train_timesteps", 1000))

    @property
    def offloaded(self) -> bool:
        """Whether weights move while the model runs: diffusers' or accelerate's hooks are on some part."""
        parts = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        return any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for part in parts for m in part.modules())

    def _flow(self, branch: Branch) -> FlowDenoiser:
        # The branch casts to the weights' dtype itself; until there everything is float32.
        return FlowDenoiser(branch, time_scale=self.train_steps, model_dtype=torch.float32)

    def _component(self, name: str) -> Any:
        found = getattr(self.pipe, name, None)
        if found is None:
            raise PipelineError(
                f"this {type(self.pipe).__name__} has no {name}; load it whole: "
                f"{type(self.pipe).__name__}.from_pretrained(path)."
            )
        return found

    def _default(self, name: str, otherwise: Any) -> Any:
        """The default of an argument of the pipeline's own call."""
        found = inspect.signature(type(self.pipe).__call__).parameters.get(name)
        return otherwise if found is None or found.default in (None, inspect.Parameter.empty) else found.default

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.pipe).__name__}, {self.device})"
