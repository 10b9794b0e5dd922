"""Images of any size through encoder and decoder: what fits, what is padded and cropped back, what is refused."""

import functools

import pytest
import torch
import torch.nn.functional as F

from arae.errors import InputError
from arae.models import Decoder, create_decoder, create_encoder
from arae.models.autoencoder import Autoencoder
from arae.models.fit import Fit
from arae.models.taps import without_data


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small: a second thread would wait more than work


def autoencoder(encoder, layer, decoder, image, width=1.0, **entry):
    """An untrained one, for RGB or grey images (C, H, W)."""
    network = create_encoder(encoder, 3, in_channels=image[0], width=width)
    made = create_decoder(decoder, network.feature_shape(image, layer), image)
    config = {"encoder": {"layer": layer}, "decoder": {"name": decoder, **entry}, "image_shape": image}
    return Autoencoder(network, made, config)


RGB, SMALL = (3, 224, 224), (3, 32, 32)
PAIRS = [
    ("alexnet", "conv5", "alexnet-conv5", RGB, 0.1),
    ("alexnet", "conv5", "alexnet-conv5-printed", RGB, 0.1),
    ("alexnet", "conv5", "alexnet-conv5-interp", RGB, 0.1),
    ("alexnet", "conv2", "alexnet-conv2", RGB, 0.1),
    ("alexnet", "conv1", "alexnet-conv1", RGB, 0.1),
    ("alexnet", "conv5", "mirror", RGB, 0.1),
    ("alexnet-wavelet", "conv5", "alexnet-wavelet", RGB, 1.0),
    ("vgg16", "conv5_1", "vgg16-conv5_1", RGB, 0.05),
    ("resnet18-cifar", "layer4", "resnet18-cifar-layer4", SMALL, 0.1),
    ("wrn-28-10", "block3", "wrn-28-10-block3", SMALL, 0.1),
    ("small-cnn", "conv4", "mirror", (1, 28, 28), 0.25),
    ("small-cnn", "conv4", "deepsim", SMALL, 0.25),
]
SIZES = {
    224: [(448, 448), (97, 131), (225, 300), (1, 70)],
    32: [(64, 64), (33, 47), (1, 100)],
    28: [(56, 56), (33, 47), (1, 100)],
}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[2]}")
def test_some_size_at_or_above_any_comes_back(pair):
    """By shapes alone; the smallest such size is found, and at the training size it is that size."""
    encoder, layer, decoder, image, width = pair
    model = autoencoder(encoder, layer, decoder, image, width)
    assert model.decoder is not None
    least = model.encoder.min_size(layer) or 1

    @functools.cache
    def comes_back(height, width):
        shape = model.encoder.feature_shape((image[0], height, width), layer)
        return model.decoder.output_size(*shape[1:]) == (height, width)

    for height, width_px in SIZES[image[1]]:
        size = model.fitting_size(height, width_px)
        assert comes_back(*size)
        assert size[0] >= height
        assert size[1] >= width_px
        for smaller in range(max(width_px, least), size[1]):  # rows are as columns are
            assert not comes_back(size[0], smaller)
    assert model.fitting_size(*image[1:]) == image[1:]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[2]}")
def test_any_size_is_reconstructed_at_its_own_size(pair):
    model = autoencoder(*pair)
    channels, trained = pair[3][0], pair[3][1]
    sizes = [(97, 131), (20, 230)] if trained == 224 else SIZES[trained]
    for height, width in sizes:
        x = torch.rand(1, channels, height, width)
        again = model.reconstruct(x)
        assert again.shape == x.shape
        assert again.min() >= 0
        assert again.max() <= 1


@pytest.mark.parametrize("side", [224, 448])
def test_the_papers_autoencoder_at_full_width(side):
    model = autoencoder("alexnet", "conv5", "alexnet-conv5", RGB)
    x = torch.rand(1, 3, side, side)
    z = model.encode(x)
    assert z.shape == (1, 256, {224: 6, 448: 13}[side], {224: 6, 448: 13}[side])
    assert model.decode(z).shape == x.shape
    assert torch.equal(model.reconstruct(x), model.decode(z))


@pytest.mark.parametrize(("image", "size"), [((1, 28, 28), (28, 28)), ((1, 28, 28), (36, 60)), ((3, 32, 32), (32, 64))])
def test_what_fits_is_neither_padded_nor_cropped(image, size):
    model = autoencoder("small-cnn", "conv4", "mirror", image, 0.25)
    x = torch.rand(2, image[0], *size)
    assert model.fitting_size(*size) == size
    assert torch.equal(model.reconstruct(x), model.decode(model.encode(x)))
    assert torch.equal(model.reconstruct(x), model.decoder(model.encoder.features(x, "conv4")))


