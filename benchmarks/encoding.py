"""Encoding photographs: CPU time and bytes an image, by size and mode; and from them what ImageNet would take.

Measured: all that `arae encode` does to an image, with one thread: read, decode, resize, compress, write the shard with
its hash; and apart, for one process does it alone, joining the shards: read, hash, write, hash. On photographs, cut to
4 : 3, scaled and saved as JPEG of quality 95 (not timed) in two sizes: 500 × 375, the commonest of ImageNet's, and
667 × 500; and on ImageNet's own, whose shorter side is 256 there already. They are taken from the folder that
`ARAE_TEST_DATA` names. One timing is 56 images (14 photographs four times, or 56 of ImageNet's); n = 5 rounds, 1 of
warm-up. Bytes are those of a long `.beton`, the empty ends of its pages included, as the plan of `arae encode` reckons
them.

`python -m benchmarks encoding` measures; `python -m benchmarks.encoding` makes `docs/encoding.md` anew of what was
measured.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageOps

from arae.data import ffcv_write
from arae.data.estimate import estimate
from arae.data.shards import How, Job, Plan, images_of, open_parts, read_record
from arae.data.sources import Found, find
from arae.errors import InputError
from arae.files import write_text, write_with
from benchmarks.harness import BEGIN, END, FOLDER, Comparison, Result, measure, read

IMAGES, ROUNDS, SOURCE_QUALITY, QUALITY = 56, 5, 95, 90
LARGE, MEDIAN, OWN = (667, 500), (500, 375), "ImageNet's, 256"
JOINING = "joining, raw"
PAGE = FOLDER.parent / "docs" / "encoding.md"
IMAGENET = {"train": 1_281_167, "test": 50_000}
SHARES = {"jpg": 1.0, "proportion": 0.5, "raw": 0.0}


@dataclass(frozen=True)
class Case:
    """Photographs of one size, written with one bound."""

    source: str
    size: int

    def variant(self, mode: str) -> str:
        """Its name in the record."""
        return f"{self.source} → {self.size}, {mode}"


CASES = (
    Case(OWN, 256),
    Case("500 × 375", 256),
    Case("500 × 375", 400),
    Case("667 × 500", 400),
    Case("667 × 500", 500),
)


def encoding(device: torch.device) -> Result:
    """CPU seconds and bytes of every case; InputError where the photographs or FFCV are missing."""
    given = os.environ.get("ARAE_TEST_DATA")
    if not given or not (Path(given) / "highres.tar").is_file():
        raise InputError("ARAE_TEST_DATA names no folder with highres.tar, style.tar and imagenet_even.tar")
    with TemporaryDirectory() as place:
        folder = Path(place)
        sources = {name: find(str(path), None, "all", None) for name, path in _sources(Path(given), folder).items()}
        variants, sizes = {}, {}
        for case in CASES:
            for mode, share in SHARES.items():
                how = How(share, QUALITY, case.size, False, 0, "skip")
                guess = replace(estimate(sources[case.source], how), images=IMAGENET["train"])
                sizes[case.variant(mode)] = round(guess.file_bytes(share) / guess.images, 1)
                if mode != "proportion":  # the mean of the other two
                    variants[case.variant(mode)] = partial(_encode, sources[case.source], how, folder / "parts")
        largest = How(0.0, QUALITY, CASES[-1].size, False, 0, "skip")
        variants[JOINING] = partial(_join, _encode(sources[CASES[-1].source], largest, folder / "joined"))
        sizes[JOINING] = sizes[CASES[-1].variant("raw")]
        return measure(
            "encoding",
            f"{IMAGES} photographs from JPEG files to a .beton, by one thread: the source's size → the bound of the "
            f"shorter side, and the mode (JPEG of quality {QUALITY}, or raw).",
            variants,
            [
                Comparison(
                    what=f"jpg over raw, {each.source} → {each.size}",
                    slow=each.variant("jpg"),
                    fast=each.variant("raw"),
                )
                for each in CASES
            ],
            images=IMAGES,
            rounds=ROUNDS,
            warmup=1,
            device=torch.device("cpu"),
        ).model_copy(update={"sizes": sizes})


def _encode(found: Found, how: How, parts: Path) -> Job:
    """One shard, without what is done once a command."""
    plan = Plan(key=repr(how), images=len(found.labels), per_shard=len(found.labels))
    open_parts(parts, plan)
    job = Job(parts, plan, (0, plan.images), found.part(0, plan.images), how)
    job.run(threads=1)
    return job


def _join(job: Job) -> None:
    """The file of one shard."""
    record = read_record(job.folder, job.plan, job.span)
    assert record is not None
    columns = (np.array(getattr(record, name)) for name in ("heights", "widths", "modes", "sizes"))
    contents = ffcv_write.Contents(*columns, labels=job.found.labels)
    images = images_of(job.folder, job.span, record)
    write_with(job.folder / "whole", lambda file: ffcv_write.write(file, contents, images, lambda done: None))


def _sources(given: Path, folder: Path) -> dict[str, Path]:
    """Folders of JPEG files, `IMAGES` in each."""
    places = {each.source: folder / str(number) for number, each in enumerate(CASES)}
    photographs = [
        image for image in photographs_in(given) if min(image.width / LARGE[0], image.height / LARGE[1]) >= 1
    ]
    for name, size in (("667 × 500", LARGE), ("500 × 375", MEDIAN)):
        places[name].mkdir(parents=True)
        for i in range(IMAGES):
            image = ImageOps.fit(photographs[i % len(photographs)], size, Image.Resampling.LANCZOS)
            image.save(places[name] / f"{i:03}.jpg", quality=SOURCE_QUALITY)
    places[OWN].mkdir(parents=True)
    with tarfile.open(given / "imagenet_even.tar") as archive:
        files = [each for each in archive.getmembers() if each.name.endswith(".jpg")]
        for i in np.linspace(0, len(files) - 1, IMAGES).astype(int):
            (places[OWN] / f"{i:03}.jpg").write_bytes(_content(archive, files[i]))
    return places


def photographs_in(given: Path) -> Iterator[Image.Image]:
    """The photographs of `highres.tar` and `style.tar`, of many sizes."""
    for name, within in (("highres.tar", "highres/"), ("style.tar", "style/content/")):
        with tarfile.open(given / name) as archive:
            for each in archive.getmembers():
                if each.isfile() and each.name.startswith(within):
                    yield Image.open(io.BytesIO(_content(archive, each))).convert("RGB")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def page(text: str, result: Result) -> str:
    """The page with all that stands between its markers made anew from the record."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"the page has no {BEGIN} … {END}"
    tables = "\n\n".join([_rates(result), *(_imagenet(result, split, n) for split, n in IMAGENET.items())])
    return f"{before}{BEGIN}\n\n{tables}\n\n{_from(result)}\n\n{END}{after}"


