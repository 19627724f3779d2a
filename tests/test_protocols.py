"""The items of the protocols: each has a test that shows both behaviours, and a run records which it has."""

from __future__ import annotations

import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from data_modules import ImageTextDataModule, VideoTextDataModule
from data_modules.batches.sampling import Plan
from tests.data_modules.test_video_text import batch_of as clips_of
from tests.data_modules.test_video_text import data as clip_data
from tests.data_modules.tiny_data import DIM, write_tokenizer, write_world
from tests.data_modules.tiny_video import write_video_world
from tests.runs import Batches, make_batch, placements, quiet_trainer, tiny_module
from vlpet_lightning.__main__ import run
from vlpet_lightning.backbones import load_tokenizer
from vlpet_lightning.loggers import CSVLog, read_metrics, read_protocols
from vlpet_lightning.pet import SmallGate
from vlpet_lightning.prediction_files import read_predictions
from vlpet_lightning.protocol import (
    CUSTOM,
    ITEMS,
    OWN_TEMPLATE,
    UNKNOWN,
    departures,
    differences,
    digest,
    name_of,
    records_in,
    split_of,
    title_of,
)
from vlpet_lightning.run.protocol_log import ProtocolLog, selected
from vlpet_lightning.tasks import IMAGE_TEXT, TASKS, VIDEO_TEXT

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
IMAGE_ITEMS = "tests.data_modules.test_image_text"
VIDEO_ITEMS = "tests.data_modules.test_video_text"

# tests that show both behaviours of each item, of this file or of others
SHOWN_BY = {
    "prompts": ["test_the_prompt_of_gqa_has_the_typo_or_has_not", "test_the_protocol_of_a_decoder_only_model_is_vlm"],
    "template": ["test_the_protocol_of_a_decoder_only_model_is_vlm"],
    "mask_padding": ["test_padding_changes_an_output_or_does_not"],
    "mask_frames": [f"{VIDEO_ITEMS}.test_a_masked_frame_changes_nothing_and_an_attended_one_does"],
    "truncate": [
        f"{VIDEO_ITEMS}.test_the_original_cuts_an_input_at_its_end_and_loses_the_question",
        f"{VIDEO_ITEMS}.test_the_corrected_protocol_shortens_the_subtitles_alone",
    ],
    "answer_draw": [
        f"{IMAGE_ITEMS}.test_the_original_draw_is_the_same_in_every_epoch_and_run",
        f"{IMAGE_ITEMS}.test_a_seeded_draw_depends_on_seed_epoch_and_question_and_nothing_else",
    ],
    "seeded_order": ["tests.data_modules.batches.test_sampling.test_the_seed_matters_only_for_a_seeded_order"],
    "no_decay": ["test_norms_gates_and_prompts_are_decayed_or_spared"],
    "start": ["test_a_fresh_branch_counts_half_or_nothing"],
    "precision": ["test_the_layers_compute_in_float32_or_in_bfloat16"],
    "caption_items": ["test_a_description_has_itself_or_all_of_its_clip_as_reference"],
    "selected": ["test_the_last_epoch_and_the_best_are_kept_and_told_apart"],
}


def test_every_item_has_a_test_and_a_row_in_the_documentation():
    assert SHOWN_BY.keys() == ITEMS.keys()
    for name in (name for names in SHOWN_BY.values() for name in names):
        module, _, test = name.rpartition(".")
        assert callable(getattr(import_module(module or __name__), test)), name
    page = (ROOT / "docs" / "differences.md").read_text()
    table = page.partition("## Switches")[2].partition("\n## ")[0]
    titles = re.findall(r"^\| ([^|]+?) \|", table, flags=re.MULTILINE)[1:]
    assert sorted(titles) == sorted(item.title for item in ITEMS.values())


# the items -----------------------------------------------------------------------------------------------------------


