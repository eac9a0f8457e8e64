"""Branches (uncond, cond, source) of a batch of clips as the rows of one model call, and clips taken out of a batch."""

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .types import EstimatorError, RunError

_APART: Any = object()
"""A leaf of several branches that rows cannot express."""


def join_calls(calls: Sequence[dict[str, Any]], batch: int) -> dict[str, Any] | None:
    """The keyword arguments of several branches as those of one call; None if they cannot share one.

    Tensors whose first axis is the batch (or 1) are concatenated, and a list with one prompt per clip is chained.
    Dicts, tuples and lists of equal structure are joined leaf by leaf. Anything else must be equal everywhere, so texts
    of different lengths cannot share a call, and neither can lists of one text tensor (length, dim) per clip.
    """
    if len(calls) == 1:
        return calls[0]
    flat = [tree_flatten(_ordered(call), is_leaf=partial(_is_list, batch=batch)) for call in calls]
    spec = flat[0][1]
    if any(other != spec for _, other in flat):
        return None
    joined = [_join_leaf(parts, batch) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
    return None if any(leaf is _APART for leaf in joined) else tree_unflatten(joined, spec)


def _ordered(value: Any) -> Any:
    """Dicts in the order of their names, so that the order in which they were written says nothing."""
    return {name: _ordered(value[name]) for name in sorted(value, key=str)} if type(value) is dict else value


def _join_leaf(parts: Sequence[Any], batch: int) -> Any:
    first = parts[0]
    if all(part is first for part in parts) and not (_is_rows(first, batch) or _is_list(first, batch)):
        return first
    if isinstance(first, Tensor):
        alike = all(isinstance(part, Tensor) and part.shape[1:] == first.shape[1:] for part in parts)
        if not alike or not all(_is_rows(part, batch) for part in parts):
            return _APART
        return torch.cat([part.expand(batch, *part.shape[1:]) for part in parts])
    if all(_is_prompts(part) and len(part) == batch for part in parts):
        return type(first)(prompt for part in parts for prompt in part)
    # Arrays and dataclasses of tensors compare element by element.
    plain = isinstance(first, (int, float, complex, str, bytes, Enum, torch.dtype, torch.device, np.generic))
    return first if plain and all(type(part) is type(first) and part == first for part in parts) else _APART


def check_rows(arguments: Mapping[str, Any], batch: int, owner: str) -> None:
    """Raise RunError if a prompt, a tensor, a dict or a list of texts, has neither one row nor one for each clip.

    A model might broadcast it, or cut it to size, without a word.
    """
    for name in ("cond", "uncond"):
        value: Any = arguments.get(name)
        rows = len(value) if _is_prompts(value) or (isinstance(value, Tensor) and value.ndim) else 1
        if isinstance(value, Mapping):  # of texts (rows, length, dim), perhaps beside tables of another size
            leaves = [leaf for leaf in value.values() if isinstance(leaf, Tensor) and leaf.ndim]
            sizes = {len(leaf) for leaf in leaves if leaf.ndim > 2}
            rows = sizes.pop() if len(sizes) == 1 and not any(len(leaf) in (1, batch) for leaf in leaves) else 1
        if rows not in (1, batch):
            raise RunError(
                f"{name} in {owner} has {rows} rows for {batch} clip(s) in x; expected one, or one for each clip: "
                + (f"{name}={name}[:{batch}], or as many rows of x" if rows > batch else "repeat what clips share")
                + f". Of one text without an axis of clips {name}={name}[None]." * isinstance(value, Tensor)
            )


def check_points(points: Tensor, x: Tensor) -> None:
    """Raise EstimatorError unless an estimator's points to probe are whole batches of x."""
    if points.shape[1:] != x.shape[1:] or len(points) % len(x) or not len(points):
        raise EstimatorError(
            f"an estimator probed {tuple(points.shape)} for latents of shape {tuple(x.shape)}; expected rows in a "
            "multiple of the batch: x.repeat(k, 1, 1, 1, 1)."
        )


def split_rows(out: Any, like: Tensor, branches: int) -> list[Tensor]:
    """What a call of the model returned, as the rows of each branch. Raises RunError if they are not like its input."""
    batch = len(like)
    if not isinstance(out, Tensor):
        raise RunError(f"the model returned {type(out).__name__}; expected x0-hat, a tensor like x: return out.sample?")
    if len(out) != branches * batch or out.shape[1:] != like.shape[1:]:
        raise RunError(
            f"the model returned {len(out)} rows of {tuple(out.shape[1:])}; expected {branches * batch} of "
            f"{tuple(like.shape[1:])}, for {branches} branch(es) of {batch} clip(s).\n  x0-hat has the shape of x, and "
            f"tensors in extra_args have one row, or one for each row of x: {batch}."
        )
    return list(out.clone().split(batch))  # a network may write its next result to the same memory


def _is_rows(value: Any, batch: int) -> bool:
    """Whether a leaf has one entry per clip, or one entry that stands for all clips."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) in (1, batch)


def _is_prompts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, str) for each in value)


def _is_list(value: Any, batch: int) -> bool:
    """Whether a list holds prompts, or may hold one tensor per clip, none of which has an axis of rows."""
    tensors = isinstance(value, list) and len(value) == batch and all(isinstance(each, Tensor) for each in value)
    return _is_prompts(value) or (tensors and not any(_is_rows(each, batch) for each in value))


def per_row(value: Tensor, x: Tensor) -> Tensor:
    """One number, or one for each clip, broadcastable to x."""
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def take(value: Any, index: Tensor, batch: int) -> Any:
    """The rows `index` of every leaf with one row per clip of a batch of `batch`; other leaves stay as they are."""
    # A prompt may be a list of one text (length, dim) per clip. Another list may be of tables of all clips.
    index = torch.as_tensor(index)
    index = torch.arange(batch, device=index.device)[index]  # of a mask of clips, too
    prompts = [value[name] for name in ("cond", "uncond") if isinstance(value, Mapping) and name in value]
    lists = [each for each in prompts if _is_list(each, batch) and not _is_prompts(each)]
    texts = {id(each) for each in lists if len({text.shape[1:] for text in each}) == 1}

    def is_list(leaf: Any) -> bool:
        return _is_prompts(leaf) or id(leaf) in texts

    def rows(leaf: Any) -> Any:
        if batch > 1 and isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == batch:
            return leaf[index.to(leaf.device)]
        if batch > 1 and is_list(leaf) and len(leaf) == batch:
            return type(leaf)(leaf[i] for i in index.tolist())
        return leaf

    return tree_map(rows, value, is_leaf=is_list)
