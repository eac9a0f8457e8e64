"""Where the source's keys and values meet the edit's: fusion, hooks and sites."""

from .architecture import Architecture, Layers, register
from .frame import Frame
from .fuse import fuse, fusion_ratio
from .hooks import Hooks
from .reachable import reachable_modules
from .sites import SdpaSites, Site, Sites, find_sites

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
