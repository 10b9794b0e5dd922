"""Stages that are shared: each is trained and measured once, in a run folder named by all that it depends on.

`<runs>/stages/encoder-<key>` and `decoder-<key>` are ordinary run folders. Whoever needs a stage first trains it; who
needs it meanwhile waits for the folder's lock, and takes over from its newest state where the first one dies. What was
measured of a stage lies in its folder's `evaluated/<key>.jsonl`, the key telling of all that the values depend on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from arae.adopt import adopt_encoder, finished
from arae.config import Data, Recipe, digest_of
from arae.data.load import fingerprint
from arae.errors import AraeError, Busy, InputError, Stopped
from arae.files import write_text
from arae.launch import Stop, Where
from arae.metrics import backbone_at_hand
from arae.models.autoencoder import read_config
from arae.monitor.events import read_events
from arae.records import Record, read_records, write_records
from arae.runs import SHARED, RunFolder
from arae.session import Session, session
from arae.storage import fetched
from arae.tracking import Family
from arae.train.log import Event, Listener
from arae.train.networks import sha256_of, weights_file
from arae.train.state import list_states

Name = Literal["encoder", "decoder"]
Measure = Callable[[Recipe, RunFolder], list[Record]]

EVALUATED = "evaluated"
LACKING = ".without-lpips"
WAIT_S = 1.0
SAID_S = 60.0
"""Seconds between words on what is waited for."""


@dataclass(frozen=True)
class Stage:
    """One stage of a trip, as the store knows it."""

    name: Name
    key: str
    """Hash of all that its training depends on."""
    recipe: Recipe
    """What its folder holds: of an encoder no decoder, and no layer."""
    group: str
    """Whom it may be compared with: encoders of one radius, norm and seed; decoders on one layer of one encoder."""
    encoder: str
    """Key of the encoder that it is, or needs."""
    evaluation: Recipe | None
    """What is measured of it, as a recipe; None: nothing."""

    @property
    def folder(self) -> RunFolder:
        """Where it lies."""
        return RunFolder.of(self.recipe)

    @property
    def measured(self) -> Path | None:
        """The file of what is measured of it, for this evaluation."""
        if self.evaluation is None:
            return None
        part = self.evaluation.evaluate.model_copy(update={"looks": None})
        document = [part.digested(), self.evaluation.precision, _images(self.recipe, "test")]
        return self.folder.path / EVALUATED / f"{digest_of(document)[:16]}.jsonl"

    @property
    def is_measured(self) -> bool:
        """Whether there is nothing left to measure. What lacked LPIPS' weights is measured anew once they are there."""
        if self.evaluation is None or self.measured is None:
            return True
        lacking = self.measured.with_suffix(LACKING).exists()
        return self.measured.is_file() and not (lacking and _has_lpips(self.evaluation))


@dataclass(frozen=True)
class Outcome:
    """How a stage came to be there."""

    stage: Name
    key: str
    trained: bool
    """Whether any of its steps were taken for this trial."""
    measured: bool
    steps: int
    seconds: float
    """Of its training, whoever paid for it."""
    workers: int
    evaluation_s: float

    @property
    def device_hours(self) -> float:
        """Of its training: workers times hours."""
        return self.workers * self.seconds / 3600


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe's trip: the encoder's and, where it has one, the decoder's."""
    alone: dict[str, Any] = {"base": None, "map": None}
    if not recipe.encoder.attack.eps:  # then nothing else of the attack matters
        alone |= {"encoder.attack": {"eps": 0.0}, "encoder.radius_warmup": 0.0, "encoder.quick_attack": True}
        smaller = [phase.model_copy(update={"steps": None}) for phase in recipe.encoder.phases if phase.scale < 1]
        alone |= {"encoder.noise": 0.0, "encoder.replays": 1, "encoder.early_stop": None, "encoder.guard": None}
        alone["encoder.phases"] = [p.model_dump() for p in smaller]
    bare = recipe.replace({**alone, "encoder.layer": None, "decoder": None})
    encoder = _key(bare, "encoder")
    attack = recipe.encoder.attack
    group = digest_of(["encoder", attack.norm if attack.eps else None, attack.eps, recipe.seed])[:16]
    protocol = recipe.evaluate.protocol
    unused = {"evaluate.lpips": None, "evaluate.lpips_weights": None, "evaluate.factors": [1]}
    classified = (
        bare.replace({"evaluate.protocol": "robustness", **unused}) if protocol in ("map", "robustness") else None
    )
    first = Stage("encoder", encoder, _named(bare, "encoder", encoder), group, encoder, classified)
    if recipe.decoder is None:
        return (first,)
    whole = recipe.replace(alone)
    decoder = _key(whole, "decoder")
    shown = protocol if protocol != "map" else "reconstruction"
    # Under attack nothing is reconstructed: with the attacks left out, all sets of attacks share what is measured.
    looked = whole.replace({"evaluate.protocol": shown, "evaluate.attacks": []}) if protocol != "robustness" else None
    compared = f"{encoder}-{recipe.encoder.layer}"
    return first, Stage("decoder", decoder, _named(whole, "decoder", decoder), compared, encoder, looked)


