"""The page of the cheaper trainings: made from its record, and nothing else."""

from benchmarks import curves, time_to_robust
from benchmarks.time_to_robust import Record


def test_the_page_is_that_of_the_committed_record() -> None:
    record = Record.model_validate_json(time_to_robust.OUT.read_text())
    assert curves.PAGE.read_text() == curves.page(record)
    assert curves.draw(record)[:8] == b"\x89PNG\r\n\x1a\n"
    assert curves.PICTURE.is_file()
    assert all(len(record.of("l2", name)) == len(time_to_robust.SEEDS) for name in time_to_robust.RECIPES["l2"])
