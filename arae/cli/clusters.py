"""Commands on clusters: submit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arae.cli.options import app
from arae.errors import InputError

if TYPE_CHECKING:
    from cluster.submit import Command

IN_JOBS = ("train", "evaluate", "demo", "reproduce", "encode", "sweep", "validate", "plan", "doctor")
EXAMPLE = "arae submit -- arae train RECIPE --workers 8"


@app.command(context_settings={"allow_interspersed_args": False})
def submit(
    command: Annotated[list[str] | None, typer.Argument(metavar="-- arae VERB …", help="The command to run.")] = None,
    address: Annotated[
        str | None, typer.Option(help="URL of the job server; default: RAY_API_SERVER_ADDRESS, http://127.0.0.1:8265.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="ID", help="The job's id; default: one that Ray makes.")] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show the job's log until it ends.")] = True,
    attach: Annotated[str | None, typer.Option(metavar="ID", help="Follow a job that was submitted before.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Stop a job; its run can go on.")] = None,
    project: Annotated[
        Path | None, typer.Option(help="The folder that the job works in; default: the checkout of arae.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Hand on this variable as well.")] = None,
    python: Annotated[str | None, typer.Option(help="The cluster's Python; default: the one that Ray has.")] = None,
    grace: Annotated[int, typer.Option(min=0, help="Seconds to save in when the job is stopped.")] = 60,
) -> None:
    """Run a command of arae as a job of a Ray cluster; exits as the command does."""
    if sum(map(bool, (command, attach, stop))) != 1:
        raise InputError(f"arae submit: give a command ({EXAMPLE}), or --attach ID, or --stop ID")
    from arae.checkout import checkout_module

    jobs, submitting = checkout_module("cluster.jobs"), checkout_module("cluster.submit")
    if stop:
        typer.echo(f"{stop}: {jobs.Jobs(address).stop(stop).status.lower()}")
        return
    if attach:
        sys.exit(submitting.watch(attach, jobs.Jobs(address)))
    inner = parsed(command or [])
    job = submitting.Job(inner, project or submitting.ROOT, name, tuple(env or ()), python=python, grace=grace)
    ready = submitting.prepare(job)  # what is wrong with it is said before a cluster is asked
    server = jobs.Jobs(address)
    started = submitting.submit(ready, server)
    typer.echo(started)
    if follow:
        sys.exit(submitting.watch(started, server))


def parsed(words: list[str]) -> Command:
    """A command line of arae's, taken apart; InputError, or typer's own error, for one that would be refused."""
    from arae.checkout import checkout_module

    group = typer.main.get_command(app)
    verb, *rest = words[1:] or [""]
    commands: dict[str, Any] = getattr(group, "commands", {})
    if words[:1] != ["arae"] or verb not in commands:
        raise InputError(f"arae submit -- {' '.join(words)}: write a command of arae's, such as {EXAMPLE}")
    if verb not in IN_JOBS:
        raise InputError(f"arae submit -- arae {verb}: runs here; as jobs there are {', '.join(IN_JOBS)}")
    with commands[verb].make_context(f"arae {verb}", list(rest)) as context:
        given = context.params
    trains = "address" in given and given["address"] is None and given.get("workers") not in (None, 0, "0")
    return checkout_module("cluster.submit").Command(
        verb=verb,
        words=tuple(rest),
        recipe=given.get("recipe"),
        overrides=tuple(given.get("overrides") or ()),
        on_cluster=trains,
        source=given.get("source"),
        dest=None if given.get("dest") is None else str(given["dest"]),
    )
