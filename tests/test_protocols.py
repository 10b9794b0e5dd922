"""What each protocol measures, which records it replaces, and what becomes of an evaluation that was killed."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import CPU, run_folder, through
from torch import Tensor, nn
from torchvision.transforms.functional import resize
from training import tiny_recipe

from arae.attacks import Outcome
from arae.config import Attack, Recipe
from arae.cost import Networks, Passes, attack_flops
from arae.errors import InputError, Stopped
from arae.evaluate import alone, evaluate, invert, mapping, name_of, threat_of
from arae.evaluate import batches as measuring
from arae.evaluate.measure import described, evenly
from arae.evaluate.run import held_out
from arae.evaluate.upscale import enlarged, upscaled
from arae.records import Record, Threat, read_records

QUALITY = {"psnr", "ssim"}  # at 16 px, LPIPS left out
KINDS = ("pgd", "apgd-ce", "apgd-dlr", "apgd-t", "cascade", "autoattack")
FEW: dict[str, Any] = {"evaluate__n": 5, "evaluate__batch": 3, "evaluate__inversion": {"steps": 3}}


def kinds_of(records: list[Record]) -> Counter[tuple[str, bool]]:
    return Counter((record.protocol, record.threat is not None) for record in records)


MAP = {("classification", False): 1, ("classification", True): 1, ("reconstruction", False): 2}
MAP |= {("reconstruction", True): 2, ("mean-image", False): 1, ("other-features", False): 1}
MEASURED = {
    "map": MAP,
    "reconstruction": {key: n for key, n in MAP.items() if key[0] != "classification" and not key[1]},
    "robustness": {key: n for key, n in MAP.items() if key[0] == "classification"},
    "upscale": {("upscale-1", False): 2, ("upscale-3", False): 2},
    "inversion": {("inversion", False): 2},
}


def test_each_protocol_measures_its_own_and_leaves_the_others(tiny_npz: Path) -> None:
    """One after the other in one folder; each replaces nothing but what it measures anew."""
    recipe, folder = run_folder(tiny_npz, evaluate__factors=[1, 3], **FEW)
    held: Counter[tuple[str, bool]] = Counter()
    for protocol, measured in MEASURED.items():
        records = evaluate(recipe.replace({"evaluate.protocol": protocol}), folder, CPU)
        assert kinds_of(records) == measured, protocol
        assert all(record.n in (5, 4) for record in records)
        stage = "encoder" if protocol in ("robustness", "inversion") else "decoder"
        assert stage in {record.stage for record in records}
        held |= Counter(measured)
        assert kinds_of(read_records(folder.records)) == held, protocol
    assert not folder.evaluation.exists()
    last = read_records(folder.records)[-1]
    assert (last.protocol, last.model.decoder, last.model.losses) == ("inversion", None, None)
    before = read_records(folder.records)
    again = evaluate(recipe.replace({"evaluate.protocol": "upscale", "evaluate.factors": [2]}), folder, CPU)
    assert read_records(folder.records) == [r for r in before if not r.protocol.startswith("upscale")] + again


@pytest.mark.parametrize("protocol", ["reconstruction", "upscale", "high-resolution"])
def test_a_run_without_a_decoder(tiny_npz: Path, protocol: str) -> None:
    recipe, folder = run_folder(tiny_npz, decoder=False, evaluate__images=str(tiny_npz.parent), **FEW)
    with pytest.raises(InputError, match=rf"evaluate\.protocol = {protocol} needs a decoder"):
        evaluate(recipe.replace({"evaluate.protocol": protocol}), folder, CPU)
    assert not folder.records.exists()


def test_without_a_decoder_the_rest_is_measured(tiny_npz: Path) -> None:
    recipe, folder = run_folder(tiny_npz, decoder=False, **FEW)
    assert set(kinds_of(evaluate(recipe, folder, CPU))) == {("classification", False), ("classification", True)}
    made = evaluate(recipe.replace({"evaluate.protocol": "inversion"}), folder, CPU)
    assert {record.metric for record in made} == QUALITY


def test_records_that_can_not_be_read_are_not_written_over(tiny_npz: Path) -> None:
    recipe, folder = run_folder(tiny_npz, **FEW)
    folder.records.write_text("{}\n")
    with pytest.raises(InputError, match=r"records\.jsonl:1"):
        evaluate(recipe, folder, CPU)
    assert folder.records.read_text() == "{}\n"


def test_old_records_have_no_flags(tiny_npz: Path) -> None:
    recipe, folder = run_folder(tiny_npz, evaluate__protocol="robustness", **FEW)
    record = evaluate(recipe, folder, CPU)[0]
    document = json.loads(record.model_dump_json())
    del document["flags"]
    assert Record.model_validate(document) == record.model_copy(update={"flags": ()})


@pytest.mark.parametrize(
    ("attack", "threat", "name"),
    [
        (Attack(norm="l2", eps=0.5, steps=5), ("pgd", 5, 0.25, 1, False), "pgd-5 l2 0.5"),
        (Attack(norm="linf", eps=0.1, steps=9, restarts=2, step_size=0.02), ("pgd", 9, 0.02, 2, False), None),
        (Attack(kind="apgd-t", norm="l2", eps=0.5, steps=20), ("apgd-t", 20, 1.0, 1, True), "apgd-t-20 l2 0.5"),
        (Attack(kind="cascade", norm="l2", eps=0.5), ("cascade", 100, 1.0, 1, True), "cascade-100 l2 0.5"),
        (Attack(kind="autoattack", norm="linf", eps=0.1), ("autoattack", 100, 0.2, 1, True), "autoattack linf 0.1"),
    ],
)
def test_the_threat_says_which_attack(attack: Attack, threat: tuple[object, ...], name: str | None) -> None:
    made = threat_of(attack)
    assert (made.attack, made.steps, made.step_size, made.restarts, made.random_start) == threat
    assert name is None or name_of(attack) == name


def test_attacks_of_every_kind(tiny_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The single attacks are run; the suite is stood in for by one that breaks every other image."""
    calls: list[dict[str, Any]] = []

    def suite(model: nn.Module, x: Tensor, y: Tensor, threat: object, **given: Any) -> Outcome:
        calls.append(given | {"n": len(x), "threat": threat})
        given["progress"]("square", 1, 1)
        robust = torch.arange(len(x)) % 2 == 0
        for job in ("mine", "others"):  # what another evaluation has not finished lies beside it
            (given["state"] / job).mkdir(parents=True)
        return Outcome(robust, x / 255, {"square": 2}, ("masked gradients?",), given["state"] / "mine")

    monkeypatch.setattr(mapping, "autoattack", suite)
    attacks = [{"kind": kind, "norm": "l2", "eps": 1, "steps": 3} for kind in KINDS]
    attacks += [{"kind": kind, "norm": "l2", "eps": 0} for kind in KINDS]
    recipe, folder = run_folder(tiny_npz, evaluate__attacks=attacks, **FEW)
    said: list[str] = []
    records = evaluate(recipe, folder, CPU, lambda label, done, total: said.append(label))
    robust = [r for r in records if r.metric == "robust_accuracy"]
    assert [r.threat.attack for r in robust if r.threat] == [*KINDS, *KINDS]
    clean = next(r for r in records if r.metric == "clean_accuracy")
    single = KINDS.index("autoattack")
    assert all(r.value is not None and clean.value is not None and r.value <= clean.value for r in robust[:single])
    assert [r.value for r in robust[len(KINDS) :]] == [clean.value] * len(KINDS)
    assert (robust[single].value, robust[single].flags) == (3 / 5, ("masked gradients?",))
    assert all("DLR" in " ".join(r.flags) for r in robust[:single])  # three classes, which the checks remark on
    assert robust[0].flags == robust[single - 1].flags
    (call,) = calls
    assert (call["n"], call["batch"], call["state"]) == (5, 3, folder.evaluation / "map" / f"attack-{single}")
    assert "autoattack l2 1: square" in said
    assert list(call["state"].iterdir()) == [call["state"] / "others"]


