"""Clips and masks: read, write and compare them. Files need the extra `video`."""

from .media import VideoError
from .read import Clip, read_clip, read_mask
from .write import check_suffix, side_by_side, write_clip

__all__ = ["Clip", "VideoError", "check_suffix", "read_clip", "read_mask", "side_by_side", "write_clip"]
