"""Recipes: what they refuse and in which words, the grammar of overrides, bases, digests, differences."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from arae.config import Recipe, difference, dump_recipe, flatten, keys, load_recipe, parse_radius
from arae.errors import InputError

WHOLE: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "data": {"name": "images", "size": 16, "channels": 3},
    "encoder": {"name": "small-cnn", "epochs": 2, "batch": 32, "attack": {"norm": "l2", "eps": 0.5}},
    "decoder": {
        "epochs": 1,
        "batch": 32,
        "losses": {"pixel": 1.0, "feature": 0.1},
        "comparator": {"name": "alexnet", "weights": "alexnet.pt"},
    },
    "evaluate": {"n": 100, "attacks": [{"norm": "l2", "eps": 0.5}, {"norm": "l2", "eps": 1.0, "steps": 20}]},
    "map": {"radii": [0, 0.5, 1]},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the recipe `small.yaml`."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "small.yaml", WHOLE)
    return tmp_path


def write(path: Path, document: object) -> str:
    path.write_text(yaml.safe_dump(document))
    return str(path)


def refusal(name: str | Path, *overrides: str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(InputError) as caught:
        load_recipe(name, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


@pytest.mark.parametrize(
    ("value", "radius"),
    [
        (0, 0.0),
        (1, 1.0),
        (0.5, 0.5),
        ("0.5", 0.5),
        ("8/255", 8 / 255),
        (" 8/255 ", 8 / 255),
        ("1e-3", 1e-3),
        ("3", 3.0),
    ],
)
def test_a_radius_is_read(value: object, radius: float) -> None:
    assert parse_radius(value) == pytest.approx(radius, rel=1e-15)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (-1, "negative"),
        ("-1/255", "negative"),
        ("8px", "8/255"),
        ("8 / 0", "can't be"),
        ("1/0", "can't be"),
        ("", "can't be"),
        (True, "can't be True"),
        (None, "can't be None"),
        ([1], "can't be [1]"),
        ("nan", "can't be"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        ("1e999", "finite"),
    ],
)
def test_a_radius_is_refused(value: object, says: str) -> None:
    with pytest.raises(ValueError, match="radius") as caught:
        parse_radius(value)
    assert says in str(caught.value)


# Overrides of the whole recipe above, and what the refusal says.
REFUSALS = [
    ("encoder.attack.epss=1", ["encoder.attack.epss", "did you mean encoder.attack.eps?"]),
    ("encodr.name=x", ["unknown key encodr", "encoder"]),
    ("decoder.losses.pixl=1", ["decoder.losses.pixl", "decoder.losses.pixel"]),
    ("evaluate.attacks.0.stepps=1", ["evaluate.attacks.0.stepps", "evaluate.attacks.0.steps?"]),
    ("encoder.attack.eps=-0.5", ["encoder.attack.eps", "negative", "-0.5"]),
    ("encoder.attack.eps=8px", ["encoder.attack.eps", "8px", "8/255"]),
    ("encoder.attack.eps=.nan", ["encoder.attack.eps", "finite"]),
    ("encoder.attack.norm=null", ["encoder.attack", "norm", "l2", "linf"]),
    ("encoder.attack.norm=l3", ["encoder.attack.norm", "l3", "'l2' or 'linf'"]),
    ("encoder.attack.eps=128", ["encoder.attack.eps", "128", "divide", "255"]),
    ("encoder.attack={norm: linf, eps: 8}", ["encoder.attack", "l-inf", "8/255"]),
    ("evaluate.attacks.1.eps=128", ["evaluate.attacks.1.eps", "255"]),
    ("encoder.attack.steps=0", ["encoder.attack.steps", "greater than or equal to 1", "0"]),
    ("encoder.lr=0", ["encoder.lr", "greater than 0"]),
    ("encoder.lr=.inf", ["encoder.lr", "finite"]),
    ("encoder.lr=fast", ["encoder.lr", "'fast'"]),
    ("encoder.momentum=1", ["encoder.momentum", "less than 1"]),
    ("encoder.steps=10", ["encoder", "one of `epochs` and `steps`"]),
    ("encoder.epochs=null", ["encoder", "one of `epochs` and `steps`"]),
    ("encoder.micro_batch=5", ["encoder", "32", "micro_batch = 5"]),
    ("encoder.batch=3.5", ["encoder.batch", "3.5"]),
    ("encoder=resnet", ["encoder", "'resnet'"]),
    ("decoder.losses={pixel: 0}", ["decoder.losses", "pixel, feature or adversarial"]),
    ("data.channels=2", ["data.channels", "2"]),
    ("data.augment=[flop]", ["data.augment", "flop"]),
    ("map.radii=[]", ["map", "radii"]),
    ("map.radii=[1, 1]", ["map", "distinct"]),
    ("map.radii=[0, -1]", ["map.radii", "negative"]),
    ("precision=fp8", ["precision", "fp8", "bf16"]),
    ("seed=-1", ["seed", "-1"]),
    ("name=../outside", ["name", "../outside"]),
    ("encoder.attack.kind=apgd-ce", ["encoder", "apgd-ce is for evaluation", "pgd"]),
    ("encoder={name: x, steps: 1, label_smoothing: 0.1, objective: {kind: mart}}", ["label_smoothing", "mart"]),
    ("encoder.objective.shift=-10.5", ["encoder.objective.shift", "greater than or equal to -10"]),
    ("encoder.objective.shift=11", ["encoder.objective.shift", "less than or equal to 10"]),
    (
        "evaluate.attacks.0={kind: apgd-t, norm: l2, eps: 1, step_size: 1}",
        ["evaluate.attacks.0", "apgd-t", "step_size"],
    ),
    ("encoder.objective.kind=madry", ["encoder.objective.kind", "madry", "trades"]),
    ("encoder.objective.beta=0", ["encoder.objective.beta", "greater than 0"]),
    ("encoder.width=0", ["encoder.width", "greater than 0"]),
    ("decoder.losses.preset=inverted", ["decoder.losses.preset", "inverted", "inversion"]),
    ("decoder.losses.preset=inversion", ["decoder.losses", "inversion sets the weights itself", "null"]),
    ("decoder.comparator={name: alexnet}", ["decoder.comparator.weights", "missing"]),
    ("evaluate.protocol=high-resolution", ["protocol = high-resolution", "images"]),
    ("evaluate.factors=[]", ["factors is empty"]),
    # the grammar itself
    ("encoder.lr", ["encoder.lr", "dotted.key=value"]),
    ("=3", ["=3", "dotted.key=value"]),
    ("encoder.lr.x=1", ["encoder.lr", "number"]),
    ("encoder.attack.eps.x=1", ["encoder.attack.eps is a value"]),
    ("evaluate.attacks.7.eps=1", ["'7'", "2 items"]),
    ("evaluate.attacks.-1.eps=1", ["'-1'", "2 items"]),
    ("evaluate.attacks.first.eps=1", ["'first'", "2 items"]),
    ("map.radii.0.x=1", ["map.radii.0 is a value"]),
    ("map.radii.9=1", ["'9'", "3 items"]),
    ("base=demo", ["base"]),
]


@pytest.mark.parametrize(("override", "says"), REFUSALS, ids=[o for o, _ in REFUSALS])
def test_an_override_is_refused(folder: Path, override: str, says: list[str]) -> None:
    text = refusal("small.yaml", override)
    assert [part for part in says if part not in text] == [], text


def test_a_map_with_radii_needs_a_norm(folder: Path) -> None:
    text = refusal("small.yaml", "encoder.attack={}")
    assert "map.radii" in text
    assert "norm" in text


ACCEPTED = [
    ("encoder.attack.eps=8/255", "encoder.attack.eps", 8 / 255),
    ("encoder.attack.eps=1.5", "encoder.attack.eps", 1.5),
    ("encoder.lr=1e-4", "encoder.lr", 1e-4),  # YAML 1.1 reads it as text
    ("encoder.weight_decay=5e-4", "encoder.weight_decay", 5e-4),
    ("encoder.attack.random_start=true", "encoder.attack.random_start", True),
    ("decoder=null", "decoder", None),
    ("decoder.losses.adversarial=0.01", "decoder.losses.adversarial", 0.01),
    ("evaluate.attacks.1.eps=0.25", "evaluate.attacks.1.eps", 0.25),
    ("evaluate.attacks.0.kind=apgd-ce", "evaluate.attacks.0.steps", 100),
    ("evaluate.attacks.0={kind: apgd-t, norm: l2, eps: 1, steps: 7}", "evaluate.attacks.0.steps", 7),
    ("map.radii.2=2", "map.radii.2", 2.0),
    ("map.radii=[0, 1]", "map.radii", (0.0, 1.0)),
    ("data.augment=[flip, shift]", "data.augment", ("flip", "shift")),
    ("data.source=/a/folder with spaces", "data.source", "/a/folder with spaces"),
    ("data.source=a=b", "data.source", "a=b"),
    ("name=sweep/trial-1", "name", "sweep/trial-1"),
]


@pytest.mark.parametrize(("override", "key", "value"), ACCEPTED, ids=[o for o, _, _ in ACCEPTED])
def test_an_override_is_taken(folder: Path, override: str, key: str, value: object) -> None:
    found: Any = load_recipe("small.yaml", [override])
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_lists_are_replaced(folder: Path) -> None:
    recipe = load_recipe("small.yaml", ["encoder.lr=1", "encoder.lr=2", "evaluate.attacks=[{norm: linf, eps: 4/255}]"])
    assert recipe.encoder.lr == 2
    assert [(a.norm, a.eps) for a in recipe.evaluate.attacks] == [("linf", 4 / 255)]


def test_a_group_that_is_null_can_be_opened(folder: Path) -> None:
    recipe = load_recipe("small.yaml", ["decoder=null", "decoder.steps=3"])
    assert recipe.decoder is not None
    assert recipe.decoder.steps == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: [1", "not YAML"),
        ("- 1\n- 2\n", "mapping"),
        ("", "mapping"),
        ("name: x\n", "data is missing"),
        ("base: nowhere\n", "no recipe 'nowhere'"),
        (b"\xff\xfe\x00", "read"),
        ("!!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_file_is_refused(folder: Path, content: str | bytes, says: str) -> None:
    path = folder / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in refusal(path)


def test_a_missing_recipe_is_named(folder: Path) -> None:
    text = refusal("nosuch.yaml")
    assert "nosuch.yaml" in text
    (folder / "empty").mkdir()
    assert "run folder" in refusal("empty")


def test_a_base_holds_the_rest(folder: Path) -> None:
    top = {"base": "small.yaml", "name": "top", "encoder": {"attack": {"eps": 1}}, "evaluate": {"attacks": []}}
    recipe = load_recipe(write(folder / "top.yaml", top))
    assert recipe.name == "top"
    assert recipe.encoder.attack.eps == 1.0
    assert recipe.encoder.attack.norm == "l2"
    assert recipe.encoder.batch == 32
    assert recipe.evaluate.attacks == ()
    assert recipe.evaluate.n == 100


def test_a_base_stands_beside_its_recipe(folder: Path) -> None:
    (folder / "mine").mkdir()
    write(folder / "mine" / "root.yaml", WHOLE)
    top = write(folder / "mine" / "top.yaml", {"base": "root.yaml", "seed": 9})
    assert load_recipe(top).seed == 9
    assert load_recipe("mine/top.yaml").data.size == 16
    assert difference(load_recipe("mine/top.yaml")) == {"seed": 9}


@pytest.mark.parametrize("first", ["a.yaml", "b.yaml"])
def test_bases_in_a_circle_are_refused(folder: Path, first: str) -> None:
    write(folder / "a.yaml", {"base": "b.yaml"})
    write(folder / "b.yaml", {"base": "a.yaml"})
    assert "leads back to itself" in refusal(first)


def test_difference_from_the_base(folder: Path) -> None:
    recipe = load_recipe("small.yaml", ["encoder.attack.eps=1", "decoder.losses.feature=0.1", "data.augment=[flip]"])
    assert recipe.base == "small.yaml"
    assert difference(recipe) == {"encoder.attack.eps": 1.0, "data.augment": ["flip"]}


def test_a_file_is_the_base_of_what_comes_of_it(folder: Path) -> None:
    recipe = load_recipe("small.yaml")
    assert recipe.base == "small.yaml"
    assert difference(recipe) == {}
    assert difference(recipe.replace({"encoder.attack.eps": 1.25})) == {"encoder.attack.eps": 1.25}


def test_difference_without_a_base_is_the_recipe(folder: Path) -> None:
    recipe = load_recipe("small.yaml").replace({"base": None})
    assert difference(recipe)["encoder.attack.eps"] == 0.5


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["decoder=null"],
        ["encoder.attack.eps=8/255", "encoder.lr=1e-4"],
        ["evaluate.attacks.0={kind: apgd-t, norm: l2, eps: 1, steps: 7}"],  # 7: PGD's default, not its own
        ["evaluate.attacks.0.kind=apgd-t"],
        ["decoder.augment=[]"],
    ],
)
def test_dump_and_load(folder: Path, overrides: list[str]) -> None:
    recipe = load_recipe("small.yaml", overrides)
    run = folder / "runs" / "x"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    for back in (load_recipe(run), load_recipe(run / "recipe.yaml")):
        assert back == recipe
        assert back.digest == recipe.digest


def test_a_run_folder_outlives_its_base(folder: Path) -> None:
    recipe = load_recipe("small.yaml", ["seed=4"])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "small.yaml").unlink()
    assert load_recipe(folder) == recipe


def test_a_recipe_is_frozen(folder: Path) -> None:
    recipe = load_recipe("small.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.encoder.lr = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_replace_checks_anew(folder: Path) -> None:
    recipe = load_recipe("small.yaml")
    other = recipe.replace({"encoder.attack.eps": 1.0, "name": "small/eps-1"})
    assert (other.encoder.attack.eps, other.name) == (1.0, "small/eps-1")
    assert recipe.encoder.attack.eps == 0.5
    with pytest.raises(InputError, match=r"encoder\.attack\.eps"):
        recipe.replace({"encoder.attack.epss": 1.0})


def reordered(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: reordered(document[key]) for key in reversed(document)}
    return document


def test_the_digest_is_of_what_is_computed() -> None:
    recipe = Recipe.model_validate(WHOLE)
    same = [
        reordered(WHOLE),
        WHOLE | {"name": "other", "base": "somewhere"},
        WHOLE | {"scale": "full"},  # a default written out
        WHOLE | {"encoder": WHOLE["encoder"] | {"attack": {"norm": "l2", "eps": "1/2"}}},
    ]
    assert {Recipe.model_validate(document).digest for document in same} == {recipe.digest}
    assert len(recipe.digest) == 64


# One other value for every key of the schema; a key that is added must be added here.
OTHER: dict[str, Any] = {
    "scale": "small", "seed": 4, "precision": "fp32",
    "data.name": "mnist", "data.source": "/x", "data.train": "a.beton", "data.test": "b.beton", "data.size": 20,
    "data.channels": 1, "data.loader": "ffcv", "data.limit": 10, "data.augment": ["flip"], "data.pad": 2,
    "encoder.epochs": 3, "encoder.batch": 64, "encoder.micro_batch": 16, "encoder.lr": 0.2,
    "encoder.schedule.kind": "cosine", "encoder.schedule.warmup": 0.1, "encoder.schedule.every": 0.5,
    "encoder.schedule.gamma": 0.2, "encoder.name": "alexnet", "encoder.layer": "conv1", "encoder.weights": "w",
    "encoder.attack.norm": "linf", "encoder.attack.eps": 0.25, "encoder.attack.steps": 3,
    "encoder.attack.step_size": 0.1, "encoder.attack.random_start": True, "encoder.attack.restarts": 2,
    "encoder.momentum": 0.5,
    "encoder.weight_decay": 0.1, "encoder.label_smoothing": 0.1, "encoder.ema": 0.9, "encoder.width": 0.5,
    "encoder.objective.kind": "trades", "encoder.objective.beta": 3.0, "encoder.objective.burn_in": 0.25,
    "encoder.objective.shift": 0.0, "encoder.radius_warmup": 0.5, "encoder.quick_attack": False,
    "encoder.phases": [{"until": 0.5, "scale": 0.5}], "encoder.guard.steps": 9, "encoder.guard.below": 0.25,
    "encoder.noise": 2.0, "encoder.replays": 4, "encoder.early_stop": 1,
    "decoder.epochs": 3, "decoder.batch": 64, "decoder.micro_batch": 16, "decoder.lr": 0.2,
    "decoder.schedule.kind": "cosine", "decoder.schedule.warmup": 0.1, "decoder.schedule.every": 0.5,
    "decoder.schedule.gamma": 0.2, "decoder.name": "other", "decoder.losses.pixel": 2.0,
    "decoder.losses.pixel_norm": "l2", "decoder.losses.feature": 0.2, "decoder.losses.adversarial": 0.2,
    "decoder.losses.discriminator": 2.0, "decoder.losses.preset": "inversion", "decoder.normalisation": "signed",
    "decoder.comparator.name": "vgg16", "decoder.comparator.weights": "vgg16.pt", "decoder.comparator.layer": "conv2",
    "decoder.augment": [], "decoder.recompute": 3,
    "decoder.discriminator_lr": 0.1, "decoder.betas": [0.5, 0.9], "decoder.weight_decay": 0.1, "decoder.ema": 0.9,
    "evaluate.n": 7, "evaluate.batch": 8, "evaluate.attacks": [], "evaluate.looks": 4, "evaluate.lpips": None,
    "evaluate.lpips_weights": "w", "evaluate.protocol": "upscale", "evaluate.factors": [1, 4], "evaluate.images": "x",
    "evaluate.tile": 64, "evaluate.inversion.steps": 5, "evaluate.inversion.step_size": 0.5,
    "evaluate.inversion.start": "other", "state.every": 7, "state.keep": 3, "map.radii": [0, 1],
    "state.minutes": 5, "state.not_finite": "rollback", "encoder.export": "best", "decoder.export": "best",
    "engine.kind": "deepspeed", "engine.stage": 3, "engine.offload": True,
}  # fmt: skip
GROUPS = {"data", "encoder", "decoder", "evaluate", "state", "map", "engine"}
INNER = {"encoder.attack", "encoder.schedule", "encoder.objective", "decoder.schedule", "decoder.losses"}
INNER |= {"decoder.comparator", "evaluate.inversion", "encoder.guard"}
# A stage has one of epochs and steps; names are no part of what is computed; training attacks by PGD alone.
EXEMPT = {"name", "base", "encoder.steps", "decoder.steps", "encoder.attack.kind"}


def before_and_after(key: str) -> tuple[Recipe, Recipe]:
    """The whole recipe without and with the key's other value."""
    before = Recipe.model_validate(WHOLE)
    if key == "decoder.losses.preset":  # it stands beside no other weights
        before = before.replace({"decoder.losses": {}})
    if key in ("encoder.noise", "encoder.replays") or key.startswith("encoder.guard"):  # which are for single steps
        before = before.replace({"encoder.attack.steps": 1})
    if key == "engine.offload":  # DDP has nothing to offload
        before = before.replace({"engine.kind": "deepspeed"})
    return before, before.replace({key: OTHER[key]})


