"""Sending a run's journal to MLflow: at least once, in order, and so that a second delivery changes nothing.

MLflow takes an equal metric (name, value, time, step), parameter, tag, artifact or status twice without a trace, so a
kill between a delivery and its note in the run folder does no harm. Everything here may block: call it from a thread.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from arae.tracking.journal import Card, Journal, Operation, held

if TYPE_CHECKING:
    from mlflow import MlflowClient

Note = Callable[[str], None]

PENDING = "mlflow.pending.jsonl"
CARD = "mlflow.json"
LOCK = ".mlflow.lock"
MARK = "arae.key"
MOST_METRICS, MOST_OTHERS = 1000, 100  # MLflow's limits on one batch
ATTEMPTS = 3  # on an artifact, where the server answers and only its store for artifacts does not
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}  # the server understood and will never take it

# MLflow's own defaults keep a caller waiting for minutes where the server is away; we have a journal and try again.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes beside `arae ui`'s server, for what we never ask
}


def log_note(text: str) -> None:
    """The default place for notes: the standard library's logging."""
    logging.getLogger("arae.tracking").warning(text)


def first_line(error: Exception) -> str:
    """What an exception says, short enough for a note."""
    return without_password((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]


def without_password(text: str) -> str:
    """The text, user and password of the URLs in it left out: it goes to logs and terminals."""
    return re.sub(r"(://)[^/@\s]+@", r"\1", text)


def default_uri(runs_root: Path) -> str:
    """The store beside the runs."""
    return f"sqlite:///{runs_root.absolute() / 'mlflow.db'}"


def tracking_uri(runs_root: Path) -> str:
    """Where runs are mirrored: `MLFLOW_TRACKING_URI` if set, else an SQLite store beside the runs, absolute."""
    return os.environ.get("MLFLOW_TRACKING_URI") or default_uri(runs_root)


def prepare_environment() -> None:
    """Short time-outs, quiet logs and no telemetry for this process, save where the user has said otherwise."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # MLflow's own making of its tables, of which the user can mend nothing.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"alembic\.")


class Sender:
    """Delivers the journal of one run folder; holds the folder's lock meanwhile, so there is one at a time."""

    def __init__(self, folder: Path, runs_root: Path, note: Note = log_note) -> None:
        self.folder, self.root, self.note = folder.absolute(), runs_root.absolute(), note
        self.uri = tracking_uri(self.root)
        self.journal = Journal(folder / PENDING)
        self._client: MlflowClient | None = None
        self._run_id: str | None = None
        self._failures: dict[str, int] = {}

    def drain(self) -> int:
        """Deliver all that waits and return the number of operations. Raises whatever MLflow raises; the rest stays."""
        sent = 0
        prepare_environment()
        with held(self.folder / LOCK):
            while (head := self.journal.head()).size:
                card = Card.load(self.folder / CARD)
                for batch in batches(head.operations):
                    self._deliver(card, batch)
                    for operation in batch:
                        card.absorb(operation)
                card.save(self.folder / CARD)  # before the drop: an operation is on the card, in the journal, or both
                self.journal.drop(head.size)
                sent += len(head.operations)
        return sent

    def ensure_run(self, card: Card) -> str:
        """The id of the MLflow run of the card, made where there is none (any more)."""
        if self._run_id and self._run_id == card.run_id:
            return self._run_id
        if not (card.run_id and self._is_active(card.run_id)):
            card.run_id = self._find(card) or self._create(card)
            card.save(self.folder / CARD)
        self._run_id = card.run_id
        return card.run_id

    def _deliver(self, card: Card, batch: list[Operation]) -> None:
        from mlflow.exceptions import MlflowException

        if batch[0]["op"] == "run":
            card.absorb(batch[0])
            self._run_id = None
        run_id = self.ensure_run(card)
        try:
            self._send(run_id, batch)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                self._run_id = None  # deleted for good meanwhile: look again next time
            if error.error_code not in REFUSALS:
                raise
            self._after_refusal(card, batch, error)

    def _after_refusal(self, card: Card, batch: list[Operation], error: Exception) -> None:
        if len(batch) > 1:  # which of them?
            for operation in batch:
                self._deliver(card, [operation])
            return
        (operation,) = batch
        if operation["op"] == "param":  # a parameter can't be changed in MLflow, a tag can
            self._deliver(card, [{"op": "tag", "key": f"changed.{operation['key']}", "value": operation["value"]}])
        else:
            self.note(f"MLflow refused {operation}: {first_line(error)}")

    def _send(self, run_id: str, batch: list[Operation]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client = self._connect()
        kind = batch[0]["op"]
        if kind == "artifact":
            self._send_artifact(run_id, batch[0])
        elif kind == "end":
            client.set_terminated(run_id, batch[0]["status"], end_time=batch[0]["time"])
        elif kind == "run":
            client.update_run(run_id, status="RUNNING")
        else:
            metrics = [
                Metric(name, value, o["time"], o["step"])
                for o in batch
                if o["op"] == "metrics"
                for name, value in o["values"].items()
            ]
            params = [Param(o["key"], o["value"]) for o in batch if o["op"] == "param"]
            tags = [RunTag(o["key"], o["value"]) for o in batch if o["op"] == "tag"]
            client.log_batch(run_id, metrics=metrics, params=params, tags=tags)

    def _send_artifact(self, run_id: str, operation: Operation) -> None:
        path = self.folder / operation["path"]
        if not path.is_file():
            self.note(f"{path}: gone before it could be sent to MLflow")
            return
        try:
            self._connect().log_artifact(run_id, str(path), operation["to"])
        except Exception as error:  # every kind of store has its own errors, ImportError among them
            self._connect().get_run(run_id)  # raises where it is the server that is away
            failures = self._failures[operation["path"]] = self._failures.get(operation["path"], 0) + 1
            if failures < ATTEMPTS:
                raise
            self.note(
                f"{path}: MLflow's store for artifacts won't take it ({first_line(error)}); it stays in the run folder"
            )

    def _connect(self) -> MlflowClient:
        if self._client is None:
            from mlflow import MlflowClient

            # What fails is told by us, in a line; MLflow would print the whole traceback each time.
            logging.getLogger("mlflow").setLevel(logging.CRITICAL)
            self.root.mkdir(parents=True, exist_ok=True)
            with held(self.root / LOCK):  # two processes must not make the tables of one SQLite file at once
                client = MlflowClient(self.uri)
                client.search_experiments(max_results=1)
            self._client = client
        return self._client

    def _is_active(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._connect().get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _find(self, card: Card) -> str | None:
        """A run made by an attempt that was cut short before its id could be written down."""
        if card.key is None:
            return None
        found = self._connect().search_runs([self._experiment(card)], f"tags.`{MARK}` = '{card.key}'", max_results=1)
        return found[0].info.run_id if found else None

    def _create(self, card: Card) -> str:
        experiment, tags = self._experiment(card), {}
        if card.parent and (self.root / card.parent) != self.folder:
            tags["mlflow.parentRunId"] = self._parent_id(card.parent, card.experiment)
        if card.key is None:
            card.key = uuid.uuid4().hex
            card.save(self.folder / CARD)
        tags[MARK] = card.key
        run = self._connect().create_run(experiment, start_time=card.started or None, tags=tags, run_name=card.name)
        return run.info.run_id

    def _parent_id(self, parent: str, experiment: str) -> str:
        sender = Sender(self.root / parent, self.root, self.note)
        sender.uri, sender._client = self.uri, self._client
        sender.folder.mkdir(parents=True, exist_ok=True)
        with held(sender.folder / LOCK):
            card = Card.load(sender.folder / CARD)
            if card.run_id and sender._is_active(card.run_id):
                return card.run_id
            card.name, card.experiment = card.name or parent, card.experiment or experiment
            return sender.ensure_run(card)

    def _experiment(self, card: Card) -> str:
        from mlflow.exceptions import MlflowException

        client = self._connect()
        found = client.get_experiment_by_name(card.experiment)
        if found is None:
            # Only a server knows where its artifacts belong; a bare database would put them in the working directory.
            ours = not self.uri.startswith(("http:", "https:", "databricks", "uc"))
            try:
                return client.create_experiment(card.experiment, (self.root / "mlartifacts").as_uri() if ours else None)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(card.experiment)  # another process was first
                assert found is not None
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id


def batches(operations: list[Operation]) -> Iterator[list[Operation]]:
    """The operations in order, in groups that MLflow takes in one call: metrics, parameters and tags together."""
    batch: list[Operation] = []
    metrics = others = 0
    for operation in operations:
        alone = operation["op"] not in ("metrics", "param", "tag")
        metrics += len(operation.get("values", ()))
        others += operation["op"] in ("param", "tag")
        if batch and (alone or metrics > MOST_METRICS or others > MOST_OTHERS):
            yield batch
            batch, metrics, others = [], len(operation.get("values", ())), int(operation["op"] in ("param", "tag"))
        batch.append(operation)
        if alone:
            yield batch
            batch, metrics, others = [], 0, 0
    if batch:
        yield batch


def send_pending(runs_root: Path, note: Note = log_note) -> int:
    """Send what waits in every run folder under `runs_root`; returns the number of operations. What fails stays."""
    sent = 0
    for path in sorted(runs_root.rglob(PENDING)):
        try:
            sent += Sender(path.parent, runs_root, note).drain()
        except Exception as error:  # noqa: BLE001 -- MLflow, its database driver or the network: all the same here
            note(f"{path}: not sent ({first_line(error)}); `arae ui` tries again")
    return sent
