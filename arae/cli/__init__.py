"""The command line: verbs only. Each loads a recipe and calls one function."""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

import typer

from arae.cli import clusters, comparing, images, looking, recipes, sweeps, trips  # noqa: F401 -- for their commands
from arae.cli.options import app
from arae.errors import AraeError

INTERRUPTED = 130  # what typer makes of Ctrl-C; ours is 1 where nothing was kept


def main() -> None:
    """Run a command; an AraeError ends it with one line and its own exit code."""
    try:
        code = app(standalone_mode=False)
    except AraeError as error:
        _end(str(error), error.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read has gone
            sys.exit(1)
        _end(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    except Exception as error:
        told = getattr(error, "format_message", None)  # typer's own, whose class has moved between its versions
        if told is None:
            raise
        _end(f"{told()}; `arae --help` and `arae VERB --help` list what there is", 2)
    sys.exit(1 if code == INTERRUPTED else code or 0)


def _end(said: str, code: int) -> NoReturn:
    typer.echo(f"arae: {' '.join(said.split())}", err=True)
    sys.exit(code)
