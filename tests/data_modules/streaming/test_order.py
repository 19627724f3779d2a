"""The order of samples with a bounded cache of shards."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from data_modules.batches.sampling import EvalSampler, TaskMixSampler
from data_modules.streaming.order import ShardOrder

SHARDS, ROWS = 40, 100


def single(window=6, ahead=1, shards=SHARDS, rows=ROWS):
    return ShardOrder(np.repeat(np.arange(shards), rows)[:, None], shards, window, ahead)


def pairs(window=6, near=0.9):
    """Return pairs of images, most of them in the same shard and the others anywhere."""
    rng = np.random.default_rng(0)
    first = rng.integers(SHARDS, size=3000)
    other = np.where(rng.random(3000) < near, first, rng.integers(SHARDS, size=3000))
    return ShardOrder(np.stack([first, other], axis=1), SHARDS, window, 1)


def fetches(order, rows, room):
    """Return the number of shards fetched by a cache of a given size."""
    cache: OrderedDict[int, None] = OrderedDict()
    count = 0
    for row in rows:
        for shard in order.shards[row].tolist():
            if shard not in cache:
                count += 1
                cache[shard] = None
                if len(cache) > room:
                    cache.popitem(last=False)
            cache.move_to_end(shard)
    return count


@pytest.mark.parametrize("order", [single(), single(window=1), single(window=99), pairs(), pairs(1), pairs(near=0)])
def test_every_sample_comes_once_in_an_order_that_the_seed_alone_decides(order):
    rows = order.shuffled(3)
    assert sorted(rows.tolist()) == list(range(len(order.shards)))
    assert rows.tolist() == order.shuffled(3).tolist() != order.shuffled(4).tolist()
    assert sorted(order.sorted().tolist()) == list(range(len(order.shards)))


@pytest.mark.parametrize("window", [1, 2, 6, 20])
def test_each_shard_is_fetched_once_an_epoch_into_a_cache_of_the_window_and_two(window):
    order = single(window)
    assert fetches(order, order.shuffled(0), window + 2) == SHARDS
    plain = np.random.default_rng(0).permutation(len(order.shards))
    assert fetches(order, plain, window + 2) > 10 * SHARDS


def test_a_batch_mixes_all_shards_of_the_window_evenly_and_the_first_needs_one():
    order = single(window=8)
    rows = order.shuffled(0)
    shards = order.shards[rows, 0]
    middle = shards[1600:2400].reshape(-1, 100)
    assert all(len(set(batch)) in (8, 9) for batch in middle)
    assert max(np.bincount(batch).max() for batch in middle) < 30  # of 100; 12 or 13 expected
    assert len(set(shards[:10])) == 1


def test_epochs_have_different_shards_together():
    order = single(window=4)
    firsts = {tuple(sorted(set(order.shards[order.shuffled(seed)[:200], 0].tolist()))) for seed in range(5)}
    assert len(firsts) == 5


def test_pairs_in_one_shard_or_near_ones_need_no_second_fetch():
    order = pairs(near=1)
    assert fetches(order, order.shuffled(0), 7) == SHARDS


def test_pairs_in_distant_shards_come_last_block_by_block():
    order = pairs(near=0.9)
    rows = order.shuffled(0)
    blocks = -(-SHARDS // 3)  # of half a window; every pair of blocks once, each fetches one block
    bound = SHARDS + blocks * (blocks + 1) // 2 * 3
    assert SHARDS < fetches(order, rows, 7) <= bound
    assert fetches(order, np.random.default_rng(0).permutation(3000), 7) > 5 * bound


def test_tasks_on_the_same_store_have_their_shards_in_the_same_order():
    one, other = single(), single(rows=ROWS // 2)
    lines = [list(dict.fromkeys(order.shards[order.shuffled(5), 0].tolist())) for order in (one, other)]
    assert [abs(lines[1].index(shard) - place) for place, shard in enumerate(lines[0])] == pytest.approx(
        [0] * SHARDS, abs=2
    )


def test_evaluation_reads_shard_by_shard_and_within_a_shard_in_the_order_of_the_file():
    shards = np.array([2, 0, 2, 1, 0])[:, None]
    assert ShardOrder(shards, 3, 1).sorted().tolist() == [1, 4, 3, 0, 2]


def test_what_follows_are_the_shards_of_the_next_rows_the_first_ones_first():
    order = single(window=1, ahead=2)
    rows = order.shuffled(0)
    line = list(dict.fromkeys(order.shards[rows, 0].tolist()))
    assert order.following(rows[250:]) == line[2:5]
    assert order.following(rows[-50:]) == line[-1:]
    assert single(ahead=0).following(rows) == []


TASKS = {"vqa": single(), "nlvr2": pairs()}
SIZES = {task: len(order.shards) for task, order in TASKS.items()}
BATCH = {"vqa": 64, "nlvr2": 49}


def samplers(world_size, epoch=0):
    made = [TaskMixSampler(SIZES, BATCH, orders=TASKS, rank=rank, world_size=world_size) for rank in range(world_size)]
    for sampler in made:
        sampler.set_epoch(epoch)
    return made


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_are_disjoint_and_have_every_sample_once_an_epoch(world_size):
    seen: dict = {task: [] for task in TASKS}
    for sampler in samplers(world_size, epoch=1):
        for plan in sampler:
            seen[plan.task] += [] if plan.filler else plan.rows.tolist()
    assert {task: sorted(rows) for task, rows in seen.items()} == {task: list(range(n)) for task, n in SIZES.items()}


def test_a_sampler_stopped_at_any_position_goes_on_with_the_rest_of_the_epoch():
    (whole,) = samplers(1, epoch=2)
    plans = [(plan.task, plan.rows.tolist(), list(plan.ahead)) for plan in whole]
    for position in range(len(plans) + 1):
        (resumed,) = samplers(1)
        resumed.load_state_dict({"epoch": 2, "batches": position})
        assert [(plan.task, plan.rows.tolist(), list(plan.ahead)) for plan in resumed] == plans[position:]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_has_every_sample_once_over_all_ranks(world_size):
    made = [EvalSampler(SIZES, BATCH, rank, world_size, TASKS) for rank in range(world_size)]
    for task, size in SIZES.items():
        rows = [row for one in made for plan in one if plan.task == task for row in plan.rows.tolist()]
        assert sorted(rows) == list(range(size))
    assert [len(list(one)) for one in made] == [len(one) for one in made]
