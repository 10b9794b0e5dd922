"""The learning rate as a function of the step."""

import pytest
import torch

from arae import precision
from arae.config import Schedule
from arae.errors import InputError
from arae.train.micro import Average
from arae.train.schedule import factor


@pytest.mark.parametrize(
    ("schedule", "total", "steps", "expected"),
    [
        ({"kind": "constant"}, 10, [0, 9], [1, 1]),
        ({"kind": "step"}, 90, [0, 29, 30, 59, 60, 89], [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ({"kind": "step", "every": 0.5, "gamma": 0.5}, 7, [3, 4], [1, 0.5]),
        ({"kind": "linear"}, 10, [0, 5], [1, 0.5]),
        ({"kind": "cosine"}, 10, [0, 5], [1, 0.5]),
        ({"kind": "linear", "warmup": 0.2}, 10, [0, 1, 2, 6], [0.5, 1, 1, 0.5]),
        ({"kind": "constant", "warmup": 0.2}, 7, [0, 1, 2], [1 / 1.4, 1, 1]),
    ],
)
def test_factor(schedule: dict, total: int, steps: list[int], expected: list[float]) -> None:
    found = [factor(Schedule.model_validate(schedule), step, total) for step in steps]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["constant", "step", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.33])
@pytest.mark.parametrize("total", [1, 7, 100])
def test_a_factor_lies_in_0_1(kind: str, warmup: float, total: int) -> None:
    schedule = Schedule.model_validate({"kind": kind, "warmup": warmup})
    assert all(0 <= factor(schedule, step, total) <= 1 for step in range(total))


def test_average_is_the_exponential_moving_average() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    average = Average(layer, 0.9)
    shadow = layer.weight.detach().clone().double()
    for value in (1.0, -2.0, 0.5):
        torch.nn.init.constant_(layer.weight, value)
        average.update()
        shadow = 0.9 * shadow + 0.1 * value
    torch.testing.assert_close(average.weights(layer.state_dict())["weight"].double(), shadow, atol=1e-6, rtol=0)
    assert torch.equal(Average(layer, 0.0).weights(layer.state_dict())["weight"], layer.weight)


@pytest.mark.parametrize(
    ("wanted", "device", "bf16", "expected"),
    [
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp16"),  # a V100
        ("auto", "cpu", True, "bf16"),
        ("auto", "cpu", False, "fp32"),
        ("fp32", "cuda", True, "fp32"),
        ("bf16", "cpu", False, "bf16"),
    ],
)
def test_precision(monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, bf16: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: bf16)
    assert precision.resolve_precision(wanted, torch.device(device)) == expected


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="precision=bf16"):
        precision.resolve_precision("fp16", torch.device("cpu"))
