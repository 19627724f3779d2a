"""What a real browser makes of the page: keys, widths, colours, and markup in the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from tests.browse.chromium import NAMES, PROGRAM, Tab, chromium
from tests.browse.test_browse import EVIL, picture, vqa, write
from vlpet_lightning.__main__ import run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"no browser on the PATH: none of {', '.join(NAMES)}")
WIDE, PHONE = 1280, 360


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab) -> Iterator[Tab]:
    browser.size(WIDE)
    browser.dark(False)
    yield browser
    assert browser.problems() == []
    assert all(url.startswith("file:") for url in browser.requests())


def text(tab: Tab, selector: str) -> str:
    return str(tab.value(f"document.querySelector({selector!r}).innerText"))


def shown(tab: Tab) -> list[str]:
    """Return the ids of the questions on the page."""
    return list(tab.value("[...document.querySelectorAll('article')].map((card) => card.getAttribute('aria-label'))"))


def focus(tab: Tab) -> str:
    return str(tab.value("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))


def wait_for(tab: Tab, expression: str) -> None:
    until = monotonic() + 10
    while not tab.value(expression):
        assert monotonic() < until, expression
        sleep(0.02)


def caption(id: str, said: str, captions: list[str]) -> dict[str, Any]:
    return {"question_id": id, "prediction": said, "images": [id], "text": "", "reference": {"captions": captions}}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with two tasks, of which VQA has two pages."""
    folder = tmp_path_factory.mktemp("two")
    right = [vqa(i, "dog", "dog") for i in range(100, 170)]
    other = [vqa(i, "cat" if i % 7 == 0 else "dog", "dog") for i in range(100, 170)]
    right[0]["reference"]["answer_type"] = other[0]["reference"]["answer_type"] = "number"
    captions = [("i1", "a red dog runs", ["a red dog runs fast"]), ("i2", "two men talk", ["two men talk here"])]
    protocols: list[dict[str, Any]] = [{"seed": 1, "digest": "a"}, {"seed": 2, "digest": "b"}]
    for name, records, said in (("one", right, None), ("other", other, "nothing at all")):
        protocol = protocols.pop(0)
        write(folder / name, "vqa", records, protocol)
        rows = [caption(id, said or good, truths) for id, good, truths in captions]
        write(folder / name, "caption", rows, protocol)
    picture(folder / "pictures" / "i100.png")
    arguments = ["browse", str(folder / "one"), str(folder / "other"), "--images", str(folder / "pictures")]
    assert run([*arguments, "--out", str(folder / "page.html")]) == 0
    return folder / "page.html"


def test_markup_in_the_data_is_shown_and_not_run(tab: Tab, tmp_path: Path) -> None:
    record = {**vqa(1, EVIL, EVIL, EVIL), "question_id": EVIL, "images": [f"{EVIL}.jpg"]}
    record["reference"]["question_type"] = EVIL
    folder = write(tmp_path / EVIL.replace("/", "")[:30], "vqa", [record, vqa(2, "dog", "dog")], {EVIL: EVIL})
    run(["browse", str(folder), "--out", str(tmp_path / "page.html")])
    tab.open(tmp_path / "page.html")
    assert text(tab, "article").count(EVIL) == 6  # question, type, id, image, prediction, truth
    assert tab.value("document.title").endswith(": test predictions")
    assert tab.value("document.scripts.length") == 2
    assert tab.value("document.querySelectorAll('img').length") == 0
    tab.value("byId('protocol').open = true")
    assert EVIL[:9] in text(tab, "#protocols")
    tab.open(tmp_path / "page.html", "#search=%3Cscript%3Edocument.title=1%3C/script%3E&task=%3Cb%3E&toString=1")
    assert tab.value("document.title").endswith(": test predictions")
    assert "toString" not in tab.value("location.hash")
    assert shown(tab) == []
    assert "No question matches" in text(tab, "#list")


