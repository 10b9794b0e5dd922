"""One training step of the encoder and of the decoder, against plain PyTorch."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training import tiny_recipe

from arae.attacks import Threat, pgd
from arae.config import Recipe
from arae.models import Encoder, create_decoder, create_discriminator, create_encoder
from arae.train.decoder import DecoderTrainer
from arae.train.encoder import EncoderTrainer
from arae.train.engine import Engine
from arae.train.micro import Micro

CPU = torch.device("cpu")


def micros(count: int, size: int = 8) -> list[Micro]:
    """Random micro-batches of 16-px images in three classes."""
    torch.manual_seed(1)
    return [Micro(torch.rand(size, 3, 16, 16), torch.randint(0, 3, (size,)), i, count) for i in range(count)]


def networks(recipe: Recipe) -> tuple[Encoder, torch.nn.Module, torch.nn.Module]:
    """Encoder, generator, discriminator for 16-px images."""
    torch.manual_seed(0)
    encoder = create_encoder("small-cnn", 3, 3, 16)
    shape = encoder.feature_shape((3, 16, 16))
    return encoder, create_decoder("mirror", shape, (3, 16, 16)), create_discriminator("mirror", shape, (3, 16, 16))


@pytest.mark.parametrize(("eps", "count"), [(0.0, 1), (0.0, 2), (0.5, 1), (0.5, 2)])
def test_an_encoder_step_is_plain_sgd_on_attacked_images(tiny_npz: Path, eps: float, count: int) -> None:
    recipe = tiny_recipe(
        tiny_npz, encoder__attack__eps=eps, encoder__attack__random_start=False, encoder__schedule__kind="constant"
    ).replace({"encoder.schedule.warmup": 0.0, "encoder.momentum": 0.9})
    model = networks(recipe)[0]
    plain = copy.deepcopy(model).to(memory_format=torch.channels_last)  # the same kernels: a ReLU at zero is a coin
    trainer = EncoderTrainer(recipe, model, Engine(CPU, "fp32"), total=10)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    for step in range(3):
        trainer.step(step, micros(count))
        x, y = (torch.cat([getattr(m, part) for m in micros(count)]) for part in ("images", "labels"))
        x_adv = pgd(plain, x, y, Threat("l2", eps), steps=2)
        optimizer.zero_grad()
        F.cross_entropy(plain(x_adv), y, label_smoothing=0.1).backward()
        optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_radius_zero_is_exactly_standard_training(tiny_npz: Path) -> None:
    made = []
    for attack in ({"norm": "l2", "eps": 0.0, "steps": 7}, {"norm": None, "eps": 0.0, "steps": 1}):
        recipe = tiny_recipe(tiny_npz, encoder__attack=attack)
        trainer = EncoderTrainer(recipe, networks(recipe)[0], Engine(CPU, "fp32"), total=10)
        for step in range(2):
            trainer.step(step, micros(2))
        made.append(trainer.exported())
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


Features = Callable[[torch.Tensor], torch.Tensor]


def plain_gan_step(
    part: Recipe,
    read: Features,
    compare: Features,
    g: torch.nn.Module,
    d: torch.nn.Module,
    x: torch.Tensor,
    optimizers: list,
) -> None:
    """Eqs. 3 to 7 as one would write them first: everything recomputed, no graph shared."""
    losses = part.decoder.losses
    with torch.no_grad():
        z, f = read(x), compare(x)
    d_optimizer, g_optimizer = optimizers
    d_optimizer.zero_grad()
    ones, zeros = torch.ones(len(x)), torch.zeros(len(x))
    both = d(torch.cat([x, g(z).detach()]), f)
    bce = F.binary_cross_entropy_with_logits
    (bce(both[: len(x)], ones) + bce(both[len(x) :], zeros)).backward()
    d_optimizer.step()
    g_optimizer.zero_grad()
    again = g(z)
    total = losses.pixel * F.l1_loss(again, x) + losses.feature * F.mse_loss(compare(again), f)
    (total + losses.adversarial * bce(d(again, f), ones)).backward()
    g_optimizer.step()


def signed(encoder: Encoder) -> Features:
    """The encoder's features of images normalised by 2x - 1, with its own first layer undone."""
    return lambda x: encoder.features((2 * x - 1) * encoder.std + encoder.mean)


