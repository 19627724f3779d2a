"""The search for ranks, against exhaustive counts over formulas."""

from __future__ import annotations

from decimal import Decimal

import pytest

from vlpet_lightning.budget import (
    ALL,
    TOGETHER,
    Budget,
    Counts,
    Family,
    Search,
    at_sites,
    families,
    groups,
    sites_of,
    steps,
    subsets,
)
from vlpet_lightning.pet.ranks import ranks_in

WIDTH = 32
FROZEN, FLOOR = 10_000, 500


def node(name, **settings):
    return {"class_path": f"vlpet_lightning.pet.{name}", "init_args": settings}


def large(rank=8, gate=8, value=8, heads=4):
    return [
        {
            "at": ["encoder.attn", "encoder.ffn"],
            "unit": node("VLPET", rank=rank, heads=heads, gate=node("LargeGate", rank=gate)),
        },
        {"at": ["decoder.cross.value"], "unit": node("ParallelAdapter", rank=value)},
    ]


def linear(placements):
    """Count 65 parameters a rank and site, as an adapter of width 32 without its last bias."""
    added = sum(65 * rank.value * len(p["at"]) for p in placements for rank in ranks_in(p).values())
    return Counts(FLOOR + added, FROZEN + FLOOR + added)


def quadratic(placements):
    added = sum(rank.value**2 * len(p["at"]) for p in placements for rank in ranks_in(p).values())
    return Counts(FLOOR + added, FROZEN + FLOOR + added)


def search(budget, count=linear, limit=None):
    widths = dict.fromkeys(["encoder.attn", "encoder.ffn", "decoder.cross.value"], WIDTH)
    return Search(count, widths, budget, limit)


def percent(text):
    return Budget(percent=Decimal(text))


@pytest.mark.parametrize("count", [linear, quadratic])
@pytest.mark.parametrize("wanted", ["5.0", "8.31", "17", "25.5", "33.333", "41"])
@pytest.mark.parametrize("ranks", [pytest.param((8, 8, 8), marks=pytest.mark.slow), (16, 16, 8), (12, 8, 20)])
def test_no_other_scale_is_nearer(count, wanted, ranks):
    budget, placements = percent(wanted), large(*ranks)
    finder = search(budget, count)
    for family in families(placements):
        found = finder.nearest(family)
        accepted = [k for k in range(1, finder.largest_scale(family) + 1) if finder.accepts(family.at(k))]
        distances = [abs(budget.distance(count(family.at(k)))) for k in accepted]
        assert abs(budget.distance(found.counts)) == min(distances)
        assert found.counts == count(found.placements)


def test_ranks_keep_the_ratios_of_the_method_and_the_heads_divide_them():
    first = next(families(large(16, 16, 8)))
    assert list(first.varied.values()) == [2, 2, 1]
    found = search(percent("30")).nearest(first)
    vlpet, gate, value = (rank.value for rank in ranks_in(found.placements).values())
    assert (vlpet, gate) == (2 * value, 2 * value)
    assert vlpet % 4 == 0
    assert (found.sites, found.ranks) == (ALL, TOGETHER)


def test_a_rank_that_the_constructor_refuses_is_not_accepted():
    finder = search(percent("10"))
    assert [k for k in range(1, 13) if finder.accepts(large(rank=k))] == [4, 8, 12]


def test_few_models_are_counted():
    counted = []

    def count(placements):
        counted.append(placements)
        return linear(placements)

    first = next(families(large(heads=1)))
    assert search(percent("20"), count, limit=4000).nearest(first) is not None
    assert len(counted) == 4  # both ends, and the neighbours of the budget


def test_one_adjusted_rank_comes_nearer():
    budget = percent("20")
    finder, first = search(budget), next(families(large()))
    whole = finder.nearest(first)
    near = min((abs(budget.distance(one.counts)) for one in finder.adjusted(first)), default=None)
    assert near < abs(budget.distance(whole.counts))
    assert len(list(finder.adjusted(first))) == 2 * 3  # around both neighbours of the budget, each of three ranks
    for one in finder.adjusted(first):
        values = [rank.value for rank in ranks_in(one.placements).values()]
        assert len(set(values)) <= 2
        assert one.keeps_method


def test_a_method_with_one_rank_has_nothing_to_adjust():
    placements = [{"at": ["encoder.attn", "encoder.ffn"], "unit": node("Adapter", rank=8)}]
    assert [family.ranks for family in families(placements)] == [TOGETHER] * 3
    assert list(search(percent("10")).adjusted(next(families(placements)))) == []


