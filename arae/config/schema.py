"""The recipe and its parts: typed, frozen, unknown keys forbidden; a docstring under every field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from arae.config.base import Augment, Count, Part, Positive, Radius, check_no_secret, check_radius
from arae.config.document import checked, digest_of, flatten, set_key
from arae.config.stages import Attack, Decoder, Encoder


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
    augment: tuple[Augment, ...] = ()
    """`flip`: mirror, p = 1/2. `shift`: by up to `pad` pixels, edges repeated. `crop`: random resized crop."""
    pad: Annotated[int, Field(ge=0)] = 4
    """Reach of `shift` in pixels."""


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

    later = frozenset({"protocol", "factors", "images", "tile", "inversion", "looks"})

    protocol: Literal["map", "reconstruction", "robustness", "upscale", "high-resolution", "inversion"] = "map"
    """`map`: robustness and reconstruction. `reconstruction` or `robustness`: that alone. `upscale`: reconstructions of
    the images enlarged by `factors`. `high-resolution`: of the files in `images`, at their own size. `inversion`:
    images optimised to have the features, in place of the decoder."""
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
    """For `high-resolution`: largest side in pixels that goes through the networks at once; default: the whole image,
    or what memory allows."""
    inversion: Inversion = Inversion()
    """For `inversion`: how the images are optimised."""
    looks: Count | None = None
    """While training, looks at a few held-out images in each stage, evenly over its steps; default: after epochs, about
    ten times a stage."""
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
        if document["reconstruct"] in (True, None):
            return rest
        if rest.get("protocol", "map") not in ("map", "robustness"):
            raise ValueError(f"protocol = {rest['protocol']} reconstructs: leave reconstruct out")
        return rest | {"protocol": "robustness"}

    def digested(self) -> dict[str, Any]:
        """See `Part`; `protocol` as 0.1 wrote it where 0.1 could: by `reconstruct`."""
        document = super().digested() | {"reconstruct": self.protocol != "robustness"}
        if self.protocol == "robustness":
            del document["protocol"]
        return document

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
    """When the whole state of a run is saved, and what is done where training leaves the numbers."""

    later = frozenset({"minutes", "not_finite"})

    every: Count = 200
    """Optimiser steps between states: a run that is killed recomputes at most this many."""
    minutes: Positive | None = None
    """Save also where this long has passed since the last state."""
    keep: Count = 2
    """Newest states kept, beside the one that was best on the held-out images."""
    not_finite: Literal["stop", "rollback"] = "stop"
    """A loss that is NaN or infinite: `stop`, or go back to the newest state and leave that batch out (at most three
    times a stage). Either way the batch's images are written to `not_finite.jsonl`."""


class EngineChoice(Part):
    """What holds the networks while they are trained, and averages their gradients over the workers."""

    kind: Literal["ddp", "deepspeed"] = "ddp"
    """`ddp`: torch's DistributedDataParallel, every worker with the whole of it. `deepspeed`: ZeRO, which shares
    optimiser states (stage 1), gradients (2) and weights (3) out among the workers."""
    stage: Annotated[int, Field(ge=0, le=3)] = 2
    """ZeRO stage, for `deepspeed`."""
    offload: bool = False
    """For `deepspeed` at stage 1 and up: optimiser states in the CPU's memory."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, document: Any) -> Any:
        """`engine: deepspeed` for `engine: {kind: deepspeed}`."""
        return {"kind": document} if isinstance(document, str) else document

    @model_validator(mode="after")
    def _offload_what_is_shared(self) -> Self:
        if self.offload and (self.kind != "deepspeed" or self.stage == 0):
            raise ValueError("offload = true is for kind = deepspeed at stage 1, 2 or 3")
        return self


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

    later = frozenset({"engine"})

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
    """Name of the run; its folder is `<runs>/<name>`."""
    base: str | None = None
    """The recipe this one starts from; MLflow's parameters are the difference from it."""
    scale: Literal["full", "small"] = "full"
    """`small` marks every record as not comparable with the paper's scale."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """`auto`: bf16 where the hardware of every worker is good at it, fp16 with loss scaling on older GPUs, fp32
    elsewhere. `fp64` is for checks: what differs there is no rounding."""
    engine: EngineChoice = EngineChoice()
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

    @model_validator(mode="after")
    def _recompute_whole_weights(self) -> Self:
        if self.decoder and self.decoder.recompute > 1 and self.engine.kind == "deepspeed" and self.engine.stage == 3:
            raise ValueError(
                f"decoder.recompute = {self.decoder.recompute}: in ZeRO's stage 3 the weights are in pieces, which a "
                "second pass would have to gather again: set engine.stage to 2, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        for place, value in flatten(self.model_dump(mode="json")).items():
            if isinstance(value, str) and "://" in value:
                check_no_secret(value, place)
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