def test_what_does_not_fit_is_padded_at_the_right_and_the_bottom():
    model = autoencoder("small-cnn", "conv4", "mirror", (3, 32, 32), 0.25)
    x = torch.rand(2, 3, 33, 47)
    assert model.fitting_size(33, 47) == (40, 48)
    padded = F.pad(x, (0, 1, 0, 7), mode="replicate")
    assert torch.equal(padded[:, :, 33:, :47], x[:, :, 32:].expand(2, 3, 7, 47))
    assert torch.equal(model.reconstruct(x), model.decode(model.encode(padded))[:, :, :33, :47])


def test_images_under_the_encoders_minimum_are_padded_but_not_encoded():
    model = autoencoder("alexnet", "conv5", "alexnet-conv5", RGB, 0.1)
    assert model.fitting_size(20, 300) == (64, 320)
    assert model.reconstruct(torch.rand(1, 3, 20, 300)).shape == (1, 3, 20, 300)
    with pytest.raises(InputError, match="63"):
        model.encode(torch.rand(1, 3, 20, 300))


def test_a_decoder_that_enlarges_by_another_factor_fits_up_to_its_training_size():
    model = autoencoder("alexnet", "conv5", "deepsim", RGB, 0.05)
    assert model.fitting_size(97, 131) == (224, 224)
    assert model.reconstruct(torch.rand(1, 3, 97, 131)).shape == (1, 3, 97, 131)
    for size in [(225, 224), (224, 448)]:
        with pytest.raises(InputError, match=r"deepsim.*made for 224 px.*tiles"):
            model.fitting_size(*size)


def test_each_size_is_searched_for_once():
    model = autoencoder("small-cnn", "conv4", "mirror", (1, 28, 28), 0.25)
    assert model.decoder is not None
    fit, calls = Fit(model.encoder, "conv4", model.decoder), []
    fit._back = lambda size, back=fit._back: (calls.append(size), back(size))[1]  # type: ignore[method-assign]
    first = fit.size(33, 33)
    searched = len(calls)
    assert fit.size(33, 33) == first
    assert len(calls) == searched + 1  # the check of both axes together
    assert fit.size(28, 28) == (28, 28)
    assert len(calls) == searched + 1  # nothing is looked for at the training size


BAD = [
    (torch.full((1, 1, 28, 28), float("nan")), "nan"),
    (torch.rand(1, 1, 28, 28).index_fill(3, torch.tensor([5]), float("nan")), "nan"),
    (torch.full((1, 1, 28, 28), float("inf")), "inf"),
    (255 * torch.rand(1, 1, 28, 28), "divide 8-bit images by 255"),
    (torch.rand(1, 1, 28, 28) - 0.5, r"\[0, 1\], not from -0"),
    (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), "float"),
    (torch.zeros(1, 3, 28, 28), r"\[N, 1, H, W\]"),
    (torch.zeros(1, 28, 28), r"\[N, 1, H, W\]"),
    (torch.zeros(0, 1, 28, 28), r"\[0, 1, 28, 28\]"),
]


@pytest.mark.parametrize(("images", "message"), BAD)
def test_anything_but_images_is_refused(images, message):
    model = autoencoder("small-cnn", "conv4", "mirror", (1, 28, 28), 0.25)
    for call in (model.encode, model.reconstruct):
        with pytest.raises(ValueError, match=message):
            call(images)


def test_without_a_decoder_nothing_is_reconstructed():
    network = create_encoder("small-cnn", 3, in_channels=1, width=0.25)
    model = Autoencoder(network, None, {"encoder": {"layer": "conv4"}, "image_shape": (1, 28, 28)})
    assert model.encode(torch.rand(1, 1, 28, 28)).shape == (1, 32, 4, 4)
    with pytest.raises(InputError, match="no decoder"):
        model.reconstruct(torch.rand(1, 1, 28, 28))


def test_images_are_normalised_as_the_decoder_was_trained_with():
    x = torch.rand(2, 3, 32, 32)
    model = autoencoder("small-cnn", "conv4", "mirror", (3, 32, 32), 0.25, normalisation="signed")
    model.encoder.mean.fill_(0.4)  # so that the encoder's own normalisation is another
    signed = model.encode(x)
    own = model.encoder.features(x, "conv4")
    assert not torch.allclose(signed, own)
    model.encoder.mean.fill_(0.5)
    model.encoder.std.fill_(0.5)
    torch.testing.assert_close(signed, model.encoder.features(x, "conv4"))
    torch.testing.assert_close(signed, model.encode(x))


def test_shapes_without_data_are_those_with():
    decoder = create_decoder("mirror", (8, 4, 4), (1, 28, 28)).eval()
    assert isinstance(decoder, Decoder)
    x = torch.randn(1, 8, 5, 3)
    assert without_data(decoder, x.to("meta")).shape == decoder(x).shape