def test_the_policy_stops_what_the_page_did_not_bring(tab: Tab, two: Path) -> None:
    tab.open(two)
    tab.value("""{
        const [script, image] = [document.createElement('script'), document.createElement('img')];
        script.textContent = 'window.ran = true';
        image.src = 'https://example.org/x.png';
        document.body.append(script, image);
        document.body.insertAdjacentHTML('beforeend', '<img src="data:," onerror="window.ran = true">');
    }""")
    wait_for(tab, "document.images[document.images.length - 1].complete")
    assert tab.value("window.ran") is None
    assert len([problem for problem in tab.problems() if "Content Security Policy" in problem]) >= 2
    tab.events.clear()


def test_two_runs_stand_side_by_side_where_they_differ(tab: Tab, two: Path) -> None:
    tab.open(two)
    assert tab.value("document.title") == "one and other: test predictions"
    first = shown(tab)[:12]
    assert all(int(name.split()[1]) % 7 == 0 for name in first if name.startswith("vqa"))
    assert {"caption i1", "caption i2"} <= set(first)
    card = "article[aria-label='vqa 105'] .answers > div"
    boxes = tab.value(f"[...document.querySelectorAll({card!r})].map((box) => [box.className, box.innerText])")
    assert boxes == [["right", "one\ndog\nright"], ["wrong", "other\ncat\nwrong"], ["", "truth\ndog"]]
    tops = tab.value(f"[...document.querySelectorAll({card!r})].map((box) => box.getBoundingClientRect().top)")
    assert len(set(tops)) == 1
    assert "72 of 72 questions" in text(tab, "#summary")
    assert "one, mean score: vqa 100.00 · caption CIDEr" in text(tab, "#summary")
    assert "other, mean score: vqa 85.71 · caption CIDEr 0.00" in text(tab, "#summary")
    assert text(tab, "#differing summary") == "Protocol items in which the runs differ: 1"
    assert text(tab, "#differing tbody") == "seed\t1\t2"


def test_captions_are_coloured_by_score_and_not_right_or_wrong(tab: Tab, two: Path) -> None:
    tab.open(two, "#task=caption")
    classes = "[...document.querySelectorAll('article:first-child .answers > div')].map((box) => box.className)"
    best, worst, _ = tab.value(classes)
    assert best in ("level3", "level4")
    assert worst < best
    assert tab.value("[...byId('score').options].map((option) => option.text)") == ["all", "one better", "other better"]
    tab.open(two, "#score=right")
    assert not any(name.startswith("caption") for name in shown(tab))


def test_filters(tab: Tab, two: Path) -> None:
    tab.open(two, "#score=wrong1")
    assert "10 of 72 questions" in text(tab, "#summary")
    tab.open(two, "#differ=true&task=vqa")
    assert "10 of 72 questions" in text(tab, "#summary")
    tab.open(two, "#answer_type=number")
    assert shown(tab) == ["vqa 100"]
    assert tab.value("document.querySelectorAll('article img').length") == 1
    tab.open(two, "#question_type=what+is&score=better1")
    assert shown(tab) == []
    tab.value("location.hash = '#search=i104'")  # a shared address pasted into the open page
    wait_for(tab, "document.querySelectorAll('article').length === 1")
    assert shown(tab) == ["vqa 104"]
    tab.open(two, "#page=1e9&sort=nonsense&task=vqa")
    assert text(tab, "#page") == "page 2 of 2"
    assert len(shown(tab)) == 20


