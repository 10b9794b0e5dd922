"""`arae import`: other projects' checkpoints give what their networks give, and nothing else gets in."""

import sys
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from checkpoints import (
    GENERATORS,
    IMAGENET,
    CifarResNet18,
    TheirDiscriminator,
    TheirWavelets,
    WideResNet,
    alexnet,
    authors_network,
    generator_file,
    robustness_file,
    used,
)
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from arae.cli import main
from arae.errors import InputError
from arae.importing import ImportOptions, import_model
from arae.models import create_discriminator, create_encoder
from arae.models.autoencoder import load_autoencoder, load_weights
from arae.models.foreign import read_generator

MEAN, STD = (value.view(3, 1, 1) for value in IMAGENET)


def arae_import(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command line in this process."""
    monkeypatch.setattr(sys, "argv", ["arae", "import", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def authors_encoder(tmp_path_factory):
    """The network, and the file that the robustness library made of it."""
    torch.manual_seed(1)
    net, path = alexnet(), tmp_path_factory.mktemp("authors") / "encoder.pt"
    torch.save(robustness_file(net), path)
    return net, path


def test_the_authors_files_give_what_their_networks_give(tmp_path, monkeypatch, capsys, authors_encoder):
    (net, encoder), theirs, discriminator = (
        authors_encoder,
        authors_network("alexnet-conv5"),
        TheirDiscriminator().eval(),
    )
    torch.save(generator_file(net, theirs, "conv5", discriminator), tmp_path / "generator.pt")

    dest = tmp_path / "model"
    said = [f"classes=[{','.join('abcdefghijkl')}]", "norm=l2", "eps=3"]
    assert arae_import(monkeypatch, tmp_path / "generator.pt", dest, f"encoder={encoder}", *said) == 0
    assert "decoder: alexnet-conv5; images are encoded for it by 2x - 1" in capsys.readouterr().out
    model = load_autoencoder(dest)
    assert (model.layer, model.config["encoder"]["num_classes"]) == ("conv5", 12)
    ours = create_discriminator("alexnet-conv5").eval()
    ours.load_state_dict(load_weights(dest / "discriminator.safetensors"))
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        code = net.features(2 * x - 1)
        wanted = (theirs.gen(code) + 1) / 2
        torch.testing.assert_close(model.encode(x), code, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.reconstruct(x), wanted, rtol=0, atol=1e-5)
        assert wanted.std() > 0.01
        torch.testing.assert_close(model.encoder(x), net((x - MEAN) / STD), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(x, code), discriminator(x, code).squeeze(1), rtol=1e-4, atol=1e-5)
        model.normalisation = "encoder"  # what normalisation=encoder writes
        wanted = (theirs.gen(net.features((x - MEAN) / STD)) + 1) / 2
        torch.testing.assert_close(model.reconstruct(x), wanted, rtol=0, atol=1e-5)

    conv1 = authors_network("alexnet-conv1")
    torch.save(generator_file(net, conv1, "conv1", None), tmp_path / "conv1.pt")
    import_model(tmp_path / "conv1.pt", tmp_path / "of-conv1", ImportOptions(encoder=str(dest)))
    model = load_autoencoder(tmp_path / "of-conv1")
    assert (model.layer, model.normalisation) == ("conv1", "signed")
    training = [model.config[key] for key in ("train_norm", "train_eps", "classes")]  # the folder's word on its encoder
    assert training == ["l2", 3.0, list("abcdefghijkl")]
    with torch.no_grad():
        wanted = (conv1.gen(net.features[:3](2 * x - 1)) + 1) / 2
        torch.testing.assert_close(model.reconstruct(x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(GENERATORS))
def test_each_of_the_authors_generators_is_recognised(name):
    net, theirs = nn.Module(), authors_network(name)
    net.features = nn.Sequential(nn.Conv2d(3, 4, 3))
    found = read_generator(generator_file(net, theirs, GENERATORS[name][0], None), "generator.pt", None)
    assert (found.decoder.name, found.signed, found.discriminator) == (name, True, None)
    assert set(found.encoder_part) == {"features.0.weight", "features.0.bias"}
    z = torch.randn(1, found.decoder.feature_shape[0], 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(found.decoder.eval()(z), (theirs.gen(z) + 1) / 2, rtol=0, atol=1e-5)


def test_the_authors_denoiser_gives_what_their_network_gives(tmp_path, authors_encoder):
    net, encoder = authors_encoder
    theirs = used(TheirWavelets(net))
    torch.save({"model": {f"module.{key}": value for key, value in theirs.state_dict().items()}}, tmp_path / "wave.pt")
    lines = import_model(tmp_path / "wave.pt", tmp_path / "model", ImportOptions(encoder=str(encoder)))
    assert "decoder: alexnet-wavelet" in lines[-1]
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        model = load_autoencoder(tmp_path / "model")
        torch.testing.assert_close(model.reconstruct(x), theirs(2 * x - 1), rtol=0, atol=1e-5)

    wrong = theirs.state_dict()
    wrong["generator.unpool2.LH.weight"] = wrong["generator.unpool2.LH.weight"].mT
    with pytest.raises(InputError, match=r"unpool2\.LH\.weight is no Haar filter"):
        read_generator({"model": wrong}, "wave.pt", None)


def test_a_generator_of_another_encoder_is_refused(tmp_path, authors_encoder):
    _, encoder = authors_encoder
    other = nn.Module()
    other.features = nn.Sequential(nn.Conv2d(3, 64, 11))
    torch.save(generator_file(other, authors_network("alexnet-conv1"), "conv1", None), tmp_path / "generator.pt")
    with pytest.raises(InputError, match=r"another encoder than .*features\.0\.weight differs"):
        import_model(tmp_path / "generator.pt", tmp_path / "model", ImportOptions(encoder=str(encoder)))
    with pytest.raises(InputError, match=r"encoder=.*no model in this folder"):
        import_model(tmp_path / "generator.pt", tmp_path / "model", ImportOptions(encoder=str(tmp_path)))


CIFAR = (torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616]))
BUFFERS = {"mean": CIFAR[0], "std": CIFAR[1]}
SAVED = {
    "plain": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 5, "arch": "x"},
    "model_state_dict, module.": lambda weights: {"model_state_dict": {f"module.{k}": v for k, v in weights.items()}},
    "mu and sigma": lambda weights: weights | {"mu": CIFAR[0].view(1, 3, 1, 1), "sigma": CIFAR[1].view(1, 3, 1, 1)},
    "module.model., normalize.": lambda weights: {
        **{f"module.model.{k}": v for k, v in weights.items()},
        **{f"module.normalize.{k}": v for k, v in BUFFERS.items()},
    },
    "half precision": lambda weights: {k: v.half() if v.is_floating_point() else v for k, v in weights.items()},
}  # fmt: skip


CASES = [(CifarResNet18, "resnet18-cifar", 0.125, saved) for saved in SAVED] + [(WideResNet, "wrn-28-10", 0.1, "plain")]


@pytest.mark.parametrize(("make", "name", "width", "saved"), CASES)
def test_robustbench_files_give_what_their_networks_give(tmp_path, make, name, width, saved):
    theirs = used(make(7))
    torch.save(SAVED[saved](theirs.state_dict()), tmp_path / "net.pt")
    lines = import_model(tmp_path / "net.pt", tmp_path / "model", ImportOptions(width=width))
    encoder = load_autoencoder(tmp_path / "model").encoder
    assert (encoder.name, encoder.num_classes, encoder.training) == (name, 7, False)
    normalised = "mu" in saved or "normalize" in saved
    assert ("none in the file" in lines[0]) != normalised
    x = torch.rand(3, 3, 32, 32)
    seen = (x - CIFAR[0].view(3, 1, 1)) / CIFAR[1].view(3, 1, 1) if normalised else x
    with torch.no_grad():
        tolerance = 2e-2 if saved == "half precision" else 1e-4
        torch.testing.assert_close(encoder(x), theirs(seen), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer3"), ("squeezenet1_1", "features.7")])
def test_torchvisions_files_give_what_their_networks_give(tmp_path, name, layer):
    theirs = used(torchvision.models.get_model(name, num_classes=9))
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    options = ImportOptions(
        name=f"torchvision/{name}", layer=layer, size=64, classes=tuple("abcdefghi"), norm="linf", eps="4/255"
    )
    import_model(tmp_path / "net.pth", tmp_path / "model", options)
    model = load_autoencoder(tmp_path / "model")
    assert (model.layer, model.image_shape, model.config["classes"]) == (layer, (3, 64, 64), list("abcdefghi"))
    assert (model.config["train_norm"], model.config["train_eps"]) == ("linf", 4 / 255)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(x), theirs((x - MEAN) / STD), rtol=1e-4, atol=1e-4)


def test_our_own_safetensors_and_the_weights_of_a_folder(tmp_path):
    source = create_encoder("small-cnn", 5, in_channels=1).eval()
    source.mean.fill_(0.3)
    save_file(source.state_dict(), tmp_path / "encoder.safetensors")
    lines = import_model(tmp_path / "encoder.safetensors", tmp_path / "model", ImportOptions(channels=1, size=28))
    assert "mean 0.3" in lines[0]
    assert "not the network's usual ones" in lines[0]
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(load_autoencoder(tmp_path / "model").encoder(x), source(x))
    as_given = ImportOptions(channels=1, size=28, mean=(0.0,), std=(1.0,))
    import_model(tmp_path / "encoder.safetensors", tmp_path / "other", as_given)
    assert load_autoencoder(tmp_path / "other").encoder.mean.item() == 0
    again = create_encoder("small-cnn", 5, in_channels=1, pretrained=tmp_path / "model" / "encoder.safetensors")
    assert torch.equal(again.eval()(x), source(x))


def test_a_folder_that_is_there_is_left_alone(tmp_path, monkeypatch, capsys):
    torch.save(create_encoder("small-cnn", 5).net.state_dict(), tmp_path / "net.pt")
    (tmp_path / "model").mkdir()
    assert arae_import(monkeypatch, tmp_path / "net.pt", tmp_path / "model", "size=32") == 0
    assert "features: 128×4×4 at conv4" in capsys.readouterr().out
    assert arae_import(monkeypatch, tmp_path / "net.pt", tmp_path / "model") == 2
    assert "is there already" in capsys.readouterr().err
    assert arae_import(monkeypatch, tmp_path / "net.pt", tmp_path / "other", "nmae=x") == 2
    assert "did you mean name?" in capsys.readouterr().err


def test_real_squeezenet_weights_classify_real_photographs(tmp_path, test_data):
    """61 % of ImageNet's validation set were right; these are training photographs, one a class, in class order."""
    with tarfile.open(test_data / "weights.tar") as archive:
        (tmp_path / "net.pt").write_bytes(archive.extractfile("weights/squeezenet1_1_caffe_fp16.pt").read())
    import_model(tmp_path / "net.pt", tmp_path / "model", ImportOptions(name="torchvision/squeezenet1_1"))
    encoder = load_autoencoder(tmp_path / "model").encoder
    images, names = [], []
    with tarfile.open(test_data / "imagenet_even.tar") as archive:
        for member in [m for m in archive.getmembers() if m.name.endswith(".jpg")][::16]:
            with Image.open(archive.extractfile(member)) as photo:
                side = min(photo.size)
                box = tuple((length - side) // 2 for length in photo.size)
                square = photo.convert("RGB").crop((*box, box[0] + side, box[1] + side)).resize((224, 224))
            images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255)
            names.append(member.name.split("_", 2)[2].removesuffix(".jpg").replace("_", " ").lower())
    known = [name.lower() for name in torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"]]
    with torch.no_grad():
        told = encoder(torch.stack(images)).argmax(1).tolist()
    right = [known[guess] == name for guess, name in zip(told, names, strict=True)]
    assert np.mean(right) > 0.4