def items_of(overlay):
    """Return the items that an overlay of ``experiments/protocol`` sets."""
    config = yaml.safe_load((EXPERIMENTS / "protocol" / f"{overlay}.yaml").read_text())
    given = {"trainer": config["trainer"], **{part: config[part]["init_args"] for part in ("model", "data")}}
    return {f"{part}.{name}": value for part, settings in given.items() for name, value in settings.items()}


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("protocol", ["original", "corrected"])
def test_the_overlays_set_the_items_to_the_values_by_which_a_protocol_is_recognised(protocol, video):
    given = items_of(f"{protocol}_video" if video else protocol)
    tasks = VIDEO_TEXT if video else IMAGE_TEXT
    only = {"mask_frames", "truncate", "caption_items"} if video else {"prompts", "answer_draw"}
    other = {"prompts", "answer_draw"} if video else {"mask_frames", "truncate", "caption_items"}
    by_setting = {item.setting: name for name, item in ITEMS.items() if item.setting}
    assert {by_setting[setting] for setting in given} == ITEMS.keys() - other - {"selected", "template"}
    items = dict.fromkeys(ITEMS) | {by_setting[setting]: value for setting, value in given.items()}
    items["no_decay"] = sorted(items["no_decay"])
    items["prompts"] = {name: (items["prompts"] or {}).get(name, TASKS[name].prompt) for name in tasks}
    assert name_of(items, tasks) == protocol
    assert only <= ITEMS.keys()
    for name in {*by_setting.values()} - {"template"}:
        changed = items | {name: UNKNOWN}
        assert name_of(changed, tasks) == CUSTOM
        assert departures(changed, tasks, protocol) == [f"{name}: unknown"]


def test_the_protocol_of_a_decoder_only_model_is_vlm():
    by_setting = {item.setting: name for name, item in ITEMS.items() if item.setting}
    items = dict.fromkeys(ITEMS) | {by_setting[setting]: value for setting, value in items_of("vlm").items()}
    items |= {"no_decay": sorted(items["no_decay"]), "mask_padding": False, "template": OWN_TEMPLATE}
    assert items["prompts"] == {name: TASKS[name].instruction for name in IMAGE_TEXT}
    assert name_of(items, IMAGE_TEXT) == name_of(items | {"precision": "32-true"}, IMAGE_TEXT) == "vlm"
    other = {"text": "{images}{text} Short answer:"}
    for change in ({"template": other}, {"start": "original"}, {"prompts": dict.fromkeys(IMAGE_TEXT, "")}):
        assert name_of(items | change, IMAGE_TEXT) == CUSTOM
        assert title_of({"protocol": CUSTOM, "items": items | change, "tasks": IMAGE_TEXT}).startswith(
            f"custom (vlm except {next(iter(change))}: "
        )
    assert name_of(items | {"template": None}, IMAGE_TEXT) == CUSTOM  # of an encoder-decoder


def test_a_run_without_any_prompt_has_no_typo():
    settings = {by: value for by, value in items_of("original").items() if by != "data.prompts"}
    items = {name: settings.get(item.setting) for name, item in ITEMS.items()}
    assert name_of(items | {"prompts": dict.fromkeys(IMAGE_TEXT, "")}, IMAGE_TEXT) == "original"
    assert name_of(items | {"prompts": {"vqa": "vqa: ", "gqa": ""}}, ["vqa", "gqa"]) == CUSTOM


