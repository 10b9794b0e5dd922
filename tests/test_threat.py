"""Threat models: their balls, projections and random points, and what is no threat model."""

import numpy as np
import pytest
import torch

from arae import by_image
from arae.attacks import Threat


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 0.5)])
def test_random_starts_fill_the_ball(norm, eps):
    threat = Threat(norm, eps)
    x = torch.zeros(20000, 1, 2, 1)
    delta = threat.sample(x, torch.Generator().manual_seed(0))
    length = threat.length(delta)
    assert length.max() <= eps * (1 + 1e-6)
    # Uniform in two dimensions: a quarter of the points lie within half of the radius, for the disc as for the square.
    assert (length < eps / 2).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert delta.mean(0).abs().max() < 0.01


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_projection_is_idempotent_and_keeps_what_is_inside(norm):
    threat = Threat(norm, 0.5)
    delta = torch.randn(50, 3, 4, 4) * torch.logspace(-4, 2, 50).view(-1, 1, 1, 1)
    delta[0] = 0
    once = threat.project(delta)
    assert threat.length(once).max() <= 0.5 * (1 + 1e-6)
    torch.testing.assert_close(threat.project(once), once)
    inside = threat.length(delta) <= 0.5
    assert inside.any()
    assert torch.equal(once[inside], delta[inside])


def in_numpy(norm: str, eps: float, images, x, gradient, size: float) -> np.ndarray:
    """One step of projected ascent, image by image in float64."""
    out = []
    for image, origin, slope in zip(images, x, gradient, strict=True):
        if norm == "linf":
            delta = np.clip(image - origin + size * np.sign(slope), -eps, eps)
        else:
            length = np.linalg.norm(slope / max(np.abs(slope).max(), 1e-300))
            direction = slope / max(np.abs(slope).max(), 1e-300) / max(length, 1e-300)
            delta = image - origin + size * direction
            delta *= min(1, eps / max(np.linalg.norm(delta), 1e-300))
        out.append(np.clip(origin + delta, 0, 1))
    return np.stack(out)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("norm", "eps", "size"), [("l2", 0.5, 0.2), ("l2", 3.0, 5.0), ("linf", 0.1, 0.03)])
def test_a_step_is_that_of_a_plain_reference(norm, eps, size, last, one_by_one, monkeypatch):
    monkeypatch.setattr(by_image, "LARGE", 1 if one_by_one else 10**9)
    threat, generator = Threat(norm, eps), torch.Generator().manual_seed(0)
    x = torch.rand(6, 3, 5, 4, generator=generator)
    images = (x + threat.sample(x, generator)).clamp(0, 1)
    gradient = torch.randn(x.shape, generator=generator) * torch.logspace(-35, 3, 6).view(-1, 1, 1, 1)
    gradient[2], gradient[3] = 0, -1e-42  # none, and one below the normal numbers
    if last:
        x, images, gradient = (each.contiguous(memory_format=torch.channels_last) for each in (x, images, gradient))
    before = [each.clone() for each in (x, images, gradient)]
    moved = threat.move(images, x, gradient, size)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, images, gradient), strict=True))
    assert moved.stride() == x.stride()
    expected = in_numpy(norm, eps, *(each.double().numpy() for each in (images, x, gradient)), size)
    np.testing.assert_allclose(moved.numpy(), expected, atol=2e-6)
    assert threat.length(moved - x).max() <= eps * (1 + 1e-5)
    if norm == "l2":  # a gradient that is no number is not taken for one
        gradient[1] = float("nan")
        assert threat.move(images, x, gradient, size)[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_zero_gradient_moves_nothing_in_any_format(dtype):
    x = torch.rand(2, 3, 4, 4, dtype=torch.float32).to(dtype)
    assert torch.equal(Threat("l2", 0.5).move(x, x, torch.zeros_like(x), 0.2), x)
    assert not Threat("l2", 0.5).steepest(torch.zeros_like(x)).any()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 6, 5)])
def test_lengths_are_numpys(norm, shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = delta.flatten(1).numpy()
    expected = np.linalg.norm(rows, ord=2 if norm == "l2" else np.inf, axis=1)
    np.testing.assert_allclose(Threat(norm, 0.5).length(delta).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [("l2", -1, "negative"), ("l2", "inf", "can't be"), ("l2", float("nan"), "finite"), ("linf", 8, "8/255"),
     ("l1", 1, "norm 'l1'"), (None, 1, "norm None"), ("l2", "8px", "8px"), ("l2", "-8/255", "negative")],
)  # fmt: skip
def test_impossible_threats_are_refused(norm, eps, message):
    with pytest.raises(ValueError, match=message):
        Threat(norm, eps)


def test_threats_are_values():
    assert Threat("linf", "8/255") == Threat("linf", 8 / 255)
    assert len({Threat("l2", 1), Threat("l2", 1.0)}) == 1
    with pytest.raises(AttributeError):
        Threat("l2", 1).eps = 2  # type: ignore[misc]
