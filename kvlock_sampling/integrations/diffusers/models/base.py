"""A diffusers pipeline with everything that an edit needs around its denoiser: what all families share.

Latents are (batch, channels, time, height, width), float32, normalised as the transformer sees them, in
variance-exploding form. A family declares how its transformer is called: packing, axis order, rotary tables, masks.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....attention.architecture import config_patch
from ....denoisers import Call, FlowDenoiser, Preconditioned
from ....masks import as_mask, latent_mask
from ....samplers import flow_sigmas
from ....types import PipelineError
from ....utils.denoiser import accepts
from ....utils.fields import check_number
from ....video.read import as_clips, check_pixels
from .. import latents as codec
from ..schedule import check_flow, flow_times, schedule_sigmas, train_steps

Conditioning = dict[str, Tensor]


class Branch(nn.Module):
    """A pipeline's transformers behind one call for all families: `branch(z, time, cond) -> prediction`, like z.

    `call(network, z, time, cond, dtype)` calls a network of the family. `transformer_2`, if any, runs below `boundary`.
    """

    def __init__(
        self, transformer: nn.Module, channels: int, call: Call, transformer_2: nn.Module | None, boundary: float | None
    ) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary
        self.channels, self.call = channels, call

    def forward(self, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Call the transformer with the model's own noisy latents, times (batch,) in training steps, and a prompt."""
        if z.ndim != 5 or z.shape[1] != self.channels:
            raise PipelineError(
                f"x has shape {tuple(z.shape)}; expected latents (batch, {self.channels}, time, height, width).\n"
                "  Start from torch.randn_like(video.encode(clip)) * sigmas[0]."
            )
        network = self.expert(time)
        dtype = getattr(network, "dtype", z.dtype)
        placed = {k: v.to(z.device, dtype if v.is_floating_point() else v.dtype) for k, v in cond.items()}
        placed = {k: v.expand(len(z), *v.shape[1:]) for k, v in placed.items()}  # one for all clips
        return self.call(network, z, time, placed, dtype)

    def expert(self, time: Tensor) -> nn.Module:
        """The transformer that runs at this time. All clips of a call share one noise level."""
        if self.boundary is None or self.transformer_2 is None:
            return self.transformer
        high, low = self.transformer, self.transformer_2
        chosen, other = (high, low) if float(time.max()) >= self.boundary else (low, high)
        if type(getattr(other, "_hf_hook", None)).__name__ == "CpuOffload":
            other.to("cpu")  # Offloading only looks ahead, and a sampler may go back up the noise levels.
        return chosen


def ask(network: nn.Module, z: Tensor, time: Tensor, cond: Conditioning, **read: Any) -> Tensor:
    """Call a transformer of diffusers by the names that all of them use, and `read` beside."""
    return network(hidden_states=z, timestep=time, encoder_hidden_states=cond["text"], return_dict=False, **read)[0]


