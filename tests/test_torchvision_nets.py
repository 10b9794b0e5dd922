"""Any torchvision classifier at any layer, against torchvision's own pass."""

import re

import pytest
import torch
import torchvision
from torch import nn

from arae.errors import InputError
from arae.models import create_encoder
from arae.models.taps import own_names
from arae.models.torchvision_nets import classifiers

NORMALISE = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for images this small a second thread only costs


def _without_weights(name: str):
    with torch.device("meta"):
        return create_encoder(f"torchvision/{name}", 10)


# Family, a layer inside, the default layer.
FAMILIES = [
    ("resnet50", "layer2.1.bn2", "layer4"),
    ("densenet121", "features.denseblock2.denselayer3", "features"),
    ("googlenet", "inception4a.branch3", "inception5b"),
    ("mobilenet_v3_small", "features.4.block.1", "features"),
    ("efficientnet_b0", "features.3", "features"),
    ("convnext_tiny", "features.2.0", "features"),
    ("squeezenet1_1", "features.6.squeeze", "features"),
    ("regnet_x_400mf", "trunk_output.block2", "trunk_output"),
    ("shufflenet_v2_x0_5", "stage3.2", "conv5"),
    ("mnasnet0_5", "layers.9", "layers"),
]


@pytest.mark.parametrize(("name", "inner", "default"), FAMILIES)
def test_a_tap_is_what_the_whole_network_computes_there(name, inner, default):
    encoder = create_encoder(f"torchvision/{name}", 10).eval()
    assert encoder.layer == default
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    net = torchvision.models.get_model(name, weights=None, num_classes=10, **options).eval()
    weights = encoder.net.state_dict()  # torchvision's, which bears the version that its MNASNet asks for
    net.load_state_dict(weights)
    net.transform_input = True  # as with torchvision's weights of GoogLeNet; nothing to the others
    seen: dict[str, torch.Tensor] = {}
    for layer in (inner, default):
        keep = lambda _module, _inputs, out, layer=layer: seen.update({layer: out.clone()})  # noqa: E731
        net.get_submodule(layer).register_forward_hook(keep)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        logits = net(NORMALISE(x))
        for layer, there in seen.items():
            torch.testing.assert_close(encoder.features(x, layer), there, rtol=1e-4, atol=1e-5)
            assert encoder.feature_shape((3, 64, 64), layer) == there.shape[1:]
        torch.testing.assert_close(encoder(x), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("resnet50", "layer3", (1024, 14, 14)),
        ("vgg11_bn", "features.28", (512, 7, 7)),
        ("wide_resnet50_2", "layer2", (512, 28, 28)),
        ("vit_b_16", "conv_proj", (768, 14, 14)),
        ("swin_t", "permute", (768, 7, 7)),
        ("inception_v3", "Mixed_6e", (768, 12, 12)),
    ],
)
def test_shapes_at_224(name, layer, shape):
    assert _without_weights(name).feature_shape((3, 224, 224), layer) == shape


def test_every_torchvision_classifier_is_there():
    assert len(classifiers()) > 70
    assert {"torchvision/resnet50", "torchvision/vit_b_16", "torchvision/alexnet"} <= set(classifiers())
    assert not any("segmentation" in name or "raft" in name for name in classifiers())


def test_a_tap_costs_what_comes_before_it_and_keeps_modes_and_parameters():
    encoder = create_encoder("torchvision/resnet18", 10).train()
    ran: list[str] = []
    for name, module in encoder.net.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    early, late = encoder.net.layer1[0].bn1, encoder.net.layer3[0].bn1
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder.features(x.to(memory_format=torch.channels_last), "layer2")
    assert features.dtype == torch.bfloat16
    assert ran == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]
    assert early.running_mean.abs().sum() > 0
    assert late.running_mean.abs().sum() == 0
    features.float().square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert encoder.net.conv1.weight.grad.abs().sum() > 0
    assert encoder.net.layer3[0].conv1.weight.grad is None
    encoder.eval()
    before = early.running_mean.clone()
    with torch.no_grad():
        assert not encoder.features(x, "layer2").requires_grad
    assert torch.equal(early.running_mean, before)


