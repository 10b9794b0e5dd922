"""A classifier of torchvision's, tapped at a named layer, with a derived decoder, on a folder of photographs' size."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import test_cli
import yaml
from PIL import Image
from test_cli import Run, refused

arae_here = test_cli.arae_here
SIDES = [(64, 48), (50, 80), (64, 64), (71, 59)]  # width and height, pixels


def make_folder(root: Path) -> Path:
    """16 colour images of odd sizes in two classes: stripes across, stripes down."""
    random = np.random.default_rng(0)
    for i in range(16):
        width, height = SIDES[i % len(SIDES)]
        wave = np.sin(np.arange(max(width, height)) * random.uniform(0.3, 0.9)) * 0.5 + 0.5
        stripes = np.broadcast_to(wave[:height, None] if i % 2 else wave[None, :width], (height, width))
        pixels = 255 * stripes[..., None] * random.uniform(0.4, 1, 3) * random.uniform(0.8, 1, (height, width, 3))
        folder = root / "photographs" / ("across" if i % 2 else "down")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return root / "photographs"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The encoder is named on the command line; 32 px, two steps of each stage."""
    from arae.data.encode import EncodeOptions, encode

    options = EncodeOptions.model_validate({"split": "all", "size": 32, "crop": True, "workers": 1})
    encode(str(make_folder(tmp_path)), tmp_path / "photographs.beton", options)
    stage = {"steps": 2, "batch": 8, "micro_batch": 4}
    document = {
        "name": "photographs",
        "scale": "small",
        "data": {"train": "photographs.beton", "test": "photographs.beton", "size": 32},
        "encoder": {"name": "small-cnn", **stage, "lr": 0.001, "attack": {"norm": "l2", "eps": 0.5, "steps": 1}},
        "decoder": {**stage, "losses": {"pixel": 1.0, "feature": 0.01, "adversarial": 0.01}},
        "evaluate": {"lpips": None, "batch": 8, "attacks": [{"norm": "l2", "eps": 0.5, "steps": 1}]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


RESNET = ["encoder.name=torchvision/resnet50", "encoder.layer=layer3"]


@pytest.mark.integration
def test_resnet50_trains_with_a_derived_decoder_on_an_image_folder(run_arae: Run, recipe: Path) -> None:
    trained = run_arae("train", recipe, *RESNET)
    assert trained.returncode == 0, trained.stderr
    measured = run_arae("evaluate", recipe, *RESNET, "evaluate.n=8")
    assert measured.returncode == 0, measured.stderr
    run = Path(os.environ["ARAE_RUNS"]) / "photographs"
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert {"clean_accuracy", "robust_accuracy", "psnr", "ssim"} <= {record["metric"] for record in records}
    for record in records:
        assert (record["model"]["encoder"], record["model"]["layer"]) == ("torchvision/resnet50", "layer3")
        assert record["n"] == 8
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["decoder"]["name"] == "mirror"
    assert config["classes"] == ["across", "down"]


@pytest.mark.parametrize("verb", ["validate", "train"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["encoder.layer=layer5"], ["torchvision/resnet50", "'layer5'", "layer1", "layer4"]),
        (["encoder.layer=fc"], ["torchvision/resnet50", "fc", "layer1", "layer4"]),
        (["encoder.layer=avgpool"], ["torchvision/resnet50"]),
        (["decoder.name=alexnet-conv5"], ["alexnet-conv5", "(1024, 2, 2)", "mirror"]),
        (["encoder.name=torchvision/resnet51"], ["resnet51", "resnet50"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    arae_here: Run, recipe: Path, verb: str, change: list[str], said: list[str]
) -> None:
    refused(arae_here(verb, recipe, *RESNET, *change), *said)
    assert not (Path(os.environ["ARAE_RUNS"]) / "photographs").exists()
