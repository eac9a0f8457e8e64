"""Where the source's keys and values meet the edit's: fusion, hooks and sites."""

from ..utils.modules import reachable_modules
from .architecture import Architecture, Layers, register
from .context import Frame
from .fuse import fuse, fusion_ratio
from .hooks import Hooks
from .layers import SdpaSites, Site, Sites, find_sites

__all__ = [
    "Architecture",
    "Frame",
    "Hooks",
    "Layers",
    "SdpaSites",
    "Site",
    "Sites",
    "find_sites",
    "fuse",
    "fusion_ratio",
    "reachable_modules",
    "register",
]