def test_layers_are_maps_that_are_computed_once():
    encoder = _without_weights("resnet50")
    assert {"conv1", "bn1", "maxpool", "layer1", "layer3.5", "layer4.2.bn3"} <= set(encoder.layers)
    assert not {"avgpool", "fc", "layer1.0.relu"} & set(encoder.layers)
    swin = _without_weights("swin_t")
    assert list(swin.layers) == ["features.0.0", "permute"]  # all others are [N, h, w, c]
    assert all(encoder.feature_shape((3, 64, 64), layer)[1] > 1 for layer in ("conv1", "layer3", "layer4"))


OUTER = r"its layers are conv1, bn1, relu, maxpool, layer1\.0, .*layer3\.5, layer3, .*layer4, and 108 layers inside"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("layer5", "has no 'layer5': did you mean 'layer.'.*" + OUTER),
        ("nothing-like-it", "has no 'nothing-like-it': " + OUTER),
        ("fc", r"can't tap 'fc', which gives 10, not a map \[N, c, h, w\]: .*" + OUTER),
        ("avgpool", r"can't tap 'avgpool', which gives 2048×1×1, not a map"),
        ("layer1.0.relu", "can't tap 'layer1.0.relu', which runs 3 times a pass"),
    ],
)
def test_a_layer_that_cannot_be_tapped_is_refused_with_those_that_can(layer, message):
    encoder = _without_weights("resnet50")
    with pytest.raises(InputError, match="encoder torchvision/resnet50 " + message) as caught:
        encoder.feature_shape((3, 64, 64), layer)
    assert len(str(caught.value)) < 500
    with pytest.raises(InputError, match=r"encoder\.layer"):
        encoder.features(torch.empty(1, 3, 64, 64, device="meta"), layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_encoder("torchvision/resnet5", 10), r"no classifier 'resnet5': did you mean 'torchvision/res"),
        (lambda: create_encoder("torchvision/fcn_resnet50", 10), "no classifier 'fcn_resnet50'"),
        (lambda: create_encoder("torchvision/", 10), "list_models"),
        (lambda: create_encoder("resnet50", 10), "did you mean 'torchvision/resnet50'"),
        (lambda: create_encoder("torchvision/resnet18", 10, width=0.5), "encoder.width = 0.5"),
        (lambda: create_encoder("torchvision/resnet18", 10, in_channels=1), "RGB images.*data.channels to 3"),
        (lambda: create_encoder("torchvision/squeezenet1_1", 10, image_size=16), "17×17 px at least"),
        (lambda: _without_weights("vgg11_bn").refuse_unfit((3, 28, 28)), "32×32 px at least"),
        (lambda: _without_weights("vit_b_16").refuse_unfit((3, 64, 64)), "Expected 224 but got 64"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


PUBLISHED = [  # our name in a torchvision file -> how the file has it; names that the file has besides
    ("densenet121", r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", []),
    ("googlenet", "$^", "", ["aux1.conv.bn.bias", "aux2.fc2.weight"]),
    ("inception_v3", "$^", "", ["AuxLogits.conv0.conv.weight"]),
    ("resnet18", "$^", "", []),
]


@pytest.mark.parametrize(("name", "pattern", "theirs", "besides"), PUBLISHED)
def test_names_of_published_files(name, pattern, theirs, besides):
    encoder = _without_weights(name)
    own = list(encoder.net.state_dict())
    file = {re.sub(pattern, theirs, key): key for key in own} | dict.fromkeys(besides, "")
    assert set(file) != set(own) or name == "resnet18"
    assert own_names(encoder, file) == {key: key for key in own}
    assert own_names(encoder, {"conv9.weight": 1}) == {"conv9.weight": 1}  # a stranger is not passed over


def test_weights_without_a_version_load_into_mnasnet():
    encoder = create_encoder("torchvision/mnasnet0_5", 10)
    ones = {key: torch.ones_like(value) for key, value in encoder.state_dict().items()}
    encoder.load_state_dict(ones)
    assert all(torch.equal(value, ones[key]) for key, value in encoder.state_dict().items())


def test_statistics_are_those_of_torchvisions_weights():
    assert _without_weights("resnet18").mean.shape == (1, 3, 1, 1)
    encoder = create_encoder("torchvision/squeezenet1_1", 10)
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor(NORMALISE.mean))
    torch.testing.assert_close(encoder.std.flatten(), torch.tensor(NORMALISE.std))
    assert isinstance(encoder.net, nn.Module)
