"""Fronts against comparing every pair, volumes against sampling, and what must hold of both."""

import itertools

import numpy as np
import pytest

from tune.front import contenders, front, hypervolume, knee

SIGNS = {1: (1,), 2: (1, -1), 3: (1, -1, 1), 4: (-1, 1, 1, -1)}


def dominates(one: np.ndarray, other: np.ndarray, signs: tuple[int, ...]) -> bool:
    better = [sign * (a - b) for sign, a, b in zip(signs, one, other, strict=True)]
    return min(better) >= 0 and max(better) > 0


def some_points(k: int, n: int = 40) -> np.ndarray:
    """Rounded, so that some are equal in some objectives."""
    return np.random.default_rng(k).random((n, k)).round(1)


@pytest.mark.parametrize("k", SIGNS)
def test_the_front_is_what_no_other_point_dominates(k: int) -> None:
    points, signs = some_points(k), SIGNS[k]
    expected = [i for i, p in enumerate(points) if not any(dominates(q, p, signs) for q in points)]
    assert front(points, signs).tolist() == expected


@pytest.mark.parametrize("k", SIGNS)
def test_the_volume_is_that_of_random_places_dominated(k: int) -> None:
    points, signs = some_points(k, 12), np.array(SIGNS[k])
    ideal, nadir = (signs > 0).astype(float), (signs < 0).astype(float)
    places = np.random.default_rng(9).random((20_000, k))
    reached = ((points * signs)[None] >= (places * signs)[:, None]).all(axis=2).any(axis=1)
    assert hypervolume(points, SIGNS[k], ideal, nadir) == pytest.approx(reached.mean(), abs=0.015)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_volume_is_optunas(k: int) -> None:
    optuna = pytest.importorskip("optuna._hypervolume")
    points = some_points(k, 12)
    theirs = optuna.compute_hypervolume(points, np.ones(k))  # less is better there, down from the reference
    assert hypervolume(points, (-1,) * k, np.zeros(k), np.ones(k)) == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("values", "share"),
    [
        ([[1, 0]], 1.0),
        ([[0, 1]], 0.0),
        ([[0.5, 0.5]], 0.25),
        ([[2, -3]], 1.0),  # beyond the ideal
        ([[0.5, 0.5], [0.5, 0.5], [0.4, 0.6]], 0.25),
        ([[np.nan, 0], [0.5, 0.5]], 0.25),
        (np.empty((0, 2)), 0.0),
    ],
)
def test_shares_of_the_box(values: object, share: float) -> None:
    assert hypervolume(values, (1, -1), (1, 0), (0, 1)) == pytest.approx(share)


def test_objectives_in_which_nothing_differs_take_no_part() -> None:
    assert hypervolume([[0.5, 7]], (1, 1), (1, 7), (0, 7)) == pytest.approx(0.5)
    assert hypervolume([[3, 7]], (1, 1), (3, 7), (3, 7)) == 1.0
    assert hypervolume([[2, 7]], (1, 1), (3, 7), (3, 7)) == 0.0


def test_more_points_never_cover_less_and_dominated_ones_add_nothing() -> None:
    points = some_points(3)
    sizes = [hypervolume(points[:n], (1, 1, 1), (1, 1, 1), (0, 0, 0)) for n in range(len(points) + 1)]
    assert (np.diff(sizes) >= -1e-12).all()
    best = points[front(points, (1, 1, 1))]
    assert hypervolume(best, (1, 1, 1), (1, 1, 1), (0, 0, 0)) == pytest.approx(sizes[-1])


def test_whatever_the_true_values_are_the_front_is_among_the_contenders() -> None:
    numbers, signs = np.random.default_rng(5), (1, -1)
    middle = numbers.random((15, 2))
    width = 0.1 * numbers.random((15, 2))
    kept = set(contenders(middle - width, middle + width, signs).tolist())
    assert set(front(middle, signs).tolist()) <= kept < set(range(15))
    for _ in range(200):
        true = middle + width * numbers.uniform(-1, 1, middle.shape)
        assert set(front(true, signs).tolist()) <= kept
    # Nobody is there in vain: with its best luck and the others' worst, each is in the front.
    for i in kept:
        lucky = middle - width * signs
        lucky[i] = middle[i] + width[i] * signs
        assert i in front(lucky, signs)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 1], [0.8, 0.8], [1, 0]], 1),
        ([[0, 100], [0.8, 80], [0.1, 99], [1, 0]], 1),  # each on its own scale
        ([[0, 1], [0.5, 0.5], [1, 0]], None),  # on the line
        ([[0, 1], [0.3, 0.3], [1, 0]], None),  # inside it
        ([[0, 1], [1, 0]], None),
        ([[1, 1]], None),
        ([[0.9, 0.1], [0, 1], [0.7, 0.7], [np.nan, 2], [1, 0], [0.1, 0.1]], 2),
        ([[0, 1], [1, 0], [1, 0]], None),  # three points, but only the two ends
        ([[0.5, 0.5]] * 3, None),
    ],
)
def test_the_knee(values: list[list[float]], expected: int | None) -> None:
    assert knee(values, (1, 1)) == expected
    for order in itertools.islice(itertools.permutations(range(len(values))), 30):
        found = knee([values[i] for i in order], (1, 1))
        assert found is None if expected is None else found is not None and order[found] == expected


@pytest.mark.parametrize("signs", [(1,), (1, 2), (1, 0)])
def test_signs_that_do_not_fit(signs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="signs"):
        front([[1, 2]], signs)


def test_a_nadir_that_is_better_than_the_ideal() -> None:
    with pytest.raises(ValueError, match="better than ideal"):
        hypervolume([[1, 2]], (1, -1), (0, 0), (1, 1))