class PipelineVideo:
    """A diffusers pipeline as a `VideoModel`: pass it to `edit_video`, or use its parts in your own script.

    Args:
        pipe: The pipeline. Its weights, scheduler and offloading are used as they are; nothing is copied.
        cfg_scale: Guidance scale if the caller passes none; default: that of the pipeline's own call.
        negative_prompt: Text of the unconditional branch; default "".
        shift: A static flow shift instead of the scheduler's schedule.
        max_sequence_length: Text tokens per prompt, padded or cut; default: the pipeline's.
        t_max: Flow time, < 1, at which schedules begin that would begin at pure noise; default: sigma = 9999.

    Attributes:
        denoiser: `denoiser(x, sigma, cond=video.prompt(text)) -> x0-hat`, for any k-diffusion sampler and `KVLock`.

    Raises:
        PipelineError: The pipeline lacks a part, its scheduler does not fit the family, or an option is no number.
    """

    family: ClassVar[str]
    scale_name: ClassVar[str] = "guidance_scale"
    prompt_parts: ClassVar[tuple[str, ...]] = ("text",)
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
        if missing := [name for name in ("transformer", "vae") if getattr(pipe, name, None) is None]:
            kind = type(pipe).__name__
            raise PipelineError(f"this {kind} has no {missing[0]}; load it whole: {kind}.from_pretrained(path).")
        self.transformer = pipe.transformer
        scale = self._default(self.scale_name, 5.0) if cfg_scale is None else cfg_scale
        self.cfg_scale = check_number("cfg_scale", scale, PipelineError)
        self.negative_prompt = negative_prompt or ""
        self.shift = None if shift is None else check_number("shift", shift, PipelineError, above=0.0)
        self.t_max = check_number("t_max", t_max, PipelineError, above=0.0, below=1.0)
        most = self._default("max_sequence_length", 512) if max_sequence_length is None else max_sequence_length
        self.max_sequence_length = check_number("max_sequence_length", most, PipelineError, at_least=1, whole=True)
        self._texts: dict[str, Conditioning] = {}
        self._clips: Conditioning = {}
        self._shape: tuple[int, ...] | None = None
        self._check_scheduler()
        self.denoiser = self._denoiser()

    call: ClassVar[Call]
    """`call(network, z, time, cond, dtype)`: z and time are float32 or finer, cond has the weights' dtype."""

    def _call_options(self) -> dict[str, Any]:
        """More keyword arguments of `call`: values by which a KVCache may tell models apart."""
        return {}

    def _branch(self) -> Branch:
        call = partial(type(self).call, **self._call_options())
        second, ratio = getattr(self.pipe, "transformer_2", None), self.pipe.config.get("boundary_ratio")
        boundary = None if ratio is None else ratio * train_steps(self.pipe.scheduler)
        return Branch(self.transformer, self.channels, call, second, boundary)

    def _denoiser(self) -> Preconditioned:
        # Everything is float32 until the branch, which casts to the weights' dtype.
        return FlowDenoiser(self._branch(), time_scale=train_steps(self.pipe.scheduler), model_dtype=torch.float32)

    def _encode_text(self, text: str) -> Conditioning:
        """What the transformer reads of one prompt; every tensor has a first axis of 1."""
        given = {"max_sequence_length": self.max_sequence_length, "do_classifier_free_guidance": False}
        taken = {name: value for name, value in given.items() if accepts(self.pipe.encode_prompt, name)}
        encoded = self.pipe.encode_prompt([text], device=self.device, **taken)
        return dict(zip(self.prompt_parts, encoded, strict=False))  # Negative prompts follow, and are None.

    def _condition(self, clips: Tensor, mask: Tensor) -> Conditioning:
        """What the transformer reads of the clips themselves, one row per clip; nothing by default."""
        return {}

    channels = property(lambda self: self.transformer.config.in_channels)

    @property
    def usual(self) -> tuple[int, int, int]:
        """The default (frames, height, width) of the pipeline's own call."""
        return self._default("num_frames", 49), self._default("height", 480), self._default("width", 832)

    @property
    def compression(self) -> tuple[int, int]:
        """Pixels per latent of the VAE, (time, space)."""
        return codec.compression(self.pipe.vae)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latents per token, (time, height, width)."""
        return config_patch(self.transformer)

    def fit(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the largest size that the model can edit and that is no larger than this one, at least one token."""
        (t, s), (_, ph, pw) = self.compression, self.patch
        latents = self._latent_frames((max(frames, 1) - 1) // t + 1)
        return 1 + (latents - 1) * t, max(1, height // (s * ph)) * s * ph, max(1, width // (s * pw)) * s * pw

    def _latent_frames(self, most: int) -> int:
        """The largest number of latent frames up to `most` that this model takes."""
        return max(1, most // self.patch[0]) * self.patch[0]

    def lock_mask(self, mask: Any) -> Any:
        """The mask for a lock: in pixels, or at the latents' size where frames cannot tell the compression."""
        temporal, spatial = self.compression
        return mask if temporal in (4, 8) else latent_mask(mask, temporal=temporal, spatial=spatial)

    def given(self, clips: Tensor, mask: Any = None) -> "PipelineVideo":
        """Return this model bound to clips: some schedules depend on the size, some transformers read a first frame.

        Clips are (3, frames, height, width) or (batch, 3, frames, height, width), in [-1, 1]; the mask, 1 = edit, as
        `masks.as_mask` reads, is by default everything. A prompt of one text then counts for all clips. Raises
        PipelineError if the model cannot edit this size, or the mask has another.
        """
        second = getattr(self.denoiser.inner_model, "transformer_2", None)
        if self.pipe.transformer is not self.transformer or getattr(self.pipe, "transformer_2", None) is not second:
            raise PipelineError("a transformer of the pipeline was replaced: take it anew, kv.from_pipeline(pipe).")
        check_pixels(clips := as_clips(clips))
        frames, height, width = clips.shape[2:]
        if (fit := self.fit(frames, height, width)) != (frames, height, width):
            raise PipelineError(
                f"a clip of {frames} frames of {height} x {width}; {self.family} edits e.g. {fit[0]} of {fit[1]} x "
                f"{fit[2]}.\n  clip = kv.video.read_clip(path, frames={fit[0]}, size={fit[1:]}, pad=True).pixels"
            )
        region = torch.ones(1, 1, frames, height, width) if mask is None else as_mask(mask, frames=frames).float()
        if region.shape[2:] != clips.shape[2:] or len(region) not in (1, len(clips)):
            raise PipelineError(
                f"the mask has shape {tuple(region.shape)}; expected (batch or 1, 1, {frames}, {height}, {width}).\n"
                f"  mask = kv.masks.resize(mask, {frames}, {height}, {width})"
            )
        bound = copy.copy(self)
        bound._shape = tuple(clips.shape)
        with torch.no_grad():
            bound._clips = self._condition(clips, region.expand(len(clips), -1, frames, height, width))
        return bound

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode clips (batch, 3, frames, height, width) in [-1, 1] to latents, float32: the mode of the posterior."""
        latents = codec.encode_clip(self.pipe.vae, pixels)
        self._unload()
        return self._padded(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to clips in [-1, 1], float32."""
        with torch.no_grad():
            raw = codec.denormalise(self.pipe.vae, self.unpadded(latents.to(self.device).float()))
            pixels = torch.cat([self._decode(clip.to(self.pipe.vae.dtype)) for clip in raw.split(1)])
        self._unload()
        return pixels.float().clamp(-1, 1)

    def _unload(self) -> None:
        """Take offloaded parts from the device. Each moves only the part before it, in the pipeline's own order."""
        for hook in getattr(self.pipe, "_all_hooks", ()):
            hook.offload()

    def _padded(self, latents: Tensor) -> Tensor:
        """Latents with the frames that the transformer needs beside the clip's; `unpadded` is the inverse."""
        return latents

    def unpadded(self, latents: Tensor) -> Tensor:
        """Return latents without the frames that the clip lacks."""
        return latents

    def _decode(self, raw: Tensor) -> Tensor:
        return self.pipe.vae.decode(raw, return_dict=False)[0]

    def prompt(self, texts: str | Sequence[str]) -> Conditioning:
        """Encode one text, or one per clip, as the denoiser's `cond`: tensors with one row per text, and what it reads
        of `given` clips. A text is encoded once and kept. Raises PipelineError if texts and clips differ in number, or
        a new text comes after `pipe.text_encoder = None`.
        """
        count = self._shape[0] if self._shape is not None else 1
        texts = [texts] * count if isinstance(texts, str) else list(texts)
        if not texts or (self._shape is not None and len(texts) != count):
            raise PipelineError(f"{len(texts)} prompts for {count} clips; give one text, or one per clip.")
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                if getattr(self.pipe, "text_encoder", None) is None:
                    raise PipelineError(
                        f"prompt {text!r} was not encoded before the text encoder was released; encode all prompts "
                        "first, also the negative one: video.prompt([...])."
                    )
                with torch.no_grad():
                    # On the host: a batch of films has many texts.
                    self._texts[text] = {name: rows.cpu() for name, rows in self._encode_text(text).items()}
        self._unload()
        rows = [self._texts[text] for text in texts]
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]} | self._clips

    def sigmas(self, steps: int, strength: float = 1.0) -> Tensor:
        """Return the schedule of the pipeline's scheduler: `steps` >= 1 noise levels and a final 0. A `strength` in
        (0, 1] is the flow time to start at: 1 starts where the scheduler does, less takes `steps` levels below that
        time, with the scheduler's spacing. Raises PipelineError out of range, or if the scheduler lacks what it needs.
        """
        steps = check_number("steps", steps, PipelineError, at_least=1, whole=True)
        strength = check_number("strength", strength, PipelineError, above=0.0, at_most=1.0)
        if self.shift is not None:
            return flow_sigmas(steps, shift=self.shift, t_max=min(self.t_max, strength))
        return schedule_sigmas(self._times, steps, strength, self.t_max)

    def _times(self, steps: int) -> Tensor:
        return flow_times(self.pipe.scheduler, num_inference_steps=steps)

    def _check_scheduler(self) -> None:
        if self.shift is None:
            check_flow(self.pipe.scheduler, self.family)

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, also while its weights are offloaded."""
        return torch.device(self.pipe._execution_device)

    @property
    def offloaded(self) -> bool:
        """Whether weights move while the model runs: a part has hooks of diffusers or accelerate."""
        parts = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        return any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for part in parts for m in part.modules())

    def _default(self, name: str, otherwise: Any) -> Any:
        found = inspect.signature(type(self.pipe).__call__).parameters.get(name)
        return otherwise if found is None or found.default in (None, inspect.Parameter.empty) else found.default
