"""Context parallelism of diffusers: every process holds a piece of the tokens, and a layer sees that piece only.

`model.enable_parallelism(config=...)` cuts the sequence into contiguous pieces, one per process, and communicates
inside the attention call. Fusion works token by token, so each process takes its piece of the ratio. Predictions are
gathered, so all processes decide the same. Text in the same sequence is cut too: a process holds [its text, its video].
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...types import AttentionError
from ..context import FusionContext
from ..layers import AttentionLayer, AttentionLayers


def shard_of(module: Any) -> tuple[int, int] | None:
    """The piece, (number, count), that this process has of a diffusers network or processor; None if it is not cut."""
    config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    if mesh is None or mesh.size() == 1:
        return None
    return torch.distributed.get_rank(mesh.get_group()), mesh.size()


def is_cut(networks: Iterable[nn.Module]) -> bool:
    return any(shard_of(network) is not None for network in networks)


def local_piece(
    layers: AttentionLayers, layer: AttentionLayer, context: FusionContext, length: int
) -> tuple[Tensor, int | None]:
    """The part of the ratio, (batch, tokens), and the number of text tokens that this process holds at one layer."""
    processor = getattr(layer.module, "processor", None)
    shard, ratio, text = shard_of(processor), context.ratio, context.text
    if shard is None:
        if is_cut(layers.networks):
            raise AttentionError(
                f"context parallelism is enabled, but attention at layer {layer.name!r} ({type(processor).__name__}) "
                "does not communicate, as it does for Wan, LTX, Flux and Qwen-Image.\n"
                "  For this model leave enable_parallelism away."
            )
        return ratio, text
    if context.selection is not None:
        raise AttentionError(
            "context parallelism leaves each process some of the tokens; this lock needs their positions in the clip.\n"
            "  Make the lock after model.enable_parallelism(...), without kv_cache=; or KVLock(..., foreground=False)."
        )
    if layers.rows_apart or layers.extra != (0, 0):
        raise AttentionError(
            f"context parallelism with {'attention row by row' if layers.rows_apart else 'extra tokens'} is not "
            f"supported for architecture {layers.architecture!r}; leave enable_parallelism away."
        )
    if layer.text == "none" and length == ratio.shape[1]:
        return ratio, text  # a layer before the cut
    rank, count = shard
    ratio = ratio.tensor_split(count, dim=1)[rank]
    if layer.text != "none" and text is not None and length != ratio.shape[1] + text:
        # Plans cut the text along with the video, or leave it whole.
        text = len(torch.arange(text).tensor_split(count)[rank])
    return ratio, text


def refuse_cut(network: nn.Module) -> None:
    if is_cut(network.modules()):
        raise AttentionError(
            f"context parallelism is enabled on {type(network).__name__}, whose tokens sdpa_layers only counts.\n"
            "  Declare the model, kv.attention.Architecture(...).find(network), or leave enable_parallelism away."
        )
