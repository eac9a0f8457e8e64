"""Tiny pipelines of diffusers with random weights, one for each form of a family that the library knows.

`kvlock_sampling.testing` ships the first of them, Wan's text to video.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvlock_sampling.testing import pipelines
from kvlock_sampling.testing.pipelines import TEXT, WORDS, finished, t5, tokenizer

VOCABULARY = len(WORDS)


def tiny_pipeline(name: str = "wan", seed: int = 0) -> Any:
    """A small pipeline with random weights; the names are `BUILDERS`' and "wan"."""
    if name == "wan":
        return pipelines.tiny_pipeline(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return finished(BUILDERS[name]())


def wan_parts() -> dict[str, Any]:
    """Everything of Wan but the transformer."""
    import diffusers

    return pipelines.wan_parts(diffusers)


def wan_transformer(kind: str = "WanTransformer3DModel", **more: Any) -> Any:
    import diffusers

    config = dict(pipelines.tiny_pipeline().transformer.config)
    del config["_use_default_values"]  # of which diffusers would take no others
    return getattr(diffusers, kind).from_config({**config, **more})


def wan(**more: Any) -> Any:
    from diffusers import WanPipeline

    return WanPipeline(**wan_parts(), transformer=wan_transformer(), **more)


def wan_two() -> Any:
    pipe = finished(wan(transformer_2=wan_transformer(), boundary_ratio=0.875))
    pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
    return pipe


def wan_image() -> Any:
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    size = {"height": 28, "width": 28}
    return WanImageToVideoPipeline(
        **wan_parts(),
        transformer=wan_transformer(in_channels=36, image_dim=16, added_kv_proj_dim=24),
        image_encoder=CLIPVisionModel(vision),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size),
    )


def wan_image_ti2v() -> Any:
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(**wan_parts(), transformer=wan_transformer(), expand_timesteps=True)


def wan_vace() -> Any:
    from diffusers import WanVACEPipeline

    transformer = wan_transformer("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=96)
    return WanVACEPipeline(**wan_parts(), transformer=transformer)


def ltx() -> Any:
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
    return LTXPipeline(scheduler, vae, t5("T5"), tokenizer(), transformer)


def cogvideox(patch_t: int | None = None) -> Any:
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
    return CogVideoXPipeline(tokenizer(), t5("T5"), vae, transformer, scheduler)


def hunyuan() -> Any:
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
        tokenizer=tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(pooled),
        tokenizer_2=tokenizer(),
    )


def hunyuan15() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, scaling_factor=1.03682
    )
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        text_embed_2_dim=TEXT,
        image_embed_dim=8,
        rope_axes_dim=(2, 4, 4),
        task_type="t2v",
    )
    language = Qwen2_5_VLTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    glyphs = T5Config(
        vocab_size=384, d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=4, is_encoder_decoder=False
    )
    words = tokenizer()
    # The system message is long, and characters are many tokens: the real one's fits into the 108 that are cut away.
    words.chat_template = "{{ '%' * 107 }}{% for message in messages[1:] %}{{ message['content'] }}{% endfor %}"
    return HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(language),
        tokenizer=words,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=T5EncoderModel(glyphs),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


def mochi() -> Any:
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
    return MochiPipeline(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae, t5("T5"), tokenizer(), transformer)


BUILDERS: dict[str, Callable[[], Any]] = {
    "wan-2.2": wan_two,
    "wan-ti2v": lambda: wan(expand_timesteps=True),
    "wan-image": wan_image,
    "wan-image-ti2v": wan_image_ti2v,
    "wan-vace": wan_vace,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "cogvideox-1.5": lambda: cogvideox(patch_t=2),
    "hunyuan": hunyuan,
    "hunyuan-1.5": hunyuan15,
    "mochi": mochi,
}
