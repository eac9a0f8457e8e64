"""The KV cache: the source's keys and values kept over steps, seeds, prompts, runs and processes."""

from ..types import KVCacheError, KVCacheWarning
from .cache import CacheEntry, CacheSession, KVCache, uncacheable
from .fingerprint import content_fingerprint, model_fingerprint
from .plan import Plan, plan

__all__ = [
    "CacheEntry",
    "CacheSession",
    "KVCache",
    "KVCacheError",
    "KVCacheWarning",
    "Plan",
    "content_fingerprint",
    "model_fingerprint",
    "plan",
    "uncacheable",
]
