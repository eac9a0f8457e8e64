"""The embedded model: a small Wan trained on the stage, a procedural world. No download, no GPU."""

from .model import TinyVideo, TinyWan, load, tokenize
from .world import Scene, edit_mask, render, sample_edit, sample_scene

__all__ = ["Scene", "TinyVideo", "TinyWan", "edit_mask", "load", "render", "sample_edit", "sample_scene", "tokenize"]
