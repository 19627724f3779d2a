"""Images shared between parts of the data."""

from __future__ import annotations

import pytest

from data_modules.annotations.splits import leaks, val_is_test
from vlpet_lightning.tasks import TASKS


def found(**parts):
    """Return the leaks between parts given as ``task_split="image image"``."""
    images = {tuple(name.split("_")): set(ids.split()) for name, ids in parts.items()}
    return [("_".join(leak.one), "_".join(leak.other), leak.images) for leak in leaks(images)]


def test_a_training_image_in_any_task_s_evaluation_is_one():
    assert found(vqa_train="a b", vqa_val="b c", caption_test="a b", caption_train="d") == [
        ("vqa_train", "vqa_val", ["b"]),
        ("vqa_train", "caption_test", ["a", "b"]),
    ]


def test_tasks_may_train_on_the_same_images_and_evaluate_on_the_same():
    assert found(vqa_train="a", caption_train="a", vqa_val="b", caption_val="b", caption_test="c") == []


def test_a_task_s_test_image_in_its_validation_is_one_but_for_gqa():
    assert found(nlvr2_val="a", nlvr2_test="a") == [("nlvr2_val", "nlvr2_test", ["a"])]
    assert found(caption_val="a", caption_test="a") == [("caption_val", "caption_test", ["a"])]
    assert found(gqa_val="a", gqa_test="a") == []


def test_equal_names_in_stores_of_other_images_mean_nothing():
    assert found(gqa_train="1", vqa_val="1", nlvr2_val="1") == []
    assert found(gqa_train="1", gqa_val="1") == [("gqa_train", "gqa_val", ["1"])]  # two stores with the same numbers


def test_clips_are_called_clips():
    (leak,) = leaks({("tvqa", "train"): {"friends_1"}, ("tvc", "val"): {"friends_1", "x"}})
    assert str(leak) == "1 of 2 clips of tvc val are in tvqa train, too: friends_1"


@pytest.mark.parametrize("task", TASKS)
def test_only_gqa_is_tested_on_its_validation(task):
    assert val_is_test(TASKS[task]) == (task == "gqa")