def _seconds(result: Result, case: Case, mode: str) -> float:
    """CPU seconds for one image."""
    if mode == "proportion":
        return (_seconds(result, case, "jpg") + _seconds(result, case, "raw")) / 2
    return median(result.seconds[case.variant(mode)]) / result.images


def _rates(result: Result) -> str:
    rows = [
        f"| {case.source} | {case.size} | {mode} | {1000 * _seconds(result, case, mode):.1f} | "
        f"{result.sizes[case.variant(mode)] / 1000:.0f} |"
        for case in CASES
        for mode in SHARES
    ]
    head = "| Photographs | `size=` | `mode=` | CPU ms an image | KB an image |\n|---|---|---|---|---|"
    speed = result.images * result.sizes[JOINING] / median(result.seconds[JOINING]) / 1e6
    own = result.sizes[CASES[0].variant("jpg")] / result.sizes[CASES[1].variant("jpg")]
    told = (
        f"Joining: {speed:,.0f} MB a second, in one process. As JPEG, ImageNet's own photographs of 256 take {own:.2f} "
        "times the bytes of the others at that size."
    )
    return "\n".join(["### Measured", "", head, *rows, "", told])


def _imagenet(result: Result, split: str, n: int) -> str:
    rows = []
    for case in CASES[1:]:
        for mode in SHARES:
            size, core_s = n * result.sizes[case.variant(mode)], n * _seconds(result, case, mode)
            join_s = size * median(result.seconds[JOINING]) / (result.images * result.sizes[JOINING])
            minutes = " | ".join(f"{(core_s / cores + join_s) / 60:,.1f}" for cores in (1, 16, 64))
            rows.append(
                f"| {case.size} | {case.source} | {mode} | {size / 1e9:,.1f} | {2 * size / 1e9:,.1f} | {minutes} |"
            )
    head = (
        "| `size=` | if every photograph were | `mode=` | GB | GB while joined | minutes on 1 core | on 16 | on 64 |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([f"### ImageNet, `split={split}`: {n:,} images", "", head, *rows])


def _from(result: Result) -> str:
    versions = ", ".join(f"{name} {result.versions[name]}" for name in ("python", "numpy", "ffcv"))
    rounds = min(map(len, result.seconds.values()))
    return (
        f"From `benchmarks/results/encoding.json`: {result.clock}, medians of {rounds} interleaved rounds of "
        f"{result.images} images; {result.hardware['device']}; {versions}; `{result.git}`; {result.time}."
    )


def main() -> None:
    """Make the page anew from the record."""
    (result,) = [each for each in read() if each.name == "encoding"]
    write_text(PAGE, page(PAGE.read_text(), result))


if __name__ == "__main__":
    main()
