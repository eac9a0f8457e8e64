"""Rows of one model call: branches (uncond, cond, source) of a batch of clips, put together and taken apart again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class NotBatchable(Exception):  # noqa: N818 - a signal, not an error a user sees
    """These arguments cannot share one call, e.g. texts of different lengths."""


def join(values: Sequence[Any], batch: int) -> Any:
    """Concatenate one argument of several branches along the batch axis.

    Tensors whose first axis is the batch (or 1) are concatenated; mappings, tuples and lists of equal structure are
    joined leaf by leaf; a list with one entry per clip (prompts) is chained; anything else must be equal everywhere.

    Raises:
        NotBatchable: the branches differ in a way that rows cannot express.
    """
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, Tensor):
        if not all(isinstance(v, Tensor) and v.shape[1:] == first.shape[1:] for v in values):
            raise NotBatchable
        if first.ndim == 0 or any(v.shape[0] not in (1, batch) for v in values):
            if all(v is first for v in values):
                return first  # not per clip: a shared table, say
            raise NotBatchable
        return torch.cat([v.expand(batch, *v.shape[1:]) for v in values])
    if isinstance(first, Mapping):
        if any(not isinstance(v, Mapping) or v.keys() != first.keys() for v in values):
            raise NotBatchable
        return {k: join([v[k] for v in values], batch) for k in first}
    if isinstance(first, (list, tuple)):
        if any(type(v) is not type(first) or len(v) != len(first) for v in values):
            raise NotBatchable
        if len(first) == batch and all(isinstance(e, str) for v in values for e in v):
            return type(first)(e for v in values for e in v)
        joined = [join(list(parts), batch) for parts in zip(*values, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    if all(v is first or (type(v) is type(first) and v == first) for v in values):
        return first
    raise NotBatchable


def join_calls(calls: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Keyword arguments of several branches as those of one call."""
    if any(c.keys() != calls[0].keys() for c in calls):
        raise NotBatchable
    return {name: join([c[name] for c in calls], batch) for name in calls[0]}


def take(value: Any, index: Tensor, batch: int) -> Any:
    """The rows `index` of everything in `value` that has one row per clip; the rest as it is."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.ndim and value.shape[0] == batch > 1 else value
    if isinstance(value, Mapping):
        return {k: take(v, index, batch) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == batch > 1 and all(isinstance(e, str) for e in value):
            return type(value)(value[i] for i in index.tolist())
        parts = [take(v, index, batch) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
