"""The recipe: one typed, frozen, hashable document that says what to compute.

A recipe describes one trip from images to records: data, encoder, decoder, evaluation. *Where* to run it (workers,
device, address, run folder) is not part of it. YAML files and bare dotted overrides (`encoder.attack.eps=1.5`) share
one grammar.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from arae.errors import InputError

Norm = Literal["l2", "linf"]


def parse_radius(value: object) -> float:
    """A radius in units of images in [0, 1]: a number, or a fraction as text (`"8/255"`).

    Raises ValueError for anything negative, not finite, or with a unit of its own.
    """
    mend = 'write a number of images in [0, 1], such as 0.5, or a fraction, such as "8/255"'
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"a radius can't be {value!r}: {mend}")
    try:
        radius = float(Fraction(value.strip())) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"a radius can't be {value!r}: {mend}") from None
    except OverflowError:
        radius = math.inf
    if not math.isfinite(radius):
        raise ValueError(f"a radius must be finite, not {value!r}: {mend}")
    if radius < 0:
        raise ValueError(f"a radius must not be negative, as {value!r} is")
    return radius


Radius = Annotated[float, BeforeValidator(parse_radius)]
Positive = Annotated[float, Field(gt=0)]
Fraction01 = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


def check_radius(norm: Norm | None, eps: float, what: str = "eps", at: str = "") -> None:
    """Raise ValueError for a radius without a norm, or an l-inf radius wider than the whole range [0, 1]."""
    if eps > 0 and norm is None:
        raise ValueError(
            f"{what} = {eps:g} has no norm: add `norm: l2` or `norm: linf` {f'to {at}' if at else 'beside it'}"
        )
    if norm == "linf" and eps > 1:
        raise ValueError(
            f"{what} = {eps:g} in l-inf is wider than images in [0, 1]; for 8-bit levels write it as {eps:g}/255"
        )


class Part(BaseModel):
    """Base of every part: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


PartType = TypeVar("PartType", bound=Part)


class Attack(Part):
    """PGD in a threat model (Madry et al. 2018, Eq. 2 of the ARAE paper)."""

    norm: Norm | None = None
    """Norm of the perturbation; required where eps > 0."""
    eps: Radius = 0.0
    """Radius of the ball, for images in [0, 1]; 0 is the clean image."""
    steps: Count = 7
    """Gradient steps."""
    step_size: Radius | None = None
    """Length of a step, in the norm; default 2.5 · eps / steps."""
    random_start: bool = False
    """Start at a random point of the ball (the field's reference library starts at the image)."""
    restarts: Count = 1
    """Runs per sample, of which the worst is kept; every run after the first starts at a random point."""

    @model_validator(mode="after")
    def _radius_has_a_norm(self) -> Self:
        check_radius(self.norm, self.eps)
        return self


class Data(Part):
    """Which images, and how they are loaded."""

    name: str = "images"
    """A set of the catalogue (`arae ls data`), or `images` for a folder of one's own."""
    source: str | None = None
    """Where the images lie: an image folder, or the folder with the set's files; default: the catalogue's place."""
    train: str | None = None
    """Training images: a `.beton` (or `.npz`) file made by `arae encode`."""
    test: str | None = None
    """Held-out images, the same way."""
    size: Annotated[int, Field(ge=8)] | None = None
    """Height and width that the networks see, in pixels; default: that of the set."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for RGB; default: that of the set."""
    loader: Literal["auto", "ffcv", "resident"] = "auto"
    """`ffcv` streams the file; `resident` holds it on the device; `auto` takes resident where it is at most 2 GiB."""
    limit: Count | None = None
    """Use at most this many training images, evenly over the file."""
    augment: tuple[Literal["flip", "shift", "crop"], ...] = ()
    """`flip`: mirror, p = 1/2. `shift`: by up to `pad` pixels, edges repeated. `crop`: random resized crop."""
    pad: Annotated[int, Field(ge=0)] = 4
    """Reach of `shift` in pixels."""


