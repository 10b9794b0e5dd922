"""Threat models: their balls, projections and random points, and what is no threat model."""

import pytest
import torch

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
