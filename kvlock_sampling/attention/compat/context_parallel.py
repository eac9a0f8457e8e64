"""Context parallelism of diffusers: every process holds a piece of the tokens, and a layer sees that piece only.

`model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))`, or `ring_degree`, cuts the sequence into
contiguous pieces, one per process, and communicates behind the attention call. Fusion works token by token and the
source's pass is cut alike, so a lock needs no communication: each process takes its piece of the ratio. Predictions are
gathered before a lock sees them, so all processes measure and decide the same.

Diffusers' plans also cut text that shares the sequence: a process then holds [its text, its video].
Source: diffusers `hooks/context_parallel.py`, `models/_modeling_parallel.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...types import AttentionError
from ..context import FusionContext
from ..layers import AttentionLayer, AttentionLayers


@dataclass(frozen=True)
class Shard:
    """The piece of every sequence that this process holds: number `rank` of `count`."""

    rank: int
    count: int

    def bounds(self, length: int) -> tuple[int, int]:
        """The first position that this process holds of a sequence of `length`, and the one after the last.

        If pieces cannot be equal, the first ones are longer by one, as in `torch.tensor_split`.
        """
        size, longer = divmod(length, self.count)
        start = self.rank * size + min(self.rank, longer)
        return start, start + size + (self.rank < longer)


def shard_of(module: Any) -> Shard | None:
    """How a network, or an attention processor, of diffusers is cut; None if it is not."""
    config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    if mesh is None or mesh.size() == 1:
        return None
    return Shard(torch.distributed.get_rank(mesh.get_group()), mesh.size())


def is_cut(networks: Iterable[nn.Module]) -> bool:
    """Whether context parallelism is enabled on any of these networks."""
    return any(shard_of(network) is not None for network in networks)


def local_piece(
    layers: AttentionLayers, layer: AttentionLayer, context: FusionContext, ratio: Tensor, length: int
) -> tuple[Tensor, int | None]:
    """What this process holds of the ratio and of the text, in a sequence of `length` at one layer.

    Args:
        layers: All layers.
        layer: The layer.
        context: The context of the call.
        ratio: The fusion ratio on this layer's tokens, (batch, tokens).
        length: The length of the sequence in this process.

    Returns:
        The ratio of the tokens in this process, and the number of text tokens; both unchanged without parallelism.

    Raises:
        AttentionError: A lock, or the model's attention, cannot work with this parallelism.
    """
    processor = getattr(layer.module, "processor", None)
    shard, text = shard_of(processor), context.text
    if shard is None:
        if is_cut(layers.networks):
            raise AttentionError(
                f"context parallelism is enabled, but attention at layer {layer.name!r} ({type(processor).__name__}) "
                "does not communicate: each process attends to its own tokens alone, with a lock or without.\n"
                "  Models whose attention communicates are Wan, LTX, Flux and Qwen-Image; for this one leave "
                "enable_parallelism away."
            )
        return ratio, text
    if context.selection is not None:
        raise AttentionError(
            "context parallelism leaves each process some of the tokens, and this lock keeps the source's K/V by their "
            "positions in the whole clip.\n"
            "  Make the lock after model.enable_parallelism(...), without kv_cache=; or KVLock(..., foreground=False)."
        )
    if layers.rows_apart or layers.extra != (0, 0):
        raise AttentionError(
            f"context parallelism with {'attention row by row' if layers.rows_apart else 'extra tokens'} is not "
            f"supported for architecture {layers.architecture!r}: where its tokens stand in a piece is unknown.\n"
            "  Use one process per clip instead: leave enable_parallelism away."
        )
    start, end = shard.bounds(ratio.shape[1])
    if layer.text == "none" and length == ratio.shape[1]:
        return ratio, text  # a layer before the cut
    texts = () if layer.text == "none" or text is None else (shard.bounds(text)[1] - shard.bounds(text)[0], text)
    rest = length - (end - start)
    # Plans cut the text along with the video, or leave it whole; the length tells which.
    return ratio[:, start:end], rest if rest in texts else next(iter(texts), text)


def refuse_cut(network: nn.Module) -> None:
    """Refuse a watched network under context parallelism, since the positions of its tokens are unknown.

    Raises:
        AttentionError: Parallelism is enabled.
    """
    if is_cut(network.modules()):
        raise AttentionError(
            f"context parallelism is enabled on {type(network).__name__}, whose tokens sdpa_layers knows by their "
            "number alone.\n  Declare the model, kv.attention.Architecture(...).find(network), or leave enable_parallelism away."
        )
