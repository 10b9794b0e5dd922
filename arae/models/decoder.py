"""Decoders (the paper's generators) by name: features in, images in [0, 1] out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from arae.models.blocks import Decoder, Shapes
from arae.models.deepsim import deepsim
from arae.models.generators import LAYOUTS
from arae.models.mirror import mirror
from arae.models.registry import Entry, pick
from arae.models.wavelet import alexnet_wavelet_decoder

__all__ = ["DECODERS", "Decoder", "create_decoder", "mirror"]

_SUMMARIES = {
    "alexnet-conv5": "AlexNet conv5 to 224 px, the authors' layout, 4.75 M parameters",
    "alexnet-conv5-printed": "the same as the paper prints it (Table A4), 5.65 M parameters",
    "alexnet-conv5-interp": "the same with nearest neighbours for the doublings, 3.21 M parameters",
    "alexnet-conv2": "AlexNet conv2 to 224 px (Table A7), 1.32 M parameters",
    "alexnet-conv1": "AlexNet conv1 to 224 px (Table A6), 0.21 M parameters",
    "vgg16-conv5_1": "VGG-16 conv5_1 to 224 px, after the authors' layout",
    "resnet18-cifar-layer4": "ResNet-18 layer4 to 32 px, after the authors' layout",
    "wrn-28-10-block3": "WideResNet-28-10 block3 to 32 px, after the authors' layout",
}

DECODERS: dict[str, Entry[Callable[[Shapes, Shapes], Decoder]]] = {
    **{name: Entry(partial(layout.build, name), _SUMMARIES[name]) for name, layout in LAYOUTS.items()},
    "alexnet-wavelet": Entry(
        partial(alexnet_wavelet_decoder, "alexnet-wavelet"),
        "the encoder alexnet-wavelet to 224 px, with its skips (Table A9), 2.57 M parameters",
    ),
    "alexnet-wavelet-right": Entry(
        partial(alexnet_wavelet_decoder, "alexnet-wavelet-right"),
        "the same with its pads at the right and the bottom, where lines were lost",
    ),
    "deepsim": Entry(
        deepsim, "DeePSiM's larger generator for conv5, 12.7 M parameters; in proportion for other shapes"
    ),
    "mirror": Entry(mirror, "derived from the feature and image shapes"),
}


def create_decoder(name: str, feature_shape: Shapes = None, image_shape: Shapes = None) -> Decoder:
    """A decoder from features (c, h, w) to images (C, H, W); shapes may be left out where the name fixes them.

    Raises InputError: unknown name, shapes that the decoder cannot join.
    """
    return pick(DECODERS, name, "decoder")(feature_shape, image_shape)
