"""Published rows: recognised by the recipe, shown as comparable only where nothing stands against it."""

from __future__ import annotations

import copy
import json
import re
import statistics

import pytest
from rich.console import Console

from tests.published.recipes import FILE, NOT_HERE, all_recipes, config_of, configs_of
from vlpet_lightning.cli import module_from_config
from vlpet_lightning.commands.params import report_of
from vlpet_lightning.pet.serialization import placements_to_plain
from vlpet_lightning.protocol import ITEMS
from vlpet_lightning.published import initial_weights, objections, recipes, recognised, rows_of
from vlpet_lightning.published.rows import PAPER, ROWS, TABLE_9
from vlpet_lightning.published.table import main_scores, print_scores
from vlpet_lightning.run.protocol_log import _model
from vlpet_lightning.tasks import IMAGE_TEXT, TASKS, VIDEO_TEXT

COUNTS = {"vqa": 26_280, "gqa": 12_578, "nlvr2": 6_967, "caption": 5_000}


def test_the_recipes_are_those_of_the_shipped_experiments():
    assert json.loads(FILE.read_text()) == all_recipes(), "run python -m tests.published.recipes"
    assert recipes().keys() == {row.key for row in ROWS} - NOT_HERE


@pytest.mark.parametrize(
    "row", [row for row in ROWS if len(row.scores) == 4], ids=lambda row: f"{row.key}-{row.source}"
)
def test_an_average_is_that_of_its_scores(row):
    # the sources round scores and averages apart; Ladder Side-Tuning to one digit
    mean = statistics.mean(score for score, _ in row.scores.values())
    assert row.average[0] == pytest.approx(mean, abs=0.11)
    assert row.scores.keys() == set(VIDEO_TEXT if row.key.endswith("/video") else IMAGE_TEXT)


def test_the_headers_of_the_experiments_report_the_same_rows():
    for row in ROWS:
        if row.key in NOT_HERE or row.source not in (PAPER, TABLE_9):
            continue
        name = row.key.partition("/")[0]
        header = (FILE.parents[2] / "experiments" / "pet" / f"{name}.yaml").read_text().partition("model:")[0]
        for task, label in (("vqa", "VQA"), ("gqa", "GQA"), ("nlvr2", "NLVR2"), ("caption", "CIDEr")):
            mean, deviation = row.scores[task]
            assert f"{label} {mean:.2f} ({deviation:.2f})" in header, (row.key, task)
        assert f"average {row.average[0]:.2f} ({row.average[1]:.2f})" in header, row.key


@pytest.mark.parametrize(
    "key", ["vlpet_large/bart", "compacter_small/bart", "lora_t5/t5", "lst_t5/t5", "vl_adapter/video"]
)
def test_a_recipe_has_the_published_share_of_trained_parameters(key):
    (row,) = [row for row in ROWS if row.key == key and row.trained is not None]
    words = [word for path in configs_of(key) for word in ("--config", str(path))]
    module = module_from_config(words)
    assert report_of(words).percent == pytest.approx(row.trained, abs=0.006)
    recipe = {"placements": placements_to_plain(module.placements), "trainable": module.rules[::-1]}
    tasks = config_of(key)["data"]["init_args"]["tasks"]
    assert recognised(module.kind, recipe, tasks) == key
    assert recognised("t5" if module.kind == "bart" else "bart", recipe, tasks) is None


def test_a_method_is_recognised_by_every_setting_and_not_by_its_name():
    recipe = copy.deepcopy(recipes()["vlpet_large/bart"])
    apart = [{"at": [site], "unit": entry["unit"]} for entry in recipe["placements"] for site in entry["at"]]
    assert recognised("bart", recipe | {"placements": apart}, IMAGE_TEXT) == "vlpet_large/bart"
    assert recognised("bart", recipe, VIDEO_TEXT) == "vlpet_large/video"
    assert recognised("bart", recipe, ["vqa", "tvqa"]) is None
    assert recognised("bart", recipe | {"peft": {"class_path": "peft.LoraConfig"}}, IMAGE_TEXT) is None
    assert recognised("bart", recipe | {"trainable": ["pet", "visual_embedding"]}, IMAGE_TEXT) is None
    recipe["placements"][0]["unit"]["init_args"]["gate"]["init_args"]["rank"] = 95
    assert recognised("bart", recipe, IMAGE_TEXT) is None


