"""The memory that a KV cache will need, before anything runs. Sizes are exact.

Wan 2.1 1.3B at 480 x 832 x 81 with 70% background needs 2.1 GB per level in int8, 4.2 GB in bfloat16.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..attention import AttentionLayers
from ..masks.tokens import Selection
from ..types import KVCacheError
from .cache import KVCache
from .memory import readable
from .quantize import packed_bytes


@dataclass(frozen=True)
class Plan:
    """Sizes of a KV cache. Print it for a table.

    Attributes:
        layers: Attention layers of the network.
        heads: Heads of each layer.
        dim: Width of a head.
        tokens: Video tokens of a clip.
        kept: Tokens whose K/V are kept: those of the background.
        levels: Noise levels that a run stores.
        clips: Clips of the batch.
        format: "int8", or None for unchanged K/V.
        budget: Bytes that may be held in memory; None is no limit.
        dtype: Of the model's K/V.
        directory: Whether levels are written to disk as well.
    """

    layers: int
    heads: int
    dim: int
    tokens: int
    kept: int
    levels: int
    clips: int = 1
    format: str | None = "int8"
    budget: int | None = 4_000_000_000
    dtype: torch.dtype = torch.bfloat16
    directory: bool = False

    @property
    def total(self) -> int:
        """The bytes of all levels. Files take some kB more each."""
        return self.levels * self.per_level(self.format)

    def per_level(self, format: str | None) -> int:
        """The bytes of one level in this format."""
        return 2 * self.layers * packed_bytes((self.clips, self.heads, self.kept, self.dim), self.dtype, format)

    def in_memory(self, format: str | None) -> int:
        """How many levels in this format the budget holds at once."""
        size = self.per_level(format)
        return self.levels if self.budget is None or not size else min(self.levels, self.budget // size)

    def _verdict(self) -> str:
        """What these sizes mean for a run, in a sentence or two."""
        held = self.in_memory(self.format)
        if self.directory:
            start = "Everything fits in memory and is" if held == self.levels else "Every level is"
            return f"{start} kept on disk ({readable(self.total)}): the next edit of this clip needs no source pass."
        later = 'For later processes give it a directory: kv_cache=KVCache("DIR"), --kv-cache DIR.'
        if held == self.levels:
            return f"Everything fits in memory, for this run and others with this KVCache. {later}"
        if held:
            few = "" if held > 1 else ", but two serve it better (interpolate)"
            return f"{held} of {self.levels} levels fit in memory: enough for one run{few}. {later}"
        advice = 'use format="int8"' if self.in_memory("int8") else "lock fewer layers"
        return f"Not one level fits in memory, so nothing is kept: raise the budget, {advice}, or pass a directory."

    def __str__(self) -> str:
        clips = f", {self.clips} clips" if self.clips != 1 else ""
        budget = "no limit" if self.budget is None else readable(self.budget)
        lines = [
            f"{self.layers} layers x {self.heads} heads x {self.dim}, {self.kept} of {self.tokens} tokens are "
            f"background{clips}; {self.levels} levels; memory budget {budget}",
            f"  {'format':<10}{'per level':>12}{'all levels':>12}{'in memory':>11}",
        ]
        for format in (None, "int8"):
            size, mark = self.per_level(format), ">" if format == self.format else " "
            count = f"{self.in_memory(format)} of {self.levels}"
            lines.append(f"{mark} {format!s:<10}{readable(size):>12}{readable(size * self.levels):>12}{count:>11}")
        return "\n".join([*lines, self._verdict()])


def plan(kv_cache: KVCache, layers: AttentionLayers, selection: Selection, levels: Iterable[float]) -> Plan:
    """Plan the memory of one run that evaluates these noise levels, in this order.

    Raises KVCacheError if the attention modules do not show how many heads they have.
    """
    heads, width, dtype = _heads(layers.layers[0].module)
    count, (clips, tokens) = len(layers.layers) // max(1, len(layers.networks)), selection.weight.shape
    stored, on_disk = kv_cache.refresh.expected_levels(levels), kv_cache.directory is not None
    sizes = (count, heads, width // heads, tokens, len(selection.stored), stored, clips)
    return Plan(*sizes, kv_cache.format, kv_cache.budget, dtype, on_disk)


def _heads(module: nn.Module) -> tuple[int, int, torch.dtype]:
    """Heads, their width together, and dtype of an attention module, by the names that diffusers and others use."""
    heads = next((getattr(module, n) for n in ("heads", "num_heads", "n_heads") if hasattr(module, n)), None)
    for name, parts in (("to_k", 1), ("k_proj", 1), ("to_qkv", 3), ("qkv_proj", 3)):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Linear) and isinstance(heads, int):
            return heads, projection.out_features // parts, projection.weight.dtype
    raise KVCacheError(
        f"{type(module).__name__} does not show how many heads it has and how wide they are.\n"
        "  Plan from counts: kv_cache.Plan(layers=30, heads=12, dim=128, tokens=32760, kept=22932, levels=17)."
    )