def test_every_key_has_another_value() -> None:
    inner = {key for key in keys(Recipe) if not key.startswith(("evaluate.attacks.", "encoder.phases."))}
    assert inner - GROUPS - INNER - EXEMPT == set(OTHER)


def test_keys_that_were_added_later_leave_old_digests_as_they_were() -> None:
    """A recipe without them has the digest it had before there were such keys: they are no part of the document."""
    document = Recipe.model_validate(WHOLE | {"decoder": {"steps": 1}}).digested()
    later = {"width", "objective", "radius_warmup", "quick_attack", "noise", "phases", "guard", "replays", "early_stop"}
    assert not later & set(document["encoder"])
    assert not {"normalisation", "comparator", "augment", "recompute"} & set(document["decoder"])
    assert "preset" not in document["decoder"]["losses"]
    assert "kind" not in document["encoder"]["attack"]
    assert not {"protocol", "factors", "images", "tile", "inversion", "looks"} & set(document["evaluate"])


def test_the_demo_has_the_digests_it_always_had() -> None:
    """Records and run folders that were made by 0.1 name them; what has been made cheaper since is put back."""
    recipe = load_recipe("demo", ["encoder.phases=[]", "decoder.steps=600"])
    found = [recipe.digest, recipe.stage_digest("encoder"), recipe.stage_digest("decoder")]
    assert [digest[:8] for digest in found] == ["c3e70d29", "0f71a19f", "139fbd5b"]


