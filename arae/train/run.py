"""One worker's whole training of a recipe: encoder, then decoder. The same code in one process and under Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from arae.allocation import memory_kept
from arae.config import Data, Recipe, Stage
from arae.data.load import Source, augmented, fingerprint, open_source
from arae.errors import InputError
from arae.models import Encoder, create_encoder
from arae.models.autoencoder import load_encoder, read_config, save_part
from arae.runs import RunFolder
from arae.seeds import mix
from arae.train.decoder import DecoderTrainer
from arae.train.encoder import EncoderTrainer, sides
from arae.train.engine import Engine
from arae.train.faults import storage_told
from arae.train.log import Listener, Log
from arae.train.loop import fit
from arae.train.meter import hosts_of
from arae.train.networks import decoding, load_comparator, sha256_of, weights_file
from arae.train.probe import Probe
from arae.train.stage import Fit, Trainer
from arae.train.state import drop_states, list_states


def train(
    recipe: Recipe,
    folder: RunFolder,
    device: torch.device,
    listener: Listener | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train what of the recipe is not trained yet, into the run folder.

    Raises InputError for data or a folder that do not fit the recipe, Stopped (DiskFull) where a state was kept or the
    storage went away and the same call goes on, AraeError where training fails.
    """
    with storage_told(folder), memory_kept(device):
        source = open_source(recipe.data, "train", device, seed=recipe.seed)
        if len(source.classes) < 2:
            raise InputError(
                f"data.train: {len(source.classes)} class; an encoder needs two or more (one folder a class)"
            )
        engine = Engine(device, recipe.precision, recipe.engine)
        log = Log(folder, listener, active=engine.rank == 0)
        states = list_states(folder.state) if log.active else []
        engine.go_on_in(states[-1].precision if states else None, recipe.precision)
        if engine.mixed:
            log.note(f"the workers' devices differ: all of them train in {engine.precision}, which each of them has")
        log.emit("group", hosts=hosts_of(engine), **hardware(engine))
        worker = Worker(recipe, folder, source, engine, log, stop)
        encoder = worker.encoder()
        if recipe.decoder is not None:
            worker.decoder(encoder)
        if engine.rank == 0:
            drop_states(folder.state)


