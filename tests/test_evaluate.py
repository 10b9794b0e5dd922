"""Records hold what was measured: a model whose numbers can be told by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import through
from training import tiny_recipe

from arae import metrics
from arae.config import Recipe
from arae.evaluate import Batches, Evaluation, alone
from arae.models import create_encoder
from arae.models.autoencoder import Autoencoder, load_autoencoder, save_part
from arae.records import Record


def stub() -> Autoencoder:
    """A model that passes images on as features, sees class 1 where the image is bright, and answers 0.9 times it."""
    model, _ = through(0.9)

    def classify(x: torch.Tensor) -> torch.Tensor:
        light = x.mean((1, 2, 3)) - 0.5
        return torch.stack([-light, light, 0 * light - 9], dim=1)

    model.encoder.forward = classify  # type: ignore[method-assign]
    return model


def measured(recipe: Recipe, images: torch.Tensor, labels: torch.Tensor) -> list[Record]:
    batches = Batches.of(recipe, stub(), images)
    with alone(batches) as team:
        return Evaluation(batches, images, labels, team, lambda label, done, total: None).records()


def test_every_value_is_what_it_says(tiny_npz: Path) -> None:
    """Batches of 4, of which the last holds one image; the attack darkens or brightens by a known amount."""
    levels = torch.tensor([100, 120, 140, 150, 200, 220, 110, 130, 160], dtype=torch.uint8)
    images = levels[:, None, None, None].expand(9, 3, 16, 16).contiguous()
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 0, 1, 1])  # the sixth is wrong
    attack = {"norm": "linf", "eps": 0.05, "steps": 4}
    recipe = tiny_recipe(tiny_npz, evaluate__batch=4, evaluate__attacks=[attack])
    records = {(r.metric, r.protocol, r.threat is not None): r for r in measured(recipe, images, labels)}

    clean = records["clean_accuracy", "classification", False]
    assert (clean.value, clean.n) == (pytest.approx(8 / 9), 9)
    assert clean.interval == pytest.approx(metrics.wilson(8, 9))
    # 0.05 is 12.75 levels: those within that of 127.5 are lost as well (120, 140 and 130)
    assert records["robust_accuracy", "classification", True].value == pytest.approx(5 / 9)

    x = levels.double().numpy() / 255

    def psnr(made: np.ndarray) -> float:
        return float(np.mean(-20 * np.log10(np.abs(made - x))))

    assert records["psnr", "reconstruction", False].value == pytest.approx(psnr(0.9 * x), abs=1e-3)
    assert records["psnr", "mean-image", False].value == pytest.approx(psnr(np.full(9, x.mean())), abs=1e-2)
    rolled = np.concatenate([0.9 * np.roll(x[:4], 1), 0.9 * np.roll(x[4:8], 1), [np.nan]])
    others = -20 * np.log10(np.abs(rolled - x)[:8])
    assert records["psnr", "other-features", False].value == pytest.approx(others.mean(), abs=1e-2)
    assert records["psnr", "other-features", False].n == 8  # the last image has no other in its batch
    # Under attack, the reconstruction of the attacked image is held against the clean one.
    direction = np.where(labels.numpy() == 1, -1, 1)
    assert records["psnr", "reconstruction", True].value == pytest.approx(psnr(0.9 * (x + 0.05 * direction)), abs=1e-2)


def test_a_metric_that_can_not_be_had_is_null_with_its_reason(tiny_npz: Path) -> None:
    images, labels = torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    recipe = tiny_recipe(tiny_npz, evaluate__lpips="alex", evaluate__attacks=[])
    (lpips,) = [r for r in measured(recipe, images, labels) if r.metric == "lpips"]
    assert lpips.value is None
    assert "px" in (lpips.reason or "")


def test_a_model_folder_gives_the_model_back(tmp_path: Path) -> None:
    from arae.models import create_decoder

    torch.manual_seed(0)
    encoder = create_encoder("small-cnn", 3, 3, 16)
    decoder = create_decoder("mirror", encoder.feature_shape((3, 16, 16)), (3, 16, 16))
    common = {"image_shape": [3, 16, 16], "classes": ["a", "b", "c"], "train_norm": None, "train_eps": 0.0}
    entry = {"name": "small-cnn", "layer": "conv4", "num_classes": 3}
    save_part(tmp_path / "model", "encoder", encoder.state_dict(), entry, common)
    save_part(tmp_path / "model", "decoder", decoder.state_dict(), {"name": "mirror"}, common)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    for path in (tmp_path, tmp_path / "model"):
        model = load_autoencoder(path)
        assert not model.encoder.training
        again = model.reconstruct(x)
        assert not again.requires_grad
        assert torch.equal(again, decoder.eval()(encoder.eval().features(x)))
        assert torch.equal(model.decode(model.encode(x)), again)
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        model.encode(torch.rand(2, 1, 16, 16))
    file = tmp_path / "model" / "decoder.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    from arae.errors import InputError

    with pytest.raises(InputError, match="sha256 differs"):
        load_autoencoder(tmp_path)
    (tmp_path / "model" / "config.json").write_text('{"encoder": {}}')
    with pytest.raises(InputError, match="not an arae model"):
        load_autoencoder(tmp_path)
