"""The stages of a recipe: how the encoder and the decoder are trained, and what attacks them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from arae.config.base import Augment, Count, Fraction01, Norm, Part, Positive, Radius, check_radius


class Attack(Part):
    """An attack in a threat model; for training, PGD (Madry et al. 2018, Eq. 2 of the ARAE paper)."""

    later = frozenset({"kind"})

    kind: Literal["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "cascade", "autoattack"] = "pgd"
    """`apgd-ce`, `apgd-dlr`, `apgd-t` (targeted DLR): Croce & Hein 2020, which choose their own step size and start;
    `cascade`: apgd-ce, then apgd-t on the samples that it left; `autoattack`: their standard suite, which chooses its
    own steps and restarts too. For evaluation only."""
    norm: Norm | None = None
    """Norm of the perturbation; required where eps > 0."""
    eps: Radius = 0.0
    """Radius of the ball, for images in [0, 1]; 0 is the clean image."""
    steps: Count = 7
    """Gradient steps; default for the APGD family: 100."""
    step_size: Radius | None = None
    """Length of a step, in the norm; default 2.5 · eps / steps."""
    random_start: bool = False
    """Start at a random point of the ball (the field's reference library starts at the image)."""
    restarts: Count = 1
    """Runs per sample, of which the worst is kept; every run after the first starts at a random point."""

    @model_validator(mode="before")
    @classmethod
    def _steps_of_apgd(cls, document: Any) -> Any:
        """APGD's published 100 steps, in place of PGD's 7, where none are given."""
        if (
            isinstance(document, Mapping)
            and str(document.get("kind", "")).startswith(("apgd", "cascade"))
            and "steps" not in document
        ):
            return {**document, "steps": 100}
        return document

    @model_validator(mode="after")
    def _radius_has_a_norm(self) -> Self:
        check_radius(self.norm, self.eps)
        if self.kind != "pgd" and self.step_size is not None:
            raise ValueError(f"kind = {self.kind} chooses its own steps: leave step_size = {self.step_size:g} out")
        return self


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

    later = frozenset({"export"})

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
    export: Literal["last", "best"] = "last"
    """Which weights the stage is for: those of its last step, or those that were best on the held-out images."""

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
    shift: Annotated[float, Field(ge=-10, le=10)] = -1.0
    """GAIRAT: lambda of its weights, (1 + tanh(lambda + 5 (1 - 2 k / K))) / 2 where a sample falls at step k of K."""


class Phase(Part):
    """The stage up to some share of its steps, made cheaper."""

    until: Annotated[float, Field(gt=0, lt=1)]
    """Share of the stage's steps at which the next phase begins."""
    steps: Count | None = None
    """Steps of the attack, where it has more; default: its own. A step_size that is given is longer by as much as they
    are fewer."""
    scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the images' side. An l2 radius shrinks with it, so that a pixel is perturbed by as much."""


class Guard(Part):
    """What is done about catastrophic overfitting: robustness that is suddenly there for the training attack alone.

    Found when the accuracy under PGD-10 on held-out images (`evaluate.looks` times a stage) falls below a share of its
    best, by more than chance: then training goes back to the state that was best, and on with a stronger attack (Wong
    et al. 2020 stop). Not before the radius has warmed up.
    """

    below: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the best accuracy so far below which training has overfitted."""
    steps: Count = 7
    """Steps of the attack from then on, in all phases, more than it had: PGD's, of its default size, without noise."""


class Span(NamedTuple):
    """A part of an encoder's stage: how it attacks, and images of which size."""

    until: float
    """Share of the stage's steps at which it ends."""
    attack: Attack
    scale: float


class Encoder(Stage):
    """The classifier whose features are inverted, and its adversarial training (Madry et al.; SGD with momentum)."""

    later = Stage.later | {"width", "objective", "radius_warmup", "quick_attack", "noise", "phases", "guard"}
    later |= {"replays", "early_stop"}

    name: str
    """A network of `arae ls encoders`, or `torchvision/NAME` for any of torchvision's classifiers."""
    layer: str | None = None
    """The tap: which layer's output is the feature; default: the network's own."""
    width: Positive = 1.0
    """Factor on the network's channels, for the networks of arae's own (not `torchvision/…`)."""
    weights: str | None = None
    """Start from these weights: a `.safetensors` file, a run folder or model folder, or `run:NAME`, the run of that
    name; with `steps: 0` they are used as they are."""
    attack: Attack = Attack()
    """What the training images are attacked with; eps 0 is standard training."""
    radius_warmup: Fraction01 = 0.0
    """Share of the stage's steps over which the radius of the attack grows from 0 to its own, evenly (and with it the
    step size). At large radii short trainings from random weights do not leave the level of chance without."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """N-FGSM (de Jorge et al. 2022, Algorithm 1; theirs: 2): noise of so many radii before a single step of the radius
    (or of step_size), and no projection after it."""
    replays: Count = 1
    """Free adversarial training (Shafahi et al. 2019, Algorithm 1; theirs: 4 to 8): each batch is learnt from so many
    times in a row, and each time the images' gradient, which comes along, moves the perturbation on by a radius (or by
    step_size). The rate follows the batches, so with m replays a stage wants 1 / m of its steps. (A guard that has to
    step in goes on with one update a step.)"""
    early_stop: Annotated[int, Field(ge=0)] | None = None
    """Friendly adversarial training (Zhang et al. 2020, Algorithm 1): a sample is attacked until it is misclassified,
    and for so many steps more (their tau). On a GPU each step waits for the device to tell who is left."""
    phases: tuple[Phase, ...] = ()
    """Cheaper first phases, in order: fewer steps of the attack, smaller images."""
    guard: Guard | None = None
    """Watch for catastrophic overfitting, which single-step attacks are prone to."""
    quick_attack: bool = True
    """Attack a copy of the network that is made for attacks: the same up to rounding, in less time, for the memory of
    the weights once more (whole on every worker, also in ZeRO's stage 3). Off, attacks see the network itself."""
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

    @model_validator(mode="after")
    def _phases_in_order(self) -> Self:
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)):
            raise ValueError(f"phases end at {ends} of the stage: write them in order, each longer than the one before")
        return self

    @model_validator(mode="after")
    def _guard_is_stronger(self) -> Self:
        most = max(span.attack.steps for span in self.spans())
        if self.guard and self.attack.eps and self.guard.steps <= most:
            raise ValueError(
                f"guard.steps = {self.guard.steps} must be more than the attack has before it, {most}: raise it"
            )
        return self

    @model_validator(mode="after")
    def _noise_before_one_step(self) -> Self:
        attack = self.attack
        if not self.noise or not attack.eps:
            return self
        if self.objective.kind != "at":
            raise ValueError(f"noise is for objective.kind = at, not {self.objective.kind}: set it to 0")
        if attack.steps != 1 or attack.random_start or attack.restarts != 1:
            raise ValueError(
                f"noise = {self.noise:g} goes before a single step: set attack.steps to 1, and leave random_start and "
                "restarts out"
            )
        check_radius(attack.norm, self.noise * attack.eps, "noise · attack.eps")
        return self

    @model_validator(mode="after")
    def _replays_by_one_step(self) -> Self:
        attack = self.attack
        if self.replays == 1 or not attack.eps:
            return self
        if attack.steps != 1 or attack.restarts != 1 or self.noise or self.objective.kind != "at":
            raise ValueError(
                f"replays = {self.replays} are attacks of one step each, with objective.kind = at: set attack.steps to "
                "1, and leave restarts and noise out"
            )
        return self

    @model_validator(mode="after")
    def _stops_early_once(self) -> Self:
        attack = self.attack
        if self.early_stop is None or not attack.eps:
            return self
        if attack.restarts != 1 or self.noise or self.replays != 1 or self.objective.kind != "at":
            raise ValueError(
                f"early_stop = {self.early_stop} is for PGD that runs once, with objective.kind = at: leave "
                "attack.restarts, noise and replays out"
            )
        return self

    def spans(self) -> tuple[Span, ...]:
        """The stage's parts in order; the last one ends at 1."""
        return (*(self._span(phase) for phase in self.phases), Span(1.0, self.attack, 1.0))

    def _span(self, phase: Phase) -> Span:
        attack, changes = self.attack, dict[str, Any]()
        shrunk = phase.scale if attack.norm == "l2" else 1.0
        steps = min(phase.steps or attack.steps, attack.steps)
        if attack.step_size is not None:
            changes["step_size"] = attack.step_size * shrunk * attack.steps / steps
        changes |= {"eps": attack.eps * shrunk, "steps": steps}
        return Span(phase.until, attack.model_copy(update=changes), phase.scale)


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

    later = Stage.later | {"normalisation", "comparator", "augment", "recompute"}

    name: str = "mirror"
    """A network of `arae ls decoders`; `mirror` derives one from the feature and image shapes."""
    losses: Losses = Losses()
    normalisation: Literal["encoder", "signed"] = "encoder"
    """What the images are normalised by before they are encoded for the decoder: the `encoder`'s own mean and
    deviation, or 2x - 1 (`signed`), as the authors' code does; the feature loss keeps the encoder's own."""
    comparator: Comparator | None = None
    """Default: the encoder itself."""
    augment: tuple[Augment, ...] | None = None
    """As `data.augment`, for the decoder's training alone (the authors' code: none); default: `data.augment`."""
    recompute: Count = 1
    """Parts of the decoder whose activations are computed anew in the backward pass, where the memory for them is
    short: about a forward pass more for each step, the same numbers. 1 keeps them."""
    lr: Positive = 3e-4
    discriminator_lr: Positive = 12e-4
    betas: tuple[Fraction01, Fraction01] = (0.0, 0.9)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    ema: Fraction01 = 0.0
    """Decay of the moving average of the weights that is exported; 0 exports the weights themselves."""
