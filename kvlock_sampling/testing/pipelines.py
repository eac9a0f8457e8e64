"""Tiny diffusers pipelines with random weights, built on the spot: for trying things and for tests, with no download.

They have every part of the real ones (tokenizer, text encoder, VAE, scheduler, transformer) under the same class
names, and are saved and loaded like them. They draw nothing sensible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..compat import broken_torchvision_hidden
from ..types import KVLockError

TEXT = 32
"""Width of the text encoders."""


def tiny_pipeline(name: str = "wan", seed: int = 0) -> Any:
    """A small pipeline of diffusers with random weights.

    name: "wan", "wan-2.2" (two experts), "wan-ti2v" (a time per token), "wan-image", "wan-image-ti2v", "wan-vace",
        "ltx", "cogvideox", "cogvideox-1.5", "hunyuan", "mochi".
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


def _tokenizer() -> Any:
    """Characters as tokens: every text has its own, and no vocabulary file is needed."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


VOCABULARY = 3 + 127 - 32


def _t5(kind: str) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=4, is_encoder_decoder=False
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


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
        "tokenizer": _tokenizer(),
        "text_encoder": _t5("UMT5"),
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


def _ltx() -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    vae: Any = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
    )
    vae.latents_mean.normal_(0, 0.1)
    vae.latents_std.uniform_(0.5, 1.5)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=TEXT,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    return LTXPipeline(scheduler, vae, _t5("T5"), _tokenizer(), transformer)


def _cogvideox(patch_t: int | None = None) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    block = "CogVideoXDownBlock3D", "CogVideoXUpBlock3D"
    vae = AutoencoderKLCogVideoX(
        down_block_types=(block[0],) * 4,
        up_block_types=(block[1],) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.7,
        sample_height=64,
        sample_width=64,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        patch_size_t=patch_t,
        temporal_compression_ratio=4,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=True,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
    )
    return CogVideoXPipeline(_tokenizer(), _t5("T5"), vae, transformer, scheduler)


def _hunyuan() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    down, up = "HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D"
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=(down,) * 4,
        up_block_types=(up,) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.476986,
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=TEXT,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    language = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    pooled = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(language),
        tokenizer=_tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(pooled),
        tokenizer_2=_tokenizer(),
    )


def _mochi() -> Any:
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

    vae = AutoencoderKLMochi(
        latent_channels=4,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=(0.1, 0.0, -0.1, 0.2),
        latents_std=(0.9, 1.0, 1.1, 0.8),
    )
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=TEXT,
        time_embed_dim=4,
        max_sequence_length=256,
    )
    return MochiPipeline(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae, _t5("T5"), _tokenizer(), transformer)


_BUILDERS: dict[str, Callable[[], Any]] = {
    "wan": _wan,
    "wan-2.2": _wan_two,
    "wan-ti2v": lambda: _wan(expand_timesteps=True),
    "wan-image": _wan_image,
    "wan-image-ti2v": _wan_image_ti2v,
    "wan-vace": _wan_vace,
    "ltx": _ltx,
    "cogvideox": _cogvideox,
    "cogvideox-1.5": lambda: _cogvideox(patch_t=2),
    "hunyuan": _hunyuan,
    "mochi": _mochi,
}