def test_ranks_that_change_nothing_are_not_offered():
    finder = search(percent("4"), lambda placements: Counts(FLOOR, FROZEN + FLOOR + linear(placements).total))
    assert finder.nearest(next(families(large()))) is None


def test_a_budget_out_of_reach_gives_the_nearest_end():
    first = next(families(large()))
    low, high = search(percent("99")).ends(first)
    assert (low, high) == (4, 32)
    assert search(percent("99")).nearest(first).counts == linear(first.at(32))
    assert search(percent("0.1")).nearest(first).counts == linear(first.at(4))
    assert search(percent("99"), limit=10).nearest(first).counts == linear(first.at(8))


def test_a_fixed_rank_above_the_limit_excludes_a_family():
    found = {family.ranks: search(percent("20"), limit=6).ends(family) for family in families(large(8, 4, 4))}
    assert found["VLPET rank alone"] == (4, 4)
    assert found["LargeGate rank alone"] is None  # VLPET would keep its 8


def test_the_range_is_over_all_families():
    found = search(percent("20")).range(list(families(large())))
    assert found == (linear(at_sites(large(value=1), ["decoder.cross.value"])), linear(large(32, 32, 32)))


@pytest.mark.parametrize(
    ("budget", "counts", "met"),
    [
        (percent("4.16"), Counts(6_052_416, 145_606_464), True),
        (percent("4.157"), Counts(6_052_416, 145_606_464), True),
        (percent("4.1570"), Counts(6_052_416, 145_606_464), False),
        (percent("4.2"), Counts(6_052_416, 145_606_464), False),  # one digit still means two
        (Budget(parameters=500), Counts(500, 10_000), True),
        (Budget(parameters=501), Counts(500, 10_000), False),
    ],
)
def test_a_percentage_is_met_to_the_digits_that_it_has_at_least_two(budget, counts, met):
    assert budget.is_met(counts) is met


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of the two"),
        ({"percent": Decimal(3), "parameters": 3}, "exactly one of the two"),
        ({"percent": Decimal(0)}, "above 0 and at most 100, got 0"),
        ({"percent": Decimal("100.01")}, "above 0 and at most 100, got 100.01"),
        ({"percent": Decimal("nan")}, "above 0 and at most 100, got NaN"),
        ({"parameters": 0}, "1 or more, got 0"),
    ],
)
def test_a_budget_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Budget(**settings)


def test_the_excess_is_exact():
    assert percent("30").excess(Counts(30, 100)) == 0
    assert percent("30").excess(Counts(31, 100)) == 1
    assert Budget(parameters=30).excess(Counts(31, 100)) == 1


def test_subsets_are_named_by_parts_and_none_comes_twice():
    sites = ["encoder.attn.query", "encoder.attn.value", "decoder.attn.value", "decoder.cross.query"]
    found = subsets(sites)
    assert next(iter(found)) == ALL
    assert found["encoder only"] == sites[:2]
    assert found["attn only"] == sites[:3]
    assert found["query only"] == [sites[0], sites[3]]
    assert "without encoder" not in found  # the same as decoder only
    assert "without cross" not in found  # the same as attn only
    assert len({tuple(some) for some in found.values()}) == len(found)


def test_fewer_sites_leave_out_placements_without_any():
    assert sites_of(at_sites(large(), ["encoder.ffn"])) == ["encoder.ffn"]
    assert len(at_sites(large(), ["encoder.ffn"])) == 1
    assert sites_of(large()) == ["encoder.attn", "encoder.ffn", "decoder.cross.value"]


def test_steps_are_the_ranks_without_their_common_divisor():
    assert list(steps(ranks_in(large(192, 192, 96))).values()) == [2, 2, 1]
    assert list(
        steps(ranks_in([{"at": ["encoder.prompt"], "unit": node("Prompt", length=40, hidden=800)}])).values()
    ) == [
        1,
        20,
    ]


def test_equal_ranks_of_a_class_are_one_group():
    placements = [
        {"at": [site], "unit": node("Adapter", rank=rank)}
        for site, rank in (("encoder.attn", 8), ("encoder.ffn", 8), ("decoder.ffn", 4))
    ]
    assert {name: len(members) for name, members in groups(placements).items()} == {
        "Adapter rank 8": 2,
        "Adapter rank 4": 1,
    }
    assert list(groups(large())) == ["VLPET rank", "LargeGate rank", "ParallelAdapter rank"]


def test_a_family_changes_its_own_ranks_alone():
    path = next(path for path, rank in ranks_in(large()).items() if rank.unit == "LargeGate")
    changed = Family(large(), {path: 3}, ALL, "LargeGate").at(5)
    assert [rank.value for rank in ranks_in(changed).values()] == [8, 15, 8]
