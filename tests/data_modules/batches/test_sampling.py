import random

import numpy as np
import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from data_modules.batches.length_buckets import LengthBuckets, longest, sort_key
from data_modules.batches.sampling import EvalSampler, TaskMixSampler

SIZES = {"vqa": 23, "gqa": 41, "nlvr2": 5}
BATCH = {"vqa": 4, "gqa": 6, "nlvr2": 2}


def sampler(**changes) -> TaskMixSampler:
    return TaskMixSampler(SIZES, BATCH, **changes)


def plain(plans) -> list:
    return [(plan.task, plan.rows.tolist(), plan.epoch, plan.filler) for plan in plans]


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_the_original_order_is_that_of_distributed_samplers_and_a_shuffled_task_list(epoch):
    tasks, batches = [], {}
    for task, size in SIZES.items():
        reference = DistributedSampler(range(size), num_replicas=1, rank=0)
        reference.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(range(size), batch_size=BATCH[task], sampler=reference)
        batches[task] = iter([batch.tolist() for batch in loader])
        tasks += [task] * len(loader)
    random.Random(epoch).shuffle(tasks)
    expected = []
    while tasks:
        task = tasks.pop()
        expected.append((task, next(batches[task]), epoch, False))
    ours = sampler(seed=3)
    ours.set_epoch(epoch)
    assert plain(ours) == expected
    assert len(ours) == len(expected)


def test_the_seed_matters_only_for_a_seeded_order():
    assert plain(sampler(seed=1)) == plain(sampler(seed=2))
    assert plain(sampler(seed=1, seeded_order=True)) != plain(sampler(seed=2, seeded_order=True))
    first, second = sampler(seed=1, seeded_order=True), sampler(seed=1, seeded_order=True)
    assert plain(first) == plain(second)


def test_an_epoch_has_every_row_once_and_epochs_differ():
    ours = sampler()
    for task, size in SIZES.items():
        rows = np.concatenate([plan.rows for plan in ours if plan.task == task])
        assert sorted(rows.tolist()) == list(range(size))
    first = plain(ours)
    ours.set_epoch(1)
    assert plain(ours) != first


@pytest.mark.parametrize("stop", [0, 1, 9, len(sampler())])
def test_a_sampler_goes_on_where_another_stopped(stop):
    whole = sampler()
    whole.set_epoch(2)
    plans = iter(whole)
    seen = [next(plans) for _ in range(stop)]
    resumed = sampler()
    resumed.load_state_dict(whole.state_dict() if stop else {"epoch": 2, "batches": 0})
    assert plain(seen) + plain(resumed) == plain(sampler_at(2))
    resumed.set_epoch(3)
    assert plain(resumed) == plain(sampler_at(3))


def sampler_at(epoch: int) -> TaskMixSampler:
    ours = sampler()
    ours.set_epoch(epoch)
    return ours


def test_a_loaded_position_does_not_hold_for_another_epoch():
    ours = sampler()
    ours.load_state_dict({"epoch": 1, "batches": 5})
    ours.set_epoch(2)
    assert plain(ours) == plain(sampler_at(2))


