"""Every network by name, with one line about it: what `arae ls` shows and recipes may say."""

from __future__ import annotations

from arae.models.decoder import DECODERS
from arae.models.discriminator import DISCRIMINATORS
from arae.models.encoder import ENCODERS
from arae.models.torchvision_nets import FAMILY, SUMMARY


def summaries() -> dict[str, dict[str, str]]:
    """Kind ("encoders", "decoders", "discriminators") -> name -> one line about it."""
    tables = {"encoders": ENCODERS, "decoders": DECODERS, "discriminators": DISCRIMINATORS}
    lines = {kind: {name: entry.summary for name, entry in table.items()} for kind, table in tables.items()}
    lines["encoders"][f"{FAMILY}…"] = SUMMARY
    return lines
