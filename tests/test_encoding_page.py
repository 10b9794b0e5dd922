"""The page on encoding says what the record says."""

import re
from statistics import median

import pytest

from benchmarks import encoding, harness


@pytest.fixture(scope="module")
def record() -> harness.Result:
    return next(each for each in harness.read() if each.name == "encoding")


def test_the_page_is_that_of_the_record(record: harness.Result) -> None:
    text = encoding.PAGE.read_text()
    assert text == encoding.page(text, record), "python -m benchmarks.encoding makes docs/encoding.md anew"


def test_the_record_has_every_case(record: harness.Result) -> None:
    variants = {case.variant(mode) for case in encoding.CASES for mode in encoding.SHARES}
    assert set(record.sizes) == variants | {encoding.JOINING}
    assert set(record.seconds) == {name for name in record.sizes if not name.endswith("proportion")}
    for case in encoding.CASES:
        small, middle, large = (record.sizes[case.variant(mode)] for mode in encoding.SHARES)
        assert small < middle < large


@pytest.mark.parametrize(("split", "images"), [("train", 1_281_167), ("test", 50_000)])
def test_imagenet_is_reckoned_as_the_page_says(record: harness.Result, split: str, images: int) -> None:
    """One row by hand: 667 × 500 to a shorter side of 400, as JPEG."""
    name = "667 × 500 → 400, jpg"
    section = encoding.PAGE.read_text().split(f"split={split}`: {images:,} images")[1]
    row = re.search(r"\| 400 \| 667 × 500 \| jpg \|(.*)\|", section)
    assert row
    size, joined, one, sixteen, many = (float(cell.replace(",", "")) for cell in row[1].split("|"))
    assert size == pytest.approx(images * record.sizes[name] / 1e9, abs=0.05)
    assert joined == pytest.approx(2 * images * record.sizes[name] / 1e9, abs=0.05)
    encode_m = images * median(record.seconds[name]) / record.images / 60
    assert one - sixteen == pytest.approx(encode_m * 15 / 16, abs=0.11)
    assert sixteen - many == pytest.approx(encode_m * 3 / 64, abs=0.11)
    join_m = size * 1e9 * median(record.seconds[encoding.JOINING]) / record.images / record.sizes[encoding.JOINING] / 60
    assert one == pytest.approx(encode_m + join_m, abs=0.06)  # the joining, which is not divided