def _named(recipe: Recipe, name: Name, key: str) -> Recipe:
    return recipe.replace({"name": f"{SHARED}/{name}-{key}"})


def _key(recipe: Recipe, name: Name) -> str:
    parts = [recipe.stage_digest(name), _images(recipe, "train"), recipe.precision, recipe.engine.kind]
    stages = [recipe.encoder] if recipe.decoder is None else [recipe.encoder, recipe.decoder]
    comparator = recipe.decoder.comparator if recipe.decoder else None
    for weights in (recipe.encoder.weights, comparator.weights if comparator else None):
        if weights is not None:  # by what they are, not by where they lie
            parts.append(_weights(weights))
    chosen = any(stage.export == "best" for stage in stages) or recipe.encoder.guard is not None
    if chosen:  # by held-out images
        parts += [_images(recipe, "test"), str(recipe.evaluate.looks)]
    return digest_of(parts)[:16]


def _has_lpips(recipe: Recipe) -> bool:
    part = recipe.evaluate
    return part.lpips is not None and backbone_at_hand(part.lpips, part.lpips_weights)


def _weights(where: str) -> str:
    """SHA-256 of a file of weights; where it is not at hand (as for a plan), its name."""
    try:
        found = weights_file(where).stat()
    except OSError:
        return f"{where}, which is not at hand"
    return _hashed(where, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=64)
def _hashed(where: str, changed: int, size: int) -> str:
    """Kept for as long as the file is the same: every trial of a sweep asks."""
    return sha256_of(where)


def _images(recipe: Recipe, split: Literal["train", "test"]) -> str:
    """The images' fingerprint; where they are not at hand (as for a plan), their name."""
    return _fingerprint(recipe.data.model_dump_json(), split)


@lru_cache(maxsize=64)
def _fingerprint(document: str, split: Literal["train", "test"]) -> str:
    """Kept, for it reads all images of a set that is not encoded; `document`: the recipe's data as JSON."""
    data = Data.model_validate_json(document)
    try:
        return fingerprint(data, split)
    except InputError:
        return f"{data.name}, which is not at hand"