class Worker:
    """What the stages of one run share."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, source: Source, engine: Engine, log: Log, stop: Callable[[], bool]
    ) -> None:
        self.recipe, self.folder, self.source, self.engine, self.log, self.stop = (
            recipe,
            folder,
            source,
            engine,
            log,
            stop,
        )
        self.images = fingerprint(recipe.data, "train")
        self.probe = Probe(recipe, folder, source, engine, log) if log.active else None
        engine.assemble()

    def encoder(self) -> Encoder:
        """The trained encoder: from the run folder where it is finished, else trained now."""
        part, shape = self.recipe.encoder, self.source.shape
        if self._finished("encoder"):
            return self._finished_encoder()
        torch.manual_seed(mix(self.recipe.seed, "initial encoder"))
        given = weights_file(part.weights) if part.weights else None
        model = create_encoder(
            part.name, len(self.source.classes), shape[0], shape[1], pretrained=given, width=part.width
        )
        self._refuse_what_cannot_follow(model)
        total = part.total_steps(self.source.n)
        trainer = EncoderTrainer(self.recipe, model, self.engine, total)

        def validate(step: int) -> dict[str, float]:
            assert self.probe is not None
            return self.probe.classify(trainer.model)

        entry = {
            "name": part.name,
            "layer": part.layer or model.layer,
            "num_classes": len(self.source.classes),
            "width": part.width,
        }
        self._run(trainer, part, total, validate, entry)
        # Another one: DeepSpeed leaves its hooks, and at stage 3 pieces of the weights, in what it has trained.
        trained = create_encoder(part.name, len(self.source.classes), shape[0], shape[1], width=part.width)
        trained.to(self.engine.images_dtype).load_state_dict(trainer.exported())
        return trained

    def decoder(self, encoder: Encoder) -> None:
        """Train the decoder, unless the run folder has it."""
        part, shape = self.recipe.decoder, self.source.shape
        assert part is not None
        if self._finished("decoder"):
            return
        comparator = load_comparator(part.comparator, shape)
        networks = decoding(self.recipe, encoder, comparator, shape)
        torch.manual_seed(mix(self.recipe.seed, "initial decoder"))
        generator = networks.generator()
        torch.manual_seed(mix(self.recipe.seed, "initial discriminator"))
        discriminator = networks.discriminator()
        total = part.total_steps(self.source.n)
        trainer = DecoderTrainer(
            self.recipe,
            encoder,
            generator,
            discriminator,
            self.engine,
            total,
            weights=networks.weights,
            comparator=comparator,
        )

        def validate(step: int) -> dict[str, float]:
            assert self.probe is not None
            return self.probe.reconstruct(trainer.encoder, trainer.generator, step)

        entry: dict[str, Any] = {
            "name": part.name,
            "normalisation": part.normalisation,
            "losses": networks.weights.model_dump(include={"pixel", "feature", "adversarial"}),
        }
        if part.comparator is not None:
            where = part.comparator.weights
            entry["comparator"] = part.comparator.model_dump() | {"sha256": sha256_of(where)}
        self._run(trainer, part, total, validate, entry, augmented(self.recipe.data, part.augment))

    def _refuse_what_cannot_follow(self, encoder: Encoder) -> None:
        """InputError, before hours of training, for a layer that is not there and a decoder that will not fit it."""
        shape = self.source.shape
        encoder.feature_shape(shape, self.recipe.encoder.layer)
        for scale in {phase.scale for phase in self.recipe.encoder.phases}:
            encoder.refuse_unfit((shape[0], *sides(shape[1:], scale)))
        if self.recipe.decoder is not None:
            comparator = load_comparator(self.recipe.decoder.comparator, shape)
            networks = decoding(self.recipe, encoder, comparator, shape)
            networks.generator()
            networks.discriminator()

    def _run(
        self,
        trainer: Trainer,
        part: Stage,
        total: int,
        validate: Callable[[int], dict[str, float]],
        entry: dict[str, Any],
        data: Data | None = None,
    ) -> None:
        """`data`: the recipe's with another augmentation, for this stage alone."""
        stage, source = trainer.name, self.source
        if data is not None and data != self.recipe.data:
            source = open_source(data, "train", self.engine.device, seed=self.recipe.seed)
        self.log.emit("stage", stage=stage, state="started", steps=total)
        run = Fit(
            self.recipe,
            part,
            data or self.recipe.data,
            self.folder,
            source,
            self.engine,
            self.log,
            total,
            self.images,
            validate,
            self.stop,
        )
        seconds = fit(trainer, run)
        exported = trainer.exported()
        if self.log.active:
            attack = self.recipe.encoder.attack
            common = {
                "image_shape": list(self.source.shape),
                "classes": list(self.source.classes),
                "train_norm": attack.norm if attack.eps else None,
                "train_eps": attack.eps,
            }
            training = hardware(self.engine) | {"seconds": round(seconds, 3)}
            entry |= {"digest": self._digest(stage), "images": self.images, "steps": total, "training": training}
            save_part(self.folder.model, stage, exported, entry, common)
        self.log.emit("stage", stage=stage, state="finished", seconds=seconds)
        self.engine.barrier()

    def _finished_encoder(self) -> Encoder:
        """Rank 0 reads it for all, as what is finished: what others see of a shared disk may be older."""
        dtype, made = self.engine.images_dtype, None
        if self.log.active:
            config = read_config(self.folder.model)
            assert config is not None
            made = load_encoder(self.folder.model, config, dtype)
        weights = self.engine.told(made.state_dict() if made else None)
        if made is None:
            part, shape = self.recipe.encoder, self.source.shape
            made = create_encoder(part.name, len(self.source.classes), shape[0], shape[1], width=part.width).to(dtype)
            made.load_state_dict(weights)
        return made

    def _finished(self, stage: str) -> bool:
        config = self.engine.told(read_config(self.folder.model) if self.log.active else None) or {}
        if stage not in config:
            return False
        if config[stage]["digest"] != self._digest(stage) or config[stage]["images"] != self.images:
            raise InputError(
                f"{self.folder.path}: its {stage} was trained by another recipe or on other images (data, seed, encoder"
                f"{' or decoder' if stage == 'decoder' else ''} differ); "
                "give this run another name=… or delete the folder"
            )
        if stage == "decoder":
            self._refuse_another_comparator(config["decoder"].get("comparator", {}).get("sha256"))
        self.log.emit("stage", stage=stage, state="skipped")
        return True

    def _refuse_another_comparator(self, sha256: str | None) -> None:
        """InputError where the comparator's file holds other weights than those that this decoder was trained by."""
        part = self.recipe.decoder.comparator if self.recipe.decoder else None
        if part and sha256 and weights_file(part.weights).is_file() and sha256_of(part.weights) != sha256:
            raise InputError(
                f"decoder.comparator.weights = {part.weights}: holds other weights than this run's decoder was trained "
                "by; put those back, give this run another name=… or delete the folder"
            )

    def _digest(self, stage: str) -> str:
        return self.recipe.stage_digest("encoder" if stage == "encoder" else "decoder")


def hardware(engine: Engine) -> dict[str, Any]:
    """What a stage ran on, for its records."""
    gpu = engine.device.type == "cuda"
    return {
        "world_size": engine.size,
        "device": torch.cuda.get_device_name(engine.device) if gpu else "cpu",
        "precision": engine.precision,
        "engine": engine.choice.kind,
        "threads": torch.get_num_threads(),
    }
