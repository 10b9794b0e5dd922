"""What is best where several things count: non-dominated points, the volume that they cover, the knee.

Values are [n, k]: n points, k objectives; `signs` [k] has +1 where more is better and -1 where less is. A point
dominates another that it is nowhere worse than and somewhere better. Points with a value that is not a number are not
compared: they dominate nothing, nothing dominates them, and no front has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def front(values: ArrayLike, signs: Sequence[int]) -> NDArray[np.intp]:
    """Indices of the points that no other dominates, in the order given; equal points are all in it."""
    better = _upwards(values, signs)
    whole = ~np.isnan(better).any(axis=1)
    return np.flatnonzero(whole & ~_dominated(better, better))


def contenders(low: ArrayLike, high: ArrayLike, signs: Sequence[int]) -> NDArray[np.intp]:
    """Indices of the points that no other dominates for certain: by the near ends of all their intervals.

    low, high: [n, k], the ends of each value's interval. Whatever the true values within them are, the front is among
    these. A point that is here and not in the front of the values themselves is one whose interval overlaps it.
    """
    ends = np.stack([_upwards(low, signs), _upwards(high, signs)])
    whole = ~np.isnan(ends).any(axis=(0, 2))
    return np.flatnonzero(whole & ~_dominated(ends.max(axis=0), ends.min(axis=0)))


def hypervolume(values: ArrayLike, signs: Sequence[int], ideal: ArrayLike, nadir: ArrayLike) -> float:
    """The share, in [0, 1], of the box between `nadir` and `ideal` that the points dominate (Zitzler & Thiele 1999).

    ideal, nadir: [k], the best and the worst value of each objective. Points outside the box count up to its edge. An
    objective for which the two are equal takes no part; with no other, any point within reach of the ideal covers all.
    """
    best, worst = _upwards(np.atleast_2d(ideal), signs)[0], _upwards(np.atleast_2d(nadir), signs)[0]
    if (best < worst).any():
        raise ValueError(f"nadir {nadir} is better than ideal {ideal} somewhere")
    kept = best > worst
    points = _upwards(values, signs)
    points = points[~np.isnan(points).any(axis=1)]
    if not kept.any():
        return float((points >= best).all(axis=1).any())
    scaled = np.clip((points[:, kept] - worst[kept]) / (best - worst)[kept], 0, 1)
    return float(_volume(scaled[(scaled > 0).all(axis=1)]))


def knee(values: ArrayLike, signs: Sequence[int]) -> int | None:
    """Index of the front's knee, where a little more of one objective begins to cost much of the others.

    It is the point whose objectives, each scaled to [0, 1] over the front, have the largest sum: with two, the point
    farthest from the line through the front's ends (Das 1999). None where that is one of the ends, or no farther.
    """
    found = front(values, signs)
    if len(found) < 3:
        return None
    points = _upwards(values, signs)[found]
    low, high = points.min(axis=0), points.max(axis=0)
    varied = high > low
    if not varied.any():
        return None
    sums = ((points - low)[:, varied] / (high - low)[varied]).sum(axis=1)
    ends = {int(points[:, i].argmax()) for i in np.flatnonzero(varied)}
    best = int(sums.argmax())
    if best in ends or sums[best] <= max(sums[i] for i in ends) + 1e-12:
        return None
    return int(found[best])


def _upwards(values: ArrayLike, signs: Sequence[int]) -> Floats:
    """As more is better, [n, k]."""
    given, turned = np.asarray(values, np.float64), np.asarray(signs, np.float64)
    if given.ndim != 2 or given.shape[1] != len(turned) or not np.isin(turned, (-1, 1)).all():
        raise ValueError(f"values {given.shape} and signs {tuple(signs)}: write [n, k] and k times +1 or -1")
    return given * turned


def _dominated(points: Floats, by: Floats) -> NDArray[np.bool_]:
    """For each of `points` whether any of `by` dominates it."""
    nowhere_worse = (by[:, None] >= points[None]).all(axis=2)
    somewhere_better = (by[:, None] > points[None]).any(axis=2)
    return np.asarray((nowhere_worse & somewhere_better).any(axis=0))


def _volume(points: Floats) -> float:
    """What points in [0, 1]^k dominate down to 0: slices along the last objective, each of the points that reach it."""
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(points.max())
    points = points[np.argsort(-points[:, -1])]
    below = np.append(points[1:, -1], 0.0)
    total = 0.0
    for i, thick in enumerate(points[:, -1] - below):
        if thick > 0:
            slab = points[: i + 1, :-1]
            total += thick * _volume(slab[~_dominated(slab, slab)])
    return total
