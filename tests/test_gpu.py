"""The same recipe on a GPU, in low precision, from a resident set."""

from pathlib import Path

import pytest
import torch
from training import tiny_recipe, weights

from arae.evaluate import evaluate
from arae.runs import RunFolder
from arae.train.run import train


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_recipe_trains_and_is_measured_on_a_gpu(tmp_path: Path, tiny_npz: Path, precision: str) -> None:
    recipe = tiny_recipe(tiny_npz, precision=precision)
    folder = RunFolder(tmp_path / "run")
    folder.create(recipe)
    train(recipe, folder, torch.device("cuda"))
    assert len(weights(folder)) == 2
    records = evaluate(recipe, folder, torch.device("cuda"))
    assert {r.hardware["precision"] for r in records} == {precision}
    assert {r.hardware["device"] for r in records} == {torch.cuda.get_device_name()}