def comparable():
    """Return the record of a run that repeats the row VL-PET-large on BART-base."""
    recipe = recipes()["vlpet_large/bart"]
    store = {"name": "COCO", "extractor": {"model": "RN101", "pretrained": "openai"}}
    items = dict.fromkeys(ITEMS) | {"prompts": recipe["prompts"], "selected": "last epoch"}
    return {
        "protocol": "original",
        "seed": 42,
        "tasks": list(IMAGE_TEXT),
        "items": items,
        "splits": {
            "test": {
                task: {"part": "whole", "samples": count, "published_samples": count, "store": store}
                for task, count in COUNTS.items()
            }
        },
        "backbone": {"name": "anywhere/bart", "sizes": recipe["backbone"]["sizes"]},
        "method": {"published": "vlpet_large/bart"},
        "training": copy.deepcopy(recipe["training"]),
    }


def changed(record, path, value):
    *above, last = path.split(".")
    place = record
    for name in above:
        place = place[name]
    place[last] = value
    return record


CHANGES = [
    ("protocol", "corrected", "protocol corrected"),
    ("splits.test.vqa.part", "first 9 samples", r"part of the split: first 9 samples \(vqa\)"),
    ("inputs", {"shuffle_features": True}, "features shuffled between images"),
    ("splits.test.vqa.samples", 500, "samples of the test split: vqa 500 instead of 26,280"),
    ("splits.test.gqa.store", {"name": "GQA", "extractor": {"model": "RN50"}}, "features of RN50, not of CLIP RN101"),
    ("splits.test.gqa.store", {"name": "GQA", "extractor": {}}, "features of unknown extractor"),
    ("splits.test", {}, "part of the split: unknown"),
    ("backbone.sizes", {"d_model": 32}, "backbone anywhere/bart is not of the sizes of facebook/bart-base"),
    ("training.lr", 0.01, "lr 0.01 instead of 0.001"),
    ("training.max_epochs", 2, "max_epochs 2 instead of 20"),
    ("training.limit_train", 100, "limit_train 100"),
    ("items.prompts", {"vqa": "question: "}, "prompt of vqa 'question: ' instead of 'vqa: '"),
    ("method.published", None, "no published row has this method"),
    ("method.published", "coeff_tuning_dora/bart", "no published row has this method"),
]


def test_a_run_that_repeats_a_row_is_comparable_and_only_on_the_test_split():
    assert objections(comparable(), "test") == []
    assert any("val split" in why for why in objections(comparable(), "val"))


@pytest.mark.parametrize(
    ("path", "value", "reason"), CHANGES, ids=[f"{path}-{n}" for n, (path, *_) in enumerate(CHANGES)]
)
def test_anything_else_is_named(path, value, reason):

    found = objections(changed(comparable(), path, value), "test")
    assert any(re.search(reason, why) for why in found), found
    assert len(found) == 1


def lst_run(**initial):
    """Return the record of a run of Ladder Side-Tuning, like :func:`comparable`, with these initial weights."""
    recipe = recipes()["lst_t5/t5"]
    placements = copy.deepcopy(recipe["placements"])
    placements[0]["unit"]["init_args"] |= initial
    method = recognised("t5", recipe | {"placements": placements}, IMAGE_TEXT)
    record = comparable() | {"training": copy.deepcopy(recipe["training"])}
    record["backbone"] = {"name": "anywhere/t5", "sizes": recipe["backbone"]["sizes"]}
    return record | {"method": {"published": method, "initial_weights": initial_weights(placements)}}


