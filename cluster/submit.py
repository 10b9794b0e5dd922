"""One of arae's commands as a job of a Ray cluster: what is sent, what is refused before, and how it ends."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from arae.config import Recipe, flatten, load_recipe
from arae.config.load import shipped_recipes
from arae.errors import InputError
from arae.provenance import git_revision
from cluster.jobs import Jobs, exit_code
from cluster.package import Package, mebibytes, package

ROOT = Path(__file__).resolve().parent.parent
HANDED_ON = ("ARAE_RUNS", "ARAE_SCRATCH", "MLFLOW_TRACKING_URI")
PATHS = ("data.source", "data.train", "data.test", "encoder.weights", "decoder.comparator.weights", "evaluate.images")
SECRET = re.compile(r"^AWS_|SECRET|TOKEN|PASSW|PASSPHRASE|CREDENTIAL|ACCOUNT_KEY|ACCESS_KEY|API_?KEY|PRIVATE_KEY", re.I)
# The Python that Ray itself runs with, which need not be on the PATH: where the library lies that the shell's parent,
# Ray's supervisor of the job, has loaded.
RAYS_PYTHON = r"sed -n 's:.* \(/.*\)/lib/python3[^/]*/site-packages/ray/_raylet.so$:\1/bin/python:p' /proc/$PPID/maps"
GRACE_S = 60  # Ray's own 3 s are too few for a training to save


@dataclass(frozen=True)
class Command:
    """One of arae's commands as it is to run in the job."""

    verb: str
    words: tuple[str, ...]
    """What follows the verb."""
    recipe: str | None
    """The recipe it names, as it stands in `words`; None where the verb names none."""
    overrides: tuple[str, ...]
    on_cluster: bool = False
    """Whether it trains through Ray and no address says where: in a job, that is the job's cluster."""
    source: str | None = None
    """What `encode` reads: a path, or a name of the catalogue."""
    dest: str | None = None
    """What `encode` writes."""


@dataclass(frozen=True)
class Job:
    """A job to submit."""

    command: Command
    project: Path = ROOT
    """The folder that is sent as the job's working directory."""
    name: str | None = None
    env: tuple[str, ...] = ()
    """Further variables of this environment that the job gets."""
    python: str | None = None
    """The cluster's Python; None takes the one that Ray runs with."""
    grace: int = GRACE_S
    """Seconds that the command has to save when the job is stopped."""


@dataclass(frozen=True)
class Ready:
    """A job that can be sent as it is."""

    packed: Package
    entrypoint: str
    env: dict[str, str]
    name: str | None


def prepare(job: Job) -> Ready:
    """What is to be sent.

    Raises InputError: the package is too large, the runs would lie in the job's temporary folder, the recipe or its
    data would not be found there, or a secret would be handed on.
    """
    env = environment(job.env) | {
        "RAY_JOB_STOP_WAIT_TIME_S": str(job.grace),
        "ARAE_REVISION": git_revision(),  # the package has no .git
    }
    if job.name is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", job.name):
        raise InputError(f"--name {job.name}: write letters, digits, '-', '_' and '.'")
    kept = [Path(env[name]) for name in ("ARAE_RUNS", "ARAE_SCRATCH") if name in env and "://" not in env[name]]
    packed = package(job.project, without=kept)
    words = shlex.join(["-m", "arae", *words_of(job.command, packed)])
    python = f"python={shlex.quote(job.python)}" if job.python else f"python=$({RAYS_PYTHON} | sort -u)"
    # `exec`, so that signals and exit codes are the command's own and not a shell's.
    return Ready(packed, f'{python}; exec "${{python:-python}}" {words}', env, job.name)


def submit(ready: Ready, jobs: Jobs) -> str:
    """Send the project and start the job; returns its id. Raises what `Jobs.submit` raises."""
    packed = ready.packed
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "project.zip"
        sent = packed.write(archive)
        jobs.say(f"arae: sends {len(packed.sizes)} files, {mebibytes(packed.size)} ({mebibytes(sent)} as a zip)")
        started = jobs.submit(ready.entrypoint, {"working_dir": str(archive), "env_vars": ready.env}, ready.name)
    jobs.say(f"arae: {started} at {jobs.address}; `arae submit --stop {started}` stops it")
    return started


def watch(job: str, jobs: Jobs) -> int:
    """Follow the job's log on stdout to its end; returns its command's exit code.

    Raises what `follow` and `exit_code` raise.
    """
    return exit_code(job, jobs.follow(job))


