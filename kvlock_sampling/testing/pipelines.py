"""Tiny diffusers pipelines with random weights, built on the spot: for trying things and for tests, with no download.

They have every part of the real ones (tokenizer, text encoder, VAE, scheduler, transformer) under the same class
names, and are saved and loaded like them. They draw nothing sensible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..types import KVLockError
from ..utils.torchvision import broken_torchvision_hidden
from ._tiny import TEXT, cogvideox, hunyuan, hunyuan15, ltx, mochi, t5, tokenizer


def tiny_pipeline(name: str = "wan", seed: int = 0) -> Any:
    """A small pipeline of diffusers with random weights.

    name: "wan", "wan-2.2" (two experts), "wan-ti2v" (a time per token), "wan-image", "wan-image-ti2v", "wan-vace",
        "ltx", "cogvideox", "cogvideox-1.5", "hunyuan", "hunyuan-1.5", "mochi".
    seed: of the weights; torch's global generator is left alone.

    >>> pipe = tiny_pipeline("ltx")
    >>> type(pipe).__name__, sum(p.numel() for p in pipe.transformer.parameters()) < 50_000
    ('LTXPipeline', True)

    Raises:
        KVLockError: an unknown name, or transformers is not installed.
    """
    if name not in _BUILDERS:
        raise KVLockError(f"no tiny pipeline is called {name!r}; there are {', '.join(_BUILDERS)}.")
    with broken_torchvision_hidden(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            pipe = _BUILDERS[name]()
        except ImportError as error:
            raise KVLockError(f"{error}\n  pip install 'kvlock-sampling[pipelines]'") from error
        _enliven(pipe.transformer)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _enliven(transformer: torch.nn.Module) -> None:
    """Fresh transformers hardly react to text and time: their modulation starts near 0. Make every matrix count."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)


def _wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def _wan_transformer(kind: str = "WanTransformer3DModel", in_channels: int = 16, **more: Any) -> Any:
    import diffusers

    return getattr(diffusers, kind)(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=16,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **more,
    )


def _flow_unipc(shift: float = 3.0) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def _wan_parts() -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(),
        "text_encoder": t5("UMT5"),
        "vae": _wan_vae(),
        "scheduler": _flow_unipc(),
    }


def _wan(**more: Any) -> Any:
    from diffusers import WanPipeline

    return WanPipeline(**_wan_parts(), transformer=_wan_transformer(), **more)


def _wan_two() -> Any:
    second = _wan_transformer()
    _enliven(second)
    return _wan(transformer_2=second, boundary_ratio=0.875)


def _wan_image() -> Any:
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    size = {"height": 28, "width": 28}
    return WanImageToVideoPipeline(
        **_wan_parts(),
        transformer=_wan_transformer(in_channels=36, image_dim=16),
        image_encoder=CLIPVisionModel(vision),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size),
    )


def _wan_image_ti2v() -> Any:
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(**_wan_parts(), transformer=_wan_transformer(), expand_timesteps=True)


def _wan_vace() -> Any:
    from diffusers import WanVACEPipeline

    transformer = _wan_transformer("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=96)
    return WanVACEPipeline(**_wan_parts(), transformer=transformer)


_BUILDERS: dict[str, Callable[[], Any]] = {
    "wan": _wan,
    "wan-2.2": _wan_two,
    "wan-ti2v": lambda: _wan(expand_timesteps=True),
    "wan-image": _wan_image,
    "wan-image-ti2v": _wan_image_ti2v,
    "wan-vace": _wan_vace,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "cogvideox-1.5": lambda: cogvideox(patch_t=2),
    "hunyuan": hunyuan,
    "hunyuan-1.5": hunyuan15,
    "mochi": mochi,
}
