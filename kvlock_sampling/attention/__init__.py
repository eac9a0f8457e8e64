"""Where the source's keys and values meet the edit's: fusion, hooks and layers."""

from ..utils.modules import reachable_modules
from .architecture import Architecture, LayerPattern, register
from .context import Frame
from .fuse import fuse, fusion_ratio
from .hooks import Hooks
from .layers import AttentionLayer, AttentionLayers, find_layers, sdpa_layers

__all__ = [
    "Architecture",
    "AttentionLayer",
    "AttentionLayers",
    "Frame",
    "Hooks",
    "LayerPattern",
    "find_layers",
    "fuse",
    "fusion_ratio",
    "reachable_modules",
    "register",
    "sdpa_layers",
]
