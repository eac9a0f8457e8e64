"""Dropout for models that ship without any: forward hooks that exist only within a `with` block.

`dropout_hooks(model, rate, seed)` makes one thinned network: in each chosen linear layer the same random output units
are 0 for all rows and tokens, the others are scaled by 1 / (1 - rate). Sharing the units is what makes it a draw of a
*network* (Gal & Ghahramani, arXiv 1506.02142 and, for sequences, 1512.05287), keeps a clip independent of its batch,
and costs one small vector per layer. By default the layers that write into a transformer block's residual stream.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..types import EstimatorError

RESIDUAL = (
    r"\.\d+\.(.*\.)?("
    r"to_out\.0|to_out|to_add_out|out_proj|proj_out|attn_proj|\w+_attn_proj|o|wo|"  # attention
    r"net\.2|ff\w*\.2|mlp\.2|fc2|linear2|w2|down_proj"  # feed-forward
    r")$"
)
"""Names, inside a numbered block, of the linear layers that end attention and feed-forward; diffusers' and others'."""


def droppable(model: nn.Module, select: str | None = None) -> dict[str, nn.Linear]:
    """The linear layers of `model` by name that `select`, a regular expression (None: `RESIDUAL`), is found in.

    Raises:
        EstimatorError: there is none; the message shows some names that there are.
    """
    pattern = re.compile(RESIDUAL if select is None else select)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = {name: m for name, m in linears.items() if pattern.search(f".{name}")}
    if not chosen:
        shown = ", ".join(list(linears)[:12]) or "none at all"
        raise EstimatorError(
            f"no linear layer of {type(model).__name__} to drop units of: {select or 'the usual names'!r} fits none.\n"
            f"  Its linear layers: {shown}. Name some by a regular expression: select=r'ffn\\.2$'."
        )
    return chosen


@contextmanager
def dropout_hooks(model: nn.Module, rate: float, seed: int, select: str | None = None) -> Iterator[None]:
    """Within the block, and in this thread only, `model` computes as one thinned network; the same seed, the same one.

    rate: share of output units dropped, in [0, 1); 0 changes nothing. Hooks are removed by handle, whatever happened.
    """
    owner = threading.get_ident()

    def thinned(keep: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if threading.get_ident() != owner:
                return None
            return output * keep.to(output)

        return hook

    with ExitStack() as stack:
        if rate > 0:
            for index, module in enumerate(droppable(model, select).values()):
                generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
                keep = torch.rand(module.out_features, generator=generator) >= rate
                stack.callback(module.register_forward_hook(thinned(keep / (1 - rate))).remove)
        yield
