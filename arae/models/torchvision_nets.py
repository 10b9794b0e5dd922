"""Any of torchvision's classifiers, tapped at any layer that gives a map of features."""

from __future__ import annotations

import difflib
import types
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from arae.errors import InputError
from arae.models.classifiers import refuse_grey
from arae.models.taps import IMAGENET_MEAN, IMAGENET_STD, SIGNED, Encoder, Rule, without_data
from arae.modes import evaluating

FAMILY = "torchvision/"
SUMMARY = "any torchvision classifier (torchvision/resnet50), RGB, at any layer that gives a map"
TRACED = 224  # pixels: every one of these networks takes images of this size
WITH_AUXILIARY = ("googlenet", "inception_v3")

# Names in torchvision's files that its own networks rename or leave out when they load them.
PUBLISHED: dict[str, tuple[Rule, ...]] = {
    "densenet": ((r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2."),),
    "googlenet": ((r"^aux[12]\.", None),),
    "inception": ((r"^AuxLogits\.", None),),
}


@cache
def classifiers() -> tuple[str, ...]:
    """torchvision's classifiers by name, each with the family's prefix."""
    import torchvision
    from torchvision.models import list_models

    return tuple(FAMILY + name for name in list_models(module=torchvision.models))


def torchvision_encoder(name: str, num_classes: int, in_channels: int, width: float) -> Encoder:
    """The classifier `torchvision/NAME` with random weights.

    Taps are the modules whose output is a map [N, c, h, w] larger than 1×1 and that run once a pass; by default the
    last one before the classifier's pooling. Raises InputError: an unknown name, other than 3 channels, a width.
    """
    kind = name.removeprefix(FAMILY)
    if name not in classifiers():
        near = difflib.get_close_matches(kind, [known.removeprefix(FAMILY) for known in classifiers()], n=1)
        hint = f"did you mean {FAMILY + near[0]!r}?" if near else "torchvision.models.list_models() names what it has"
        raise InputError(f"encoder.name: torchvision has no classifier {kind!r}: {hint}")
    refuse_grey(name, in_channels)
    if width != 1:
        raise InputError(f"encoder.width = {width:g}: encoder {name} has one width, so leave it at 1")
    net = _network(kind, num_classes)
    layers, refused, layer = _taps(net)
    mean, std = _statistics(kind)
    rules = [rule for prefix, rules in PUBLISHED.items() if kind.startswith(prefix) for rule in rules]
    return Encoder(
        name,
        net,
        layers={path: path for path in layers},
        layer=layer,
        num_classes=num_classes,
        mean=mean,
        std=std,
        refused=refused,
        published=rules,
    )


def _network(kind: str, num_classes: int) -> nn.Module:
    from torchvision.models import get_model

    if kind in WITH_AUXILIARY:  # their auxiliary classifiers only help to train them from scratch by plain SGD
        return get_model(kind, weights=None, num_classes=num_classes, aux_logits=False, init_weights=True)
    net = get_model(kind, weights=None, num_classes=num_classes)
    if kind.startswith("mnasnet"):
        # It refuses state dicts without a version, which ours and all in safetensors are; there is but one layout.
        net._load_from_state_dict = types.MethodType(nn.Module._load_from_state_dict, net)
    return net


def _statistics(kind: str) -> tuple[Any, Any]:
    """Mean and standard deviation of torchvision's own weights for a network."""
    if kind in WITH_AUXILIARY:  # their files ask for ImageNet's and then undo them to 2x - 1 (`transform_input`)
        return (SIGNED,) * 3, (SIGNED,) * 3
    from torchvision.models import get_model_weights

    transforms: Any = get_model_weights(kind)["DEFAULT"].transforms()
    return getattr(transforms, "mean", IMAGENET_MEAN), getattr(transforms, "std", IMAGENET_STD)


def _taps(net: nn.Module) -> tuple[list[str], dict[str, str], str]:
    """Paths of the layers that can be tapped, in the order they end; why each other one can't; the default one."""
    shapes = _shapes(net)
    layers, refused = [], {path: "is not run" for path, _ in net.named_modules() if path and path not in shapes}
    for path, found in shapes.items():
        if len(found) > 1:
            refused[path] = f"runs {len(found)} times a pass"
        elif not _is_map(found[0]):
            shape = "×".join(map(str, found[0][1:])) if found[0] else "no tensor"
            refused[path] = f"gives {shape}, not a map [N, c, h, w]"
        else:
            layers.append(path)
    pools = [i for i, path in enumerate(shapes) if isinstance(net.get_submodule(path), nn.AdaptiveAvgPool2d)]
    outer = [i for i in pools if list(shapes)[i].count(".") == 0]  # those inside are squeeze-and-excitation's
    before = list(shapes)[: outer[0]] if outer else list(shapes)
    candidates = [path for path in before if path in layers and not path.startswith("classifier")]
    return layers, refused, candidates[-1]


def _shapes(net: nn.Module) -> dict[str, list[tuple[int, ...]]]:
    """The output shapes of every submodule for one image, in the order they end; () for what is no tensor."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    handles = []
    for path, module in net.named_modules():
        if path:

            def note(_module: nn.Module, _inputs: object, output: object, path: str = path) -> None:
                shapes.setdefault(path, []).append(tuple(output.shape) if isinstance(output, Tensor) else ())

            handles.append(module.register_forward_hook(note))
    try:
        with evaluating(net):
            without_data(net, torch.empty(1, 3, TRACED, TRACED, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _is_map(shape: tuple[int, ...]) -> bool:
    """Whether a shape is [N, c, h, w]: for a square image h = w, which [N, h, w, c] of transformers does not show."""
    return len(shape) == 4 and shape[2] == shape[3] > 1
