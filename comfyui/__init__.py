"""KV Lock for ComfyUI: masked edits of video whose background keeps the source's keys and values.

The nodes are in `nodes.py`, what they do in `kvlock_sampling.integrations.comfyui`. Nothing else is imported here.
"""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
