"""The torchmetrics classes: collection, duplicates, and two ranks compared with one."""

import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
import torch.multiprocessing

from vlpet_lightning.metrics import CaptionScores, ExactMatch, NLVR2Accuracy, SampleMetric, VQAAccuracy

WORDS = ["dog", "a dog", "2", "two", "Red", "red", "t-shirt"]
NUMBER = 23


def metrics() -> list[SampleMetric]:
    return [VQAAccuracy(), ExactMatch(), NLVR2Accuracy(), CaptionScores(["cider", "bleu"])]


def samples(metric: SampleMetric) -> list[tuple[str, str, Any]]:
    if isinstance(metric, NLVR2Accuracy):
        return [
            (
                str(i),
                ("true", "false")[i % 2],
                {"label": ("true", "false")[i % 3 % 2], "identifier": f"dev-{i // 3}-{i % 3}-0"},
            )
            for i in range(NUMBER)
        ]
    if isinstance(metric, CaptionScores):
        return [(str(i), f"a {WORDS[i % 7]} runs", {"captions": [f"the {WORDS[i % 5]} runs"]}) for i in range(NUMBER)]
    return [
        (
            str(i),
            WORDS[i % 7],
            {"answers": [WORDS[(i + j) % 6] for j in range(10)], "label": {WORDS[i % 5]: 0.3 + i / 100}},
        )
        for i in range(NUMBER)
    ]


def fed(metric: SampleMetric, chosen: list[tuple[str, str, Any]]) -> SampleMetric:
    for start in range(0, len(chosen), 4):
        metric.update(*zip(*chosen[start : start + 4], strict=True))
    return metric


def on_one_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = []
    for metric in metrics():
        mine = samples(metric)[rank::2]
        padded = [*mine, samples(metric)[0]]  # as padded by a distributed sampler
        fed(metric, padded)
        results.append(metric.compute())
        assert len(metric.samples) == len(padded)  # each rank has only its own samples again
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_numbers_of_one_to_the_last_digit(tmp_path: Path) -> None:
    # forked: a spawned process would import everything again
    torch.multiprocessing.start_processes(on_one_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    alone = [fed(metric, samples(metric)).compute() for metric in metrics()]
    for rank in range(2):
        assert pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) == alone


@pytest.mark.parametrize("metric", metrics(), ids=lambda metric: type(metric).__name__)
def test_order_and_duplicates_do_not_show(metric: SampleMetric) -> None:
    expected = fed(metric, samples(metric)).compute()
    assert all(score > 0 for score in expected.values())
    again = fed(metric.clone(), samples(metric)[:5][::-1])
    assert again.compute() == expected
    metric.reset()
    assert fed(metric, samples(metric)[::-1]).compute() == expected


def test_which_of_two_predictions_counts_does_not_depend_on_the_order() -> None:
    pair = [("1", "left", {"label": {"left": 1.0}}), ("1", "right", {"label": {"left": 1.0}})]
    assert fed(ExactMatch(), pair).compute() == fed(ExactMatch(), pair[::-1]).compute()


def test_an_id_with_two_references_is_an_error() -> None:
    metric = fed(ExactMatch(), [("7", "a", {"label": {"a": 1.0}}), ("7", "a", {"label": {"b": 1.0}})])
    with pytest.raises(ValueError, match="id '7' stands for two samples"):
        metric.compute()


def test_lengths_that_differ_are_an_error_and_add_nothing() -> None:
    metric = ExactMatch()
    with pytest.raises(ValueError, match="got 2 ids, 1 predictions and 2 references"):
        metric.update(["1", "2"], ["a"], [{}, {}])
    assert metric.samples == []


def test_samples_survive_a_move_to_another_type_and_pickling() -> None:
    metric = fed(ExactMatch(), samples(ExactMatch()))
    expected = metric.compute()
    assert pickle.loads(pickle.dumps(metric.to("cpu").double())).compute() == expected


def test_forward_gives_the_batch_and_keeps_the_epoch() -> None:
    metric = ExactMatch()
    assert metric(["1"], ["a"], [{"label": {"a": 1.0}}]) == {"accuracy": 1.0}
    assert metric(["2"], ["b"], [{"label": {"a": 1.0}}]) == {"accuracy": 0.0}
    assert metric.compute() == {"accuracy": 0.5}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="ExactMatch has no sample"):
        ExactMatch().compute()


def test_scores_against_labels_without_an_answer_are_left_out():
    unlabelled = [{"answers": ["net"] * 10, "label": {}}] * 2
    with pytest.warns(UserWarning, match="soft_score left out: none of 2 samples"):
        scores = scored(VQAAccuracy(), ["1", "2"], ["net", "dog"], unlabelled)
    assert scores == {"accuracy": 0.5, "accuracy_original": 0.5}
    with pytest.warns(UserWarning, match="accuracy left out: none of 1 samples"):
        assert scored(ExactMatch(), ["1"], ["left"], [{"label": {}}]) == {}


def scored(metric, ids, predictions, references):
    metric.update(ids, predictions, references)
    return metric.compute()
