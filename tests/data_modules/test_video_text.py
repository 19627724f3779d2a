"""TVQA, How2QA, TVC and YC2C: batches from the benchmark's files, padding and pooling of frames, truncation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data_modules.annotations.image_text import AnnotationError, read_split
from data_modules.batches.prompts import input_texts
from data_modules.batches.sampling import Plan
from data_modules.store.frames import fit_frames, lengths_of
from data_modules.video_text import VideoTextDataModule
from tests.data_modules.tiny_data import write_tokenizer
from tests.data_modules.tiny_video import DIM, FRAMES, NAMES, clip, question, video, write_lines, write_video_world
from tests.runs import make_batch, tiny_module
from vlpet_lightning.__main__ import run
from vlpet_lightning.backbones import load_tokenizer
from vlpet_lightning.commands.params import report_of
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.tasks import TASKS, VIDEO_TEXT

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
VALUE = Path(__file__).parents[3] / "shared" / "value"
with_value_files = pytest.mark.skipif(not VALUE.is_dir(), reason="the benchmark's files are not at ../shared/value")


@pytest.fixture
def root(tmp_path):
    write_video_world(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def data(root, stage="fit", **options):
    defaults = {"root": str(root), "tokenizer": str(root / "tokenizer"), "batch_size": 3, "frames": FRAMES}
    module = VideoTextDataModule(**(defaults | options))
    module.setup(stage)
    return module


def batch_of(module, task, rows, split="train"):
    return module.datasets[split][Plan(task, np.asarray(rows))]


def texts(module, batch):
    tokenizer = load_tokenizer(module.tokenizer)
    return [tokenizer.decode(ids[mask]) for ids, mask in zip(batch.input_ids, batch.text_mask, strict=True)]


CHOICES = "[Choices] a0: red. a1: green. a2: blue. a3: big."


@pytest.mark.parametrize(
    ("task", "text", "target"),
    [
        (
            "tvqa",
            f"[Subs] the red circle is there [Q] which color is 1? [TS] (1.5-3.0) {CHOICES} a4: small. tvqa: ",
            "a1",
        ),
        ("how2qa", f"[Subs] the red circle is there [Q] which color is 1? [TS] (1.5-3.0) {CHOICES} how2qa: ", "a1"),
        ("tvc", "[Subs] the red circle is there [TS] ([1.5, 4.0]) tvc: ", "a green circle"),
        ("yc2c", "[Subs] the red circle is there yc2c: ", "a green circle"),
    ],
)
def test_the_prompt_is_at_the_end_behind_subtitles_and_question(root, task, text, target):
    module = data(root)
    batch = batch_of(module, task, [2 if task == "tvc" else 1])
    assert texts(module, batch) == [f"<s>{text}</s>"]
    assert load_tokenizer(module.tokenizer).decode(batch.labels[0]) == f"<s>{target}</s>"
    assert batch.images == [(video(1),)]


def test_a_clip_without_speech_keeps_the_empty_place_of_its_subtitles(root):
    module = data(root)
    assert texts(module, batch_of(module, "yc2c", [0])) == ["<s>[Subs]  yc2c: </s>"]


def test_every_split_has_its_own_file_and_tvqas_test_split_two(root):
    sizes = {
        (task, split): len(read_split(root, TASKS[task], split)) for task in VIDEO_TEXT for split in ("val", "test")
    }
    assert sizes["tvqa", "test"] == sum(NAMES["tvqa"][name] for name in ("test_public", "test_release"))
    assert sizes["tvc", "val"] == 2 * NAMES["tvc"]["val_release"]  # one item per description
    assert sizes["yc2c", "val"] == NAMES["yc2c"]["val_release"]


def test_a_batch_of_each_task_is_the_whole_batch_size(root):
    assert data(root).sizes_of_batches == dict.fromkeys(VIDEO_TEXT, 3)
    assert {spec.batch_size(50) for spec in map(TASKS.get, VIDEO_TEXT)} == {50}


def test_questions_have_their_choice_as_reference_and_descriptions_themselves(root):
    module = data(root)
    assert batch_of(module, "how2qa", [0], "val").references == [{"label": "a2", "choices": 4}]
    assert batch_of(module, "tvc", [0, 1], "val").references == [
        {"captions": ["a small circle"], "clip_id": "504"},
        {"captions": ["a red circle"], "clip_id": "504"},
    ]


def test_a_clip_can_be_one_item_with_all_its_descriptions(root):
    module = data(root, caption_items="clip")
    batch = batch_of(module, "tvc", [0], "val")
    assert batch.ids == ["504"]
    assert batch.references == [{"captions": ["a small circle", "a red circle"], "clip_id": "504"}]
    assert len(module.datasets["train"].tasks["tvc"]) == 2 * NAMES["tvc"]["train_release"]


def test_a_test_split_whose_answers_a_server_keeps_has_no_references(root):
    module = data(root, "test")
    batches = list(module.test_dataloader())
    assert [batch.task for batch in batches] == list(VIDEO_TEXT)
    assert all(batch.references == [] and batch.labels is None for batch in batches)
    assert batches[2].ids == ["507", "508"]


def test_a_training_question_without_its_answer_is_named(root):
    write_lines(root / "video/ann/how2qa/how2qa_train_release.jsonl", [question("how2qa", 1, answered=False)])
    with pytest.raises(AnnotationError, match=r"train_release\.jsonl, record 0: the field 'answer_idx' is missing"):
        data(root)


def test_a_choice_there_is_not_is_named(root):
    wrong = question("how2qa", 1, answered=True) | {"answer_idx": 4}
    write_lines(root / "video/ann/how2qa/how2qa_val_release.jsonl", [wrong])
    with pytest.raises(AnnotationError, match="record 0: answer_idx must be one of 0 to 3, got 4"):
        data(root)


def test_a_line_that_was_cut_short_is_named(root):
    path = root / "video/ann/tvc/tvc_val_release.jsonl"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(AnnotationError, match=r"tvc_val_release\.jsonl, line 3 is not valid JSON"):
        data(root)


def test_videos_without_a_line_of_subtitles_are_counted_and_named(root):
    write_lines(root / "video/ann/yc2_subtitles.jsonl", [{"vid_name": video(1), "sub": []}])
    with pytest.raises(AnnotationError, match=r"3 of 4 videos have no line in .*yc2_subtitles\.jsonl: clip_00"):
        data(root)


def test_a_missing_file_is_named_with_the_tree_and_the_command(root):
    (root / "video/ann/how2_subtitles.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"how2_subtitles\.jsonl") as error:
        data(root).prepare_data()
    assert "yc2c_train_release.jsonl" in str(error.value)
    assert "data synthetic-video" in str(error.value)


def test_tasks_about_images_are_refused(root):
    with pytest.raises(ValueError, match="unknown task 'vqa': choose from how2qa, tvc, tvqa, yc2c"):
        data(root, tasks=["vqa"])


# --- frames ------------------------------------------------------------------------------------------------------


def test_zero_frames_are_attended_to_unless_they_are_masked(root):
    original, corrected = (batch_of(data(root, mask_frames=mask), "yc2c", [0, 1, 3]) for mask in (False, True))
    assert original.feature_mask is None
    assert corrected.feature_mask.sum(dim=1).tolist() == [1, 2, 4]
    assert torch.equal(original.features, corrected.features)
    assert torch.equal(corrected.features[:, :, 0] != 0, corrected.feature_mask)


def test_short_clips_get_zeros_and_a_mask(root):
    batch = batch_of(data(root, frames=6, mask_frames=True), "yc2c", [3, 0])
    assert batch.features[:, :, 0].tolist() == [[4, 4, 4, 4, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.feature_mask.sum(dim=1).tolist() == [4, 1]


def resized(clip, length):
    """Pool or pad as ``resize`` of src/video/tvqa_data.py."""
    if len(clip) < length:
        return torch.cat([clip, torch.zeros(length - len(clip), clip.shape[1])])
    return torch.nn.functional.adaptive_max_pool1d(clip.T[None], length)[0].T


@pytest.mark.parametrize("frames", [3, 5, 7])
def test_clips_are_padded_or_pooled_one_by_one_as_in_the_original(frames):
    lengths = torch.tensor([1, 3, 4, 6, 7])
    features = torch.randn(5, 7, 2) * (torch.arange(7) < lengths[:, None])[..., None]
    fitted, mask = fit_frames(features, lengths, frames)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(fitted[row], resized(features[row, :length], frames))
        assert mask[row].sum() == min(length, frames)


def test_half_precision_frames_are_pooled_without_a_loss():
    features = torch.randn(2, 9, 3).half()
    fitted, _ = fit_frames(features, torch.tensor([9, 9]), 4)
    assert fitted.dtype == torch.float16
    assert torch.equal(fitted[0], resized(features[0].float(), 4).half())


def test_only_the_zeros_at_the_end_are_padding():
    features = torch.ones(3, 4, 2)
    features[0, 1] = features[1, 2:] = features[2] = 0
    assert lengths_of(features).tolist() == [4, 2, 0]


def test_a_masked_frame_changes_nothing_and_an_attended_one_does(tiny_backbone):
    module = tiny_module(tiny_backbone, grid=None, mask_padding=True)
    module.configure_model()
    model = module.model.eval()
    batch = make_batch("yc2c", 3, seed=0)
    batch.feature_mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    loss, texts = model.loss(batch), model.encode(batch)[:, :7]
    batch.features[~batch.feature_mask] = 9.0
    assert torch.equal(model.loss(batch), loss)
    batch.feature_mask = None
    assert not torch.equal(model.loss(batch), loss)
    assert (model.encode(batch)[:2, :7] - texts[:2]).abs().max() > 1e-3


def test_a_mask_over_features_that_the_model_pools_is_refused(tiny_backbone):
    module = tiny_module(tiny_backbone, grid=1)
    module.configure_model()
    batch = make_batch("yc2c", 2, seed=0)
    batch.feature_mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"a mask over \(2, 4\) image tokens where the model makes \(2, 1\)"):
        module.model.loss(batch)


# --- long subtitles ----------------------------------------------------------------------------------------------


@pytest.fixture
def talkative(root):
    words = [f"thing{number}, what?" for number in range(400)]
    lines = [{"vid_name": video(n), "sub": [{"text": text} for text in words]} for n in range(30)]
    for store in ("tv", "how2", "yc2"):
        write_lines(root / f"video/ann/{store}_subtitles.jsonl", lines)
    return root


def test_the_original_cuts_an_input_at_its_end_and_loses_the_question(talkative):
    module = data(talkative)
    (text,) = texts(module, batch_of(module, "how2qa", [0]))
    assert "thing1, what?" in text
    assert "[Q]" not in text
    assert "how2qa:" not in text


@pytest.mark.parametrize("task", VIDEO_TEXT)
def test_the_corrected_protocol_shortens_the_subtitles_alone(talkative, task):
    module = data(talkative, truncate="subtitles")
    samples = module.datasets["train"].tasks[task].samples
    batch = batch_of(module, task, [0])
    (text,) = texts(module, batch)
    full = next(input_texts(TASKS[task], samples, TASKS[task].prompt))
    rest = full.rpartition(samples.subtitles[video(0)])[2]
    assert text.endswith(f"{rest}</s>")
    assert 590 < batch.input_ids.shape[1] <= 600
    kept = text.removeprefix("<s>[Subs] ").removesuffix(f"{rest}</s>")
    assert full.startswith(f"[Subs] {kept} ")  # whole words


def test_short_inputs_are_the_same_under_both_ways_to_cut(root):
    end, subtitles = data(root), data(root, truncate="subtitles")
    for task in VIDEO_TEXT:
        assert torch.equal(batch_of(end, task, [0, 1, 2]).input_ids, batch_of(subtitles, task, [0, 1, 2]).input_ids)


def test_a_question_that_is_too_long_by_itself_loses_its_subtitles(talkative):
    long = question("how2qa", 0, answered=True) | {"q": "what " * 700}
    write_lines(talkative / "video/ann/how2qa/how2qa_train_release.jsonl", [long])
    module = data(talkative, truncate="subtitles", tasks=["how2qa"])
    (text,) = texts(module, batch_of(module, "how2qa", [0]))
    assert text.startswith("<s>[Subs]  [Q] what what")


# --- the benchmark's own files -----------------------------------------------------------------------------------


def value_root(folder, task, store):
    """Build a data root around a real validation file, without its subtitles and features."""
    path = folder / f"video/ann/{task}/{task}_val_release.jsonl"
    path.parent.mkdir(parents=True)
    shutil.copyfile(VALUE / path.name, path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    names = sorted({record["vid_name"] for record in records})
    write_lines(folder / f"video/ann/{store}_subtitles.jsonl", [{"vid_name": name, "sub": []} for name in names])
    return records


@with_value_files
def test_the_real_how2qa_validation_file_is_read(tmp_path):
    records = value_root(tmp_path, "how2qa", "how2")
    samples = read_split(tmp_path, TASKS["how2qa"], "val")
    assert len(samples) == len(records) == 3115
    assert samples.ids[0] == "30351"
    assert samples.texts[0] == (
        "[Q] What website is shown during this video? [TS] (36.58-58.52) [Choices] a0: Www.lyndalepl.com. "
        "a1: Www.plants.com. a2: Www.lyndaleplants.com. a3: Www.lyndale.com."
    )
    assert samples.references[0] == {"label": "a2", "choices": 4}
    answers = [f"a{record['answer_idx']}" for record in records]
    assert [reference["label"] for reference in samples.references] == answers


@with_value_files
def test_the_real_yc2c_validation_file_is_read(tmp_path):
    records = value_root(tmp_path, "yc2c", "yc2")
    samples, clips = (read_split(tmp_path, TASKS["yc2c"], "val", by_clip=by_clip) for by_clip in (False, True))
    assert len(samples) == len(clips) == len(records) == 3492
    assert (samples.ids[0], clips.ids[0], samples.images[0]) == ("10337", "13447", ("ljyO7IaGWLY_10",))
    assert (
        samples.references[0]["captions"] == clips.references[0]["captions"] == ["layer marinara sauce and pierogies"]
    )


# --- the command line --------------------------------------------------------------------------------------------


def test_the_shipped_experiment_trains_what_the_paper_says():
    report = report_of(["--config", str(EXPERIMENTS / "video_text.yaml")])
    assert (report.trainable, report.total) == (4_872_768, 144_426_816)


@pytest.fixture
def words(root, tiny_backbone, tmp_path):
    """Return the arguments of ``fit`` on the tiny root: the shipped config with a small overlay."""
    shipped = yaml.safe_load((EXPERIMENTS / "video_text.yaml").read_text())
    logger = {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": {"save_dir": str(tmp_path), "name": "run"}}
    logger["init_args"]["version"] = "a"
    callbacks = [c for c in shipped["trainer"]["callbacks"] if "ProgressBar" not in c["class_path"]]
    overlay = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": logger, "enable_progress_bar": False},
        "model": {"init_args": {"backbone": str(tiny_backbone), "feature_dim": DIM}},
        "data": {"init_args": {"root": str(root), "batch_size": 3, "eval_batch_size": 8, "frames": FRAMES}},
    }
    overlay["trainer"] |= {"callbacks": callbacks, "log_every_n_steps": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    return ["--config", str(EXPERIMENTS / "video_text.yaml"), "--config", str(tmp_path / "tiny.yaml")]


def test_the_shipped_experiment_fits_and_predicts_on_a_tiny_root(words, tmp_path):
    assert run(["fit", *words]) == 0
    folder = tmp_path / "run" / "a"
    rows = read_metrics(folder)
    val = {name: row[name] for row in rows for name in row if name.startswith("val/")}
    mains = ("tvqa/accuracy", "how2qa/accuracy", "tvc/cider", "yc2c/cider")
    assert val["val/average"] == pytest.approx(sum(val[f"val/{name}"] for name in mains) / 4)
    assert {f"train/{task}/loss" for task in VIDEO_TEXT} <= set().union(*rows)
    assert {"last.ckpt", "best-0.ckpt"} <= {path.name for path in (folder / "checkpoints").iterdir()}
    assert run(["predict", *words, "--ckpt_path", str(folder / "checkpoints" / "best-0.ckpt")]) == 0
    written = (folder / "predictions" / "predict_tvc_submission.jsonl").read_text().splitlines()
    assert [json.loads(line)["clip_id"] for line in written] == [507, 508]
    choices = json.loads((folder / "predictions" / "predict_tvqa_submission.json").read_text())
    assert set(choices) == {
        str(record["qid"]) for record in (question("tvqa", n, answered=False) for n in range(10, 14))
    }


@pytest.mark.parametrize("protocol", ["original_video", "corrected_video"])
def test_overlays_of_the_protocols_fit(words, protocol):
    overlay = ["--config", str(EXPERIMENTS / "protocol" / f"{protocol}.yaml")]
    quick = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.callbacks=[]"]
    assert run(["fit", *words, *overlay, *quick, "--trainer.enable_checkpointing=false"]) == 0


def test_a_clip_of_the_helper_has_the_real_fields():
    assert clip("tvc", 1, described=True)["descs"][0].keys() == {"desc", "desc_id", "type"}
