"""A tiny Wan pipeline of diffusers with random weights, for documentation and tests."""

from typing import Any

import torch

from ..utils.extras import hide_broken_torchvision, require

TEXT = 32  # width of the text encoder
WORDS = ["<pad>", "</s>", "<unk>", *(chr(code) for code in range(32, 127))]


def tiny_pipeline(seed: int = 0) -> Any:
    """Return a small text-to-video pipeline of diffusers with random weights.

    >>> type(tiny_pipeline()).__name__
    'WanPipeline'

    Args:
        seed: Seed of the weights. Torch's global generator is left alone.

    Raises:
        KVLockError: diffusers or transformers is not installed.
    """
    hide_broken_torchvision()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        d = require("diffusers", "diffusers")
        parts = wan_parts(d)
        heads = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "rope_max_seq_len": 32}
        widths = {"in_channels": 16, "out_channels": 16, "text_dim": TEXT, "freq_dim": 16, "ffn_dim": 32}
        return finished(d.WanPipeline(**parts, transformer=d.WanTransformer3DModel(**heads, **widths)))


def wan_parts(d: Any) -> dict[str, Any]:
    sizes = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    encoder = t5("UMT5")  # first: the weights depend on the order
    vae = d.AutoencoderKLWan(**sizes, temperal_downsample=[False, True, True])
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = d.UniPCMultistepScheduler(**flow)
    return {"tokenizer": tokenizer(), "text_encoder": encoder, "vae": vae, "scheduler": scheduler}


def finished(pipe: Any) -> Any:
    """Make a new pipeline's transformer react to text and time, and put all parts in evaluation mode."""
    for parameter in pipe.transformer.parameters():
        if parameter.ndim >= 2:  # The modulation of a fresh transformer is near 0.
            torch.nn.init.normal_(parameter, 0, 1.5 * parameter[0].numel() ** -0.5)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer() -> Any:
    """Characters as tokens, so that no vocabulary file is needed."""
    tokenizers, transformers = require("tokenizers", "diffusers"), require("transformers", "diffusers")
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **marks, model_max_length=512)


def t5(kind: str) -> Any:
    """A text encoder of one layer; `kind` is "T5" or "UMT5"."""
    transformers = require("transformers", "diffusers")
    sizes = {"vocab_size": len(WORDS), "d_model": TEXT, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    return getattr(transformers, f"{kind}EncoderModel")(getattr(transformers, f"{kind}Config")(**sizes))
