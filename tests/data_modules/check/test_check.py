"""``data check``: finds all kinds of broken files at once, from a config of ``fit`` and without weights."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from data_modules.annotations.image_text import AnnotationError
from data_modules.annotations.published import SAMPLES
from data_modules.batches.answers import best_answers
from data_modules.check.check import CheckFailed, DataCheck
from data_modules.image_text import ImageTextDataModule
from data_modules.store.store import FeatureStoreError
from data_modules.streaming.streamed_store import Stream
from data_modules.video_text import VideoTextDataModule
from tests.data_modules.test_video_text import value_root, with_value_files
from tests.data_modules.tiny_data import (
    DIM,
    coco,
    vqa_answers,
    vqa_record,
    write_features,
    write_json,
    write_tokenizer,
    write_world,
)
from tests.data_modules.tiny_video import FRAMES, video, write_lines, write_video_world
from vlpet_lightning.__main__ import for_the_user, run

EXPERIMENTS = Path(__file__).parents[3] / "experiments"


@pytest.fixture
def root(tmp_path):
    write_world(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


@pytest.fixture
def video_root(tmp_path):
    write_video_world(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


def words(root, experiment="image_text", **data):
    """Return the arguments of ``data check`` for a shipped config on a tiny root."""
    settings = {"root": root, **data}
    return [
        *("data", "check", "--config", str(EXPERIMENTS / f"{experiment}.yaml")),
        *("--model.init_args.backbone", str(root / "tokenizer"), f"--model.init_args.feature_dim={DIM}"),
        *(f"--data.init_args.{name}={value}" for name, value in settings.items()),
    ]


def checked(root, kind=ImageTextDataModule, splits=("train", "val", "test"), checksums=False, scheme="", **options):
    defaults = {"root": f"{scheme}{root}", "tokenizer": str(root / "tokenizer"), "feature_dim": DIM}
    with Progress(disable=True) as progress:
        found = DataCheck(kind(**(defaults | options)), splits, checksums, progress)
        found.run()
    return found


def failures(found):
    return {finding.where: finding.what for finding in found.findings if finding.level == "failed"}


def of_annotations(found):
    """Findings about annotations; the first image of each tiny store has features of zeros, which is a warning."""
    return [finding for finding in found.findings if not finding.where.startswith("features ")]


def change(path, **fields):
    """Change the first record of a file."""
    records = json.loads(path.read_text())
    records[0] |= fields
    write_json(path, records)


# --- the command -------------------------------------------------------------------------------------------------


def test_a_whole_root_passes_and_every_split_is_shown_beside_the_literature(root, capsys):
    assert run(words(root)) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert ["vqa", "train", "7", "605,102", "7", "0", "0"] in [row[:7] for row in rows]
    assert ["caption", "test", "4", "5,000", "4", "0", "0"] in [row[:7] for row in rows]
    assert ["vqa", "train", "input", "20"] in [row[:4] for row in rows]
    assert "not measured here" in shown
    assert "ready: nothing failed" in shown


def test_a_config_of_clips_passes(video_root, capsys):
    assert run(words(video_root, "video_text", frames=FRAMES, tasks="[tvqa,how2qa,yc2c]")) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["tvqa", "train", "6", "122,039", "6", "0", "0"] in [row[:7] for row in rows]
    assert ["yc2c", "test", "2", "-", "2", "0", "0"] in [row[:7] for row in rows]


def test_all_that_is_wrong_is_said_before_it_fails(root, capsys):
    path = root / "vqa/karpathy_train.json"
    path.write_text(path.read_text()[:-20])
    (root / "nlvr/valid.json").unlink()
    (root / "nlvr/test.json").unlink()
    (root / "features/GQA/meta.json").unlink()
    change(root / "GQA/train.json", img_id="elsewhere")
    with pytest.raises(CheckFailed, match=r"5 checks of .* failed") as error:
        run(words(root))
    assert for_the_user(error.value) is error.value  # gives exit status 1 and one line without traceback
    shown = capsys.readouterr().out
    for what in (
        "karpathy_train.json is not valid JSON",
        "no annotation file nlvr/valid.json",
        "no annotation file nlvr/test.json",
        "meta.json is missing",
        "1 of 9 images have no features",
    ):
        assert what in shown
    assert shown.count("dataset_coco.json\n") == 1  # the expected tree is shown once for all missing files


def test_a_config_with_other_data_or_none_is_refused(root, tmp_path):
    other = ["--data=lightning.pytorch.demos.boring_classes.BoringDataModule"]
    overlay = tmp_path / "none.yaml"
    overlay.write_text("model: {class_path: vlpet_lightning.VLBart, init_args: {backbone: x}}")
    for given, named in ((other, "BoringDataModule"), ([], "a config without `data`")):
        with pytest.raises(ValueError, match=f"cannot check {named}"):
            run(["data", "check", "--config", str(overlay), *given])


@pytest.mark.parametrize(
    ("option", "said"), [("--splits=tain", "must be some of train, val, test"), ("--checksums=yes", "true or false")]
)
def test_an_option_that_makes_no_sense_is_refused(root, option, said, capsys):
    with pytest.raises(SystemExit) as error:
        run([*words(root), option])
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_only_the_wanted_splits_are_read(root):
    for name in ("vqa/karpathy_test.json", "nlvr/test.json"):
        (root / name).unlink()
    found = checked(root, splits=("train", "val"))
    assert not failures(found)
    assert {split for _, split in found.parts} == {"train", "val"}


def test_lengths_are_drawn_on_request(root, capsys):
    run([*words(root), f"--plot={root / 'lengths.png'}"])
    assert (root / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "lengths.png" in capsys.readouterr().out


# --- what it finds -----------------------------------------------------------------------------------------------


def test_images_without_features_are_counted_and_named(root):
    change(root / "vqa/karpathy_val.json", img_id="COCO_gone")
    found = checked(root)
    assert found.parts["vqa", "val"].featureless == 1
    assert failures(found).keys() == {"vqa val"}
    assert "1 of 4 images have no features" in failures(found)["vqa val"]
    assert "COCO_gone" in failures(found)["vqa val"]


def test_an_annotation_file_at_a_url_that_is_not_what_its_manifest_says_stops_nothing(root, tmp_path):
    record = {"path": "train.json", "shard": "annotations/GQA/train.json", "size": 1, "crc": 0}
    (root / "annotations").mkdir()
    (root / "GQA").rename(root / "annotations" / "GQA")
    with gzip.open(root / "manifest.json.gz", "wt") as file:
        json.dump({"root": "x", "files": [record]}, file)
    stream = Stream(cache=str(tmp_path / "cache"), attempts=1)
    found = checked(root, splits=("train", "val"), scheme="file://", stream=stream)
    assert failures(found).keys() == {"gqa train"}
    assert "train.json could not be read" in failures(found)["gqa train"]
    assert found.parts["vqa", "train"].samples == 7


def test_features_of_another_width_than_the_model_s_are_found_once_a_store(root):
    found = checked(root, feature_dim=DIM + 1)
    assert failures(found).keys() == {f"features {name}" for name in ("COCO", "VG", "GQA", "nlvr")}
    assert found.parts["vqa", "train"].featureless is None
    assert found.parts["vqa", "train"].samples == 7  # annotations are checked nevertheless


def test_a_shard_that_was_cut_short_is_found_by_size_and_a_changed_one_by_checksum(root):
    changed, cut = root / "features/VG/shard-00000.npy", root / "features/COCO/shard-00000.npy"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\x55")
    cut.write_bytes(cut.read_bytes()[:-1])
    assert failures(checked(root)).keys() == {"features COCO"}
    thorough = failures(checked(root, checksums=True))
    assert "instead of" in thorough["features COCO"]
    assert "was changed since it was written" in thorough["features VG"]


def test_a_damaged_index_is_one_failure(root):
    (root / "features/GQA/ids.npy").write_bytes(b"")
    assert failures(checked(root)).keys() == {"features GQA"}


def test_an_image_that_a_task_trains_on_and_another_evaluates_is_a_leak(root):
    change(root / "vqa/karpathy_train.json", img_id=coco(11))  # a test image of vqa and of captions
    found = checked(root)
    said = [finding.what for finding in found.findings if finding.level == "failed"]
    assert said == [f"1 of 4 images of {task} test are in vqa train, too: {coco(11)}" for task in ("vqa", "caption")]
    assert (found.parts["caption", "test"].shared, found.parts["caption", "val"].shared) == (1, 0)
    assert not failures(checked(root, tasks=["caption"]))  # alone, it does not train on this image


def test_gqa_is_tested_on_its_validation_by_design(root):
    found = checked(root, tasks=["gqa"])
    assert not failures(found)
    assert found.parts.keys() == {("gqa", "train"), ("gqa", "val")}
    assert [finding.where for finding in of_annotations(found)] == ["gqa test"]


def test_samples_without_an_answer_and_unknown_answers_are_counted(root):
    change(root / "vqa/karpathy_train.json", label={})
    records = [vqa_record(7 + i, coco(7 + i)) | {"label": {answer: 1.0}} for i, answer in enumerate(["red", "mauve"])]
    write_json(root / "vqa/karpathy_val.json", records)
    found = checked(root, tasks=["vqa"])
    train, val = found.parts["vqa", "train"], found.parts["vqa", "val"]
    assert train.answered == pytest.approx(6 / 7)
    assert (val.answered, val.known) == (1, 0.5)
    assert not failures(found)
    assert "1 of 7 samples have no answer of positive score and weigh nothing in training: 0" in {
        finding.what for finding in found.findings
    }


def test_the_best_answer_has_the_highest_score_and_comes_first_among_equals():
    scores = np.float32([0.3, 1.0, 1.0, 0.0, 0.5])
    assert best_answers(scores, np.array([0, 0, 3, 4, 5, 5])).tolist() == [-1, 1, -1, 4, -1]
    assert best_answers(np.empty(0), np.zeros(3, dtype=np.int64)).tolist() == [-1, -1]


def test_a_training_split_without_any_answer_fails(root):
    write_json(root / "vqa/karpathy_train.json", [vqa_record(0, coco(0)) | {"label": {"red": 0.0}}])
    assert "1 of 1 samples have no answer" in failures(checked(root, tasks=["vqa"]))["vqa train"]


def test_the_balance_of_labels_is_shown_and_its_lack_is_a_warning(root):
    found = checked(root, tasks=["nlvr2"])
    assert found.parts["nlvr2", "train"].frequent == ("false", pytest.approx(4 / 7))
    for record in (records := json.loads((root / "nlvr/valid.json").read_text())):
        record["label"] = 1
    write_json(root / "nlvr/valid.json", records)
    said = [(f.level, f.where, f.what) for f in of_annotations(checked(root, tasks=["nlvr2"]))]
    assert said == [("warning", "nlvr2 val", "every answer is 'true'")]


def wordless_caption(root):
    path = root / "COCO/dataset_coco.json"
    images = json.loads(path.read_text())["images"]
    images[7]["sentences"] = [{"raw": " \n"}]
    write_json(path, {"images": images})


def test_an_image_whose_captions_have_no_word_fails_before_the_metric_does(root):
    wordless_caption(root)
    said = failures(checked(root, tasks=["caption"]))
    assert said == {"caption val": f"1 samples have no reference with a word in it: {coco(7)}"}


def test_a_limit_is_kept_and_not_compared_with_the_literature(root):
    found = checked(root, tasks=["vqa"], limit_train=3)
    assert (found.parts["vqa", "train"].samples, found.parts["vqa", "train"].whole) == (3, False)
    assert found.parts["vqa", "val"].whole
    assert "only the first 3 samples" in found.findings[0].what


def test_weights_that_were_cut_short_are_found(root):
    (root / "tokenizer" / "model.safetensors").write_bytes(b"short")
    assert "model.safetensors is damaged or cut short" in failures(checked(root))["backbone"]


def test_a_damaged_tokenizer_is_named(root):
    (root / "tokenizer" / "tokenizer.json").write_text("{")
    assert "tokenizer.json is not valid JSON" in failures(checked(root))["tokenizer"]


def test_a_missing_tokenizer_leaves_only_the_lengths_out(root):
    found = checked(root, tokenizer=str(root / "nowhere"))
    assert failures(found).keys() == {"tokenizer"}
    assert found.lengths == []
    assert found.parts["vqa", "train"].samples == 7


# --- clips -------------------------------------------------------------------------------------------------------


def long_subtitles(root):
    lines = [{"vid_name": video(n), "sub": [{"text": "red circle " * (400 if n == 0 else 1)}]} for n in range(30)]
    write_lines(root / "video/ann/tv_subtitles.jsonl", lines)


def test_a_question_that_long_subtitles_cut_off_is_a_warning_with_its_cure(video_root):
    long_subtitles(video_root)
    found = checked(video_root, VideoTextDataModule, tasks=["tvqa"], frames=FRAMES)
    warned = [finding for finding in found.findings if finding.level == "warning"]
    assert [finding.where for finding in warned] == ["tvqa train"]
    assert "1 of 6 inputs lose their whole prompt and 1 all of their text" in warned[0].what
    assert "truncate: subtitles" in warned[0].what


def test_nothing_is_lost_where_subtitles_alone_are_cut(video_root):
    long_subtitles(video_root)
    found = checked(video_root, VideoTextDataModule, tasks=["tvqa"], frames=FRAMES, truncate="subtitles")
    assert [one.cut for one in found.lengths if one.split == "train"] == [1, 0]
    assert not [finding for finding in found.findings if finding.level == "warning"]


def test_a_clip_without_subtitles_in_their_file_fails(video_root):
    write_lines(video_root / "video/ann/yc2_subtitles.jsonl", [{"vid_name": video(0), "sub": []}])
    said = failures(checked(video_root, VideoTextDataModule, tasks=["yc2c"], frames=FRAMES))
    assert said.keys() == {"yc2c train", "yc2c val", "yc2c test"}
    assert "have no line in" in said["yc2c val"]


def test_a_clip_that_a_task_trains_on_and_another_evaluates_is_a_leak(video_root):
    found = checked(video_root, VideoTextDataModule, frames=FRAMES)  # so in this tiny world: clips are shared by number
    assert failures(found) == {"tvc val": f"2 of 3 clips of tvc val are in tvqa train, too: {video(4)}, {video(5)}"}
    assert found.parts["tvc", "val"].shared == 2


def test_answers_that_a_server_keeps_are_a_note_in_test_alone(video_root):
    found = checked(video_root, VideoTextDataModule, tasks=["how2qa"], frames=FRAMES)
    assert [(f.level, f.where, f.what) for f in found.findings] == [
        ("note", "how2qa test", "no answers: nothing is scored")
    ]


@with_value_files
def test_the_real_validation_files_have_the_published_counts(tmp_path):
    for task, store in (("how2qa", "how2"), ("yc2c", "yc2")):
        records = value_root(tmp_path, task, store)
        write_features(tmp_path / "features" / store, sorted({record["vid_name"] for record in records}))
    write_tokenizer(tmp_path / "tokenizer")
    found = checked(tmp_path, VideoTextDataModule, splits=("val",), tasks=["how2qa", "yc2c"])
    assert not failures(found)
    assert {part: one.samples for part, one in found.parts.items()} == {
        part: count for part, count in SAMPLES.items() if part in found.parts
    }


# --- what fit runs -----------------------------------------------------------------------------------------------


def test_fit_looks_at_the_size_of_every_file_before_it_starts(root):
    path = root / "features/nlvr/shard-00000.npy"
    path.write_bytes(path.read_bytes()[:-1])
    data = ImageTextDataModule(str(root), str(root / "tokenizer"))
    with pytest.raises(FeatureStoreError, match="instead of") as error:
        data.prepare_data()
    assert for_the_user(error.value) is error.value


def test_fit_warns_of_an_image_that_it_trains_on_and_evaluates(root):
    change(root / "vqa/karpathy_train.json", img_id=coco(8))
    data = ImageTextDataModule(str(root), str(root / "tokenizer"))
    with pytest.warns(UserWarning, match=f"1 of 4 images of caption val are in vqa train, too: {coco(8)}"):
        data.setup("fit")


def test_fit_of_a_sound_root_warns_of_nothing(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        data = ImageTextDataModule(str(root), str(root / "tokenizer"))
        data.setup("fit")
    assert {"train", "val"} <= data.datasets.keys()  # the values warned about above were checked


def test_fit_stops_at_captions_that_cannot_be_scored(root):
    wordless_caption(root)
    with pytest.raises(AnnotationError, match=f"1 samples of caption val have no reference with a word .*{coco(7)}"):
        ImageTextDataModule(str(root), str(root / "tokenizer")).setup("fit")


def test_human_answers_are_read_too(root):
    write_json(root / "vqa/v2_mscoco_val2014_annotations.json", {"annotations": [vqa_answers(7)]})
    write_json(root / "vqa/v2_mscoco_train2014_annotations.json", {"annotations": []})
    said = failures(checked(root, tasks=["vqa"]))
    assert "3 VQA questions have no human answers" in said["vqa val"]


# --- values ------------------------------------------------------------------------------------------------------


def overwrite(store, row, value):
    """Change a row of a store behind its checksums."""
    shard = np.load(store / "shard-00000.npy", mmap_mode="r+")
    shard[row] = value
    shard.flush()


def values(found, level):
    return [f.what for f in found.findings if (f.level, f.where) == (level, "features VG")]


def test_rows_that_are_not_finite_fail_and_rows_of_zeros_warn(root):
    overwrite(root / "features/VG", slice(0, 9), 1)
    overwrite(root / "features/VG", 3, np.nan)
    overwrite(root / "features/VG", 5, 0)
    found = checked(root, tasks=["gqa"])
    assert values(found, "failed") == ["1 of 9 rows are not finite: 3"]
    assert values(found, "warning") == ["1 of 9 rows are all zero: 5"]


def test_without_checksums_a_sample_of_rows_is_read(root, monkeypatch):
    monkeypatch.setattr("data_modules.check.check.SAMPLE", 3)
    overwrite(root / "features/VG", slice(0, 9), 1)
    overwrite(root / "features/VG", 8, np.inf)  # the sample is spread evenly: rows 0, 4 and 8
    overwrite(root / "features/VG", 7, np.inf)
    assert values(checked(root, tasks=["gqa"]), "failed") == ["1 of 3 sampled rows are not finite: 8"]
    named = values(checked(root, tasks=["gqa"], checksums=True), "failed")
    assert "2 of 9 rows are not finite: 7, 8" in named
