"""The page of predictions: its content, its bounds, and what a browser makes of it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlpet_lightning.__main__ import run
from vlpet_lightning.browse.entries import BrowseError, read_entries
from vlpet_lightning.browse.page import differences, script_json
from vlpet_lightning.prediction_files import as_json

EVIL = '</script><script>document.title="run"</script><img src=x onerror="document.title=1">'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")


def vqa(id: int, said: str, right: str, text: str = "What is it?") -> dict[str, Any]:
    reference = {"answers": [right] * 10, "label": {right: 1.0}, "answer_type": "other", "question_type": "what is"}
    return {"question_id": str(id), "prediction": said, "images": [f"i{id}"], "text": text, "reference": reference}


def write(folder: Path, task: str, records: list[dict[str, Any]], protocol: dict[str, Any] | None = None) -> Path:
    path = folder / "predictions" / f"test_{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(records, protocol))
    return folder


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def picture(path: Path, size: int = 300) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(len(path.stem)).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def test_two_runs_are_merged_by_id_and_the_largest_difference_comes_first(tmp_path: Path) -> None:
    one = write(tmp_path / "one", "vqa", [vqa(1, "dog", "dog"), vqa(2, "cat", "dog"), vqa(3, "x", "x")])
    other = write(tmp_path / "other", "vqa", [vqa(3, "y", "x"), vqa(1, "dog", "dog")])
    entries, _, _ = read_entries([one, other], "test")
    assert [(entry.id, entry.said, entry.scores) for entry in entries] == [
        ("3", ["x", "y"], [1.0, 0.0]),
        ("1", ["dog", "dog"], [1.0, 1.0]),
        ("2", ["cat", None], [0.0, None]),
    ]
    assert entries[0].kind == "other"


def test_captions_have_the_cider_of_their_split(tmp_path: Path) -> None:
    records = [
        {
            "question_id": f"i{i}",
            "prediction": said,
            "images": [f"i{i}"],
            "text": "",
            "reference": {"captions": captions},
        }
        for i, (said, captions) in enumerate(
            [("a red dog runs", ["a red dog runs", "a dog"]), ("two men", ["a blue car on a road"])]
        )
    ]
    entries, _, notes = read_entries([write(tmp_path / "run", "caption", records)], "test")
    assert notes == []
    first, second = (entry.scores[0] for entry in sorted(entries, key=lambda entry: entry.id))
    assert first is not None
    assert first > 1
    assert second == 0
    assert entries[0].truth == ["a red dog runs", "a dog"]


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "vqa", [vqa(1, EVIL, "dog", EVIL)], {"protocol": "original"})
    picture(tmp_path / "pictures" / "COCO" / "i1.png")
    assert run(["browse", str(folder), "--images", str(tmp_path / "pictures")]) == 0
    text = (folder / "browse.html").read_text()
    data = data_of(folder / "browse.html")
    assert data["entries"][0]["said"] == [EVIL]  # the data itself is unchanged
    assert EVIL not in text
    assert "<img" not in text
    assert text.count("<script") == 2
    assert "default-src 'none'" in html.unescape(text)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert data["pictures"][0].startswith("data:image/jpeg;base64,")
    assert data["protocols"] == [{"protocol": "original"}]


def test_a_placeholder_in_the_data_is_only_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "vqa", [vqa(1, "@@script@@ @@style@@", "dog")])
    run(["browse", str(folder)])
    assert data_of(folder / "browse.html")["entries"][0]["said"] == ["@@script@@ @@style@@"]


def test_line_separators_and_markup_are_escaped() -> None:
    encoded = script_json(["\u2028<!--&"])
    assert encoded == '["\\u2028\\u003c!--\\u0026"]'
    assert json.loads(encoded) == ["\u2028<!--&"]


def test_the_thumbnails_stay_within_their_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "run", "vqa", [vqa(i, "dog", "dog") for i in range(10, 30)])
    for i in range(10, 30):
        picture(tmp_path / "pictures" / f"i{i}.png")
    run(["browse", str(folder), "--images", str(tmp_path / "pictures"), "--max_mb", "0.03"])
    data = data_of(folder / "browse.html")
    assert 0 < sum(map(len, data["pictures"])) <= 30_000
    left = 20 - len(data["pictures"])
    assert left > 0
    assert f"{left} of 20 images are left out to keep the page small" in capsys.readouterr().out
    assert any("left out" in note for note in data["notes"])


def test_a_limit_takes_evenly_spaced_questions(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "vqa", [vqa(i, "dog", "dog") for i in range(100, 200)])
    run(["browse", str(folder), "--limit", "4"])
    assert [entry["id"] for entry in data_of(folder / "browse.html")["entries"]] == ["100", "125", "150", "175"]


def test_an_unreadable_image_is_named_on_the_page(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "vqa", [vqa(1, "dog", "dog"), vqa(2, "dog", "dog")])
    picture(tmp_path / "pictures" / "i2.png")
    (tmp_path / "pictures" / "i1.png").write_text("no image")
    run(["browse", str(folder), "--images", str(tmp_path / "pictures")])
    entries = {entry["id"]: entry for entry in data_of(folder / "browse.html")["entries"]}
    assert "i1.png cannot be read" in entries["1"]["images"][0][2]
    assert entries["2"]["images"][0][1] == 0


def test_what_differs_between_protocols_is_named() -> None:
    protocols = [{"seed": 1, "tasks": ["vqa"]}, {"seed": 2, "tasks": ["vqa"], "version": "x"}]
    assert differences(protocols) == [["seed", "1", "2"], ["version", "null", '"x"']]
    assert differences(protocols[:1]) == []


def test_what_cannot_be_browsed_is_named(tmp_path: Path) -> None:
    one = write(tmp_path / "one", "vqa", [vqa(1, "dog", "dog")])
    other = write(tmp_path / "other", "gqa", [vqa(1, "dog", "dog")])
    with pytest.raises(BrowseError, match="no task in common"):
        run(["browse", str(one), str(other)])
    with pytest.raises(BrowseError, match=r"no val predictions in .*one.predictions: run .*validate"):
        run(["browse", str(one), "--split", "val"])
    with pytest.raises(BrowseError, match="is the folder"):
        run(["browse", str(one), "--out", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run(["browse", str(one), "--images", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="3 runs: give one, or two"):
        run(["browse", "a", "b", "c"])
    assert not (one / "browse.html").exists()


def dom(page: Path, folder: Path, fragment: str = "", width: int = 1280) -> str:
    """Return the document after its script ran in a headless browser."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--window-size={width},900"]
    command += [f"--user-data-dir={folder}", "--virtual-time-budget=5000", "--dump-dom", f"{page.as_uri()}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@in_a_browser
def test_a_browser_shows_markup_as_text_and_runs_nothing_of_it(tmp_path: Path) -> None:
    one = write(tmp_path / "one", "vqa", [vqa(1, EVIL, "dog", EVIL), vqa(2, "dog", "dog")])
    other = write(tmp_path / "other", "vqa", [vqa(1, "dog", "dog", EVIL), vqa(2, "dog", "dog")])
    picture(tmp_path / "pictures" / "i1.png")
    run(["browse", str(one), str(other), "--images", str(tmp_path / "pictures")])
    shown = dom(one / "browse.html", tmp_path / "profile")
    assert html.escape(EVIL, quote=False) in shown
    assert "<title>one and other</title>" in shown  # no injected script changed it
    assert shown.count("<article") == 2
    assert "2 of 2 questions" in shown
    assert shown.count('<img src="data:image/jpeg') == 1
    assert "one: mean score 50.00 · other: mean score 100.00" in shown


@in_a_browser
def test_filters_of_the_address_are_applied(tmp_path: Path) -> None:
    records = [vqa(i, "dog" if i % 2 else "cat", "dog") for i in range(120)]
    folder = write(tmp_path / "run", "vqa", records)
    run(["browse", str(folder)])
    shown = dom(folder / "browse.html", tmp_path / "profile", "#right=wrong&page=1")
    assert "60 of 120 questions" in shown
    assert "page 2 of 2" in shown
    assert shown.count("<article") == 10
    assert 'class="right"' not in shown
