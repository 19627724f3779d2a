"""The rendered clips: VALUE's formats, disjoint splits, features of every frame, reproducible by seed."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from data_modules.annotations.image_text import read_split
from data_modules.store.frames import lengths_of
from data_modules.store.store import FeatureStore
from data_modules.world import synthetic_video as command
from data_modules.world.clips import FRAMES
from data_modules.world.synthetic import RECORD, STARTED
from data_modules.world.synthetic_video import synthetic_video
from data_modules.world.value import films, text_pairs
from vlpet_lightning.tasks import TASKS, VIDEO_TEXT

CLIPS = 200
SPLITS = ("train", "val", "test")
MODEL = str(Path(__file__).parents[3] / "experiments" / "clip" / "tiny_rn.json")


def make(out, seed=3, **options):
    synthetic_video(out, seed=seed, clips=CLIPS, model=MODEL, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(command, "TEXT_PAIRS", {"train": 40, "val": 8})
    out = tmp_path_factory.mktemp("world") / "w"
    make(out)
    yield out
    patch.undo()


@pytest.fixture(scope="module")
def clips():
    """Return the contents of every clip of the world."""
    return {film.id: film.clip for film in films(CLIPS, Random("3 clips"))}


@pytest.mark.parametrize("name", VIDEO_TEXT)
def test_every_split_is_read_has_features_and_shares_no_video(world, name):
    seen = set()
    for split in SPLITS:
        spec = TASKS[name]
        samples = read_split(world, spec, split)
        videos = {video for videos in samples.images for video in videos}
        store = FeatureStore(world / "features" / spec.splits[split].features)
        assert len(store.rows(sorted(videos))) == len(videos) >= 4
        assert not videos & seen
        seen |= videos
        assert split == "train" or all(samples.references)


def test_both_test_files_of_tvqa_have_questions(world):
    for name in TASKS["tvqa"].splits["test"].annotations:
        assert (world / name).read_text().count("\n") > 3


def test_answers_are_true_and_choices_differ(world, clips):
    lines = (world / "video/ann/tvqa/tvqa_train.jsonl").read_text().splitlines()
    asked = set()
    for record in map(json.loads, lines):
        clip, choices = clips[record["vid_name"]], [record[f"a{i}"] for i in range(5)]
        answer = choices[record["answer_idx"]]
        assert len(set(choices)) == 5
        words = record["q"].rstrip("?").split()
        asked.add(words[-1])
        if words[0] == "Who":
            assert clip.lines == (f"i am {answer}",)
        elif words[-1] == "object":
            assert answer == clip.shows[("first", "last").index(words[-2])].color
        else:
            assert answer == next(show.color for show in clip.shows if show.shape == words[-1])
    assert {"object", "speaking", "circle"} <= asked


def test_a_clip_has_a_vector_a_frame_and_zeros_behind_them(world, clips):
    for name in ("tv", "how2", "yc2"):
        store = FeatureStore(world / "features" / name)
        assert (store.tokens, store.dim) == (FRAMES, 512)
        features = torch.from_numpy(store.gather(store.rows(store.ids)))
        assert lengths_of(features).tolist() == [clips[id].frames for id in store.ids]


def test_a_clip_has_a_picture_of_its_frames(world, clips):
    found = list((world / "images").rglob("*.png"))
    assert {path.stem for path in found} == set(clips)
    assert Image.open(found[0]).size[0] == 256


def test_the_words_have_every_task_with_its_prompt_and_the_answer_of_its_question():
    pairs = text_pairs(40, Random(0))
    assert {pair["kind"] for pair in pairs} == set(VIDEO_TEXT)
    for pair in pairs:
        assert pair["source"].startswith("[Subs] ")
        question, _, seen = pair["source"].partition(TASKS[pair["kind"]].prompt)
        if pair["kind"] == "how2qa":
            answer = question.split(f"{pair['target']}: ")[1].split(".")[0]
            assert answer in seen


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_world_is_left_as_it_is_and_another_is_not_overwritten(world, capsys):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    make(world)
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"holds another world.*choose another --out"):
        make(world, seed=5)
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


@pytest.mark.slow
def test_a_world_that_was_cut_short_is_made_again_and_is_the_same(world, tmp_path):
    out = tmp_path / "w"
    shutil.copytree(world, out)
    (out / RECORD).rename(out / STARTED)  # as if killed before the end
    (out / "features/yc2/meta.json").unlink()
    (out / "video/ann/yc2_subtitles.jsonl").write_text("half a line")
    make(out)
    assert files_of(out) == files_of(world)


def test_too_few_clips_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="a world needs 200 clips or more"):
        synthetic_video(tmp_path / "w", clips=50, model=MODEL)
    assert not (tmp_path / "w").exists()