def test_enlarging_is_torchvisions_resize() -> None:
    x = torch.rand(2, 3, 9, 14)
    for factor in (1, 2, 7):
        assert torch.allclose(enlarged(x, factor), resize(x, [9 * factor, 14 * factor]), atol=1e-6)


def test_upscaled_images_are_judged_at_their_size(tiny_npz: Path) -> None:
    """A model that answers 0.9 times the image: the PSNR of 0.1 times the enlarged one; batches shrink by L²."""
    recipe = tiny_recipe(tiny_npz, evaluate__batch=9, evaluate__factors=[1, 3, 4, 3])
    images = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)
    model, decoder = through(0.9)
    batches = measuring.Batches.of(recipe, model, images)
    with alone(batches) as team:
        found = upscaled(batches, images, team, lambda label, done, total: None)
    records = {(r.protocol, r.metric): r for r in found}
    assert len(records) == 6
    for factor in (1, 3, 4):
        large = resize(images.double() / 255, [16 * factor, 16 * factor])
        expected = (-10 * (0.1 * large).square().flatten(1).mean(1).log10()).mean().item()
        record = records[f"upscale-{factor}", "psnr"]
        assert record.value == pytest.approx(expected, abs=1e-3)
        assert (record.n, record.stage) == (10, "decoder")
    assert Counter(decoder.seen) == {(9, 3, 16, 16): 1, (1, 3, 16, 16): 1, (1, 3, 48, 48): 10, (1, 3, 64, 64): 10}


