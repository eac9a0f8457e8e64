"""The memory that a KV cache will need, before anything runs. Sizes are exact.

Wan 2.1 1.3B at 480 x 832 x 81 with 70% background needs 2.1 GB per level in int8, 4.2 GB in bfloat16.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..attention import AttentionLayers
from ..masks.tokens import Selection
from ..types import KVCacheError
from .cache import KVCache
from .memory import readable
from .quantize import packed_bytes


class Plan(NamedTuple):
    """What one run will store in its KV cache: how many noise levels, of how many bytes each; the bytes that may be
    held in memory (None is no limit), and whether levels are written to disk as well. Print it.
    """

    levels: int
    per_level: int
    budget: int | None = None
    directory: bool = False

    @property
    def total(self) -> int:
        """The bytes of all levels. Files take some kB more each."""
        return self.levels * self.per_level

    @property
    def in_memory(self) -> int:
        """How many levels the budget holds at once."""
        return self.levels if self.budget is None else min(self.levels, self.budget // max(1, self.per_level))

    def __str__(self) -> str:
        held = "Everything fits" if self.in_memory == self.levels else f"{self.in_memory} of them fit"
        sizes = f"{self.levels} levels of {readable(self.per_level)}: {readable(self.total)}. {held} in memory"
        if self.directory:
            return f"{sizes}. All are kept on disk for the next edit of this clip."
        if not self.in_memory:
            return f'{sizes}, so nothing is kept: raise the budget, use format="int8", or pass a directory.'
        return f'{sizes}. For later processes give it a directory: kv_cache=KVCache("DIR"), --kv-cache DIR.'


def plan(kv_cache: KVCache, layers: AttentionLayers, selection: Selection, levels: Iterable[float]) -> Plan:
    """Plan the memory of one run that evaluates these noise levels, in this order.
    Raises KVCacheError if the attention modules do not show how many heads they have, and how wide those are.
    """
    module: Any = layers.layers[0].module
    heads = next((getattr(module, n) for n in ("heads", "num_heads", "n_heads") if hasattr(module, n)), None)
    named = {"to_k": 1, "k_proj": 1, "to_qkv": 3, "qkv_proj": 3}  # as diffusers and others name them
    name = next((n for n in named if hasattr(getattr(module, n, None), "out_features")), None)
    if name is None or not isinstance(heads, int):
        raise KVCacheError(f"{type(module).__name__} does not show how many heads it has and how wide they are.")
    projection = getattr(module, name)
    shape = len(selection.weight), heads, len(selection.stored), projection.out_features // named[name] // heads
    dtype = getattr(layers.networks[0], "dtype", projection.weight.dtype)  # a network whose weights are cast says it
    size = 2 * layers.per_network * packed_bytes(shape, dtype, kv_cache.format)
    return Plan(kv_cache.refresh.expected_levels(levels), size, kv_cache.budget, kv_cache.directory is not None)
