"""Activations that are computed anew: the same training for less memory."""

from __future__ import annotations

import pytest
import torch
from test_footprint import CPU, networks, recipe

from arae.config import Recipe, load_recipe
from arae.cost import Networks
from arae.errors import InputError
from arae.footprint import footprint
from arae.models import create_decoder
from arae.train.decoder import DecoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro

DECODERS = ["mirror", "resnet18-cifar-layer4", "deepsim"]  # batch norm; spectral norm too; neither
FEATURES, SHAPE = (64, 4, 4), (3, 32, 32)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("parts", [2, 3, 50])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_and_running_values_are_the_same(name: str, parts: int, autocast: bool) -> None:
    torch.manual_seed(0)
    plain = create_decoder(name, FEATURES, SHAPE).train()
    other = create_decoder(name, FEATURES, SHAPE).train()
    other.load_state_dict(plain.state_dict())
    other.recompute(parts)
    z = torch.rand(4, *FEATURES)
    for model in (plain, other):
        for _ in range(2):  # two passes before the gradients: the first's second look comes after the second's first
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                kept = model(z), model(2 * z)
            (kept[0].float().square().mean() - kept[1].float().mean()).backward()
    theirs, ours = dict(plain.named_parameters()), dict(other.named_parameters())
    assert all(torch.equal(ours[name].grad, weight.grad) for name, weight in theirs.items())  # type: ignore[arg-type]
    buffers = dict(other.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in plain.named_buffers())


def test_parts_begin_with_a_convolution_and_are_as_many_as_asked_for() -> None:
    made = create_decoder("mirror", FEATURES, SHAPE)
    for parts in (1, 2, 3, 4):
        made.recompute(parts)
        assert len(made.ends) <= parts
        assert made.ends[-1] == len(made.layers)
        assert list(made.ends) == sorted(set(made.ends))
        assert all("Conv" in type(made.layers[end]).__name__ for end in made.ends[:-1])


def test_a_step_holds_less_and_ends_at_the_same_weights() -> None:
    def trained(made: Recipe) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        there, engine = Networks(made, SHAPE, 10), Engine(CPU, "fp32")
        assert there.decoding is not None
        assert there.decoder is not None
        losses = there.decoding.weights
        trainer = DecoderTrainer(made, there.encoder, there.decoder, there.discriminator, engine, 4, weights=losses)
        images, labels = torch.rand(32, *SHAPE, generator=torch.Generator().manual_seed(2)), torch.zeros(32).long()
        for step in range(2):
            trainer.step(step, [Micro(images[i : i + 16], labels[i : i + 16], n, 2) for n, i in enumerate((0, 16))])
        return there.decoder.state_dict()

    plain, other = recipe(), recipe(decoder__recompute=3)
    found = trained(other)
    assert all(torch.equal(found[name], value) for name, value in trained(plain).items())
    many = {"decoder__batch": 128, "decoder__micro_batch": 128, "decoder__losses": {"pixel": 1.0}}
    held = [footprint(networks(recipe(**many, decoder__recompute=n)), "decoder", CPU)["activations"] for n in (1, 4)]
    assert held[1] < 0.75 * held[0]
    steps = [networks(made).decoder_step(2) for made in (plain, other)]
    assert steps[1] - steps[0] == networks(plain).generate.forward


def test_what_can_not_be_recomputed_is_refused() -> None:
    made = load_recipe("imagenet-alexnet", ["encoder.name=alexnet-wavelet", "decoder.name=alexnet-wavelet"])
    with pytest.raises(InputError, match=r"decoder.recompute = 2: alexnet-wavelet is not layers in a row"):
        Networks(made.replace({"decoder.recompute": 2, "decoder.losses": {"pixel": 1.0}}), (3, 224, 224), 10)
    with pytest.raises(InputError, match=r"in ZeRO's stage 3 the weights are in pieces"):
        recipe(decoder__recompute=2, engine={"kind": "deepspeed", "stage": 3})