@pytest.mark.parametrize("normalisation", ["encoder", "signed"])
@pytest.mark.parametrize("with_comparator", [False, True])
def test_a_decoder_step_is_the_plain_gan_step(tiny_npz: Path, normalisation: str, with_comparator: bool) -> None:
    recipe = tiny_recipe(tiny_npz, decoder__schedule={"kind": "constant"}, decoder__normalisation=normalisation)
    encoder, generator, discriminator = networks(recipe)
    read: Features = encoder.features if normalisation == "encoder" else signed(encoder)
    compare: Features = encoder.features
    comparator = None
    if with_comparator:
        recipe = recipe.replace({"decoder.comparator": {"name": "small-cnn", "weights": "w", "layer": "conv2"}})
        comparator = create_encoder("small-cnn", 5, 3, 16, width=0.25).eval().requires_grad_(False)
        compare = lambda x: comparator.features(x, "conv2")  # noqa: E731
        discriminator = create_discriminator("mirror", comparator.feature_shape((3, 16, 16), "conv2"), (3, 16, 16))
    encoder.eval().requires_grad_(False)
    plain_g, plain_d = copy.deepcopy(generator), copy.deepcopy(discriminator)
    trainer = DecoderTrainer(
        recipe, encoder, generator, discriminator, Engine(CPU, "fp32"), total=10, comparator=comparator
    )
    # Adam makes a whole step of a gradient that is all rounding (a feature that is zero throughout), but for its eps.
    for optimizer in (trainer.critic.optimizer, trainer.learner.optimizer):
        optimizer.param_groups[0]["eps"] = 1e-4
    optimizers = [
        torch.optim.Adam(plain_d.parameters(), recipe.decoder.discriminator_lr, (0.0, 0.9), eps=1e-4),
        torch.optim.Adam(plain_g.parameters(), recipe.decoder.lr, (0.0, 0.9), eps=1e-4),
    ]
    for step in range(3):
        trainer.step(step, micros(1))
        plain_gan_step(recipe, read, compare, plain_g, plain_d, micros(1)[0].images, optimizers)
    for ours, theirs in ((generator, plain_g), (discriminator, plain_d)):
        for (name, a), b in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            torch.testing.assert_close(a, b[1], atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_by_default_the_images_are_encoded_once(tiny_npz: Path) -> None:
    recipe = tiny_recipe(tiny_npz)
    trainer = DecoderTrainer(recipe, *networks(recipe), Engine(CPU, "fp32"), total=10)
    codes = trainer._encode(micros(1)[0].images)
    assert codes.compared is codes.decoded


@pytest.mark.parametrize("count", [1, 2])
def test_each_gradient_reaches_its_network_and_no_other(tiny_npz: Path, count: int) -> None:
    recipe = tiny_recipe(tiny_npz)
    encoder, generator, discriminator = networks(recipe)
    encoder.train()
    trainer = DecoderTrainer(recipe, encoder, generator, discriminator, Engine(CPU, "fp32"), total=10)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    assert not encoder.training
    generator.train()
    trainer.buffers.begin()
    batch = micros(count)
    codes = [trainer._encode(m.images) for m in batch]
    once = trainer._reconstruct(codes[0].decoded) if count == 1 else None

    trainer._discriminator_step(0, batch, codes, once)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in discriminator.parameters())
    assert all(p.grad is None for p in (*generator.parameters(), *encoder.parameters()))

    theirs = [p.grad.clone() for p in discriminator.parameters()]
    trainer._generator_step(0, batch, codes, once)
    assert all(p.grad is not None for p in generator.parameters())
    assert sum(p.grad.abs().sum() for p in generator.parameters()) > 0
    assert all(torch.equal(p.grad, was) for p, was in zip(discriminator.parameters(), theirs, strict=True))
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize("term", ["pixel", "feature", "adversarial"])
def test_every_loss_moves_the_generator(tiny_npz: Path, term: str) -> None:
    recipe = tiny_recipe(tiny_npz)
    encoder, generator, discriminator = networks(recipe)
    trainer = DecoderTrainer(recipe, encoder, generator, discriminator, Engine(CPU, "fp32"), total=10)
    discriminator.requires_grad_(False)
    x = micros(1)[0].images
    z = trainer._encode(x).decoded
    loss = trainer._terms(x, z, trainer._reconstruct(z))[term]
    gradients = torch.autograd.grad(loss, list(generator.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)
    assert sum(g.abs().sum() for g in gradients) > 0


def test_running_statistics_are_the_mean_over_the_steps_micro_batches(tiny_npz: Path) -> None:
    """Each micro-batch starts from the step's own statistics; none is forgotten, none counts twice."""
    recipe = tiny_recipe(tiny_npz)
    batch = micros(3)

    def after(some: list[Micro]) -> dict[str, torch.Tensor]:
        encoder, generator, discriminator = networks(recipe)
        trainer = DecoderTrainer(recipe, encoder, generator, discriminator, Engine(CPU, "fp32"), total=10)
        trainer.step(0, some)
        state = {**generator.state_dict(), **{f"d.{k}": v for k, v in discriminator.state_dict().items()}}
        return {k: v for k, v in state.items() if "running" in k or k.endswith(("_u", "_v", "num_batches_tracked"))}

    together, alone = after(batch), [after([replace(micro, of=1)]) for micro in batch]
    assert {k.split(".")[-1] for k in together} >= {"running_mean", "running_var", "num_batches_tracked", "_u", "_v"}
    for key, value in together.items():
        if key.startswith("d."):
            continue  # its second pass sees the discriminator's own, differing step
        mean = torch.stack([one[key].double() for one in alone]).mean(0)
        torch.testing.assert_close(value.double(), mean, atol=1e-6, rtol=1e-5)
    assert not torch.equal(alone[0]["layers.1.running_mean"], alone[1]["layers.1.running_mean"])
