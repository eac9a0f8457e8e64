"""Where the source's keys and values meet the edit's: fusion, hooks and sites."""

from .frame import Frame
from .fuse import fuse, fusion_ratio
from .hooks import Hooks
from .sites import SdpaSites, Site, Sites, find_sites

__all__ = ["Frame", "Hooks", "SdpaSites", "Site", "Sites", "find_sites", "fuse", "fusion_ratio"]
