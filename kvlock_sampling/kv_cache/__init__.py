"""Source K/V kept across steps, seeds and repeated edits: formats, tiers, a byte budget, and when they still serve."""

from .cache import KVCache
from .clock import expected_levels
from .errors import KVCacheError, KVCacheWarning
from .fingerprint import KVCacheKey, arguments_fingerprint, model_fingerprint, tensor_fingerprint
from .level import Level
from .plan import Plan, plan_for
from .shelf import Served, Shelf

__all__ = [
    "KVCache",
    "KVCacheError",
    "KVCacheKey",
    "KVCacheWarning",
    "Level",
    "Plan",
    "Served",
    "Shelf",
    "arguments_fingerprint",
    "expected_levels",
    "model_fingerprint",
    "plan_for",
    "tensor_fingerprint",
]