def test_everything_works_by_keys(tab: Tab, two: Path) -> None:
    tab.open(two, "#sort=order")
    tab.press("j")
    assert focus(tab) == "vqa 100"
    tab.press("j", "ArrowDown", "k")
    assert focus(tab) == "vqa 101"
    assert tab.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.press("n")
    assert text(tab, "#page") == "page 2 of 2"
    assert focus(tab) == "vqa 150"  # the selection follows
    tab.press("n")
    assert text(tab, "#page") == "page 2 of 2"
    tab.press("p", "2")
    assert shown(tab) == ["caption i1", "caption i2"]
    tab.press("1", "w")
    assert shown(tab) == []
    tab.press("w", "d")
    assert len(shown(tab)) == 10
    tab.press("d", "0", "/")
    assert focus(tab) == "search"
    tab.press(*"i104")
    wait_for(tab, "document.querySelectorAll('article').length === 1")
    assert shown(tab) == ["vqa 104"]
    assert "search=i104" in tab.value("location.hash")
    tab.press("Escape")
    assert focus(tab) != "search"
    tab.press("?")
    assert tab.value("byId('help').open")
    tab.press("j", "2")  # nothing behind the dialog changes
    assert shown(tab) == ["vqa 104"]
    assert tab.value("byId('help').contains(document.activeElement)")
    tab.press("Enter")  # its only button: Close
    assert not tab.value("byId('help').open")


def test_tab_reaches_every_control(tab: Tab, two: Path) -> None:
    tab.open(two, "#search=i100")
    seen = []
    for _ in range(14):
        tab.press("Tab")
        seen.append(focus(tab))
    wanted = [
        "task",
        "answer_type",
        "question_type",
        "score",
        "sort",
        "search",
        "differ",
        "Keyboard shortcuts",
        "vqa 100",
    ]
    assert [name for name in seen if name in wanted] == wanted
    unnamed = """[...document.querySelectorAll('input, select, button')].filter(
        (control) => !control.labels?.length && !control.ariaLabel && !control.innerText && control.offsetParent)"""
    assert tab.value(f"{unnamed}.map((control) => control.id)") == []


def test_a_phone_needs_no_sideways_scrolling(tab: Tab, tmp_path: Path) -> None:
    long = "Donaudampfschifffahrtsgesellschaft" * 8
    records = [{**vqa(1, long, long, long), "question_id": long, "images": [long[:90], "i2"]}]
    one = write(tmp_path / ("a" * 80), "vqa", records, {long: 1})
    other = write(tmp_path / ("b" * 80), "vqa", records, {long: 2})
    picture(tmp_path / "pictures" / "i2.png", 700)
    run(["browse", str(one), str(other), "--images", str(tmp_path / "pictures"), "--pixels", "480"])
    tab.size(PHONE)
    tab.open(one / "browse.html")
    tab.press("?")
    assert tab.value("[document.documentElement.scrollWidth, innerWidth]") == [PHONE, PHONE]
    outside = "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1)"
    assert tab.value(f"{outside}.map((e) => e.tagName + e.id)") == []


LUMINANCE = """
(() => {
  const parts = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parts(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const texts = 'h1, h2, p, label, summary, td, th, select, button:enabled, .name, .score, .answers div';
  for (const element of document.querySelectorAll(texts)) {
    if (!element.offsetParent) continue;
    const [a, b] = [light(parts(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.className || element.tagName]);
  }
  return found.sort((x, y) => x[0] - y[0])[0];
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(tab: Tab, two: Path, dark: bool) -> None:
    tab.dark(dark)
    tab.open(two)
    page = tab.value("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (sum(page) < 3 * 64) == dark
    ratio, where = tab.value(LUMINANCE)
    assert ratio >= 4.5, where  # WCAG 2.1, level AA


def test_many_questions_stay_usable(tab: Tab, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", "vqa", [vqa(i, "dog" if i % 3 else "cat", "dog") for i in range(50_000)])
    run(["browse", str(folder)])
    began = monotonic()
    tab.open(folder / "browse.html")
    assert "50,000 of 50,000 questions" in text(tab, "#summary")
    assert monotonic() - began < 10  # takes half a second
    assert len(shown(tab)) == 50
    seconds = (
        tab.value(
            "(() => { const began = performance.now(); change('score', 'wrong'); return performance.now() - began; })()"
        )
        / 1e3
    )
    assert seconds < 3  # takes a tenth
    assert text(tab, "#page") == "page 1 of 334"
