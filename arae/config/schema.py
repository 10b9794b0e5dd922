"""The recipe's parts: typed, frozen, unknown keys forbidden; a docstring under every field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from arae.config.document import checked, digest_of, set_key

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

    later: ClassVar[frozenset[str]] = frozenset()
    """Keys that were added after runs had been made: at their default they stay out of digests, which so stay valid."""

    def digested(self) -> dict[str, Any]:
        """The part as a JSON document for a digest."""
        document = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in self.later and value == field.get_default(call_default_factory=True):
                del document[name]
            elif isinstance(value, Part):
                document[name] = value.digested()
            elif isinstance(value, tuple):
                pairs = zip(value, document[name], strict=True)
                document[name] = [one.digested() if isinstance(one, Part) else plain for one, plain in pairs]
        return document


class Attack(Part):
    """An attack in a threat model; for training, PGD (Madry et al. 2018, Eq. 2 of the ARAE paper)."""

    later = frozenset({"kind"})

    kind: Literal["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "autoattack"] = "pgd"
    """`apgd-ce`, `apgd-dlr`, `apgd-t` (targeted DLR): Croce & Hein 2020, which choose their own step size; `autoattack`:
    their standard suite, which chooses its own steps and restarts too. For evaluation only."""
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


class Objective(Part):
    """What the encoder's training minimises over the attacked images."""

    kind: Literal["at", "trades", "mart", "gairat"] = "at"
    """`at`: cross-entropy of the attacked images (Madry et al. 2018); TRADES (Zhang et al. 2019), MART (Wang et al.
    2020), GAIRAT (Zhang et al. 2021)."""
    beta: Positive | None = None
    """Weight of the robust term of TRADES (default 6) and MART (default 5)."""
    burn_in: Fraction01 = 0.5
    """GAIRAT: share of the stage before the samples are weighted."""
    shift: float = -1.0
    """GAIRAT: lambda of its weights, (1 + tanh(lambda + 5 (1 - 2 k / K))) / 2 for a sample that falls at step k of K."""


class Encoder(Stage):
    """The classifier whose features are inverted, and its adversarial training (Madry et al.; SGD with momentum)."""

    later = frozenset({"width", "objective"})

    name: str
    """A network of `arae ls encoders`, or `torchvision/NAME` for any of torchvision's classifiers."""
    layer: str | None = None
    """The tap: which layer's output is the feature; default: the network's own."""
    width: Positive = 1.0
    """Factor on the network's channels, for the networks of arae's own (not `torchvision/…`)."""
    weights: str | None = None
    """Start from these weights: a `.safetensors` file or a run folder; with `steps: 0` they are used as they are."""
    attack: Attack = Attack()
    """What the training images are attacked with; eps 0 is standard training."""
    objective: Objective = Objective()
    lr: Positive = 0.1
    momentum: Fraction01 = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    label_smoothing: Fraction01 = 0.0
    ema: Fraction01 = 0.0
    """Decay of the moving average of the weights that is exported; 0 exports the weights themselves."""

    @model_validator(mode="after")
    def _trained_by_pgd(self) -> Self:
        if self.attack.kind != "pgd":
            raise ValueError(f"attack.kind = {self.attack.kind} is for evaluation; training attacks by pgd")
        if self.objective.kind != "at" and self.label_smoothing:
            raise ValueError(f"label_smoothing is for objective.kind = at, not {self.objective.kind}: set it to 0")
        return self


Preset = Literal[
    "inversion-pixel",
    "inversion-pixel-feature",
    "inversion",
    "anomaly-standard",
    "anomaly-robust",
    "style-standard",
    "style-robust",
    "denoising",
]


class Losses(Part):
    """Weights of the decoder's losses (Eqs. 3 to 7), each **mean**-reduced; 0 leaves a term out.

    The paper's weights are for sums over a batch of 128: `arae.train.losses.from_paper` converts them.
    """

    later = frozenset({"preset"})

    preset: Preset | None = None
    """One of the paper's weight sets (Sec. A4 of its appendix), converted to means at the images' and features' sizes;
    it takes the place of `pixel`, `feature`, `adversarial` and `discriminator`."""
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
        if self.preset and (self.pixel, self.feature, self.adversarial, self.discriminator) != (1, 0, 0, 1):
            raise ValueError(f"preset = {self.preset} sets the weights itself: leave them out, or set preset to null")
        if not (self.pixel or self.feature or self.adversarial):
            raise ValueError("every loss has weight 0: give pixel, feature or adversarial a weight")
        return self


class Comparator(Part):
    """A network beside the encoder whose features the feature loss and the discriminator compare."""

    name: str
    """A network of `arae ls encoders`, or `torchvision/NAME`."""
    weights: str
    """Its weights: a `.safetensors` or `.pt` file with a state dict, a run folder or a model folder."""
    layer: str | None = None
    """The tap; default: the network's own."""


