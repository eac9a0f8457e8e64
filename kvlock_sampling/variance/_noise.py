"""Random draws of estimators: seeded per measurement, so that a rewound run repeats itself, and the same for every clip
of a batch, so that a clip alone and in a batch agree. Drawn in float32 on the latents' own device.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..types import EstimatorError


def draw(
    kind: Literal["normal", "signs"],
    passes: int,
    like: Tensor,
    count: int,
    seed: int,
    seeds: tuple[int, ...] | None = None,
) -> Tensor:
    """Fresh values for `passes` copies of `like`, clip-major as `like.repeat(passes, ...)`: (passes * batch, ...).

    kind: "normal" for unit noise, "signs" for +1 and -1 (Rademacher). count: which measurement of the run this is.
        Passes of unit noise are orthogonal to one another, so that each looks where the others did not.
    seed: one draw for all clips. seeds: (batch,) integers instead, a draw of its own for each clip.

    Raises:
        EstimatorError: `seeds` does not have one entry per clip.
    """
    clips = len(like)
    if seeds is not None and len(seeds) != clips:
        raise EstimatorError(f"seeds has {len(seeds)} entries for a batch of {clips} clips; give one per clip.")
    draws = []
    for own in (seed,) if seeds is None else seeds:
        generator = torch.Generator(like.device).manual_seed((own * 1_000_003 + count) % 2**63)
        shape = (passes, 1, *like.shape[1:])
        values = torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32)
        draws.append(_orthogonal(values) if kind == "normal" else torch.where(values < 0, -1.0, 1.0))
    values = torch.cat(draws, dim=1).expand(passes, clips, *like.shape[1:])
    return values.reshape(passes * clips, *like.shape[1:])


def check_seeds(seed: int, seeds: tuple[int, ...] | None) -> None:
    """The door of an estimator that draws.

    Raises:
        EstimatorError: a seed for all clips beside one for each.
    """
    if seeds is not None and seed != 0:
        raise EstimatorError(
            f"seed={seed} beside seeds={seeds}; expected one of them: seed={seed} for all clips, or seeds with one per "
            f"clip, e.g. seeds={tuple(seed + i for i in range(len(seeds)))}."
        )


def _orthogonal(values: Tensor) -> Tensor:
    """Gaussian draws (passes, 1, ...) made orthogonal, each keeping its length: every one stays Gaussian, for its
    direction is still uniform and its length independent of it, but together they cover space evenly.
    """
    rows = values.flatten(1)
    if not 1 < len(rows) <= rows.shape[1]:
        return values
    lengths = rows.norm(dim=1, keepdim=True)
    basis: list[Tensor] = []
    for row in rows:
        for other in basis:
            row = row - (row @ other) * other
        basis.append(row / row.norm())
    return (torch.stack(basis) * lengths).view_as(values)


def copies(values: Tensor, passes: int) -> Tensor:
    """`values`, (batch, ...), `passes` times over, clip-major: (passes * batch, ...)."""
    return values.repeat(passes, *[1] * (values.ndim - 1))
