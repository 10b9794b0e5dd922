"""Networks by name: what is refused, what the seed decides, and the list of them."""

import pytest
import torch

from arae.errors import InputError
from arae.models import create_decoder, create_discriminator, create_encoder, mirror
from arae.models.decoder import DECODERS
from arae.models.discriminator import DISCRIMINATORS
from arae.models.encoder import ENCODERS
from arae.models.zoo import summaries


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'alexnet'"):
        create_encoder("alexnett", 10)
    with pytest.raises(InputError, match="did you mean 'mirror'"):
        create_decoder("miror", (8, 4, 4), (3, 32, 32))
    with pytest.raises(InputError, match="alexnet-conv5"):
        create_discriminator("nothing-like-it", (8, 4, 4), (3, 32, 32))
    with pytest.raises(InputError, match="did you mean 'conv4'"):
        create_encoder("small-cnn", 10).features(torch.rand(1, 3, 32, 32), "conv44")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_encoder("alexnet", 10, image_size=32), "can't take images of shape"),
        (lambda: create_encoder("alexnet", 10, in_channels=1), "data.channels"),
        (lambda: create_encoder("small-cnn", 1), "2 classes"),
        (lambda: create_decoder("mirror"), "feature_shape is missing"),
        (lambda: create_decoder("mirror", (8, 4), (3, 32, 32)), "channels, height, width"),
        (lambda: create_decoder("alexnet-conv5", (128, 4, 4), (1, 28, 28)), "decoder mirror"),
        (lambda: create_discriminator("alexnet-conv5", (128, 4, 4), (1, 28, 28)), "mirror"),
        (lambda: create_discriminator("mirror", (128, 4, 4)), "image_shape is missing"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("make", [
    lambda: create_encoder("small-cnn", 10), lambda: create_encoder("resnet18-cifar", 10),
    lambda: create_encoder("wrn-28-10", 10, width=0.1), lambda: create_encoder("vgg16", 10, width=0.05),
    lambda: mirror((64, 4, 4), (1, 28, 28), spectral=True),
    lambda: create_discriminator("mirror", (64, 4, 4), (1, 28, 28)),
])  # fmt: skip
def test_the_seed_decides_the_weights(make):
    torch.manual_seed(7)
    first = make().state_dict()
    torch.manual_seed(7)
    assert all(torch.equal(value, first[key]) for key, value in make().state_dict().items())


def test_the_zoo_lists_every_network():
    listed = summaries()
    assert {kind: set(names) for kind, names in listed.items()} == {
        "encoders": {*ENCODERS, "torchvision/…"}, "decoders": set(DECODERS), "discriminators": set(DISCRIMINATORS)
    }  # fmt: skip
    assert set(DECODERS) == set(DISCRIMINATORS)
    assert all(0 < len(line) < 100 for names in listed.values() for line in names.values())
