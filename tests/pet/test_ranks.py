"""The ranks that units declare, in the plain data of placements."""

from functools import partial

import pytest

from vlpet_lightning.pet import (
    VLPET,
    Adapter,
    Compacter,
    Gated,
    HyperFormer,
    LargeGate,
    LoRA,
    LowRankAdapter,
    PerTask,
    Placement,
    Prompt,
    SelfGated,
    SmallGate,
    Unit,
)
from vlpet_lightning.pet.ranks import ranks_in, with_ranks
from vlpet_lightning.pet.serialization import placements_from_plain, placements_to_plain


class Bottleneck(Unit):
    """A unit of a user, with a rank of another name."""

    ranks = ("bottleneck",)

    def __init__(self, width: int, *, bottleneck: int = 4, rank: int = 7) -> None:
        super().__init__()


def plain(unit):
    return placements_to_plain([Placement(["encoder.ffn"], unit)])


@pytest.mark.parametrize(
    ("unit", "said"),
    [
        (partial(VLPET, rank=16, gate=partial(LargeGate, rank=8)), ["VLPET 16", "LargeGate 8"]),
        (partial(VLPET, rank=16, gate=SmallGate), ["VLPET 16"]),
        (partial(Gated, unit=partial(Compacter, rank=4), gate=LargeGate), ["Compacter 4", "LargeGate 96"]),
        (Gated, []),
        (partial(PerTask, tasks=["vqa"], unit=partial(LoRA, rank=2)), ["LoRA 2"]),
        (partial(HyperFormer, tasks=["vqa"]), ["HyperFormer 96"]),
        (Prompt, ["Prompt length 40", "Prompt hidden 800"]),
        (LowRankAdapter, ["LowRankAdapter 96", "LowRankAdapter factor_rank 1"]),
        (SelfGated, ["SelfGated 96"]),
        (partial(Bottleneck, bottleneck=3), ["Bottleneck bottleneck 3"]),
    ],
)
def test_the_ranks_of_a_unit_and_its_parts_are_found(unit, said):
    assert [str(rank) for rank in ranks_in(plain(unit)).values()] == said


def test_other_values_reach_the_unit_and_leave_the_data_unchanged():
    data = plain(partial(VLPET, rank=16, gate=partial(LargeGate, rank=8)))
    values = dict(zip(ranks_in(data), (32, 12), strict=True))
    (placement,) = placements_from_plain(with_ranks(data, values))
    unit = placement.unit(64)
    assert (unit.down.out_features, unit.gate.down.out_features) == (32, 12)
    assert [rank.value for rank in ranks_in(data).values()] == [16, 8]


def test_a_default_is_a_rank_too():
    assert [rank.value for rank in ranks_in(plain(Adapter)).values()] == [96]
