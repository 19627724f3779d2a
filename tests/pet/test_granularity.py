"""The settings of ``Granularity`` reproduce the shipped experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import tiny_module
from vlpet_lightning.cli import module_from_config
from vlpet_lightning.pet import Granularity
from vlpet_lightning.pet.granularity import GATES
from vlpet_lightning.pet.serialization import placements_to_plain

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
BASE = str(EXPERIMENTS / "image_text.yaml")


def units_of(path: str) -> dict[str, list[str]]:
    module = module_from_config(["--config", BASE, "--config", path])
    return {
        site: [str(placed.unit(768)) for placed in module.placements if site in placed.at]
        for site in ("encoder.attn", "encoder.ffn", "decoder.cross.value")
    }


@pytest.mark.parametrize("gate", GATES)
def test_each_granularity_is_the_experiment_of_its_name(gate: str, tmp_path: Path) -> None:
    placements = {"class_path": "vlpet_lightning.pet.Granularity", "init_args": {"gate": gate}}
    (tmp_path / "g.json").write_text(json.dumps({"model": {"init_args": {"placements": placements}}}))
    assert units_of(str(tmp_path / "g.json")) == units_of(str(EXPERIMENTS / f"pet/vlpet_{gate}.yaml"))


def test_in_a_decoder_only_model_it_is_the_shipped_placement() -> None:
    overlays = ["--config", str(EXPERIMENTS / "vlm/smolvlm_256m.yaml"), "--config"]
    shipped = module_from_config(["--config", BASE, *overlays, str(EXPERIMENTS / "vlm/pet/vlpet_large.yaml")])
    space = Granularity(at="decoder", rank=32, value_rank=32)
    assert placements_to_plain(space.placements()) == placements_to_plain(shipped.placements)
    (gated,) = Granularity(at="decoder.ffn", value_rank=0, positions="image").placements()
    assert (gated.at, gated.positions) == (["decoder.ffn"], "image")


def test_its_settings_reach_the_units(tiny_backbone: Path) -> None:
    space = Granularity("large", rank=8, heads=2, at="encoder.ffn", value_rank=0)
    module = tiny_module(tiny_backbone, placements=space)
    module.configure_model()
    assert module.model is not None
    assert {place.site for place in module.model.injected} == {"encoder.ffn"}
    with torch.device("meta"):
        more = tiny_module(tiny_backbone, placements=Granularity("large", rank=16, heads=2, value_rank=4)).build(
            pretrained=False
        )
    assert {place.site for place in more.injected} == {"encoder.attn", "encoder.ffn", "decoder.cross.value"}


@pytest.mark.parametrize("wrong", [{"gate": "huge"}, {"rank": 0}, {"heads": 0}, {"value_rank": -1}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"choose from large, middle_x|must be 1 or more"):
        Granularity(**wrong)