def test_inversion_recovers_the_image_of_an_invertible_linear_map() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(48, 48)).Q
    scales = torch.linspace(1, 2, 48)

    def features(images: Tensor) -> Tensor:
        return images.flatten(1) @ basis * scales

    x, start = torch.rand(4, 3, 4, 4), torch.rand(4, 3, 4, 4)
    found = start
    for step_size in (0.1, 0.01, 0.001):
        found = invert(features, features(x), found, 60, step_size)
    assert (found - x).abs().amax() < 0.01 < (start - x).abs().amax()
    assert found.amin() >= 0
    assert found.amax() <= 1


def test_inversion_never_gets_worse_and_is_of_each_image_alone() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).requires_grad_(False)
    x, start = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)
    target, heard = encoder(x), list[int]()

    def distance(images: Tensor) -> Tensor:
        return (encoder(images) - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)

    found = {steps: invert(encoder, target, start, steps, 0.5) for steps in (1, 5, 25)}
    values = torch.stack([distance(start), *(distance(images) for images in found.values())])
    assert (values.diff(dim=0) <= 0).all()
    assert (values[-1] < 0.8 * values[0]).all()
    assert torch.equal(found[25], invert(encoder, target, start, 25, 0.5, heard.append))
    assert heard == list(range(26))
    assert torch.allclose(invert(encoder, target[1:2], start[1:2], 25, 0.5), found[25][1:2], atol=1e-4)
    first = found[1] - start  # one step has its length, where nothing is clamped
    assert (first.flatten(1).norm(dim=1) <= 0.5 + 1e-5).all()
    assert torch.equal(invert(encoder, encoder(x), x, 3, 0.5), x)  # nothing is better than the image itself
    for steps, step_size in ((0, 1.0), (1, 0.0)):
        with pytest.raises(ValueError, match="step"):
            invert(encoder, target, start, steps, step_size)