def test_a_position_beyond_the_epoch_is_refused():
    with pytest.raises(ValueError, match="after batch 99: an epoch of these data has"):
        sampler().load_state_dict({"epoch": 0, "batches": 99})


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_each_batch_and_draw_the_same_task(world_size):
    ranks = [list(sampler(rank=rank, world_size=world_size)) for rank in range(world_size)]
    for whole, *shares in zip(sampler(), *ranks, strict=True):
        assert {share.task for share in shares} == {whole.task}
        real = [row for share in shares if not share.filler for row in share.rows.tolist()]
        assert sorted(real) == sorted(whole.rows.tolist())
        assert all(len(share.rows) == 1 for share in shares if share.filler)
    # the last batches of NLVR2 and GQA have 1 and 5 rows
    assert any(share.filler for rank in ranks for share in rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_has_every_row_once_over_all_ranks(world_size):
    samplers = [EvalSampler(SIZES, BATCH, rank, world_size) for rank in range(world_size)]
    plans = [plan for one in samplers for plan in one]
    assert [len(list(one)) for one in samplers] == [len(one) for one in samplers]
    for task, size in SIZES.items():
        rows = [row for plan in plans if plan.task == task for row in plan.rows.tolist()]
        assert sorted(rows) == list(range(size))
        assert all(len(plan.rows) <= BATCH[plan.task] for plan in plans)


@pytest.mark.parametrize("world_size", [2, 3, 7, 40])
def test_evaluation_has_the_same_batches_on_any_number_of_ranks(world_size):
    alone = plain(EvalSampler(SIZES, BATCH))
    ranks = [plain(EvalSampler(SIZES, BATCH, rank, world_size)) for rank in range(world_size)]
    assert len(alone) < 40
    # a rank without a batch repeats the first
    assert ranks == [alone[rank::world_size] or alone[:1] for rank in range(world_size)]


def test_evaluation_keeps_the_order_of_the_files():
    plans = list(EvalSampler(SIZES, BATCH))
    assert [row for plan in plans if plan.task == "vqa" for row in plan.rows] == list(range(23))
    assert list(dict.fromkeys(plan.task for plan in plans)) == list(SIZES)


def test_an_empty_task_is_refused():
    with pytest.raises(ValueError, match="'vqa' has 0 samples and batch size 4"):
        TaskMixSampler({"vqa": 0}, {"vqa": 4})


def test_lightning_would_not_wrap_the_samplers():
    assert isinstance(sampler(), DistributedSampler)
    assert isinstance(EvalSampler(SIZES, BATCH), DistributedSampler)


LENGTHS = {task: np.random.default_rng(0).integers(4, 21, size) for task, size in SIZES.items()}


def bucketed(count: int = 3, **changes) -> TaskMixSampler:
    buckets = {task: LengthBuckets(lengths, count) for task, lengths in LENGTHS.items()}
    return sampler(buckets=buckets, **changes)


def padding(plans) -> float:
    lengths = [LENGTHS[plan.task][plan.rows] for plan in plans]
    return 1 - sum(found.sum() for found in lengths) / sum(len(found) * found.max() for found in lengths)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_length_buckets_have_every_row_once_and_the_same_tasks(count):
    ours = bucketed(count)
    for epoch in (0, 1):
        ours.set_epoch(epoch)
        plans = list(ours)
        assert [plan.task for plan in plans] == [plan.task for plan in sampler_at(epoch)]
        assert [len(plan.rows) for plan in plans] == [len(plan.rows) for plan in sampler_at(epoch)]
        for task, size in SIZES.items():
            assert sorted(row for plan in plans if plan.task == task for row in plan.rows) == list(range(size))


def test_length_buckets_have_less_padding():
    assert padding(bucketed(100)) < padding(bucketed(3)) < padding(sampler())


def test_batches_of_a_mega_batch_are_in_random_order_of_length():
    size, count = 4000, 50
    lengths = np.random.default_rng(1).integers(4, 21, size)
    order = LengthBuckets(lengths, count).arranged(np.random.default_rng(2).permutation(size), 10, seed=0)
    means = lengths[order].reshape(-1, 10).mean(axis=1)
    assert means.std() > 4  # a random batch has a mean near 12, with a deviation of 1.5
    for start in range(0, len(means), count):
        assert (
            abs(np.corrcoef(np.arange(count), means[start : start + count])[0, 1]) < 0.5
        )  # four standard errors: 0.57
    assert means[:count].mean() == pytest.approx(means[-count:].mean(), abs=1)  # no curriculum over the epoch


def test_the_incomplete_batch_stays_last_and_unsorted():
    lengths, order = np.arange(23), np.random.default_rng(0).permutation(23)
    arranged = LengthBuckets(lengths, 100).arranged(order, 4, seed=0)
    assert arranged[20:].tolist() == order[20:].tolist()


def test_length_buckets_depend_on_seed_and_epoch():
    plans = [plain(bucketed(seed=seed, seeded_order=True)) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    later = bucketed(seed=1, seeded_order=True)
    later.set_epoch(1)
    assert plain(later) != plans[0]


@pytest.mark.parametrize("stop", [1, 9, len(sampler()) - 1])
def test_a_sampler_with_length_buckets_resumes(stop):
    resumed = bucketed()
    resumed.load_state_dict({"epoch": 0, "batches": stop})
    assert plain(resumed) == plain(bucketed())[stop:]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_length_buckets(world_size):
    ranks = [list(bucketed(rank=rank, world_size=world_size)) for rank in range(world_size)]
    for whole, *shares in zip(bucketed(), *ranks, strict=True):
        real = [row for share in shares if not share.filler for row in share.rows.tolist()]
        assert sorted(real) == sorted(whole.rows.tolist())


def test_evaluation_by_length_starts_with_the_longest_and_has_every_row_once():
    plans = list(EvalSampler(SIZES, BATCH, lengths=LENGTHS))
    for task, size in SIZES.items():
        rows = np.concatenate([plan.rows for plan in plans if plan.task == task])
        assert sorted(rows.tolist()) == list(range(size))
        assert (np.diff(LENGTHS[task][rows]) <= 0).all()
    assert padding(plans) < padding(EvalSampler(SIZES, BATCH))


@pytest.mark.parametrize("world_size", [2, 3, 40])
def test_evaluation_by_length_has_the_same_batches_on_any_number_of_ranks(world_size):
    alone = plain(EvalSampler(SIZES, BATCH, lengths=LENGTHS))
    ranks = [plain(EvalSampler(SIZES, BATCH, rank, world_size, lengths=LENGTHS)) for rank in range(world_size)]
    assert ranks == [alone[rank::world_size] or alone[:1] for rank in range(world_size)]


def test_samples_are_sorted_by_input_then_by_their_longest_target():
    offsets = np.array([0, 2, 2, 3, 4])
    targets = longest(np.array([3, 5, 4, 9, 1]), offsets)  # the last length belongs to the empty target
    assert targets.tolist() == [5, 0, 4, 9]
    assert np.argsort(sort_key(np.array([7, 8, 7, 6]), targets)).tolist() == [3, 2, 0, 1]
