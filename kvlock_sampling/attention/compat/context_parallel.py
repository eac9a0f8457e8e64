"""Context parallelism of diffusers: every process holds some of a sequence's tokens, a layer sees only those.

`model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))`, or `ring_degree`, cuts the sequence into
contiguous pieces, one per process; what is communicated, is so behind the attention call. Fusion is token by token and
the source's pass is cut alike, so a lock needs no communication of its own: each process takes its piece of the ratio.
Predictions are gathered before a lock sees them, so that all processes measure, and decide, the same.

Text that shares the sequence is cut too, by the plans of diffusers: a process then holds [its text, its video].
Source: diffusers `hooks/context_parallel.py`, `models/_modeling_parallel.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...types import AttentionError
from ..context import Frame
from ..foreground import SelectedFrame

if TYPE_CHECKING:
    from ..layers import AttentionLayer, AttentionLayers

Local = Callable[[Tensor, int, int | None], tuple[Tensor, int | None]]
"""`local(ratio, length, text) -> (ratio, text)`: what of both a sequence of this length holds."""


@dataclass(frozen=True)
class Shard:
    """The piece of every sequence that this process holds: number `rank` of `count`."""

    rank: int
    count: int

    def bounds(self, length: int) -> tuple[int, int]:
        """First position of a sequence of `length` that is held here, and the one after the last.

        Where pieces cannot be equal, the first ones are longer by one, as `torch.tensor_split` has it.
        """
        size, longer = divmod(length, self.count)
        start = self.rank * size + min(self.rank, longer)
        return start, start + size + (self.rank < longer)


def shard_of(module: Any) -> Shard | None:
    """How a network, or an attention processor, of diffusers is cut; None where it is not."""
    config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    if mesh is None or mesh.size() == 1:
        return None
    return Shard(torch.distributed.get_rank(mesh.get_group()), mesh.size())


def is_cut(networks: Iterable[nn.Module]) -> bool:
    """Whether context parallelism is enabled on any of these networks."""
    return any(shard_of(network) is not None for network in networks)


def localiser(layers: AttentionLayers, layer: AttentionLayer, frame: Frame) -> Local:
    """How the calls of one layer are to be read in this process.

    Raises:
        AttentionError: parallelism that this lock, or this model's own attention, cannot take part in.
    """
    processor = getattr(layer.module, "processor", None)
    shard = shard_of(processor)
    if shard is None:
        if is_cut(layers.networks):
            _refuse_silent(layer, processor)
        return lambda ratio, length, text: (ratio, text)
    if isinstance(frame, SelectedFrame):
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
    piece: Shard = shard

    def local(ratio: Tensor, length: int, text: int | None) -> tuple[Tensor, int | None]:
        start, end = piece.bounds(ratio.shape[1])
        texts = () if layer.text == "none" or text is None else (piece.bounds(text)[1] - piece.bounds(text)[0], text)
        rest = length - (end - start)
        if layer.text == "none" and length == ratio.shape[1]:
            return ratio, text  # a layer before the cut
        # Plans cut the text along with the video, or leave it whole; the length tells.
        return ratio[:, start:end], rest if rest in texts else next(iter(texts), text)

    return local


def refuse_unknown(network: nn.Module) -> None:
    """Raises AttentionError where a network whose layers are known as calls alone is cut: which tokens, nobody says."""
    if is_cut(network.modules()):
        raise AttentionError(
            f"context parallelism is enabled on {type(network).__name__}, whose tokens sdpa_layers knows by their number "
            "alone.\n  Declare the model, kv.Architecture(...).find(network), or leave enable_parallelism away."
        )


def _refuse_silent(layer: AttentionLayer, processor: Any) -> None:
    raise AttentionError(
        f"context parallelism is enabled, but attention at layer {layer.name!r} ({type(processor).__name__}) does not "
        "communicate: each process attends to its own tokens alone, with a lock or without.\n"
        "  Models whose attention does are Wan, LTX, Flux and Qwen-Image; for this one leave enable_parallelism away."
    )
