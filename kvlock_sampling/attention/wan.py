"""Wan (diffusers `WanTransformer3DModel`): video-only self-attention `blocks.{i}.attn1`; text lives in `attn2`."""

from __future__ import annotations

import sys

from torch import nn

from .sites import Site, Sites

_FILE = "diffusers.models.transformers.transformer_wan"


def match(module: nn.Module) -> Sites | None:
    """The sites of `module` if it is a Wan transformer. If diffusers' file was never imported, it cannot be one."""
    file = sys.modules.get(_FILE)
    if file is None or not isinstance(module, file.WanTransformer3DModel):
        return None
    t, h, w = module.config.patch_size
    sites = tuple(Site(f"blocks.{i}.attn1", block.attn1) for i, block in enumerate(module.blocks))
    return Sites(patch=(t, h, w), sites=sites, architecture="wan")
