"""Wan 2.1 and 2.2: WanPipeline, WanVideoToVideoPipeline, WanImageToVideoPipeline, WanVACEPipeline.

- Latents: (VAE's - latents_mean) / latents_std. Flow, velocity, time 0 to 1000.
- Two experts (Wan 2.2 A14B): `transformer` for times from boundary_ratio * 1000 up, `transformer_2` below.
- expand_timesteps (Wan 2.2 TI2V-5B): one time per token, all equal, but 0 for a first frame that *is* an image.
- Image to video of the others: 4 channels that say which frames are given and the latents of (first frame, then grey)
  follow the 16 noisy channels; Wan 2.1 also reads the frame's CLIP features.
- VACE reads latents of what is kept, latents of what is to change, and the mask folded into 64 channels. Reference
  images would be extra frames, for which a lock has no source.

Sources: diffusers `pipelines/wan/`, whose own functions fold VACE's control; Wan, arXiv 2503.20314; VACE, 2503.07598.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from ....types import PipelineError
from ....utils.fields import check_number
from ....video.read import as_clips, check_pixels
from ..schedule import train_steps
from .base import Conditioning, PipelineVideo, ask


class WanVideo(PipelineVideo):
    """Wan, text to video. `cond` holds "text" (batch, tokens, dim). See `PipelineVideo` for the options."""

    family = "Wan"

    @staticmethod
    def call(network: Any, z: Tensor, time: Tensor, cond: Conditioning, dtype: Any, per_token: bool = False) -> Tensor:
        return ask(network, z.to(dtype), token_times(network, z, time) if per_token else time, cond)

    def _call_options(self) -> dict[str, Any]:
        return {"per_token": bool(self.pipe.config.get("expand_timesteps"))}

    channels = property(lambda self: self.pipe.vae.config.z_dim)


class WanImageVideo(WanVideo):
    """Wan, image to video from `image`, (3, height, width) in [-1, 1]; default: the clip's own first frame.

    `cond` holds "text"; "frame", latents of the first frame (batch, 16, 1, height, width) if times are per token,
    otherwise channels to append (batch, 20, time, height, width); "features" (batch, patches, dim), optional.
    """

    def __init__(self, pipe: Any, *, image: Tensor | None = None, **options: Any) -> None:
        self.image = image
        super().__init__(pipe, **options)

    @staticmethod
    def call(  # type: ignore[override]
        network: Any, z: Tensor, time: Tensor, cond: Conditioning, dtype: Any, *, per_token: bool, steps: float
    ) -> Tensor:
        if "frame" not in cond:
            raise PipelineError(
                "image to video reads the clip's first frame, which this prompt does not hold.\n"
                "  video = kv.from_pipeline(pipe).given(clip); cond = video.prompt(text)"
            )
        read = {"encoder_hidden_states_image": cond.get("features")}
        if not per_token:
            return ask(network, torch.cat([z.to(dtype), cond["frame"]], dim=1), time, cond, **read)
        known = cond["frame"].to(z)
        times = token_times(network, z, time).clone()
        times[:, : times.shape[1] // z.shape[2]] = 0  # tokens of the first frame, time being the outermost axis
        velocity = ask(network, torch.cat([known, z[:, :, 1:]], dim=2).to(dtype), times, cond, **read)
        # The first frame is known, so x0-hat = z - t * v must be it.
        t = (time / steps).clamp(min=torch.finfo(torch.float32).tiny).view(-1, 1, 1, 1, 1)
        return torch.cat([(z[:, :, :1] - known) / t, velocity[:, :, 1:].to(z)], dim=2)

    def _call_options(self) -> dict[str, Any]:
        return {**super()._call_options(), "steps": train_steps(self.pipe.scheduler)}

    def _condition(self, clips: Tensor, mask: Tensor) -> Conditioning:
        pipe, first = self.pipe, clips[:, :, :1]
        if self.image is not None:
            shape, fits = tuple(getattr(self.image, "shape", ())), (3, *clips.shape[3:])
            if shape != fits:
                hint = f"in [-1, 1]: kv.video.read_clip(path, frames=1, size={fits[1:]}).pixels[:, 0]"
                raise PipelineError(f"image is {shape or self.image}; expected (3, height, width) = {fits}, {hint}.")
            check_pixels(image := as_clips(self.image[:, None]))
            first = image.to(clips).expand(len(clips), -1, -1, -1, -1)
        found = {}
        if self.transformer.config.image_dim is not None:
            if (length := self.max_sequence_length) != 512:
                raise PipelineError(f"max_sequence_length={length}: this transformer takes 512 alone; leave it out.")
            if self.transformer.config.get("pos_embed_seq_len") is not None:
                raise PipelineError("this transformer reads a last frame too; expected one that reads the first alone.")
            if getattr(pipe, "image_encoder", None) is None:
                raise PipelineError("this transformer reads CLIP features, and the pipeline has no image_encoder.")
            found["features"] = pipe.encode_image(pipe.video_processor.postprocess(first[:, :, 0]), self.device)
        if pipe.config.get("expand_timesteps"):
            return {"frame": self.encode(first), **found}
        latents = self.encode(torch.cat([first, torch.zeros_like(clips[:, :, 1:])], dim=2))
        # One channel per pixel frame of a latent frame, 1 where that frame is given.
        given = latents.new_zeros(len(clips), self.compression[0], *latents.shape[2:])
        given[:, :, 0] = 1
        return {"frame": torch.cat([given, latents], dim=1), **found}


class WanVaceVideo(WanVideo):
    """Wan-VACE: the transformer reads the clip and the mask of the edit through its control layers.

    Where the mask is 1 it sees `reactive`: "grey" (VACE's inpainting), or "clip", the old content; the control has the
    strength `conditioning_scale`. `cond` holds "text", "control" (batch, 96, t, h, w), "strength" (batch, layers).
    """

    def __init__(
        self, pipe: Any, *, reactive: Literal["grey", "clip"] = "grey", conditioning_scale: float = 1.0, **options: Any
    ) -> None:
        if reactive not in ("grey", "clip"):
            raise PipelineError(f"reactive={reactive!r}; expected 'grey' (inpainting) or 'clip' (the old content).")
        self.reactive = reactive
        self.conditioning_scale = check_number("conditioning_scale", conditioning_scale, PipelineError)
        super().__init__(pipe, **options)

    @staticmethod
    def call(network: Any, z: Tensor, time: Tensor, cond: Conditioning, dtype: Any, per_token: bool = False) -> Tensor:
        if "control" not in cond:
            raise PipelineError(
                "VACE reads the clip and its mask, which this prompt does not hold.\n"
                "  video = kv.from_pipeline(pipe).given(clip, mask); cond = video.prompt(text)"
            )
        read = {"control_hidden_states": cond["control"], "control_hidden_states_scale": cond["strength"][0]}
        return ask(network, z.to(dtype), time, cond, **read)

    def _condition(self, clips: Tensor, mask: Tensor) -> Conditioning:
        clips = clips.to(self.device).float()
        region = (mask.to(self.device) > 0.5).float().expand_as(clips)
        shown = clips * (1 - region) if self.reactive == "grey" else clips
        controls = []
        for clip, part in zip(shown.split(1), region.split(1), strict=True):  # the pipeline takes one clip at a time
            latents = self.pipe.prepare_video_latents(clip, part, [[]], None, self.device)
            controls.append(torch.cat([latents, self.pipe.prepare_masks(part, [[]]).to(latents)], dim=1).float())
        layers = len(self.transformer.config.vace_layers)
        strength = controls[0].new_full((len(clips), layers), self.conditioning_scale)
        return {"control": torch.cat(controls), "strength": strength}


def token_times(network: Any, z: Tensor, time: Tensor) -> Tensor:
    t, h, w = (size // step for size, step in zip(z.shape[2:], network.config.patch_size, strict=True))
    return time[:, None].expand(-1, t * h * w)