@pytest.mark.parametrize("start", ["noise", "other"])
def test_a_stopped_inversion_goes_on(tiny_npz: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    overrides = FEW | {"evaluate__inversion": {"steps": 3, "start": start}, "evaluate__protocol": "inversion"}
    recipe, folder = run_folder(tiny_npz, **overrides)
    whole = evaluate(recipe, folder, CPU)

    def stop(label: str, done: int, total: int) -> None:
        assert (label, total) == ("inversion", 6)
        if done > 3:
            raise KeyboardInterrupt

    folder.records.unlink()
    with pytest.raises(Stopped, match="goes on"):
        evaluate(recipe, folder, CPU, stop)
    assert not folder.records.exists()
    batches: list[int] = []

    def counted(*given: Any) -> Tensor:
        batches.append(len(given[1]))
        return invert(*given)

    monkeypatch.setattr(measuring, "invert", counted)
    continued = evaluate(recipe, folder, CPU)
    assert batches == [2]  # the second batch alone
    assert [r.value for r in continued] == [r.value for r in whole]
    assert not folder.evaluation.exists()
    with pytest.raises(KeyboardInterrupt):  # nothing was kept yet
        evaluate(recipe, folder, CPU, lambda label, done, total: stop(label, 4, total))


def test_an_inversion_computes_damaged_parts_anew_and_removes_no_others(
    tiny_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = run_folder(tiny_npz, evaluate__protocol="inversion", **FEW)
    whole = evaluate(recipe, folder, CPU)
    others = folder.evaluation / "inversion" / "inversion-others" / "0.safetensors"
    others.parent.mkdir(parents=True)
    others.write_bytes(b"x")

    def stop(label: str, done: int, total: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        evaluate(recipe, folder, CPU, stop)
    (part,) = (path for path in folder.evaluation.rglob("*.safetensors") if path != others)
    part.write_bytes(part.read_bytes()[:40])
    batches: list[int] = []
    monkeypatch.setattr(measuring, "invert", lambda *given: batches.append(len(given[1])) or invert(*given))
    assert [r.value for r in evaluate(recipe, folder, CPU)] == [r.value for r in whole]
    assert batches == [3, 2]
    assert [path for path in folder.evaluation.rglob("*") if path.is_file()] == [others]
    assert list(others.parent.parent.iterdir()) == [others.parent]


@pytest.mark.parametrize("preset", ["inversion", None])
def test_records_name_the_weights_that_the_decoder_was_trained_with(tiny_npz: Path, preset: str | None) -> None:
    """Those of its model folder; of a folder that is too old to say, the recipe's, where it has numbers."""
    given, resolved = (
        {"pixel": 2.0, "feature": 0.5, "adversarial": 0.0},
        {"pixel": 9.0, "feature": 8.0, "adversarial": 7.0},
    )
    recipe = tiny_recipe(tiny_npz, decoder__losses={"preset": preset} if preset else given)
    model, _ = through(1.0)
    assert described(recipe, model).losses == (None if preset else given)
    model.config["decoder"]["losses"] = resolved
    assert described(recipe, model).losses == resolved
    assert described(recipe, model, decoder=False).losses is None


CLASSES = [
    (["a", "b", "c"], True),
    (["0", "1", "2"], True),  # an imported classifier's
    (["1", "2", "3"], False),
    (["a", "c", "b"], False),
    (["0", "1"], False),
]


@pytest.mark.parametrize(("names", "fits"), CLASSES)
def test_the_held_out_images_are_of_the_models_classes(tiny_npz: Path, names: list[str], fits: bool) -> None:
    np.savez(tiny_npz, **np.load(tiny_npz), classes=np.array(["a", "b", "c"]))
    recipe, (model, _) = tiny_recipe(tiny_npz, evaluate__n=5), through(1.0)
    model.config["classes"] = names
    if fits:
        images, labels = held_out(recipe, model, CPU)
        assert (len(images), labels.dtype) == (5, torch.int64)
    else:
        with pytest.raises(InputError, match=r"^data\.test: [^\n]*classes"):
            held_out(recipe, model, CPU)


def test_the_start_from_another_image_needs_another(tiny_npz: Path) -> None:
    recipe, folder = run_folder(
        tiny_npz, evaluate__protocol="inversion", evaluate__n=1, evaluate__inversion={"steps": 1, "start": "other"}
    )
    with pytest.raises(InputError, match=r"evaluate\.n"):
        evaluate(recipe, folder, CPU)


@pytest.mark.parametrize(("n", "wanted", "found"), [(5, None, 5), (5, 9, 5), (7, 3, 3), (1, 1, 1), (100, 7, 7)])
def test_evenly_is_spread_from_the_first_to_the_last(n: int, wanted: int | None, found: int) -> None:
    where = evenly(n, wanted)
    assert len(set(where.tolist())) == found
    assert (where[0], where[-1]) == (0, n - 1)


def test_what_protocols_cost() -> None:
    passes = Passes(forward=10, to_input=25, to_weights=30)
    one = Attack(kind="apgd-ce", norm="l2", eps=1, steps=9, restarts=2)
    assert attack_flops(passes, one) == 2 * 10 * 25
    assert attack_flops(passes, one.model_copy(update={"kind": "apgd-t"}), classes=4) == 3 * 2 * 10 * 25
    suite = Attack(kind="autoattack", norm="l2", eps=1)
    assert attack_flops(passes, suite, 10) > attack_flops(passes, suite, 3) > 5000 * 10
    assert attack_flops(passes, suite.model_copy(update={"eps": 0})) == 0


def test_what_each_protocol_adds(tiny_npz: Path) -> None:
    def cost(**overrides: object) -> int:
        recipe: Recipe = tiny_recipe(tiny_npz, **overrides)
        return Networks(recipe, (3, 16, 16), 3).evaluation()

    once = cost(evaluate__protocol="reconstruction")
    assert cost(evaluate__protocol="upscale", evaluate__factors=[1, 3]) == 10 * once
    assert cost(evaluate__protocol="high-resolution", evaluate__images="x") == once
    assert cost(evaluate__protocol="map") == cost(evaluate__protocol="robustness") + 2 * once
    inverted = {steps: cost(evaluate__protocol="inversion", evaluate__inversion={"steps": steps}) for steps in (1, 7)}
    assert inverted[7] == 7 * inverted[1] > 0


def test_threats_of_old_records_are_pgd() -> None:
    assert Threat(norm="l2", eps=1.0, steps=7, step_size=0.1).attack == "pgd"