def environment(names: Iterable[str]) -> dict[str, str]:
    """What the job gets of this environment: where runs and MLflow lie, and the variables named.

    Raises InputError: runs or MLflow's store would lie in the job's temporary folder, a name is not set, or what it
    holds looks like a secret, for Ray stores a job's environment and shows it to everybody on the cluster.
    """
    env = {name: os.environ[name] for name in HANDED_ON if os.environ.get(name)}
    if "ARAE_RUNS" not in env:
        raise InputError(
            "ARAE_RUNS is not set: a job's folder goes with the job, so say where its runs are to lie; an absolute "
            "path that all nodes share, or a URL such as s3://bucket/runs"
        )
    for name in ("ARAE_RUNS", "ARAE_SCRATCH"):
        if name in env and not _lasts(env[name]):
            raise InputError(f"{name}={env[name]}: is relative, and a job's folder goes with the job; write it whole")
    store = env.get("MLFLOW_TRACKING_URI", "")
    scheme, path = urlsplit(store).scheme, store.partition("://")[2]
    if store and ((not scheme and not store.startswith("/")) or (scheme == "sqlite" and not path.startswith("//"))):
        raise InputError(
            f"MLFLOW_TRACKING_URI={store}: lies in the job's folder, which goes with the job; name a server "
            "(http://…) or an absolute path (sqlite:////…)"
        )
    for name in names:
        if "=" in name or name not in os.environ:
            raise InputError(f"--env {name}: write the name of a variable that is set here; its value is handed on")
        env[name] = os.environ[name]
    for name, value in env.items():
        if SECRET.search(name) or has_password(value):
            raise InputError(
                f"{name} looks like a secret: Ray stores a job's environment and shows it; set it in the environment "
                "of the nodes, before `ray start`"
            )
    return env


def has_password(text: str) -> bool:
    """Whether the text holds a URL with a password."""
    return re.search(r"://[^/\s@]*:[^/\s@]+@", text) is not None


def words_of(command: Command, packed: Package) -> list[str]:
    """The command's words as they are right in the job's folder, where the project's own is the working directory.

    Raises InputError where a word is a secret, or a file that it or the recipe names will not be there.
    """
    words = list(command.words)
    for word in words:
        if has_password(word):
            raise InputError(f"{word.partition('://')[0]}://…: a password in a command is stored and shown by Ray")
    if command.recipe is not None and command.recipe not in shipped_recipes():
        words[words.index(command.recipe)] = _recipe_there(command.recipe, packed)
    if (recipe := _loaded(command)) is not None:
        values = flatten(recipe.model_dump(mode="json"))
        for key in PATHS:
            if values.get(key) is not None and ":" not in values[key]:
                _check_there(key, values[key], packed)
    if command.source is not None and Path(command.source).exists():
        _check_there("encode", command.source, packed)
    if command.dest is not None and not _lasts(command.dest):
        raise InputError(f"encode {command.dest}: a job's folder goes with the job; give an absolute path to write to")
    # First, for what comes after the recipe may be anything.
    return [command.verb, *(["--address", "auto"] if command.on_cluster else []), *words]


def _recipe_there(name: str, packed: Package) -> str:
    """How the job calls a recipe's file."""
    path = Path(name)
    whole = path.resolve()
    if whole.is_relative_to(packed.project.resolve()):
        inside = PurePosixPath(whole.relative_to(packed.project.resolve()).as_posix())
        if packed.holds(inside):
            return str(inside)
    if path.is_absolute():
        return name  # on storage that the nodes share, which can't be seen from here
    if path.exists():
        raise InputError(
            f"{name}: is not sent with the job (left out of {packed.project}, or outside it); move it there, or name "
            "it by an absolute path that the cluster's nodes see"
        )
    load_recipe(name)  # says what there is
    return name


def _loaded(command: Command) -> Recipe | None:
    """The recipe, where it can be read from here."""
    if command.verb == "demo":
        from arae.demo import demo_recipe

        return demo_recipe(list(command.overrides))
    if command.recipe is None:
        return None
    if command.recipe not in shipped_recipes() and not Path(command.recipe).exists():
        return None
    return load_recipe(command.recipe, command.overrides)


def _check_there(key: str, path: str, packed: Package) -> None:
    """InputError for a path relative to the folder here, which the job will not have."""
    if not _lasts(path) and not packed.holds(PurePosixPath(os.path.normpath(path))):
        raise InputError(
            f"{key}: {path} is relative and not sent with the job; name it by an absolute path that the cluster's "
            f"nodes see, such as {Path(path).absolute()}"
        )


def _lasts(path: str) -> bool:
    """Whether the path means the same outside the job's folder."""
    return "://" in path or Path(path).is_absolute()
