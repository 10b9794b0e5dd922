"""Every network by name, with one line about it: what `arae ls` shows and recipes may say."""

from __future__ import annotations

from arae.models.decoder import DECODERS
from arae.models.discriminator import DISCRIMINATORS
from arae.models.encoder import ENCODERS


def summaries() -> dict[str, dict[str, str]]:
    """Kind ("encoders", "decoders", "discriminators") -> name -> one line about it."""
    tables = {"encoders": ENCODERS, "decoders": DECODERS, "discriminators": DISCRIMINATORS}
    return {kind: {name: entry.summary for name, entry in table.items()} for kind, table in tables.items()}
