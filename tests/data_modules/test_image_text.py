import numpy as np
import pytest
import torch

from data_modules.batches.answers import AnswerDraw
from data_modules.batches.dataset import derangement
from data_modules.batches.prompts import distinct_inputs, input_texts
from data_modules.batches.sampling import Plan
from data_modules.image_text import ImageTextDataModule
from data_modules.store.store import MissingFeatures
from tests.data_modules.tiny_data import (
    DIM,
    TOKENS,
    coco,
    vqa_record,
    write_features,
    write_json,
    write_tokenizer,
    write_world,
)
from vlpet_lightning.backbones import load_tokenizer
from vlpet_lightning.batch import IGNORED


@pytest.fixture
def root(tmp_path):
    write_world(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def data(root, stage="fit", **options):
    module = ImageTextDataModule(
        **({"root": str(root), "tokenizer": str(root / "tokenizer"), "batch_size": 3} | options)
    )
    module.setup(stage)
    return module


def batch_of(module, task, rows, split="train", **options):
    return module.datasets[split][Plan(task, np.asarray(rows), **options)]


def decode(module, ids):
    return load_tokenizer(module.tokenizer).decode([int(i) for i in ids if i >= 0])


@pytest.mark.parametrize(
    ("task", "text", "target"),
    [
        ("gqa", "<s>gpa: Where is 3?</s>", "<s>right</s>"),
        ("nlvr2", "<s>nlvr: There are 3 things in the two images.</s>", "<s>true</s>"),
        ("caption", "<s>caption: </s>", "<s>A blue thing.</s>"),
    ],
)
def test_a_batch_holds_prompt_and_text_and_target(root, task, text, target):
    module = data(root)
    batch = batch_of(module, task, [3, 0])
    assert decode(module, batch.input_ids[0][batch.text_mask[0]]) == text
    assert decode(module, batch.labels[0]) == target
    assert batch.labels.dtype == batch.input_ids.dtype == torch.int64
    assert batch.weights.tolist() == [1, 1]


def test_features_are_those_of_the_sample_and_stay_half_precision(root):
    module = data(root)
    vqa, nlvr2 = batch_of(module, "vqa", [5, 2]), batch_of(module, "nlvr2", [3, 0])
    assert vqa.features.shape == (2, TOKENS, DIM)
    assert vqa.features.dtype == torch.float16
    assert vqa.features[:, 0, 0].tolist() == [5, 2]
    assert nlvr2.features.shape == (2, 2, TOKENS, DIM)
    assert nlvr2.features[:, :, 0, 0].tolist() == [[6, 7], [0, 1]]
    assert vqa.images == [(coco(5),), (coco(2),)]


def test_texts_and_targets_are_cut_at_the_task_s_length(root):
    long = vqa_record(0, coco(0)) | {"sent": "thing " * 50, "label": {"red blue green " * 20: 1}}
    write_json(root / "vqa/karpathy_train.json", [long])
    batch = batch_of(data(root, tasks=["vqa"]), "vqa", [0])
    assert batch.input_ids.shape == (1, 20)
    assert batch.labels.shape == (1, 10)
    assert batch.labels[0, -1] == 2  # truncated before </s>, not after


def test_padding_is_the_tokenizer_s_and_ignored(root):
    records = [vqa_record(0, coco(0)) | {"label": {"red": 1}}, vqa_record(1, coco(1)) | {"sent": "thing " * 6}]
    write_json(root / "vqa/karpathy_train.json", [records[0], records[1] | {"label": {"red green": 1}}])
    batch = batch_of(data(root, tasks=["vqa"]), "vqa", [0, 1])
    assert (batch.input_ids[~batch.text_mask] == 1).all()
    assert batch.text_mask.sum() < batch.text_mask.numel()
    assert (batch.labels == IGNORED).sum() == (batch.labels[1] != IGNORED).sum() - (batch.labels[0] != IGNORED).sum()


def test_a_vqa_sample_weighs_as_much_as_its_drawn_answer(root):
    module = data(root, answer_draw="seeded")
    seen = set()
    for epoch in range(30):
        batch = batch_of(module, "vqa", [0], epoch=epoch)
        seen.add((decode(module, batch.labels[0]), round(float(batch.weights[0]), 2)))
    assert seen == {("<s>red</s>", 1.0), ("<s>green</s>", 0.3)}


@pytest.mark.parametrize("label", [{}, {"red": 0.0}])
def test_a_vqa_question_without_a_scored_answer_learns_nothing(root, label):
    write_json(root / "vqa/karpathy_train.json", [vqa_record(0, coco(0)) | {"label": label}, vqa_record(1, coco(1))])
    module = data(root, tasks=["vqa"])
    batch = batch_of(module, "vqa", [0, 1])
    assert batch.weights[0] == 0
    assert batch.weights[1] > 0
    assert decode(module, batch.labels[0]) == "<s></s>"


def test_a_filler_has_no_labels_and_no_weight(root):
    batch = batch_of(data(root), "caption", [0], filler=True)
    assert (batch.labels == IGNORED).all()
    assert batch.weights.tolist() == [0]


def test_evaluation_batches_have_references_and_no_labels(root):
    module = data(root, "test")
    batches = list(module.test_dataloader())
    assert [batch.task for batch in batches[:2]] == ["vqa", "gqa"]
    assert all(batch.labels is None and len(batch.references) == len(batch.ids) == len(batch) for batch in batches)


def test_a_stage_reads_only_its_own_files(root):
    for path in root.glob("*/*train*.json"):
        path.unlink()
    write_json(root / "vqa/karpathy_val.json", [])
    assert set(data(root, "test").datasets) == {"test"}


@pytest.mark.parametrize("task", ["vqa", "gqa", "nlvr2", "caption"])
def test_inputs_without_repetitions_are_all_inputs_in_order(root, task):
    data_of_task = data(root).datasets["train"].tasks[task]
    inputs = distinct_inputs(data_of_task.task, data_of_task.samples, "prompt: ")
    assert inputs == list(input_texts(data_of_task.task, data_of_task.samples, "prompt: "))
    assert len(inputs.values) == len(set(inputs))


def test_prompts_can_be_changed(root):
    module = data(root, prompts={"gqa": "gqa: "})
    assert decode(module, batch_of(module, "gqa", [0]).input_ids[0]).startswith("<s>gqa: ")


def test_batch_sizes_follow_the_shares_unless_given(root):
    module = data(root, batch_size=3, batch_sizes={"caption": 7})
    sampler = module.train_dataloader().sampler
    assert sampler.batch_sizes == {"vqa": 3, "gqa": 5, "nlvr2": 1, "caption": 7}


def test_limits_take_the_first_samples(root):
    module = data(root, limit_train=3, limit_eval=2)
    assert {len(task) for task in module.datasets["train"].tasks.values()} == {3}
    assert {len(task) for task in module.datasets["val"].tasks.values()} == {2}


def test_a_blind_control_sees_another_image_every_time(root):
    module, blind = data(root), data(root, shuffle_features=True)
    for task in ("vqa", "gqa", "nlvr2", "caption"):
        rows = range(7)
        real, other = batch_of(module, task, rows).features, batch_of(blind, task, rows).features
        assert (real.flatten(0, -3)[:, 0, 0] != other.flatten(0, -3)[:, 0, 0]).all()
        assert torch.equal(other, batch_of(data(root, shuffle_features=True), task, rows).features)


def test_a_derangement_moves_everything_once():
    moved = derangement(50, seed=0)
    assert sorted(moved.tolist()) == list(range(50))
    assert (moved != np.arange(50)).all()
    with pytest.raises(ValueError, match="the store has 1"):
        derangement(1, seed=0)


def draw_of(scores, by_epoch=True, seed=0, copies=4000):
    offsets = np.arange(copies + 1) * len(scores)
    ids = [f"question {i}" for i in range(copies)]
    return AnswerDraw(ids, np.tile(np.float32(scores), copies), offsets, seed=seed, by_epoch=by_epoch)


def test_answers_are_drawn_in_proportion_to_their_scores():
    answers, scores = draw_of([1.0, 0.0, 0.6, 0.4])(np.arange(4000), epoch=0)
    shares = np.bincount(answers % 4, minlength=4) / 4000
    assert shares == pytest.approx([0.5, 0.0, 0.3, 0.2], abs=0.03)  # four standard errors
    assert set(np.round(scores, 1).tolist()) == {1.0, np.float32(0.6).round(1), np.float32(0.4).round(1)}


def test_a_seeded_draw_depends_on_seed_epoch_and_question_and_nothing_else():
    rows, draw = np.arange(100), draw_of([0.5, 0.5])
    answers = draw(rows, 3)[0]
    assert np.array_equal(draw(rows[::-1], 3)[0][::-1], answers)
    assert np.array_equal(draw_of([0.5, 0.5])(rows, 3)[0], answers)
    assert not np.array_equal(draw(rows, 4)[0], answers)
    assert not np.array_equal(draw_of([0.5, 0.5], seed=1)(rows, 3)[0], answers)
    assert 20 < (answers % 2).sum() < 80


def test_the_original_draw_is_the_same_in_every_epoch_and_run():
    rows = np.arange(100)
    first = draw_of([0.5, 0.5], by_epoch=False)(rows, 0)[0]
    assert np.array_equal(draw_of([0.5, 0.5], by_epoch=False, seed=9)(rows, 5)[0], first)


def test_a_draw_stays_within_its_sample_where_samples_have_no_answers():
    draw = AnswerDraw(["a", "b", "c", "d"], np.float32([0.2, 0.8]), np.array([0, 0, 2, 2, 2]))
    answers, scores = draw(np.arange(4), 0)
    assert answers[[0, 2, 3]].tolist() == [-1, -1, -1]
    assert answers[1] in (0, 1)
    assert scores[[0, 2, 3]].tolist() == [0, 0, 0]


def test_worker_processes_give_the_same_batches(root):
    alone, workers = data(root).train_dataloader(), data(root, num_workers=1).train_dataloader()
    for first, second in zip(alone, workers, strict=True):
        assert first.ids == second.ids
        assert torch.equal(first.labels, second.labels)


def test_images_without_features_are_named_and_counted(root):
    write_features(root / "other/COCO", [coco(i) for i in range(5)])
    (root / "features/COCO").rename(root / "aside")
    (root / "other/COCO").rename(root / "features/COCO")
    with pytest.raises(MissingFeatures) as error:
        data(root, tasks=["vqa"])
    assert error.value.missing == [coco(5), coco(6)]


def test_features_of_another_width_name_both_widths_and_the_cure(root):
    with pytest.raises(ValueError, match=f"{DIM} wide, the model expects 2048: set the model's feature_dim to {DIM}"):
        data(root, feature_dim=2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["vqa", "ggqa"]}, "unknown task 'ggqa': choose from caption, gqa, nlvr2, vqa"),
        ({"tasks": []}, "tasks must be one or more different names"),
        ({"tasks": ["vqa", "vqa"]}, "tasks must be one or more different names"),
        ({"prompts": {"gpa": "x"}}, "unknown task 'gpa'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_sizes": {"vqa": 0}}, "batch_sizes.vqa must be at least 1, got 0"),
        ({"limit_train": -1}, "limit_train must be at least 1, got -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(root, options, message):
    with pytest.raises(ValueError, match=message):
        ImageTextDataModule(**({"root": str(root), "tokenizer": "none"} | options))


def test_length_buckets_put_questions_of_similar_length_together(root):
    records = [vqa_record(i, coco(i % 7)) | {"sent": "thing " * (1 + i * 5 % 8)} for i in range(8)]
    write_json(root / "vqa/karpathy_train.json", records)

    def padding(**options):
        module = data(root, tasks=["vqa"], batch_size=2, seeded_order=True, **options)
        return sum(int((~batch.text_mask).sum()) for batch in module.train_dataloader())

    assert padding(length_buckets=4) == 4  # four batches of neighbours in length
    assert padding() > 4


def test_evaluation_by_length_has_the_same_samples_with_less_padding(root):
    def samples(batches):
        return sorted(
            (batch.task, id, text) for batch in batches for id, text in zip(batch.ids, batch.texts, strict=True)
        )

    records = [vqa_record(i, coco(i)) | {"sent": "thing " * (1 + i * 5 % 7)} for i in range(7, 11)]
    write_json(root / "vqa/karpathy_val.json", records)
    plain, sorted_ = (
        list(data(root, eval_batch_size=2, eval_by_length=by_length).val_dataloader()) for by_length in (False, True)
    )
    assert samples(plain) == samples(sorted_)
    assert [len(batch) for batch in plain] == [len(batch) for batch in sorted_]
    padded = [sum(int((~batch.text_mask).sum()) for batch in batches) for batches in (plain, sorted_)]
    assert padded[1] < padded[0]