def test_initial_weights_of_any_importance_file_are_those_of_the_published_row():
    record = lst_run(start="pruned", importance="my/own.safetensors")
    assert [row.method for row in rows_of(record)] == ["LST"]
    assert objections(record, "test") == []


@pytest.mark.parametrize(
    ("initial", "words"),
    [
        ({"start": "pruned", "importance": None}, "pruned by magnitude"),
        ({"start": "fresh", "importance": None}, "fresh"),
        ({"start": "fresh", "importance": "unread.safetensors"}, "fresh"),
    ],
)
def test_other_initial_weights_than_the_published_are_recognised_and_not_comparable(initial, words):
    record = lst_run(**initial)
    assert record["method"]["published"] == "lst_t5/t5"
    assert objections(record, "test") == [f"initial weights at side {words} instead of pruned by measured importance"]


def test_a_record_without_initial_weights_says_that_they_are_unknown():
    record = lst_run()
    del record["method"]["initial_weights"]
    assert objections(record, "test") == ["initial weights at side unknown instead of pruned by measured importance"]


def test_the_record_of_a_run_holds_the_initial_weights(tiny_t5):
    words = [word for path in configs_of("lst_t5/t5") for word in ("--config", str(path))]
    module = module_from_config([*words, f"--model.backbone={tiny_t5}"])
    module.model = module.build()
    assert _model(module, list(IMAGE_TEXT))["method"]["initial_weights"] == {"side": "pruned by magnitude"}


def test_another_side_network_is_not_the_published_method():
    assert lst_run(reduction=8)["method"]["published"] is None


def printed(record, stage="test", scores=None):
    console = Console(width=220, record=True, force_terminal=False)
    scores = scores or {name: {spec.score: 50.0, "other": 1.0} for name, spec in TASKS.items() if name in IMAGE_TEXT}
    with console.capture() as capture:
        print_scores(console, record, scores, stage)
    return capture.get()


def rows_in(text):
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_the_table_has_the_published_scores_in_a_column_of_their_own():
    text = printed(comparable())
    assert rows_in(text) == [
        ["vqa", "test", "accuracy_original", "50.00", "percent", "66.17 (0.27)"],
        ["gqa", "test", "accuracy", "50.00", "percent", "55.11 (0.17)"],
        ["nlvr2", "test", "accuracy", "50.00", "percent", "73.43 (0.35)"],
        ["caption", "test", "cider", "50.00", "x 100", "122.03 (0.46)"],
        ["average", "", "", "50.00", "", "79.18 (0.14)"],
    ]
    assert "table 2, protocol original, mean (deviation) of 3 seeds" in text
    assert "published: VL-PET-large" in text
    assert "not comparable" not in text


def test_a_run_that_cannot_be_compared_says_so_in_the_column_and_below():
    text = printed(changed(comparable(), "training.lr", 0.5))
    assert "published: VL-PET-large (not comparable)" in text
    assert "not comparable: lr 0.5 instead of 0.001" in text


def test_the_average_of_some_tasks_has_no_published_average():
    some = {"vqa": {"accuracy_original": 10.0}, "gqa": {"accuracy": 20.0}}
    *_, average = rows_in(printed(comparable(), scores=some))
    assert average[3:] == ["15.00", "", ""]


def test_rows_of_which_only_the_average_is_known_have_no_scores():
    record = comparable() | {"method": {"published": "vl_adapter/video"}, "tasks": list(VIDEO_TEXT)}
    assert [row.method for row in rows_of(record)] == ["VL-Adapter (re-run)", "VL-Adapter"]
    scores = {name: {TASKS[name].score: 70.0} for name in VIDEO_TEXT}
    first, *_, average = rows_in(printed(record, scores=scores))
    assert first[5:] == ["", "76.6"]
    assert average[5:] == ["87.95", "87.4"]
    assert list(main_scores(scores)) == list(VIDEO_TEXT)


def test_a_method_of_ones_own_has_no_published_row():
    text = printed(changed(comparable(), "method.published", None))
    assert "no published row has this method and backbone" in text
    assert "published:" not in text
