"""``metrics.csv`` of a run: reading and continuing files truncated by a kill or a full disk."""

from __future__ import annotations

import resource
import warnings
from contextlib import contextmanager

import pytest

from vlpet_lightning.loggers import CSVLog, read_metrics

WHOLE = "epoch,step,val/average\r\n0,0,0.25\r\n0,1,\r\n"
ROWS = [{"epoch": 0, "step": 0, "val/average": 0.25}, {"epoch": 0, "step": 1}]


def logger(folder, content=None):
    """Build a logger in a folder that may already have a file."""
    home = folder / "run" / "a"
    home.mkdir(parents=True, exist_ok=True)
    if content is not None:
        (home / "metrics.csv").write_bytes(content)
    return CSVLog(folder, name="run", version="a"), home


@contextmanager
def full_disk(left=0):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("torn", "line", "what"),
    [
        (b"1,2,0.", 4, "has no end"),
        (b"1,2,0.123", 4, "has no end"),  # 0.12345 may have been meant
        (b"1,2\r\n", 4, "has 2 cells under 3 names"),
        (b"1,2,3,4\r\n", 4, "has 4 cells under 3 names"),
        (b"\0\0\0\0\r\n", 4, "has 1 cells under 3 names"),
        (b'1,"2,3\r\n', 4, "has 2 cells under 3 names"),
        (b"\xff\xfe", 4, "has no end"),
        (b"\r\n", 4, "has 0 cells under 3 names"),
    ],
)
def test_a_line_that_cannot_be_read_is_skipped_and_named(tmp_path, torn, line, what):
    log, home = logger(tmp_path, WHOLE.encode() + torn)
    with pytest.warns(UserWarning, match=rf"run/a/metrics.csv, line {line}: {what}"):
        assert read_metrics(home) == ROWS
    with pytest.warns(UserWarning, match=f"line {line}"):
        log.log_metrics({"val/average": 0.5}, step=2)
    log.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_metrics(home) == [*ROWS, {"step": 2, "val/average": 0.5}]


def test_a_cell_that_cannot_be_read_is_skipped_and_the_others_of_its_line_are_not(tmp_path):
    _, home = logger(tmp_path, WHOLE.encode() + b"1,2,0.\0\0\r\n1,3,0.75\r\n")
    with pytest.warns(UserWarning, match=r"metrics.csv, line 4: has .* for val/average"):
        assert read_metrics(home) == [*ROWS, {"epoch": 1, "step": 2}, {"epoch": 1, "step": 3, "val/average": 0.75}]


@pytest.mark.parametrize("content", [b"", b"epoch,st", b"epoch,step\r\n"])
def test_a_file_without_rows_is_begun_anew(tmp_path, content):
    log, home = logger(tmp_path, content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_metrics(home) == []
        log.log_metrics({"loss": 0.5}, step=0)
        log.save()
    assert (home / "metrics.csv").read_bytes() == b"loss,step\r\n0.5,0\r\n"


def test_earlier_rows_are_safe_when_a_run_goes_on_and_when_it_has_a_new_value_to_log(tmp_path):
    log, home = logger(tmp_path, WHOLE.encode())
    with full_disk(), pytest.raises(OSError, match="File too large"):
        log.log_metrics({"val/average": 0.5}, step=2)
    assert read_metrics(home) == ROWS
    log, _ = logger(tmp_path)
    log.log_metrics({"loss": 1.0}, step=2)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        log.save()
    assert read_metrics(home) == ROWS
    log.save()
    assert read_metrics(home) == [*ROWS, {"loss": 1.0, "step": 2}]
    assert [file.name for file in home.iterdir()] == ["metrics.csv"]
