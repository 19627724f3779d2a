"""The demo's runner: parallel commands, their progress bars, and failures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).parents[1] / "experiments" / "demo.py"


@pytest.fixture
def demo(monkeypatch):
    specification = importlib.util.spec_from_file_location("demo", RUNNER)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "demo", module)  # dataclasses look up their module
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "PROGRAM", [sys.executable, "-c"])
    return module


def write(path):
    return f"open({str(path)!r}, 'a').write('x')"


def test_the_commands_of_a_job_run_one_after_the_other(demo, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    must_be_there = f"import os; assert os.path.exists({str(first)!r}); {write(second)}"
    job = demo.Job("job", [[write(first)], [must_be_there]], tmp_path / "logs" / "job.log")
    demo.run(job)
    assert (first.read_text(), second.read_text()) == ("x", "x")
    assert job.row()[2] == "done"


def test_a_job_has_its_own_number_of_threads(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    said = f"import os; open({str(tmp_path / 'said')!r}, 'a').write(os.environ['OMP_NUM_THREADS'])"
    for threads in (None, 2):
        demo.run(demo.Job("job", [[said]], tmp_path / "job.log", threads))
    assert (tmp_path / "said").read_text() == "12"


def test_jobs_run_side_by_side(demo, tmp_path):
    """The jobs wait for each other, so they would never end if run sequentially."""
    wait = "import os, time\nopen({0!r}, 'w').close()\nwhile not os.path.exists({1!r}): time.sleep(0.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    jobs = [
        demo.Job("a", [[wait.format(a, b)]], tmp_path / "a.log"),
        demo.Job("b", [[wait.format(b, a)]], tmp_path / "b.log"),
    ]
    demo.run(*jobs)
    assert [job.row()[2] for job in jobs] == ["done", "done"]


def test_a_failure_names_the_job_shows_its_output_and_stops_the_others(demo, tmp_path):
    other = demo.Job("other", [["import time; time.sleep(600)"]], tmp_path / "other.log")
    failing = demo.Job("failing", [["raise SystemExit('no such thing')"]], tmp_path / "failing.log")
    with pytest.raises(SystemExit, match=r"failing failed, see .*failing\.log:\nno such thing"):
        demo.run(other, failing)
    assert other.process.wait(timeout=10) != 0


def test_the_last_progress_bar_is_shown_without_its_colors(demo, tmp_path):
    log = tmp_path / "job.log"
    bars = [f"\x1b[2Kextracting \x1b[91m━━━━\x1b[0m  {done}% 0:00:02" for done in (40, 60)]
    log.write_text("a warning\n" + "\r".join(bars))
    assert demo.Job("job", [], log).last_line() == "extracting ━━━━  60% 0:00:02"


def test_a_progress_bar_is_found_in_a_real_one(demo, tmp_path):
    bar = "from rich.progress import track\nfor _ in track(range(4), description='rendering'): pass"
    job = demo.Job("job", [[bar]], tmp_path / "job.log")
    demo.run(job)
    assert job.last_line().startswith("rendering ━")
    assert "100%" in job.last_line()