class Schedule(Part):
    """The learning rate over a stage, as a factor on `lr`."""

    kind: Literal["constant", "step", "cosine", "linear"] = "constant"
    """`step` multiplies by gamma every `every` of the stage; `cosine` and `linear` fall to zero at its end."""
    warmup: Fraction01 = 0.0
    """Share of the stage over which the rate rises linearly from zero."""
    every: Annotated[float, Field(gt=0, le=1)] = 1 / 3
    """For `step`: share of the stage between drops (the paper: 30 of 90 epochs)."""
    gamma: Positive = 0.1
    """For `step`: factor of each drop."""


class Stage(Part):
    """What every training stage has: length, batches, rate."""

    epochs: Annotated[float, Field(ge=0)] | None = None
    """Passes over the training images."""
    steps: Annotated[int, Field(ge=0)] | None = None
    """Optimiser steps, in place of epochs."""
    batch: Count = 128
    """Images in one optimiser step over all workers."""
    micro_batch: Count | None = None
    """Images that batch norm sees at once, and the grain in which workers share a batch; default: the batch."""
    lr: Positive
    """Learning rate at the schedule's factor 1."""
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give one of `epochs` and `steps`")
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"batch = {self.batch} is not a multiple of micro_batch = {self.micro_batch}")
        return self

    @property
    def micro(self) -> int:
        """Images in a micro-batch."""
        return self.micro_batch or self.batch

    def total_steps(self, n: int) -> int:
        """Optimiser steps of the stage for `n` training images."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or 0) * n / self.batch)


class Encoder(Stage):
    """The classifier whose features are inverted, and its adversarial training (Madry et al.; SGD with momentum)."""

    name: str
    """A network of `arae ls encoders`."""
    layer: str | None = None
    """The tap: which layer's output is the feature; default: the network's own."""
    weights: str | None = None
    """Start from these weights: a `.safetensors` file or a run folder; with `steps: 0` they are used as they are."""
    attack: Attack = Attack()
    """What the training images are attacked with; eps 0 is standard training."""
    lr: Positive = 0.1
    momentum: Fraction01 = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    label_smoothing: Fraction01 = 0.0
    ema: Fraction01 = 0.0
    """Decay of the moving average of the weights that is exported; 0 exports the weights themselves."""


class Losses(Part):
    """Weights of the decoder's losses (Eqs. 3 to 7), each **mean**-reduced; 0 leaves a term out.

    The paper's weights are for sums over a batch of 128: `arae.train.losses.from_paper` converts them.
    """

    pixel: Annotated[float, Field(ge=0)] = 1.0
    """Eq. 4: mean absolute (or squared) difference of the images."""
    pixel_norm: Literal["l1", "l2"] = "l1"
    feature: Annotated[float, Field(ge=0)] = 0.0
    """Eq. 5: mean squared difference of the features."""
    adversarial: Annotated[float, Field(ge=0)] = 0.0
    """Eq. 6: -log D(reconstruction)."""
    discriminator: Positive = 1.0
    """Eq. 7, the discriminator's own loss; Adam makes its scale nearly irrelevant."""

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not (self.pixel or self.feature or self.adversarial):
            raise ValueError("every loss has weight 0: give pixel, feature or adversarial a weight")
        return self


class Decoder(Stage):
    """The generator that inverts the features, and its training (Adam; Sec. A4.1 of the paper's appendix)."""

    name: str = "mirror"
    """A network of `arae ls decoders`; `mirror` derives one from the feature and image shapes."""
    losses: Losses = Losses()
    lr: Positive = 3e-4
    discriminator_lr: Positive = 12e-4
    betas: tuple[Fraction01, Fraction01] = (0.0, 0.9)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    ema: Fraction01 = 0.0
    """Decay of the moving average of the weights that is exported; 0 exports the weights themselves."""


