"""Backbone overlays with the overlays of methods, counted on the meta device."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import yaml

from vlpet_lightning import VLT5, VLBart, VLMBart
from vlpet_lightning.backbones import BACKBONES, config_of
from vlpet_lightning.commands.params import report_of

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
BACKBONE_OVERLAYS = sorted(path.stem for path in (EXPERIMENTS / "backbone").glob("*.yaml"))
METHODS = sorted(path.stem for path in (EXPERIMENTS / "pet").glob("*.yaml"))
MODULES = {f"vlpet_lightning.{module.__name__}": module for module in (VLBart, VLMBart, VLT5)}


def words(*overlays):
    return [word for name in ("image_text", *overlays) for word in ("--config", str(EXPERIMENTS / f"{name}.yaml"))]


def readme():
    """Return the trained share that the README's table of backbones gives for each overlay."""
    shares = {}
    for line in (EXPERIMENTS.parent / "README.md").read_text().split("\n"):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and cells[1].strip("`") in {module.__name__ for module in MODULES.values()}:
            names, percent = cells[2].split(", "), cells[4].split(", ")
            shares |= dict(zip(names, percent * (len(names) // len(percent)), strict=True))
    return shares


def bottleneck(width, rank):
    return 2 * width * rank + rank + width


@pytest.mark.parametrize("overlay", BACKBONE_OVERLAYS)
def test_vl_pet_large_trains_the_number_of_a_formula(overlay):
    model = yaml.safe_load((EXPERIMENTS / "backbone" / f"{overlay}.yaml").read_text())["model"]
    name, kind = model["init_args"]["backbone"], MODULES[model["class_path"]].kind
    assert name in BACKBONES[kind].known
    config, is_t5 = config_of(name, kind), kind == "t5"
    width, layers = config.d_model, config.num_layers if is_t5 else config.encoder_layers
    norm = width if is_t5 else 2 * width
    norms = (2 * layers + (2 if kind == "mbart" else 1)) * norm
    visual = (2048 + 1 + 5 + 1 + 2) * width + 2 * norm
    rank = 192 if is_t5 else 96
    units = 2 * layers * 2 * bottleneck(width, rank) + layers * bottleneck(width, 96)
    found = report_of(words(f"backbone/{overlay}", "pet/vlpet_large_t5" if is_t5 else "pet/vlpet_large"))
    assert found.trainable == visual + units + norms
    assert found.groups["encoder norms"].trainable == norms
    assert f"{found.percent:.2f} %" == readme()[overlay]


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "method"), list(product(BACKBONE_OVERLAYS, METHODS)))
def test_every_method_can_be_placed_on_every_backbone(backbone, method):
    assert report_of(words(f"backbone/{backbone}", f"pet/{method}")).trainable > 0


def test_a_projection_of_another_width_is_refused_in_one_sentence():
    overlays = [*words("backbone/flan_t5_base", "pet/vlpet_large"), "--model.init_args.backbone=google/flan-t5-small"]
    gate = "{class_path: vlpet_lightning.pet.LargeGate}"
    at = "--model.init_args.placements=[{at: [encoder.attn.query], unit: {class_path: vlpet_lightning.pet.VLPET, "
    with pytest.raises(ValueError) as error:
        report_of([*overlays, f"{at}init_args: {{gate: {gate}}}}}}}]"])
    said = "site 'encoder.attn.query' has 512 channels where x enters and 384 where h leaves: VLPET needs equal widths"
    cure = "place a unit there that maps one to another, such as LoRA or ParallelAdapter"
    assert str(error.value) == f"{said}: {cure}"


def test_lora_maps_to_the_width_of_a_projection():
    found = report_of([*words("backbone/flan_t5_base", "pet/lora"), "--model.init_args.backbone=google/flan-t5-small"])
    rank, layers = 128, 8
    assert found.groups["encoder PET"].trainable == layers * 2 * rank * (512 + 384)
