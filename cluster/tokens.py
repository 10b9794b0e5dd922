"""The token of a Ray cluster with token authentication: where it is looked for, and what may be wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from arae.errors import InputError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Token:
    """What a cluster with token authentication asks of its clients."""

    value: str
    source: str
    """Where it came from, for people."""


def read_token(say: Say) -> Token | None:
    """The token to show, from where Ray looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, `~/.ray/auth_token`.

    The last only with RAY_AUTH_MODE=token; None with RAY_AUTH_MODE=disabled, and where there is none. Nothing is
    written. Raises InputError: a token was asked for and is missing, can't be read, or can't be a token.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return None
    path, default = os.environ.get("RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token"
    if value := os.environ.get("RAY_AUTH_TOKEN"):
        found = Token(value.strip(), "RAY_AUTH_TOKEN")
    elif path:
        found = Token(_token_file(Path(path), say), f"RAY_AUTH_TOKEN_PATH={path}")
    elif mode == "token" and default.is_file():
        found = Token(_token_file(default, say), str(default))
    elif mode == "token":
        raise InputError(
            "RAY_AUTH_MODE=token, but there is no token here: set RAY_AUTH_TOKEN_PATH to a file with the cluster's"
        )
    else:
        return None
    if not re.fullmatch(r"[!-~]+", found.value):
        raise InputError(f"{found.source}: holds no token; a token is one word of letters, digits and signs")
    return found


def _token_file(path: Path, say: Say) -> str:
    try:
        if path.stat().st_mode & 0o077:
            say(f"arae: {path} can be read by other users of this machine; chmod 600 {path}")
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{path}: the token can't be read ({reason})") from None
