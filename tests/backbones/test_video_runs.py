"""Clips as several images of a decoder-only model: extraction, batches and runs on the video-text tasks."""

from __future__ import annotations

import json
import math
import shutil
from fractions import Fraction

import numpy as np
import pytest
import yaml

from data_modules import FeatureStore, VideoTextDataModule
from data_modules.extraction.commands import extract_video
from data_modules.extraction.media import SpacedFrames
from data_modules.extraction.video_frames import frames_of_video
from tests.backbones.test_tower_runs import EXPERIMENTS, UNIT
from tests.backbones.tiny_vlm import save
from tests.data_modules.extraction.tiny_media import grey, number
from tests.data_modules.extraction.tiny_media import video as write_video
from tests.data_modules.tiny_video import VIDEOS, video, write_video_world
from vlpet_lightning import VLCausal
from vlpet_lightning.__main__ import run
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.cost import Step, cost_of
from vlpet_lightning.loggers import read_metrics
from vlpet_lightning.tasks import TASKS, VIDEO_TEXT

FRAMES = 3


def save_model(kind, folder):
    """Write a tiny model with a window long enough for subtitles."""
    save(kind, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def film(path, count):
    """Write a video of ``count`` grey frames, one each second."""
    return write_video(path, [1000 * n for n in range(count)], [grey(n) for n in range(count)])


@pytest.mark.parametrize(("count", "expected"), [(9, [1, 4, 7]), (3, [0, 1, 2]), (2, [0, 1, 1]), (1, [0, 0, 0])])
def test_frames_are_evenly_spaced(tmp_path, count, expected):
    path = film(tmp_path / "a.mp4", count)
    assert [number(one) for one in frames_of_video(path, Fraction(1))][:count] == list(range(count))
    media = SpacedFrames(1.0, FRAMES)
    found = [number(one) for one in media.pictures(path)]
    assert found == expected
    assert media.tokens(4) == 12
    assert media.row(np.arange(24).reshape(3, 4, 2)).tolist() == np.arange(24).reshape(12, 2).tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world of clips and their features for a tiny SmolVLM."""
    folder = tmp_path_factory.mktemp("world")
    write_video_world(folder)
    save_model("smolvlm", folder / "backbone")
    shutil.rmtree(folder / "features")
    for store in ("tv", "how2", "yc2"):
        for clip in range(VIDEOS):
            film(folder / "videos" / store / f"{video(clip)}.mp4", 1 + clip % 5)
        extract_video(
            source=folder / "videos" / store,
            out=folder / "features" / store,
            model=f"hf:{folder / 'backbone'}",
            seconds_per_frame=1.0,
            frames=FRAMES,
            device="cpu",
            workers=0,
        )
    return folder


def test_a_store_has_the_features_of_each_frame_and_says_so(world):
    store = FeatureStore(world / "features" / "tv")
    backbone = BACKBONES["smolvlm"]
    config = backbone.config(str(world / "backbone"))
    assert (store.tokens, store.dim) == (FRAMES * backbone.vectors(config), backbone.feature_dim(config))
    assert store.meta["extractor"]["clip_images"] == FRAMES
    assert not store.has_lengths
    one_frame = store.gather(store.rows([video(0)]))[0].reshape(FRAMES, -1)
    assert (one_frame == one_frame[0]).all()
    several = store.gather(store.rows([video(4)]))[0].reshape(FRAMES, -1)
    assert (several[0] != several[2]).any()


def test_a_batch_has_the_frames_as_images_and_no_mask(world):
    data = VideoTextDataModule(str(world), str(world / "backbone"), batch_size=2, mask_frames=True)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    store = FeatureStore(world / "features" / "tv")
    assert batch.features.shape == (len(batch), FRAMES, store.tokens // FRAMES, store.dim)
    stored = store.gather(store.rows([name for (name,) in batch.images]))
    assert np.array_equal(batch.features.flatten(1, 2).numpy(), stored)
    assert batch.feature_mask is None
    assert data.images_per_sample(data.tasks["tvqa"]) == FRAMES
    assert data.protocol_items()["mask_frames"] is None
    assert data.provenance("validate")["inputs"]["frames"] == FRAMES


def config_of(world, out, **changes):
    model = {
        "backbone": str(world / "backbone"),
        "placements": [{"at": ["decoder.attn.query"], "unit": UNIT}],
        "trainable": ["pet", "visual_embedding"],
        "feature_dim": None,
        "grid": None,
    }
    logger = {"save_dir": str(out), "name": "run", "version": "a"}
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    settings = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "precision": "32-true",
            "limit_train_batches": 4,
            "log_every_n_steps": 1,
            "logger": {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": logger},
            "callbacks": [checkpoint, {"class_path": "callbacks.VideoMetrics"}],
            "enable_progress_bar": False,
        },
        "model": {"class_path": "vlpet_lightning.VLCausal", "init_args": model | changes},
        "data": {"init_args": {"root": str(world), "batch_size": 2, "eval_batch_size": 4}},
    }
    out.mkdir()
    (out / "tiny.yaml").write_text(yaml.safe_dump(settings))
    shipped = ("video_text", "protocol/vlm_video")
    return [word for name in shipped for word in ("--config", str(EXPERIMENTS / f"{name}.yaml"))] + [
        "--config",
        str(out / "tiny.yaml"),
    ]


def test_all_video_tasks_are_trained_and_scored(world, tmp_path):
    assert run(["fit", *config_of(world, tmp_path / "out")]) == 0
    rows = read_metrics(tmp_path / "out" / "run" / "a")
    trained = {name for row in rows for name in row if name.endswith("/loss")}
    assert trained
    assert all(math.isfinite(row[name]) for row in rows for name in trained & row.keys())
    scored = {name.split("/")[1] for row in rows for name in row if name.startswith("val/")}
    assert scored >= set(VIDEO_TEXT)
    record = json.loads((tmp_path / "out" / "run" / "a" / "protocol.json").read_text())
    assert record["protocol"] == "vlm"
    assert record["items"]["prompts"] == {name: TASKS[name].instruction for name in VIDEO_TEXT}


def test_a_clip_that_does_not_fit_the_window_is_refused(world, tmp_path):
    config = json.loads((world / "backbone" / "config.json").read_text())
    short = shutil.copytree(world / "backbone", tmp_path / "short")
    config["text_config"]["max_position_embeddings"] = 620
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"a sample of tvqa may have \d+ tokens \(3 of images\), and .* at most 620"):
        run(["fit", *config_of(world, tmp_path / "out", backbone=str(short))])


def test_clips_have_no_pixels_on_the_fly(world, tmp_path):
    with pytest.raises(ValueError, match="image_input is pixels, which VideoTextDataModule does not read: set"):
        run(["fit", *config_of(world, tmp_path / "out", image_input="pixels")])


def test_the_cost_of_a_clip_is_that_of_eight_images(world):
    module = VLCausal(str(world / "backbone"), trainable=["visual_embedding"])
    clip, image = (cost_of(module, Step(name, samples=2, text=9, target=3)) for name in ("tvc", "vqa"))
    config = BACKBONES["smolvlm"].config(str(world / "backbone"))
    tokens = BACKBONES["smolvlm"].image_tokens(config)
    assert clip.tower_flops == 8 * image.tower_flops
    more = clip.template_tokens - image.template_tokens
    assert clip.encoder_tokens - image.encoder_tokens == 7 * tokens + more > 7 * tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "hf:", "features": "grid"}, "uses its own image processor: omit --features and --resize"),
        ({"model": "RN50", "tiling": [2, 2]}, r"--tiling is for models of Hugging Face \(--model hf:NAME\): omit it"),
        ({"model": "hf:", "frames": 0}, "frames must be positive, got 1.5 and 0"),
    ],
)
def test_settings_of_extraction_that_do_not_apply_are_refused(world, tmp_path, settings, message):
    settings = settings | {"model": settings["model"].replace("hf:", f"hf:{world / 'backbone'}")}
    with pytest.raises(ValueError, match=message):
        extract_video(source=world / "videos" / "tv", out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
