"""The page of predictions: its content, its bounds, and what a browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlpet_lightning.__main__ import run
from vlpet_lightning.browse.entries import BrowseError, read_entries
from vlpet_lightning.browse.page import differing_items, page, script_json
from vlpet_lightning.browse.thumbnails import find_images, spread
from vlpet_lightning.metrics.questions import caption_question_scores
from vlpet_lightning.prediction_files import as_json
from vlpet_lightning.reports.runs import run_names

EVIL = '</script><script>document.title="run"</script><img src=x onerror="document.title=1">'


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
    entries, _, notes = read_entries([one, other], "test")
    assert [(entry.id, entry.said, entry.scores) for entry in entries] == [
        ("3", ["x", "y"], [1.0, 0.0]),
        ("1", ["dog", "dog"], [1.0, 1.0]),
        ("2", ["cat", None], [0.0, None]),
    ]
    assert entries[0].types == {"answer_type": "other", "question_type": "what is"}
    assert notes == [f"1 of 3 questions have no prediction in {other}"]


def test_truths_come_from_the_run_that_has_them(tmp_path: Path) -> None:
    bare = {"question_id": "1", "prediction": "cat"}  # all that a prediction file must have
    one = write(tmp_path / "one", "vqa", [bare])
    other = write(tmp_path / "other", "vqa", [vqa(1, "dog", "dog")])
    for runs in ([one, other], [other, one]):
        (entry,), _, _ = read_entries(runs, "test")
        assert (entry.truth, entry.text, entry.images) == (["dog"], "What is it?", ["i1"])
        assert entry.types == {"answer_type": "other", "question_type": "what is"}
        assert set(entry.scores) == {None, 1.0}


def test_captions_do_not_come_first_because_cider_exceeds_one(tmp_path: Path) -> None:
    for name, answer, said in (("one", "dog", "a red dog runs"), ("other", "cat", "two men")):
        folder = write(tmp_path / name, "vqa", [vqa(1, answer, "dog"), vqa(2, "dog", "dog")])
        references = [{"captions": [text]} for text in ("a red dog runs in a park", "a blue car")]
        captions = [{"question_id": f"c{i}", "prediction": said, "reference": ref} for i, ref in enumerate(references)]
        write(folder, "caption", captions)
    entries, _, _ = read_entries([tmp_path / "one", tmp_path / "other"], "test")
    assert [entry.id for entry in entries] == ["1", "c0", "2", "c1"]
    assert 0 < entries[1].difference < 1
    assert entries[1].scores[0] is not None
    assert entries[1].scores[0] > 1
    text = page(entries[1:], ["one", "other"], split="test", pictures={}, keys={}, problems={}, side=160)
    assert '"tasks":{"vqa":{"largest":1.0},"caption":{"largest":10.0}}' in text  # in the order of the keys 1 to 9


def test_tasks_of_one_run_only_are_named(tmp_path: Path) -> None:
    one = write(write(tmp_path / "one", "vqa", [vqa(1, "a", "a")]), "gqa", [vqa(1, "a", "a")])
    other = write(tmp_path / "other", "vqa", [vqa(1, "a", "a")])
    entries, _, notes = read_entries([one, other], "test")
    assert [entry.task for entry in entries] == ["vqa"]
    assert notes == [f"left out, as only {one} has it: gqa"]


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


def test_captions_without_a_defined_score_have_none(tmp_path: Path) -> None:
    caption = {"question_id": "i", "prediction": "a dog", "reference": {"captions": ["a dog"]}}
    folder = write(tmp_path / "run", "caption", [caption, {**caption, "question_id": "j", "reference": None}])
    entries, _, notes = read_entries([folder], "test")
    assert [entry.scores for entry in entries] == [
        [None],
        [None],
    ]  # with one image, a perfect caption has 0
    assert notes == ["caption without scores: CIDEr is 0 for any caption with the references of so few images"]


def test_an_image_without_captions_does_not_shift_the_scores_of_the_others() -> None:
    references = [{"captions": []}, {"captions": ["a red dog runs"]}, {"captions": ["a blue car"]}, {}]
    scores = caption_question_scores(["x", "a red dog runs", "two men", "x"], references)
    assert scores[0] is scores[3] is None
    assert scores[1] is not None
    assert scores[1] > 1
    assert scores[2] == 0


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
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="(.*?)"', text)[0])
    hashed = {}
    for tag in ("style", "script"):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[0]
        hashed[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashed['style']}'; "
        f"script-src 'sha256-{hashed['script']}'; base-uri 'none'; form-action 'none'"
    )
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


def test_a_small_budget_is_spread_over_tasks_and_ids(tmp_path: Path) -> None:
    """Otherwise the first task would get all pictures."""
    folder = write(tmp_path / "run", "vqa", [vqa(i, "dog", "dog") for i in range(100, 140)])
    records = [{**vqa(i, "dog", "dog"), "reference": {"label": {"dog": 1.0}}} for i in range(200, 240)]
    write(folder, "gqa", records)
    for i in (*range(100, 140), *range(200, 240)):
        picture(tmp_path / "pictures" / f"i{i}.png")
    run(["browse", str(folder), "--images", str(tmp_path / "pictures"), "--max_mb", "0.05"])
    data = data_of(folder / "browse.html")
    shown = [entry for entry in data["entries"] if entry["images"][0][1] >= 0]
    by_task = Counter(entry["task"] for entry in shown)
    assert 0 < by_task["vqa"] < 40
    assert abs(by_task["vqa"] - by_task["gqa"]) <= 1
    assert max(int(entry["id"]) for entry in shown if entry["task"] == "vqa") >= 130
    assert any("thumbnails have 72 pixels" in note for note in data["notes"])


def test_where_two_runs_differ_pictures_come_first(tmp_path: Path) -> None:
    one = write(tmp_path / "one", "vqa", [vqa(i, "dog", "dog") for i in range(100, 140)])
    other = write(tmp_path / "other", "vqa", [vqa(i, "cat" if i >= 138 else "dog", "dog") for i in range(100, 140)])
    for i in range(100, 140):
        picture(tmp_path / "pictures" / f"i{i}.png")
    run(["browse", str(one), str(other), "--images", str(tmp_path / "pictures"), "--max_mb", "0.01"])
    entries = data_of(one / "browse.html")["entries"]
    assert [entry["images"][0][1] for entry in entries[:2]] == [0, 1]
    assert entries[-1]["images"][0][1] < 0


def test_every_beginning_of_the_spread_is_even() -> None:
    assert sorted(spread(100)) == list(range(100))
    for count in range(1, 101):
        places = [*sorted(spread(100)[:count]), 100]
        gaps = [after - before for before, after in itertools.pairwise(places)]
        assert max(gaps) <= 2 * -(-100 // count)
    assert spread(0) == []
    assert spread(1) == [0]


def test_each_image_is_embedded_once_with_at_most_the_requested_pixels(tmp_path: Path) -> None:
    records = [{**vqa(i, "dog", "dog"), "images": ["same"]} for i in range(3)]
    folder = write(tmp_path / "run", "vqa", records)
    picture(tmp_path / "pictures" / "same.png")
    run(["browse", str(folder), "--images", str(tmp_path / "pictures"), "--pixels", "240"])
    data = data_of(folder / "browse.html")
    assert len(data["pictures"]) == 1
    assert data["side"] == 240
    content = base64.b64decode(data["pictures"][0].partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (240, 240)


def test_an_id_in_several_stores_means_the_image_of_the_tasks_store(tmp_path: Path) -> None:
    picture(tmp_path / "GQA" / "deep" / "1.png")
    picture(tmp_path / "COCO" / "val2014" / "1.png")
    found = find_images(tmp_path, ["COCO", "GQA"])
    assert found["GQA/1"] == tmp_path / "GQA" / "deep" / "1.png"
    assert found["COCO/1"] == tmp_path / "COCO" / "val2014" / "1.png"


def test_missing_images_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "vqa", [vqa(1, "dog", "dog"), vqa(2, "dog", "dog")])
    picture(tmp_path / "pictures" / "i2.png")
    run(["browse", str(folder), "--images", str(tmp_path / "pictures")])
    assert data_of(folder / "browse.html")["notes"] == [f"images without a file in {tmp_path / 'pictures'}: 1"]


def test_items_in_which_the_protocols_differ_are_named() -> None:
    protocols = [
        {"seed": 1, "items": {"start": "original", "masked": True}},
        {"seed": 1, "items": {"start": "identity", "masked": True}},
    ]
    assert differing_items(["a", "b"], protocols) == [["items.start", "original", "identity"]]
    assert [row[0] for row in differing_items(["a", "b"], [{"digest": "x", "seed": 1}, {}])] == ["record"]
    assert differing_items(["a", "b"], [{}, {}]) == []


def test_a_protocol_with_nan_is_still_json(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "vqa", [vqa(1, "dog", "dog")], {"rate": float("nan")})
    run(["browse", str(folder)])
    assert data_of(folder / "browse.html")["protocols"] == [{"rate": "NaN"}]


def test_run_names_are_short_and_different() -> None:
    assert run_names([Path("runs/a/version_0"), Path("runs/b/version_0")]) == ["a/version_0", "b/version_0"]
    assert run_names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]
    assert run_names([Path("x/a"), Path("x/a")]) == ["x/a (1)", "x/a (2)"]


def test_what_cannot_be_browsed_is_named(tmp_path: Path) -> None:
    one = write(tmp_path / "one", "vqa", [vqa(1, "dog", "dog")])
    other = write(tmp_path / "other", "gqa", [vqa(1, "dog", "dog")])
    with pytest.raises(BrowseError, match="no task in common"):
        run(["browse", str(one), str(other)])
    with pytest.raises(BrowseError, match=r"no val predictions in .*one.predictions: choose --split test.*validate"):
        run(["browse", str(one), "--split", "val"])
    with pytest.raises(BrowseError, match=r"there is no folder .*absent: give the folder of a run"):
        run(["browse", str(tmp_path / "absent")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrowseError, match=r"no test predictions in .*: run .*test.* with the callback"):
        run(["browse", str(tmp_path / "empty")])
    with pytest.raises(FileExistsError, match="is a file"):
        run(["browse", str(one), "--out", str(one / "predictions" / "test_vqa.json" / "page.html")])
    with pytest.raises(ValueError, match="--limit must be 1 or more, got 0"):
        run(["browse", str(one), "--limit", "0"])
    with pytest.raises(ValueError, match="--max_mb must be above 0, got nan"):
        run(["browse", str(one), "--max_mb", "nan"])
    with pytest.raises(ValueError, match="--pixels must be from 16 to 480, got 5"):
        run(["browse", str(one), "--pixels", "5"])
    with pytest.raises(BrowseError, match="is the folder"):
        run(["browse", str(one), "--out", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run(["browse", str(one), "--images", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="3 runs: give one, or two"):
        run(["browse", "a", "b", "c"])
    assert not (one / "browse.html").exists()