class Evaluate(Part):
    """What is measured on the held-out images."""

    n: Count | None = None
    """Images, evenly over the held-out file; default: all."""
    batch: Count = 256
    attacks: tuple[Attack, ...] = ()
    """Each gives one robust accuracy, and reconstructions under attack."""
    reconstruct: bool = True
    """Measure the reconstructions, where there is a decoder."""
    lpips: Literal["alex", "vgg", "squeeze"] | None = "alex"
    """Backbone of LPIPS; null leaves it out."""
    lpips_weights: str | None = None
    """ImageNet weights of the backbone (torchvision's state dict), where they are not in torch's cache."""


class State(Part):
    """When the whole state of a run is saved."""

    every: Count = 200
    """Optimiser steps between states: a run that is killed recomputes at most this many."""
    keep: Count = 2
    """Newest states kept."""


class Map(Part):
    """The robustness-reconstruction map: one trip a radius."""

    radii: tuple[Radius, ...]
    """Training radii, fixed beforehand; 0 is standard training."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.radii)) != len(self.radii) or not self.radii:
            raise ValueError(f"radii must be one or more distinct numbers, not {list(self.radii)}")
        return self


class Recipe(Part):
    """One trip from images to records."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
    """Name of the run; its folder is `<runs>/<name>`."""
    base: str | None = None
    """The recipe this one starts from; MLflow's parameters are the difference from it."""
    scale: Literal["full", "small"] = "full"
    """`small` marks every record as not comparable with the paper's scale."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 where the hardware is good at it, fp16 with loss scaling on older GPUs, fp32 elsewhere."""
    data: Data
    encoder: Encoder
    decoder: Decoder | None = None
    evaluate: Evaluate = Evaluate()
    state: State = State()
    map: Map | None = None

    @model_validator(mode="after")
    def _balls_fit_the_images(self) -> Self:
        train, radii = self.encoder.attack, self.map.radii if self.map else ()
        attacks = [("encoder.attack.eps", train)]
        attacks += [(f"evaluate.attacks.{i}.eps", attack) for i, attack in enumerate(self.evaluate.attacks)]
        attacks += [(f"map.radii.{i}", train.model_copy(update={"eps": eps})) for i, eps in enumerate(radii)]
        for place, attack in attacks:
            check_radius(attack.norm, attack.eps, place, at="encoder.attack")
            if self.data.size and self.data.channels and attack.norm == "l2":
                diameter = math.sqrt(self.data.channels) * self.data.size
                if attack.eps > diameter:
                    raise ValueError(
                        f"{place} = {attack.eps:g} in l2 is longer than the diagonal of the images ({diameter:.3g}); "
                        f"radii are for images in [0, 1], so divide 8-bit radii by 255"
                    )
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of what is computed: all but the names."""
        return digest_of(self.model_dump(mode="json", exclude={"name", "base"}))

    def stage_digest(self, stage: Literal["encoder", "decoder"]) -> str:
        """SHA-256 of just the parts that the result of a training stage depends on."""
        document = self.model_dump(mode="json", include={"seed", "precision", "data", "encoder", "decoder"})
        if stage == "encoder":
            del document["decoder"]
        for where in ("source", "test", "loader"):  # where it lies, and what training does not see
            del document["data"][where]
        return digest_of(document)

    def replace(self, overrides: Mapping[str, Any]) -> Recipe:
        """This recipe with dotted keys set to values, checked anew."""
        document = self.model_dump(mode="json")
        for key, value in overrides.items():
            _set(document, key, value)
        return _validated(document, where=self.name)


def digest_of(document: object) -> str:
    """SHA-256 (hex) of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with arae, by name."""
    folder = Path(str(resources.files("arae") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by shipped name, YAML file, or run folder, with `dotted.key=value` overrides.

    A file may name a `base`: it then holds only what differs. Lists are replaced, not merged.
    Raises InputError: no such recipe, unreadable YAML, unknown key (with the nearest valid one), bad value.
    """
    path = _recipe_path(str(name_or_path))
    document = _document(path)
    pairs = [_parse_override(text) for text in overrides]
    if any(key == "base" for key, _ in pairs):
        raise InputError(
            "override base=…: a base belongs in a recipe's file; to start from another recipe, name that one"
        )
    if pairs and document.get("base") is None:
        document["base"] = str(name_or_path)
    for key, value in pairs:
        _set(document, key, value)
    return _validated(document, where=str(name_or_path))


