"""Clips and masks as files and as tensors."""

from ._codecs import VideoError
from .files import Clip, check_suffix, read_clip, read_mask, side_by_side, write_clip

__all__ = ["Clip", "VideoError", "check_suffix", "read_clip", "read_mask", "side_by_side", "write_clip"]
