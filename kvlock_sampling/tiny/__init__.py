"""The embedded model: a small Wan trained on the stage, a procedural world. No download, no GPU."""

from .load import TinyVideo, load
from .model import TinyWan, tokenize
from .render import Regions, coverage, edit_mask, regions, render
from .world import EDITS, Post, Scene, Texture, sample_edit, sample_scene

__all__ = [
    "EDITS",
    "Post",
    "Regions",
    "Scene",
    "Texture",
    "TinyVideo",
    "TinyWan",
    "coverage",
    "edit_mask",
    "load",
    "regions",
    "render",
    "sample_edit",
    "sample_scene",
    "tokenize",
]
