"""The first world: flat objects on a smooth, panning texture, and the model trained on it.

Nothing outside an object's outline depends on it, so compositing alone is nearly perfect here. No setting is tuned on
this model: defaults must do no harm on it.
"""

from __future__ import annotations

import torch
from world.compare import World

from .judge import judge
from .load import FirstVideo, load
from .world import EDITS, edit_mask, render, sample_edit

__all__ = ["EDITS", "FIRST_WORLD", "FirstVideo", "load", "sample_edit"]


FIRST_WORLD = World(
    render=render,
    edit_mask=lambda sources, targets: torch.stack([edit_mask(s, t) for s, t in zip(sources, targets, strict=True)]),
    judge=judge,
)
