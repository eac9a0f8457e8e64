"""Tests within ComfyUI: `COMFYUI_PATH=checkout python -m pytest tests/comfyui`, in an environment that can import it.

Without COMFYUI_PATH nothing here is collected; `tests/test_comfyui.py` says so and runs them where it is set.
"""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("COMFYUI_PATH") else ["test_*"]

if not collect_ignore_glob:
    arguments, sys.argv = sys.argv, ["x", "--cpu", *os.environ.get("COMFYUI_ARGS", "").split()]
    sys.path[:0] = [os.environ["COMFYUI_PATH"], str(Path(__file__).parents[2])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management  # reads the arguments

    sys.argv = arguments

TEXT, CHANNELS, FRAMES, SIDE = 16, 16, 5, 8


def wan(**changes):
    """A small Wan with random weights, as ComfyUI's loaders make it."""
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher

    config = {"image_model": "wan2.1", "model_type": "t2v", "dim": 64, "ffn_dim": 96, "freq_dim": 32, "text_dim": TEXT}
    config |= {"in_dim": CHANNELS, "out_dim": CHANNELS, "num_heads": 4, "num_layers": 3, "patch_size": (1, 2, 2)}
    config |= {
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "window_size": (-1, -1),
        "text_len": 12,
        **changes,
    }
    found = comfy.supported_models.WAN21_T2V(config)
    found.set_inference_dtype(torch.float32, None)
    model = found.get_model({}, "", device="cpu").eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.15)
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@pytest.fixture(scope="session")
def model():
    return wan()


def made_by(node, *args, **given):
    """The first output of a node of ComfyUI, written in its first or third form."""
    if not hasattr(node, "execute"):
        return getattr(node(), node.FUNCTION)(*args, **given)[0]
    known = inspect.signature(node.execute).parameters
    out = node.execute(*args, **{name: value for name, value in given.items() if name in known})
    return out.args[0] if hasattr(out, "args") else out.result[0]


def text(seed: int, length: int = 12):
    return [[torch.randn(1, length, TEXT, generator=torch.Generator().manual_seed(seed)), {}]]


def latents(seed: int = 1, batch: int = 1, frames: int = FRAMES):
    g = torch.Generator().manual_seed(seed)
    return {"samples": torch.randn(batch, CHANNELS, frames, SIDE, SIDE, generator=g)}


def box(frames: int = FRAMES):
    """A mask of pixels, (frames, height, width): 1 = edit in a quarter of the picture."""
    mask = torch.zeros(4 * (frames - 1) + 1, 8 * SIDE, 8 * SIDE)
    mask[:, : 4 * SIDE, : 4 * SIDE] = 1
    return mask


def sample(model, sampler="euler", *, steps=4, cfg=4.0, seed=3, source=None, batch=1, frames=FRAMES, **options):
    """As the KSampler node samples."""
    import nodes

    latent = latents(batch=batch, frames=frames) if source is None else source
    out = nodes.common_ksampler(
        model,
        seed,
        steps,
        cfg,
        sampler,
        "simple",
        options.pop("positive", text(5)),
        options.pop("negative", text(6)),
        latent,
        **options,
    )
    return out[0]["samples"]