class Decoder(Stage):
    """The generator that inverts the features, and its training (Adam; Sec. A4.1 of the paper's appendix)."""

    later = frozenset({"normalisation", "comparator"})

    name: str = "mirror"
    """A network of `arae ls decoders`; `mirror` derives one from the feature and image shapes."""
    losses: Losses = Losses()
    normalisation: Literal["encoder", "signed"] = "encoder"
    """What the images are normalised by before they are encoded for the decoder: the `encoder`'s own mean and deviation,
    or 2x - 1 (`signed`), as the authors' code does; the feature loss keeps the encoder's own."""
    comparator: Comparator | None = None
    """Default: the encoder itself."""
    lr: Positive = 3e-4
    discriminator_lr: Positive = 12e-4
    betas: tuple[Fraction01, Fraction01] = (0.0, 0.9)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    ema: Fraction01 = 0.0
    """Decay of the moving average of the weights that is exported; 0 exports the weights themselves."""


class Inversion(Part):
    """Images found by descent on the distance of their features (RI; Engstrom et al. 2019), with no decoder."""

    steps: Count = 10_000
    """Descent steps; the reference's 10,000."""
    step_size: Positive = 1.0
    """l2 length of a step, for images in [0, 1]; the reference's 1 at 224 px."""
    start: Literal["noise", "other"] = "noise"
    """Start at noise, or at another of the evaluated images."""


class Evaluate(Part):
    """What is measured on the held-out images."""

    later = frozenset({"protocol", "factors", "images", "tile", "inversion"})

    protocol: Literal["map", "reconstruction", "robustness", "upscale", "high-resolution", "inversion"] = "map"
    """`map`: robustness and reconstruction. `reconstruction` or `robustness`: that alone. `upscale`: reconstructions of
    the images enlarged by `factors`. `high-resolution`: of the files in `images`, at their own size. `inversion`: images
    optimised to have the features, in place of the decoder."""
    n: Count | None = None
    """Images, evenly over the held-out file; default: all."""
    batch: Count = 256
    attacks: tuple[Attack, ...] = ()
    """Each gives one robust accuracy, and reconstructions under attack."""
    factors: tuple[Count, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    """For `upscale`: the factors L."""
    images: str | None = None
    """For `high-resolution`: a folder of image files of any size."""
    tile: Annotated[int, Field(ge=32)] | None = None
    """For `high-resolution`: largest side in pixels that goes through the networks at once; default: the whole image, or
    what memory allows."""
    inversion: Inversion = Inversion()
    """For `inversion`: how the images are optimised."""
    lpips: Literal["alex", "vgg", "squeeze"] | None = "alex"
    """Backbone of LPIPS; null leaves it out."""
    lpips_weights: str | None = None
    """ImageNet weights of the backbone (torchvision's state dict), where they are not in torch's cache."""

    @model_validator(mode="before")
    @classmethod
    def _reconstruct_of_old(cls, document: Any) -> Any:
        """Run folders of 0.1 have `reconstruct`, which `protocol` says now."""
        if not isinstance(document, Mapping) or "reconstruct" not in document:
            return document
        rest = {key: value for key, value in document.items() if key != "reconstruct"}
        return rest if document["reconstruct"] else {"protocol": "robustness", **rest}

    @model_validator(mode="after")
    def _attacks_have_norms(self) -> Self:
        for i, attack in enumerate(self.attacks):
            if attack.norm is None:
                raise ValueError(f"attacks.{i} has no norm: add `norm: l2` or `norm: linf`")
        if not self.factors:
            raise ValueError("factors is empty: give the factors to enlarge by, such as [1, 4]")
        if self.protocol == "high-resolution" and self.images is None:
            raise ValueError("protocol = high-resolution needs images: the folder of the image files")
        return self


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
        document = self.digested()
        return digest_of({key: value for key, value in document.items() if key not in ("name", "base")})

    def stage_digest(self, stage: Literal["encoder", "decoder"]) -> str:
        """SHA-256 of just the parts that the result of a training stage depends on.

        Not the precision, which `auto` leaves to the machine, nor the training images' path: both are kept, as they
        were, beside each state.
        """
        kept = ("seed", "data", "encoder") if stage == "encoder" else ("seed", "data", "encoder", "decoder")
        document = {key: value for key, value in self.digested().items() if key in kept}
        for where in ("source", "train", "test", "loader"):  # where it lies, and what training does not see
            del document["data"][where]
        return digest_of(document)

    def replace(self, overrides: Mapping[str, Any]) -> Recipe:
        """This recipe with dotted keys set to values, checked anew."""
        document = self.model_dump(mode="json")
        for key, value in overrides.items():
            set_key(document, key, value)
        return checked(Recipe, document, where=self.name)