@dataclass(frozen=True)
class Work:
    """With what a trial's stages are trained and measured."""

    where: Where
    parent: str
    """Run folder of the trial, which MLflow shows new stages under; relative to the folder of the runs."""
    experiment: str
    measure: Measure
    listener: Listener
    """Hears the events of stages that are trained here."""
    note: Callable[[str], None]
    stop: Stop
    limits: Mapping[str, float]
    """Of each stage, up to which share of its steps it may be trained (see `tune.rungs`); 1 is all of it."""

    def ensure(self, stage: Stage) -> tuple[Outcome, list[Record]]:
        """The stage trained and measured, by whomever.

        Raises what training and measuring raise, Stopped where it has come as far as it may. A failure of another
        trial's is not inherited: the stage is tried here as well, from its newest state.
        """
        waited = said = time.monotonic()
        while True:
            if found := self._there(stage):
                return found
            try:
                with session(stage.recipe, self.parent, family=self._family(stage)) as run:
                    trained = self._trained(stage, run)
                    measured, seconds = self._measured(stage, run)
                outcome, records = outcome_of(stage, seconds), _records(stage)
                return replace(outcome, trained=trained, measured=measured), records
            except Busy:
                if self.stop():
                    raise Stopped(f"stopped while another trial trained {stage.recipe.name}") from None
                if time.monotonic() - said > SAID_S:
                    said = time.monotonic()
                    self.note(f"waiting for {stage.recipe.name}, which another trial trains ({said - waited:.0f} s)")
                time.sleep(WAIT_S)

    def _there(self, stage: Stage) -> tuple[Outcome, list[Record]] | None:
        """The stage, where nothing is left to do for it."""
        if not (is_trained(stage) and stage.is_measured):
            return None
        return outcome_of(stage), _records(stage)

    def _trained(self, stage: Stage, run: Session) -> bool:
        """Train it unless somebody has in the meantime."""
        if is_trained(stage):
            return False
        if stage.name == "decoder":
            encoder = stages_of(stage.recipe)[0].folder.path
            fetched(encoder)
            if adopt_encoder(stage.recipe, run.folder, [encoder]) is None and not read_config(run.folder.model):
                raise AraeError(f"{encoder}: its encoder is not there any more; run the same command again")
        if look := self._last_look(stage):
            for event in look:  # whoever trained it so far may have been killed before it could tell
                self.listener(event)
            raise Stopped(f"{stage.recipe.name}: as far as it may be for now")
        run.train(self.where, self.listener, self.stop)
        return True

    def _last_look(self, stage: Stage) -> list[Event]:
        """Where the stage has been trained as far as it may: its beginning and its look there, as its log has them."""
        share = self.limits.get(stage.name, 1.0)
        told = [event for event in read_events(stage.folder.log) if event.get("stage") == stage.name]
        starts = [event for event in told if event["event"] == "stage" and event.get("state") == "started"]
        if share >= 1 or not starts:
            return []
        limit, kept = share * starts[-1]["steps"] - 1e-6, outcome_of(stage).steps
        looks = [event for event in told if event["event"] == "epoch" and limit <= event["step"] <= kept]
        counted = [event for event in reversed(looks) if not event.get("overfitted")]  # the newest of a step first
        return [starts[-1], min(counted, key=lambda event: event["step"])] if counted else []

    def _measured(self, stage: Stage, run: Session) -> tuple[bool, float]:
        if stage.evaluation is None or stage.measured is None or stage.is_measured:
            return False, 0.0
        begun = time.monotonic()
        records = self.measure(stage.evaluation.replace({"name": stage.recipe.name}), run.folder)
        run.tracker.log_records(records)
        stage.measured.parent.mkdir(exist_ok=True)
        write_records(stage.measured, records)
        seconds = time.monotonic() - begun
        write_text(stage.measured.with_suffix(".seconds"), f"{seconds:.3f}\n")
        lacking = stage.measured.with_suffix(LACKING)
        lacking.unlink(missing_ok=True)
        if any(record.metric == "lpips" and record.value is None for record in records) and not _has_lpips(
            stage.evaluation
        ):
            lacking.touch()
        return True, seconds

    def _family(self, stage: Stage) -> Family:
        tags = {"stage": stage.name, "key": stage.key}
        return Family(self.experiment, f"{stage.name} {stage.key[:8]}", {}, tags, delivered=False)


def is_trained(stage: Stage) -> bool:
    """Whether the store has the stage's weights."""
    folder = RunFolder(fetched(stage.folder.path))
    return folder.recipe.is_file() and finished(stage.recipe, folder)


def outcome_of(stage: Stage, evaluation_s: float | None = None) -> Outcome:
    """What the store knows of a stage that is there, or begun."""
    config = (read_config(stage.folder.model) or {}).get(stage.name)
    training = (config or {}).get("training", {})
    states = [state for state in list_states(stage.folder.state) if state.stage == stage.name]
    if evaluation_s is None:
        evaluation_s = _seconds(stage)
    return Outcome(
        stage.name,
        stage.key,
        trained=False,
        measured=False,
        steps=int(config["steps"]) if config else max((state.step for state in states), default=0),
        seconds=float(training.get("seconds", 0.0)),
        workers=int(training.get("world_size", 1)),
        evaluation_s=evaluation_s,
    )


def times_trained(folder: RunFolder, stage: Name) -> int:
    """How often this stage's training came to its end in a folder of the store; more than once is waste."""
    events = read_events(folder.log)
    return sum(e.get("event") == "stage" and e.get("stage") == stage and e.get("state") == "finished" for e in events)


def _records(stage: Stage) -> list[Record]:
    return read_records(stage.measured) if stage.measured is not None and stage.measured.is_file() else []


def _seconds(stage: Stage) -> float:
    if stage.measured is None:
        return 0.0
    try:
        return float(stage.measured.with_suffix(".seconds").read_text())
    except (OSError, ValueError):
        return 0.0
