"""Conversion of the NLVR corpus to the NLVR2 format: complete pictures, no leaks, atomic results."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import zipfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_modules.annotations.image_text import AnnotationError, read_split
from data_modules.convert.nlvr1 import convert_nlvr1
from vlpet_lightning.__main__ import run
from vlpet_lightning.metrics.nlvr2 import nlvr2_scores
from vlpet_lightning.tasks import TASKS

GREY, LIGHT, COLOURS = (128, 128, 128), (211, 211, 211), ("Yellow", "Black", "#0099ff")
SENTENCES = 8
LABELS = ("false", "true", "true")


def picture(boxes):
    """Draw a picture like those of the corpus: three boxes, with as many squares as given for each."""
    image = Image.new("RGBA", (400, 100), GREY)
    draw = ImageDraw.Draw(image)
    for place, box in zip((0, 150, 300), boxes, strict=True):
        draw.rectangle((place, 0, place + 99, 99), LIGHT)
        for square in range(box):
            left, top = place + 11 * (square % 9), 90 - 11 * (square // 9)
            draw.rectangle((left, top, left + 9, top + 9), COLOURS[square % 3])
    return image


def write_part(root, numbers, boxes=lambda n, m: (n % 60, m, 2 * n % 60 + 20), sentence="{} squares.".format):
    """Write sentences with two statements each, and six pictures per statement."""
    lines = []
    for n, m in itertools.product(numbers, range(2)):
        (root / "images" / str(n % 3)).mkdir(parents=True, exist_ok=True)
        for k, shown in enumerate(itertools.permutations(boxes(n, m))):
            picture(shown).save(root / "images" / str(n % 3) / f"{root.name}-{n}-{m}-{k}.png")
        line = {"sentence": sentence(n), "label": LABELS[(n + m) % 3], "identifier": f"{n}-{m}"}
        line |= {"directory": str(n % 3), "evals": {"r0": "true"}, "structured_rep": [[], [], []]}
        lines.append(json.dumps(line) + "\n")
    (root / f"{root.name}.json").write_text("".join(lines))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("nlvr")
    write_part(root / "dev", range(SENTENCES))
    write_part(root / "test", range(100, 103))
    return root


@pytest.fixture(scope="module")
def converted(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted")
    convert(corpus, out)
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def convert(source, out, valid_share=0.25, **options):
    convert_nlvr1(source=source, out=out, valid_share=valid_share, **options)


def records(out, *splits):
    return [row for split in splits for row in json.loads((out / "nlvr" / f"{split}.json").read_text())]


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def pack(part, where, inside):
    with zipfile.ZipFile(where, "w") as archive:
        for path in part.rglob("*"):
            archive.write(path, f"{inside}{path.relative_to(part).as_posix()}")
        archive.writestr("../../climbed.png", b"")


@pytest.mark.parametrize(
    ("split", "file", "rows"), [("train", "train", 72), ("val", "valid", 24), ("test", "test", 36)]
)
def test_the_benchmarks_reader_reads_every_split(converted, split, file, rows):
    samples = read_split(converted, TASKS["nlvr2"], split)
    assert len(samples) == len(records(converted, file)) == rows
    assert {id for pair in samples.images for id in pair} <= {path.stem for path in converted.glob("images/nlvr/*.png")}


def test_fields_are_the_benchmarks_and_consistency_is_over_a_sentence(converted):
    rows = {row["uid"]: row for row in records(converted, "train", "valid", "test")}
    assert len(rows) == (SENTENCES + 3) * 2 * 6
    assert list(rows["test-101-1-4"]) == ["uid", "identifier", "img0", "img1", "sent", "label"]
    assert rows["test-101-1-4"]["sent"] == "101 squares."
    assert (rows["test-101-0-0"]["label"], rows["test-101-1-4"]["label"]) == (1, 0)
    test = [row for row in rows.values() if row["uid"].startswith("test")]
    answers = [("true", "false")[row["uid"] == "test-101-1-4"] for row in test]
    scores = nlvr2_scores(answers, ["true"] * len(test), [row["identifier"] for row in test])
    assert scores["consistency"] == pytest.approx(2 / 3)  # one of three sentences has a wrong answer


def test_two_images_hold_every_box_once(corpus, converted):
    for row in records(converted, "train", "valid"):
        whole = pixels(next(corpus.glob(f"dev/images/*/{row['uid']}.png")))
        left, right = (pixels(converted / "images" / "nlvr" / f"{row[name]}.png") for name in ("img0", "img1"))
        assert left.shape == right.shape == (100, 250, 3)
        assert np.array_equal(np.concatenate([left, right[:, 100:]], axis=1), whole)
        assert (right[:, :150] == GREY).all()  # box 2 painted over, and the divider


def test_equal_images_are_written_once(converted):
    rows = records(converted, "train", "valid", "test")
    written = [pixels(path).tobytes() for path in converted.glob("images/nlvr/*")]
    assert len(set(written)) == len(written) == len({row[name] for row in rows for name in ("img0", "img1")})
    assert len(written) < 2 * len(rows)


def test_no_uid_and_no_sentence_and_no_picture_is_in_two_splits(converted):
    for field in (lambda row: row["uid"], lambda row: row["sent"], lambda row: (row["img0"], row["img1"])):
        values = [set(map(field, records(converted, split))) for split in ("train", "valid", "test")]
        assert not any(a & b for a, b in itertools.combinations(values, 2))


BOXES = {(0, 1): (7, 8, 9), (1, 0): (9, 7, 8), (1, 1): (1, 2, 3), (2, 0): (3, 2, 1)}


@pytest.mark.parametrize(
    ("changed", "sides"),
    [
        # 0 and 1 share a picture, 1 and 2 another one
        ({"boxes": lambda n, m: BOXES.get((n, m), (10 * n + 20, m, 5))}, {"3"}),
        # 0 and 1, 2 and 3 differ in case and punctuation
        ({"sentence": lambda n: f"{'oO'[n % 2]}ne tower, {n // 2}{'.' * n}"}, {"01", "23"}),
        # a sentence equal to the number of another one is no link
        ({"sentence": lambda n: str((n + 1) % 4)}, {"01", "02", "03", "12", "13", "23"}),
    ],
)
def test_what_is_shared_is_on_one_side(tmp_path, out, changed, sides):
    write_part(tmp_path / "s" / "dev", range(4), **changed)
    write_part(tmp_path / "s" / "test", range(100, 101))
    convert(tmp_path / "s", out, valid_share=0.5)
    assert "".join(sorted({row["uid"].split("-")[1] for row in records(out, "valid")})) in sides


def test_the_seed_chooses_valid(corpus, tmp_path):
    chosen = set()
    for seed in range(4):
        convert(corpus, tmp_path / str(seed), seed=seed)
        chosen.add(frozenset(row["sent"] for row in records(tmp_path / str(seed), "valid")))
    assert {len(sentences) for sentences in chosen} == {2}
    assert len(chosen) > 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan"), 0.01])
def test_a_share_that_leaves_a_split_empty_is_refused(corpus, out, share):
    problem = "dev has 96 pictures in 8 groups of 12 or more" if share == 0.01 else "must lie between 0 and 1"
    with pytest.raises(ValueError, match=f"valid_share .*{problem}"):
        convert(corpus, out, valid_share=share)
    assert not out.exists()


@pytest.mark.parametrize("inside", ["", "dev", "nlvr/dev", "deep/er/dev"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_part_is_found(corpus, converted, tmp_path, out, inside, zipped):
    source = shutil.copytree(corpus / "test", tmp_path / "source" / "test").parent
    (source / "dev.json").write_text("{}")  # no images next to it, as in NLVR2
    if zipped:
        pack(corpus / "dev", source / "dev.zip", inside and f"{inside}/")
    else:
        shutil.copytree(corpus / "dev", source / (inside or "mine"))
    convert(source, out)
    assert tree(out) == tree(converted)
    assert list(source.rglob("dev-*.png")) == [] or not zipped  # zip files are not unpacked
    assert not list(tmp_path.parent.rglob("climbed.png"))


@pytest.mark.parametrize("removed", [["dev"], ["test"], ["dev", "test"]])
def test_a_missing_part_is_named_with_the_expected_tree(corpus, tmp_path, out, removed):
    source = shutil.copytree(corpus, tmp_path / "source", ignore=shutil.ignore_patterns(*removed))
    named = f"no {' and no '.join(removed)} part of the NLVR corpus"
    with pytest.raises(FileNotFoundError, match=rf"(?s)^{named}.*images/DIRECTORY/dev-N-M-K\.png.*lil-lab/nlvr"):
        convert(source, out)
    assert not out.exists()


def test_a_part_that_is_there_twice_is_refused(corpus, tmp_path, out):
    for name in ("a", "b"):
        shutil.copytree(corpus, tmp_path / name)
    with pytest.raises(ValueError, match="more than one of a part"):
        convert(tmp_path, out)


def test_missing_pictures_are_counted(corpus, tmp_path, out):
    source = shutil.copytree(corpus, tmp_path / "source", ignore=shutil.ignore_patterns("dev-[36]-0-[23].png"))
    with pytest.raises(
        FileNotFoundError, match=r"4 of 96 pictures of .*dev\.json are missing: images/0/dev-3-0-2\.png"
    ):
        convert(source, out)
    assert not out.exists()


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


def encode(image, kind):
    image.save(file := BytesIO(), kind)
    return file.getvalue()


def line(new=b"", **fields):
    """Return a function that changes line 4."""

    def change(content):
        lines = content.split(b"\n")
        lines[3] = new or json.dumps({**json.loads(lines[3]), **fields}).encode()
        return b"\n".join(lines)

    return change


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        ("test.json", line(label="maybe"), "line 4: label must be true or false, got 'maybe'"),
        ("test.json", line(label=None), "line 4: label must be true or false, got 'None'"),
        ("test.json", line(sentence=None), "line 4: sentence must be text, got None"),
        ("test.json", line(sentence=" "), "line 4: sentence must be text"),
        ("test.json", line(identifier="1/../2"), "line 4: identifier must read N-M"),
        ("test.json", line(directory="../../.."), "line 4: .* directory be a number"),
        ("test.json", line(identifier="100-0", directory="9"), "line 4: its identifier came before"),
        ("test.json", line(b'{"label": "true"}'), "line 4: the field 'sentence' is missing"),
        ("test.json", line(b'{"sentence": "cut sho'), "line 4: Unterminated string"),
        ("test.json", line(b"[1, 2]"), "line 4: it must be a JSON object"),
        ("test.json", line(b"\xff"), "line 4: .* can't decode"),
        ("test.json", lambda content: b"\n", "are missing: it has no lines"),
        ("test-102-1-5.png", lambda content: content[: len(content) // 2], "cannot be read"),
        ("test-102-1-5.png", lambda content: flip(content, len(content) // 2), "cannot be read"),
        ("test-102-1-5.png", lambda content: b"", "cannot be read"),
        ("test-102-1-5.png", lambda _: encode(picture((1, 2, 3)).convert("RGB"), "JPEG"), "cannot be read"),
        ("test-102-1-5.png", lambda _: encode(picture((1, 2, 3)).resize((200, 50)), "PNG"), "has 200 x 50 pixels"),
        ("test.zip", lambda content: content[: len(content) // 2], "no whole zip"),
        ("test.zip", lambda content: b"no zip", "no whole zip"),
        ("test.zip", lambda content: flip(content, content.index(b" squares.")), "test.json cannot be read .*CRC"),
        ("test.zip", lambda content: content.replace(b"test.json", b"best.json"), "has 0 files test.json"),
    ],
)
def test_what_cannot_be_used_is_named(corpus, tmp_path, out, file, damage, problem):
    source = shutil.copytree(corpus, tmp_path / "source")
    if file == "test.zip":
        pack(source / "test", source / file, "test/")
        shutil.rmtree(source / "test")
    path = next(source.rglob(file))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((AnnotationError, FileNotFoundError), match=rf"{file}.*{problem}"):
        convert(source, out)
    assert not out.exists()


def test_a_second_run_writes_nothing(corpus, out, capsys):
    convert(corpus, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "nothing was written" not in capsys.readouterr().out
    convert(corpus, out)
    assert "is up to date: nothing was written" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_annotations_that_are_not_ours_are_refused(corpus, out, name):
    (out / "nlvr").mkdir(parents=True)
    (out / "nlvr" / f"{name}.json").write_text("[]")
    with pytest.raises(FileExistsError, match=rf"{name}\.json is not what .* choose another --out, or remove it"):
        convert(corpus, out)
    assert list(tree(out).values()) == [b"[]"]


def test_another_seed_into_the_same_folder_is_refused(corpus, converted):
    with pytest.raises(FileExistsError, match=r"valid_share 0\.25 and seed 5 gives"):
        convert(corpus, converted, seed=5)


def test_out_must_not_be_a_file(corpus, out):
    out.write_text("mine")
    with pytest.raises(ValueError, match="out be a folder"):
        convert(corpus, out)


@pytest.mark.parametrize("files", [0, 20, -2, -1])
def test_a_killed_run_is_not_complete_and_can_be_repeated(corpus, converted, out, monkeypatch, files):
    replace, written = os.replace, []

    def stop(source, target):
        if len(written) == files % len(tree(converted)):
            raise KeyboardInterrupt
        written.append(replace(source, target))

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(corpus, out)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        read_split(out, TASKS["nlvr2"], "train")
    convert(corpus, out)
    assert tree(out) == tree(converted)


def test_a_damaged_image_is_written_again(corpus, converted, out):
    shutil.copytree(converted, out)
    damaged, missing = sorted(out.glob("images/nlvr/*"))[:2]
    damaged.write_bytes(damaged.read_bytes()[:50])
    missing.unlink()
    convert(corpus, out)
    assert tree(out) == tree(converted)


def test_the_command_line_converts_and_shows_a_table(corpus, converted, out, capsys):
    assert run([*"data convert nlvr1 --valid_share 0.25 --source".split(), str(corpus), "--out", str(out)]) == 0
    assert tree(out) == tree(converted)
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:6] for line in lines if line[:1] == ["test"]] == [["test", "3", "6", "36", "66.7%", "true"]]


def test_the_text_for_pretraining_has_the_statements_of_its_split_with_words_hidden(corpus, out):
    convert_nlvr1(source=corpus, out=out, valid_share=0.3)
    texts = {}
    for split, text in (("train", "train"), ("valid", "val")):
        pairs = [json.loads(line) for line in (out / "text" / f"{text}.jsonl").read_text().splitlines()]
        said = {record["sent"] for record in json.loads((out / "nlvr" / f"{split}.json").read_text())}
        texts[split] = {pair["target"] for pair in pairs}
        assert texts[split] == said
        assert any("<mask>" in pair["source"] for pair in pairs)
        for pair in pairs:
            assert pair["source"].startswith("nlvr: ")
            hidden = zip(pair["source"].removeprefix("nlvr: ").split(), pair["target"].split(), strict=True)
            assert all(source in (target, "<mask>") for source, target in hidden)
    assert not texts["train"] & texts["valid"]
