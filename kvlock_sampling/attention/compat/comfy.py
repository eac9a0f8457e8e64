"""ComfyUI's attention, whatever kernel it chose:  optimized_attention(q, k, v, heads, ..., transformer_options={...}).

Before each of its kernels it looks for `optimized_attention_override` in the options of the call. So a locked module is
called with a copy of its options, whose override fuses, and then calls the override that it found there, or the kernel.
Nothing is left behind, and other packs' overrides act before or after. ComfyUI is not imported.

Some calls name tokens by their position: a first frame with its own timestep, guides with weights of their own, or
patches that cut the sequence into frames. Then no token can be left out: a run of the edited tokens only is refused.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...types import AttentionError
from ...utils.threads import compiler_imported
from ..context import current
from ..interception import taken

_KEY = "optimized_attention_override"


# Arguments of blocks and layers. A mask is by position if it is no tensor, as that of LTX-Video's guides.
_BY_POSITION = ("modulation_dims_img", "modulation_dims", "mask")


def overridden(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a module, with the override in a copy of its `transformer_options`, if it was given some."""
    options = kwargs.get("transformer_options")
    if not isinstance(options, dict):
        return kwargs
    named = [f"{n}=" for n in _BY_POSITION if kwargs.get(n) is not None and not isinstance(kwargs[n], Tensor)]
    if any((options.get("patches") or {}).values()):
        named.append('transformer_options["patches"]')
    if named and current().narrow:
        raise AttentionError(
            f"{named[0]} may name tokens by their position, so none can be left out of the computation.\n"
            "  Pass foreground=False to KVLock."
        )
    hidden = torch.compiler.disable(_override) if compiler_imported() else _override
    return {**kwargs, "transformer_options": {**options, _KEY: partial(hidden, options.get(_KEY))}}


def _override(
    found: Callable[..., Any] | None, kernel: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """(rows, length, heads * dim), or (rows, heads, length, dim) with `skip_reshape`; keys may have fewer heads."""
    call = kernel if found is None else partial(found, kernel)
    with taken() as rewrite:
        if rewrite is None:
            return call(query, key, value, *args, **kwargs)
        given = dict(zip(("heads", "mask"), args, strict=False)) | kwargs
        dim = query.shape[-1] if given.get("skip_reshape") else query.shape[-1] // given["heads"]

        def apart(x: Tensor) -> Tensor:
            return x if given.get("skip_reshape") else x.unflatten(-1, (-1, dim)).transpose(1, 2)

        def together(x: Tensor) -> Tensor:
            return x if given.get("skip_reshape") else x.transpose(1, 2).flatten(2)

        mask = given.get("mask")
        new_key, new_value, new_mask = rewrite(apart(query), apart(key), apart(value), mask)
        if new_mask is not mask:
            args, kwargs = args[:1], {**kwargs, "mask": new_mask}
        return call(query, together(new_key), together(new_value), *args, **kwargs)
