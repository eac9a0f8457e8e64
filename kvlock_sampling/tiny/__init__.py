"""The embedded model: a small Wan trained on a procedural world. No download, no GPU."""

from .load import TinyVideo, load, save
from .model import TinyWan, tokenize

__all__ = ["TinyVideo", "TinyWan", "load", "save", "tokenize"]
