"""`python -m benchmarks [NAME …]`: run them (default: all that are quick); write `results/`, the README's tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from arae.errors import AraeError
from arae.train.engine import default_device
from benchmarks.decoder import decoder, decoder_conv5
from benchmarks.encoding import encoding
from benchmarks.harness import Result, section, write
from benchmarks.loader import NAME, folder_of_files, loading, photographs
from benchmarks.outage import outage
from benchmarks.overhead import overhead
from benchmarks.step import encoder_small, pgd_alexnet, pgd_resnet18
from benchmarks.targets import renew, table

BENCHMARKS: dict[str, Callable[[torch.device], Result]] = {
    "pgd-alexnet": pgd_alexnet,
    "pgd-resnet18": pgd_resnet18,
    "encoder-small": encoder_small,
    "decoder-conv5": decoder_conv5,
    "decoder": decoder,
    "loading": loading,
    "encoding": encoding,
    NAME: photographs,
    "loading-folder": folder_of_files,
    "overhead": overhead,
    "outage": outage,
}
APART = {"overhead", "outage"}
"""Long, or in need of a machine that does nothing else: run by name alone."""
GROUPS = {
    "step": ("pgd-alexnet", "pgd-resnet18", "encoder-small"),
    "loader": ("loading", NAME, "loading-folder"),
}


def chosen(names: Sequence[str]) -> list[str]:
    """The benchmarks that the names stand for, each once, in the order of the table; where there is no name, all but
    those that are run apart.
    """
    wanted = {each for name in names for each in GROUPS.get(name, (name,))} or BENCHMARKS.keys() - APART
    return [name for name in BENCHMARKS if name in wanted]


def main() -> None:
    """Run what is asked for, one after the other; one that can't run here says why and keeps its older result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    every = (*BENCHMARKS, *GROUPS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(every))
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in every]:
        parser.error(f"{unknown[0]}: no such benchmark; there are {', '.join(every)}")
    device = default_device()
    for name in chosen(names):
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            result = BENCHMARKS[name](device)
        except AraeError as error:
            print(f"{name}: skipped: {error}", file=sys.stderr)
            continue
        write(result)
        # After each: a run that is cut short leaves tables and results that agree.
        renew()
        print(section(result), flush=True)
    print(table())


if __name__ == "__main__":
    main()
