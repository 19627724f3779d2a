"""Placements and factories written in Python."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from vlpet_lightning.pet import (
    VLPET,
    Adapter,
    Gate,
    L2NormGate,
    LargeGate,
    LoRA,
    PerTask,
    Placement,
    Unit,
)
from vlpet_lightning.pet.serialization import placements_from_plain, placements_to_plain


class Free(Unit):
    """A unit of another package, with any setting."""

    def __init__(self, width: int, **settings: Any) -> None:
        super().__init__()
        self.settings = settings


def test_a_class_with_settings_is_the_factory_that_partial_makes() -> None:
    for factory in (VLPET.with_(rank=4, gate=LargeGate.with_(rank=2)), Adapter.with_(rank=4), LoRA.with_()):
        assert type(factory) is partial
        written = placements_to_plain([Placement(["encoder.ffn"], factory)])
        by_hand = placements_to_plain([Placement(["encoder.ffn"], partial(factory.func, **factory.keywords))])
        assert written == by_hand
        assert placements_to_plain(placements_from_plain(written)) == written
    made = VLPET.with_(rank=4, gate=LargeGate.with_(rank=2))(8)
    assert (made.down.out_features, made.gate.down.out_features) == (4, 2)


def test_every_layer_gets_a_unit_of_its_own() -> None:
    factory = LoRA.with_(rank=2)
    assert factory(8) is not factory(8)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (LoRA, {"rnk": 4}, "LoRA has no setting 'rnk': it has rank, alpha, dropout"),
        (LargeGate, {"width": 4}, "LargeGate has no setting 'width': it has rank, scale, init"),
        (L2NormGate, {"rank": 4}, "L2NormGate has no setting 'rank': it has none"),
        (PerTask, {"unit": LoRA, "task": ["vqa"]}, "PerTask has no setting 'task': it has unit, tasks, share"),
    ],
)
def test_an_unknown_setting_is_refused_where_it_is_written(
    kind: type[Unit] | type[Gate], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as refused:
        kind.with_(**settings)
    assert str(refused.value) == words


def test_a_unit_that_takes_any_setting_gets_it() -> None:
    assert Free.with_(anything=1)(8).settings == {"anything": 1}


def test_one_site_needs_no_list() -> None:
    assert Placement("encoder.ffn", LoRA) == Placement(["encoder.ffn"], LoRA)


def test_a_unit_instead_of_a_factory_is_refused() -> None:
    with pytest.raises(TypeError, match=r"built anew for every layer, got one LoRA: .* LoRA.with_\(...\)"):
        Placement(["encoder.ffn"], LoRA(8))
