"""The embedded model in ComfyUI: its weights in ComfyUI's own Wan, a VAE that is none, and clips to edit.

So the nodes can be tried, and the example workflow run, without a download: an edit takes seconds on a CPU.
"""

from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...tiny.model import PATCH, WEIGHTS, tokenize
from ...tiny.world import EDITS, edit_mask, render, sample_edit

_NAMES = (  # diffusers -> ComfyUI, applied in this order
    ("dit.", ""),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    (".to_out.0", ".o"),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    (".norm2.", ".norm3."),
    (".ffn.net.0.proj", ".ffn.0"),
    (".ffn.net.2", ".ffn.2"),
    ("proj_out.", "head.head."),
)


class Example(NamedTuple):
    """A clip with an edit whose true result is known. Images are (frames, height, width, 3) in [0, 1]."""

    clip: Tensor
    mask: Tensor
    truth: Tensor
    prompt: str
    source_prompt: str


def example(kind: str, scene: int) -> Example:
    """Return an edit of the embedded world.

    Args:
        kind: One of `EDITS`.
        scene: Chooses the scene, >= 0.
    """
    assert kind in EDITS
    source, target = sample_edit(scene, kind)
    mask = edit_mask([source], [target])[0, 0]
    return Example(_image(render([source])), mask, _image(render([target])), target.prompt, source.prompt)


def conditioning(prompt: str) -> list[Any]:
    """Return CONDITIONING of a prompt in the embedded model's words; "" is unconditional."""
    with safe_open(WEIGHTS, "pt") as file:
        return [[file.get_tensor("emb.weight").float()[tokenize(prompt)], {}]]


def model() -> Any:
    """Return the embedded model as a MODEL."""
    from comfy import latent_formats, model_base, model_management, model_patcher, model_sampling, supported_models

    class Pixels(latent_formats.LatentFormat):
        latent_channels, latent_dimensions, spacial_downscale_ratio = 3, 3, 1

    class Sampling(model_sampling.ModelSamplingDiscreteFlow, model_sampling.CONST):
        """Flow noise levels of a model that predicts x0."""

        def calculate_denoised(self, sigma: Any, model_output: Tensor, model_input: Tensor) -> Tensor:
            return model_output

    sizes = {"dim": 192, "num_heads": 6, "ffn_dim": 768, "num_layers": 8, "in_dim": 3, "out_dim": 3, "text_dim": 64}
    config = supported_models.WAN21_T2V(
        {"image_model": "wan2.1", "model_type": "t2v", "patch_size": PATCH, "freq_dim": 64, **sizes}
    )
    config.latent_format = Pixels()
    config.sampling_settings = {"shift": 3.0}
    config.set_inference_dtype(torch.float32, None)
    device = model_management.get_torch_device()
    made = model_base.WAN21(config, device=torch.device("cpu"))
    made.model_sampling = Sampling(config)
    made.diffusion_model.load_state_dict(_converted())
    return model_patcher.ModelPatcher(made.eval().requires_grad_(False), device, model_management.unet_offload_device())


class PixelVAE:
    """What ComfyUI's nodes ask of a VAE, for a model whose latents are pixels."""

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels[..., :3].movedim(-1, 0)[None] * 2 - 1

    def decode(self, samples: Tensor) -> Tensor:
        return (samples / 2 + 0.5).clamp(0, 1).movedim(1, -1)


def _converted() -> dict[str, Tensor]:
    found = {}
    for name, value in load_file(WEIGHTS).items():
        if name.startswith("emb."):
            continue
        for old, new in _NAMES:
            name = name.replace(old, new)
        if name.endswith("scale_shift_table"):
            name = name.replace("scale_shift_table", "modulation") if "blocks" in name else "head.modulation"
        found[name] = value.float()
    return found


def _image(clips: Tensor) -> Tensor:
    return (clips[0] / 2 + 0.5).movedim(0, -1).clamp(0, 1)