def test_the_prompt_of_gqa_has_the_typo_or_has_not(tmp_path):
    write_world(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    said = {}
    for protocol in ("original", "corrected"):
        prompts = items_of(protocol)["data.prompts"]
        data = ImageTextDataModule(str(tmp_path), str(tmp_path / "tokenizer"), ["gqa"], prompts=prompts)
        data.setup("fit")
        batch = data.datasets["train"][Plan("gqa", torch.tensor([3]).numpy())]
        said[protocol] = load_tokenizer(data.tokenizer).decode(batch.input_ids[0], skip_special_tokens=True)
    assert said == {"original": "gpa: Where is 3?", "corrected": "gqa: Where is 3?"}


@pytest.mark.parametrize("protocol", ["original", "corrected"])
def test_padding_changes_an_output_or_does_not(tiny_backbone, protocol):
    hides = items_of(protocol)["model.mask_padding"]
    model = tiny_module(tiny_backbone, placements=placements(gate=SmallGate), mask_padding=hides).build().eval()
    batch = make_batch("vqa", 3, 0)  # its last sample is shorter
    batch.text_mask = batch.input_ids != 1
    assert not batch.text_mask[-1, 5:].any()
    shown = model.encode(batch)[-1, :5].clone()
    batch.input_ids[-1, 5:] = batch.input_ids[0, 5:]  # other tokens, still masked
    assert torch.allclose(model.encode(batch)[-1, :5], shown, atol=1e-6) is hides


@pytest.mark.parametrize("protocol", ["original", "corrected"])
def test_norms_gates_and_prompts_are_decayed_or_spared(tiny_backbone, tmp_path, protocol):
    trainer = quiet_trainer(tmp_path)
    module = tiny_module(tiny_backbone, no_decay=items_of(protocol)["model.no_decay"])
    trainer.fit(module, Batches([make_batch("vqa", 3, 0)]))
    names = {id(p): name for name, p in module.named_parameters()}
    decayed = {names[id(p)] for p in trainer.optimizers[0].param_groups[0]["params"]}
    spared = {name for name in names.values() if name not in decayed}
    special = {name for name in decayed | spared if "layer_norm" in name or ".gate." in name}
    weights = {name for name in special if "bias" not in name and module.get_parameter(name).requires_grad}
    assert len(weights) > 4
    assert weights <= (decayed if protocol == "original" else spared)


def test_a_fresh_branch_counts_half_or_nothing(tiny_backbone):
    ratios = {}
    for protocol in ("original", "corrected"):
        model = tiny_module(tiny_backbone, start=items_of(protocol)["model.start"]).build().eval()
        unit = next(place.unit for place in model.injected if place.site == "encoder.ffn")
        x, h = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
        ratios[protocol] = (unit(x, h) / h).median().item()
    assert ratios["corrected"] == 1.0
    assert ratios["original"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("protocol", ["original", "corrected"])
def test_the_layers_compute_in_float32_or_in_bfloat16(tiny_backbone, tmp_path, protocol):
    seen = set()

    class Watching(type(tiny_module(tiny_backbone))):
        def on_train_start(self):
            super().on_train_start()
            linear = next(m for m in self.built().lm.modules() if isinstance(m, nn.Linear))
            linear.register_forward_hook(lambda module, given, output: seen.add(output.dtype))

    module = tiny_module(tiny_backbone)
    module.__class__ = Watching
    quiet_trainer(tmp_path, precision=items_of(protocol)["trainer.precision"]).fit(
        module, Batches([make_batch("vqa", 3, 0)])
    )
    assert seen == {torch.float32 if protocol == "original" else torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_a_description_has_itself_or_all_of_its_clip_as_reference(tmp_path):
    write_video_world(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    found = {}
    for protocol in ("original", "corrected"):
        module = clip_data(tmp_path, caption_items=items_of(f"{protocol}_video")["data.caption_items"])
        found[protocol] = [r["captions"] for r in clips_of(module, "tvc", [0], "val").references]
    assert found == {"original": [["a small circle"]], "corrected": [["a small circle", "a red circle"]]}


# a run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_backbone):
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    shutil.copytree(tiny_backbone, root / "backbone")
    return root


def words_of(root, home, version="a", **trainer):
    """Return the arguments of ``fit``: the shipped config and its callbacks, on the tiny root."""
    shipped = yaml.safe_load((EXPERIMENTS / "image_text.yaml").read_text())["trainer"]["callbacks"]
    kept = [callback for callback in shipped if callback["class_path"].endswith(("Metrics", "Writer", "Checkpoint"))]
    for callback in kept:
        if callback["class_path"].endswith("CaptionMetrics"):
            callback["init_args"] = {"metrics": ["cider"]}
    logger = {"class_path": "vlpet_lightning.loggers.CSVLog", "init_args": {"save_dir": str(home), "name": "run"}}
    logger["init_args"]["version"] = version
    overlay = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "logger": logger, "enable_progress_bar": False} | trainer,
        "model": {"init_args": {"backbone": str(root / "backbone"), "feature_dim": DIM, "grid": 2}},
        "data": {"init_args": {"root": str(root), "batch_size": 3}},
    }
    overlay["trainer"] |= {"callbacks": kept, "log_every_n_steps": 1}
    file = home / f"{version}.yaml"
    file.write_text(yaml.safe_dump(overlay))
    return ["--config", str(EXPERIMENTS / "image_text.yaml"), "--config", str(file)]


@pytest.fixture(scope="module")
def home(root, tmp_path_factory):
    """Folder of two tested runs: ``a`` under the protocol ``original``, ``b`` with the seed 7 under ``corrected``."""
    home = tmp_path_factory.mktemp("runs")
    corrected = ["--config", str(EXPERIMENTS / "protocol" / "corrected.yaml"), "--seed_everything", "7"]
    for version, more in (("a", []), ("b", corrected)):
        words = [*words_of(root, home, version), *more]
        assert run(["fit", *words]) == 0
        assert run(["test", *words, "--ckpt_path", str(home / "run" / version / "checkpoints" / "last.ckpt")]) == 0
    return home / "run"


def test_the_last_checkpoint_has_the_steps_after_the_last_validation(root, tmp_path):
    settings = {"max_epochs": 1, "limit_train_batches": 5, "val_check_interval": 0.5, "limit_val_batches": 1}
    assert run(["fit", *words_of(root, tmp_path, **settings)]) == 0
    checkpoint = torch.load(tmp_path / "run/a/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5  # validations were after steps 2 and 4


def test_the_last_epoch_and_the_best_are_kept_and_told_apart(home):
    folder = home / "a" / "checkpoints"
    (best,) = folder.glob("best-*.ckpt")
    last = torch.load(folder / "last.ckpt", weights_only=True)
    assert last["epoch"] == 1  # also where an earlier epoch was the best
    of_best = torch.load(best, weights_only=True)
    assert best.name == f"best-{of_best['epoch']}.ckpt"
    assert selected(folder / "last.ckpt", IMAGE_TEXT, 2) == "last epoch"
    assert selected(best, VIDEO_TEXT, 2) == "best validation"
    both = of_best["epoch"] == last["epoch"]
    assert selected(folder / "last.ckpt", VIDEO_TEXT, 2) == ("best validation" if both else "last epoch")
    assert selected(folder / "last.ckpt", IMAGE_TEXT, 20) == ("best validation" if both else "epoch 2 of 20")
    item = ITEMS["selected"]
    assert item.fits("original", "last epoch", IMAGE_TEXT)
    assert not item.fits("original", "best validation", IMAGE_TEXT)
    assert item.fits("original", "best validation", VIDEO_TEXT)
    assert not item.fits("original", "last epoch", VIDEO_TEXT)


def test_the_record_of_a_run_says_what_its_numbers_depend_on(home, root):
    fit, test = (json.loads((home / "a" / f"{name}.json").read_text()) for name in ("protocol", "protocol_test"))
    assert (fit["protocol"], test["protocol"]) == ("original", "original")
    assert fit["tasks"] == list(IMAGE_TEXT)
    assert fit["splits"].keys() == {"train", "val"}
    assert test["splits"].keys() == {"test"}
    assert test["generation"]["caption"] == {"beams": 5, "max_length": 20}
    assert test["scale"] == {
        "vqa": "accuracy_original, percent",
        "gqa": "accuracy, percent",
        "nlvr2": "accuracy, percent",
        "caption": "cider, x 100",
    }
    assert test["seed"] == 42
    assert {"vlpet_lightning", "torch", "transformers", "lightning"} <= test["versions"].keys()
    assert test["checkpoint"] == "last.ckpt"
    assert test["trained"]["digest"] == fit["digest"]
    part = test["splits"]["test"]["gqa"]
    assert (part["part"], part["samples"], part["published_samples"]) == ("whole", 4, 12_578)
    assert part["annotations"].keys() == {"GQA/testdev.json"}
    assert len(part["annotations"]["GQA/testdev.json"]) == len(part["store"]["checksum"]) == 64
    assert "vqa/v2_mscoco_val2014_annotations.json" in test["splits"]["test"]["vqa"]["annotations"]
    assert test["method"]["published"] == "vlpet_large/bart"
    assert digest(test) == test["digest"]


def test_every_row_prediction_and_export_names_the_record(home, tmp_path):
    known = records_in(home / "a")
    fit, test = (json.loads((home / "a" / f"{name}.json").read_text()) for name in ("protocol", "protocol_test"))
    assert known.keys() == {fit["digest"], test["digest"]}
    header, *lines = (home / "a" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("protocol")
    assert {line.split(",")[column] for line in lines} == known.keys()
    assert set(read_protocols(home / "a", "val").values()) == {fit["digest"]}
    assert read_protocols(home / "a", "test") == dict.fromkeys(IMAGE_TEXT, test["digest"])
    assert all(isinstance(value, float) for row in read_metrics(home / "a") for value in row.values())
    for task in IMAGE_TEXT:
        assert read_predictions(home / "a" / "predictions" / f"test_{task}.json").protocol == test
    last = str(home / "a" / "checkpoints" / "last.ckpt")
    assert run(["export", "--ckpt_path", last, "--out", str(tmp_path / "export")]) == 0
    written = json.loads((tmp_path / "export" / "pet_config.json").read_text())["protocol"]
    assert (written["record"], written["test_record"]) == (fit, test)
    assert written["precision"] == "32-true"
    card = (tmp_path / "export" / "README.md").read_text()
    assert "## Protocol of the training" in card
    assert f"| record | {test['digest']} |" in card


def test_a_report_names_every_item_in_which_runs_differ(home, tmp_path, capsys):
    words = ["--runs", f"[{home / 'a'},{home / 'b'}]", "--out", str(tmp_path), "--names", "[one,other]"]
    assert run(["report", *words]) == 0
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["protocols"]["other"]["protocol"] == "corrected"
    assert content["differences"].keys() == {
        "protocol",
        "seed",
        "training.data_seed",
        "items.mask_padding",
        "items.start",
        "items.no_decay",
        "items.precision",
        "items.prompts.gqa",
        "items.answer_draw",
        "items.seeded_order",
    }
    assert content["differences"]["items.precision"] == {"one": "32-true", "other": "bf16-mixed"}
    assert content["published"]["one"]["rows"][0]["average"] == [79.18, 0.14]
    assert any("backbone" in why for why in content["published"]["one"]["not_comparable"])
    page, printed = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    assert "| items.precision | 32-true | bf16-mixed |" in page
    assert "| caption | test | cider | x 100 |" in page
    table, _, published = page.partition("## Published results")
    assert "| published: VL-PET-large <sup>" in table
    assert "measured - published" not in table  # of another size
    assert "79.18 (0.14)" in published
    assert "not comparable: protocol corrected" in published
    assert f"These runs differ in {len(content['differences'])} items" in " ".join(printed.split())


def test_the_end_of_a_run_prints_its_scores_beside_the_published_row(home, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    last = str(home / "a" / "checkpoints" / "last.ckpt")
    words = [*words_of(root, tmp_path), "--ckpt_path", last, "--data.init_args.limit_eval=2"]
    capsys.readouterr()
    assert run(["test", *words]) == 0
    printed = capsys.readouterr().out
    assert "test scores, protocol original, seed 42" in printed
    (row,) = [line for line in printed.splitlines() if "accuracy_original" in line and "│ vqa" in line]
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells[:3] == ["vqa", "test, first 2 samples", "accuracy_original"]
    assert cells[4:] == ["percent", "66.17 (0.27)"]
    assert "published: VL-PET-large (not comparable)" in printed
    assert "part of the split: first 2 samples (vqa, gqa, nlvr2, caption)" in " ".join(printed.split())


def record_after(root, home, *more):
    """Return the record of a validation with other settings."""
    assert run(["validate", *words_of(root, home), *more]) == 0
    return json.loads((home / "run" / "a" / "protocol_validate.json").read_text())


@pytest.mark.filterwarnings("ignore:no --ckpt_path:UserWarning")
def test_a_changed_annotation_a_part_and_shuffled_features_show(root, tmp_path):
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "out").mkdir()
    before = record_after(tmp_path / "copy", tmp_path / "out")
    file = tmp_path / "copy" / "GQA" / "testdev.json"
    file.write_text(file.read_text().replace("Where", "Whose"))  # of the same size
    after = record_after(tmp_path / "copy", tmp_path / "out")
    name = "splits.val.gqa.annotations.GQA/testdev.json"
    assert differences({"before": before, "after": after}).keys() == {name}
    # the record that was replaced is kept under its digest
    assert records_in(tmp_path / "out" / "run" / "a").keys() == {before["digest"], after["digest"]}
    part = record_after(tmp_path / "copy", tmp_path / "out", "--trainer.limit_val_batches=2")
    assert part["splits"]["val"]["vqa"]["part"] == "limit_val_batches 2"
    blind = record_after(tmp_path / "copy", tmp_path / "out", "--data.init_args.shuffle_features=true")
    assert differences({"after": after, "blind": blind}).keys() == {"inputs.shuffle_features"}
    assert split_of(blind, "val", "vqa") == "val, features shuffled between images"


def test_a_test_in_another_precision_than_the_training_is_of_no_protocol(home, root, tmp_path):
    last = str(home / "a" / "checkpoints" / "last.ckpt")
    words = [*words_of(root, tmp_path), "--ckpt_path", last, "--trainer.precision=bf16-mixed"]
    assert run(["test", *words, "--trainer.limit_test_batches=1", "--data.init_args.answer_draw=seeded"]) == 0
    record = json.loads((tmp_path / "run" / "a" / "protocol_test.json").read_text())
    assert record["protocol"] == CUSTOM
    assert record["items"]["precision"] == "32-true in training, bf16-mixed here"
    assert record["items"]["answer_draw"] == "original"  # of the training, whatever the test is told


def test_a_run_without_a_record_is_unknown_and_not_the_same(home):
    records = {"old": None, **records_in(home / "a")}
    assert differences(records)["record"]["old"] == UNKNOWN


def test_any_data_module_is_allowed_and_what_it_does_not_say_is_unknown(tiny_backbone, tmp_path):
    log = CSVLog(tmp_path, name="run", version="a")
    trainer = quiet_trainer(tmp_path, logger=log, log_every_n_steps=1, callbacks=[ProtocolLog()])
    trainer.fit(tiny_module(tiny_backbone), Batches([make_batch("vqa", 3, 0)]))
    record = json.loads((tmp_path / "run" / "a" / "protocol.json").read_text())
    assert record["protocol"] == CUSTOM
    assert record["items"]["seeded_order"] == UNKNOWN
    assert record["splits"] == {}
    assert record["items"]["start"] == "original"

    class Wrong(Batches):
        def provenance(self, stage):
            return ["vqa"]

    with pytest.raises(TypeError, match=r"Wrong.provenance must return a mapping, got list"):
        quiet_trainer(tmp_path, callbacks=[ProtocolLog()]).fit(tiny_module(tiny_backbone), Wrong([]))


def test_a_run_that_resumes_an_older_log_adds_the_column(tiny_backbone, tmp_path):
    folder = tmp_path / "run" / "a"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,val/vqa/accuracy\r\n3,50.0\r\n")
    log = CSVLog(tmp_path, name="run", version="a")
    trainer = quiet_trainer(tmp_path, logger=log, log_every_n_steps=1, callbacks=[ProtocolLog()])
    trainer.fit(tiny_module(tiny_backbone), Batches([make_batch("vqa", 3, 0)]))
    first, *rest = read_metrics(folder)
    assert first == {"step": 3, "val/vqa/accuracy": 50.0}
    assert any("train/vqa/loss" in row for row in rest)
    assert read_protocols(folder, "val") == {}  # older than any record
    assert read_protocols(folder, "train").keys() == {"vqa"}


def test_on_two_ranks_one_writes_the_record_and_none_waits(tiny_backbone, tmp_path):
    settings = {"devices": 2, "strategy": "ddp_fork", "callbacks": [ProtocolLog()]}
    quiet_trainer(tmp_path, logger=CSVLog(tmp_path, name="run", version="a"), **settings).fit(
        tiny_module(tiny_backbone), Batches([make_batch("vqa", 4, 0)])
    )
    assert [path.name for path in (tmp_path / "run" / "a").glob("protocol*")] == ["protocol.json"]


def test_clips_have_the_items_of_videos(tmp_path):
    write_video_world(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    module = VideoTextDataModule(str(tmp_path), clip_data(tmp_path).tokenizer, mask_frames=True, truncate="subtitles")
    items = module.protocol_items()
    assert (items["mask_frames"], items["truncate"], items["caption_items"]) == (True, "subtitles", "description")
    assert items["answer_draw"] is None