def load_options(model: type[PartType], overrides: Iterable[str], where: str) -> PartType:
    """Any part of the schema from bare `key=value` overrides alone; InputError as for a recipe."""
    document: dict[str, Any] = {}
    for text in overrides:
        _set(document, *_parse_override(text))
    return _checked(model, document, where)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def difference(recipe: Recipe) -> dict[str, Any]:
    """Dotted keys whose values differ from the recipe's base (from the schema's defaults where there is no base)."""
    try:
        base = flatten(load_recipe(recipe.base).model_dump(mode="json")) if recipe.base else {}
    except InputError:
        base = {}
    mine = flatten(recipe.model_dump(mode="json"))
    return {k: v for k, v in mine.items() if k not in ("name", "base") and (not base or base.get(k) != v)}


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in models_in(field.annotation):
            yield from keys(part, f"{prefix}{name}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The parts of the schema inside a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from models_in(argument)


def _recipe_path(name: str, beside: Path = Path()) -> Path:
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = beside / name
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(shipped)}"
    raise InputError(f"no recipe {name!r}: neither a shipped recipe, a YAML file nor a run folder; {hint}")


def _document(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f"{path}: its base leads back to itself ({' -> '.join(each.name for each in seen)})")
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys, not {type(document).__name__}")
    base = document.get("base")
    if base is None or (path.name == "recipe.yaml" and "encoder" in document and "data" in document):
        return document  # a run folder's recipe is whole already; its base only names where it came from
    parent = _recipe_path(str(base), beside=path.parent)
    found_by = str(base) if str(base) in shipped_recipes() else str(parent)
    return _merged(_document(parent, (*seen, path.resolve())), document) | {"base": found_by}


def _merged(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"override {text!r}: write dotted.key=value, such as encoder.attack.eps=1.5")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value


def _set(document: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node: Any = document
    for i, name in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, name, dotted)
        else:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, dict | list):
            raise InputError(f"override {dotted}={value}: {'.'.join(parents[: i + 1])} is a value, not a group of keys")
    if isinstance(node, list):
        _item(node, last, dotted)
        node[int(last)] = value
    else:
        node[last] = value


def _item(items: list[Any], name: str, dotted: str) -> Any:
    if not name.isdigit() or int(name) >= len(items):
        raise InputError(f"override {dotted}: {name!r} is not one of the {len(items)} items, counted from 0")
    return items[int(name)]


def _validated(document: dict[str, Any], where: str) -> Recipe:
    return _checked(Recipe, document, where)


def _checked(model: type[PartType], document: dict[str, Any], where: str) -> PartType:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{where}: {'; '.join(_explain(dict(e), model) for e in error.errors())}") from None


def _listed(model: type[BaseModel]) -> str:
    return "`arae show` lists them" if model is Recipe else ", ".join(keys(model))


def _nearest_key(place: str, model: type[BaseModel]) -> str | None:
    parts = place.split(".")
    near = difflib.get_close_matches(".".join(p for p in parts if not p.isdigit()), list(keys(model)), n=1, cutoff=0.5)
    if not near:
        return None
    key = near[0].split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and key[:i] == parts[:i]:  # the schema's keys have no item numbers: put them back
            key.insert(i, part)
    return ".".join(key)


def _explain(error: dict[str, Any], model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = _nearest_key(place, model)
        return f"unknown key {place}" + (
            f"; did you mean {near}?" if near else f"; the keys are those of {model.__name__}: {_listed(model)}"
        )
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    shown = (
        f" (got {value!r})" if isinstance(value, str | int | float | bool | None) and repr(value) not in message else ""
    )
    return f"{place}: {message}{shown}" if place else message
