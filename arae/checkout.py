"""The drivers beside the package. A module of its own, for it must be light: `arae submit` needs no torch."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from arae.errors import InputError


def checkout_module(name: str) -> ModuleType:
    """A module of the drivers beside the package, which run from a checkout only.

    Raises InputError where arae was installed without them.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / name.split(".")[0]).is_dir():
        raise InputError(
            f"this needs {name}, which is run from a checkout of arae and is not part of the installed package"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(name)
