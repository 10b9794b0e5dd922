"""A recipe small enough to train in a test, with all three losses."""

from pathlib import Path

from arae.config import Recipe
from arae.runs import RunFolder

BATCH = 32


def tiny_recipe(images: Path, **overrides: object) -> Recipe:
    """Encoder by PGD-2, decoder by pixel, feature and GAN losses, on an `.npz`; overrides with __ for dots."""
    document = {
        "name": "tiny",
        "seed": 3,
        "precision": "fp32",
        "data": {
            "train": str(images),
            "test": str(images),
            "size": 16,
            "channels": 3,
            "augment": ["flip", "shift"],
            "pad": 1,
        },
        "encoder": {
            "name": "small-cnn",
            "steps": 7,
            "batch": BATCH,
            "micro_batch": BATCH // 2,
            "lr": 0.05,
            "ema": 0.9,
            "label_smoothing": 0.1,
            "schedule": {"kind": "cosine", "warmup": 0.2},
            "attack": {"norm": "l2", "eps": 0.5, "steps": 2, "random_start": True},
        },
        "decoder": {
            "steps": 7,
            "batch": BATCH,
            "micro_batch": BATCH // 2,
            "lr": 1e-3,
            "losses": {"pixel": 1.0, "feature": 0.1, "adversarial": 0.05},
        },
        "evaluate": {"lpips": None, "looks": 2, "attacks": [{"norm": "l2", "eps": 0.5, "steps": 2}]},
        "state": {"every": 3},
    }
    recipe = Recipe.model_validate(document)
    return recipe.replace({key.replace("__", "."): value for key, value in overrides.items()})


def weights(folder: RunFolder) -> dict[str, bytes]:
    """The exported weights' bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.model.glob("*.safetensors"))}
