"""The built-in families of models: every `Architecture` in the files of this folder."""

from ..architecture import Architecture
from . import comfy, hunyuan, image, video, wan

_FOUND = [value for file in (hunyuan, image, video, wan, comfy) for value in vars(file).values()]
BUILT_IN = tuple(found for found in _FOUND if isinstance(found, Architecture))
