"""Where the source's keys and values meet the edit's: fusion, hooks, and which layers they act on."""

from .architecture import Architecture, LayerPattern
from .context import FusionContext
from .fuse import fuse, fusion_ratio
from .hooks import Hooks
from .layers import AttentionLayer, AttentionLayers, Table, TokenFlow, sdpa_layers
from .record import CallRecord
from .registry import find_layers, register

__all__ = [
    "Architecture",
    "AttentionLayer",
    "AttentionLayers",
    "CallRecord",
    "FusionContext",
    "Hooks",
    "LayerPattern",
    "Table",
    "TokenFlow",
    "find_layers",
    "fuse",
    "fusion_ratio",
    "register",
    "sdpa_layers",
]
