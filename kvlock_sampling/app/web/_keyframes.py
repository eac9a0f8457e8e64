"""A mask over time from drawings on a few frames.

Between two drawings the outline moves and changes its shape:  the mask is where (1 - w) * A + w * B < 0,  with A and B
the signed distances to the two outlines, both moved so that their centres of mass meet, and w in (0, 1) the place
between the two frames. Before the first drawing and after the last one the mask holds still.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from scipy import ndimage

Region: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


def over_time(drawn: Mapping[int, Region], frames: int) -> Region:
    """Fill the frames between drawings.

    Args:
        drawn: Regions (height, width) by frame, at least one, none of them empty; True = edit.
        frames: Length of the clip, > the last drawn frame.

    Returns:
        (frames, height, width). A drawn frame is returned as it was drawn, and no frame is empty.
    """
    known = sorted(drawn)
    mask = np.stack([drawn[min(known, key=lambda k: (abs(k - frame), k))] for frame in range(frames)])
    for first, last in pairwise(known):
        for frame in range(first + 1, last):
            between = _between(drawn[first], drawn[last], (frame - first) / (last - first))
            mask[frame] = between if between.any() else mask[frame]  # Outlines of unlike shapes may cancel out.
    return mask


def _between(a: Region, b: Region, weight: float) -> Region:
    if np.array_equal(a, b):
        return a
    move = np.subtract(ndimage.center_of_mass(b), ndimage.center_of_mass(a))
    from_a, from_b = _moved(a, weight * move), _moved(b, (weight - 1) * move)
    return (1 - weight) * from_a + weight * from_b < 0


def _moved(region: Region, move: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The signed distance to the outline of a region, negative inside, moved by (rows, columns)."""
    away = np.full(region.shape, float(sum(region.shape)))  # scipy's distance to nothing is not defined.
    inside = away if region.all() else ndimage.distance_transform_edt(region)
    distance = ndimage.distance_transform_edt(~region) - inside
    return ndimage.shift(distance, move, order=1, mode="nearest")