@pytest.mark.parametrize(("old", "protocol"), [(True, "map"), (False, "robustness")])
def test_the_switch_of_old_run_folders_is_read_as_a_protocol(old: bool, protocol: str) -> None:
    recipe = Recipe.model_validate(WHOLE | {"evaluate": {"reconstruct": old}})
    assert recipe.evaluate.protocol == protocol


@pytest.mark.parametrize("key", OTHER)
def test_every_key_changes_the_digest(key: str) -> None:
    before, after = before_and_after(key)
    assert before.digest != after.digest


@pytest.mark.parametrize("key", OTHER)
def test_a_stage_digest_depends_on_its_stage_only(key: str) -> None:
    before, after = before_and_after(key)
    # the images' fingerprint and the precision as it was are kept beside each state
    irrelevant = key in ("data.source", "data.train", "data.test", "data.loader", "precision") or key.split(".")[0] in (
        "evaluate",
        "state",
        "map",
        "engine",
    )
    irrelevant |= key == "scale"
    encoder_moves = not irrelevant and not key.startswith("decoder.")
    assert (before.stage_digest("encoder") != after.stage_digest("encoder")) is encoder_moves
    assert (before.stage_digest("decoder") != after.stage_digest("decoder")) is not irrelevant


@pytest.mark.parametrize(
    ("epochs", "steps", "n", "batch", "expected"),
    [(1, None, 100, 32, 4), (2, None, 96, 32, 6), (0.5, None, 96, 32, 2), (None, 7, 5, 32, 7), (0, None, 9, 4, 0)],
)
def test_total_steps(epochs: float | None, steps: int | None, n: int, batch: int, expected: int) -> None:
    stage = WHOLE["encoder"] | {"epochs": epochs, "steps": steps, "batch": batch}
    assert Recipe.model_validate(WHOLE | {"encoder": stage}).encoder.total_steps(n) == expected


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1]}, "e": None}) == {"a.b.c": 1, "a.d": [1], "e": None}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("engine=deepspeed",), ("deepspeed", 2)),
        (("engine=deepspeed", "engine.stage=3"), ("deepspeed", 3)),
        (("engine.stage=3", "engine=deepspeed"), ("deepspeed", 3)),
        (("engine.kind=deepspeed", "engine.stage=1"), ("deepspeed", 1)),
    ],
)
def test_one_word_may_stand_for_the_engine(tmp_path: Path, overrides: tuple[str, ...], expected: tuple) -> None:
    engine = load_recipe("demo", overrides).engine
    assert (engine.kind, engine.stage) == expected
    (tmp_path / "mine.yaml").write_text("base: demo\nname: mine\nengine: deepspeed\n")
    mine = load_recipe(tmp_path / "mine.yaml", [o for o in overrides if "stage" in o]).engine
    assert (mine.kind, mine.stage) == expected


@pytest.mark.parametrize("key", ["data.train", "data.test", "data.source", "encoder.weights", "evaluate.images"])
@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hidden@bucket/x",
        "s3://bucket/x?access_key=a&secret_key=hidden",
        "https://host/x?X-Amz-Signature=hidden",
    ],
)
def test_a_recipe_holds_no_secret(key: str, url: str) -> None:
    """It is shown, logged, kept beside the run and sent to MLflow."""
    with pytest.raises(InputError, match=rf"{key} holds a password or a key") as raised:
        load_recipe("demo", [f"{key}={url}"])
    assert "hidden" not in str(raised.value)
    load_recipe("demo", [f"{key}=s3://bucket/x?endpoint_override=127.0.0.1:8333&scheme=http"])
