"""Training scripts of VL-PET, VL-Adapter, DoRA and Ladder Side-Tuning, by their flags: each is one of our experiments.

tests/testdata/original_scripts.json holds the flags that shape the model or the recipe, by repository and path. Values
that a script takes from its own command line are those of its README: rank 96 (T5: 192), 4 heads, scale 0.3, 20 epochs.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path

import pytest
import yaml

from vlpet_lightning.commands.import_original import config_from_flags
from vlpet_lightning.pet.serialization import placements_from_plain, placements_to_plain

ROOT = Path(__file__).parents[3]
SCRIPTS = json.loads((ROOT / "tests" / "testdata" / "original_scripts.json").read_text())
OVERLAYS = {
    **{f"VL-PET-{theirs}": f"vlpet_{ours}" for theirs, ours in (("large", "large"), ("small", "small"))},
    **{f"VL-PET-middle{letter}": f"vlpet_middle_{letter.lower()}" for letter in "XY"},
    "bitfit": "bitfit",
    "full_finetuning": "full",
    "hyperformer": "hyperformer",
    "single_adapter": "vl_adapter",
    "single_compacter": "compacter",
    "single_lora": "lora",
    "single_prompt": "prompt_tuning",
    "multiple_adapters": "vl_adapter_multiple",
    "multiple_lora": "lora_multiple",
    "dora": "dora",
    "LST": "lst_t5",
}
# without a published row, and without a YAML: the single one, a part for each task
PER_TASK = {"multiple_compacters": "compacter", "multiple_prompts": "prompt_tuning"}


def overlay_of(script):
    stem = Path(script).stem
    name = OVERLAYS[stem.removeprefix("T5-")] + "_t5" * stem.startswith("T5-")
    return "dora_video" if name == "dora" and "/video/" in script else name


def by_site(placements):
    """Placements as ``{site: unit}``, defaults written out."""
    return {
        site: entry["unit"] for entry in placements_to_plain(placements_from_plain(placements)) for site in entry["at"]
    }


def shipped(name):
    return yaml.safe_load((ROOT / "experiments" / "pet" / f"{name}.yaml").read_text())["model"]["init_args"]


def test_all_scripts_are_here():
    repositories = Counter("/".join(script.split("/")[:2]) for script in SCRIPTS)
    assert repositories == {
        "HenryHZY/VL-PET": 25,
        "ylsung/VL_adapter": 14,
        "NVlabs/DoRA": 2,
        "ylsung/Ladder-Side-Tuning": 1,
    }


@pytest.mark.parametrize("script", [name for name in SCRIPTS if Path(name).stem not in PER_TASK])
def test_a_script_is_the_shipped_experiment(script):
    config, method = config_from_flags(shlex.split(SCRIPTS[script]))
    ours, theirs = shipped(overlay_of(script)), config["model"]["init_args"]
    assert method.notes == []
    assert by_site(theirs["placements"]) == by_site(ours["placements"])
    if ours["trainable"] == ["all"]:
        assert set(theirs["trainable"]) == {"language_model", "visual_embedding"}
    else:
        assert set(theirs["trainable"]) == set(ours["trainable"])


@pytest.mark.parametrize("script", [name for name in SCRIPTS if Path(name).stem in PER_TASK])
def test_a_script_with_modules_for_each_task_has_the_single_module_once_a_task(script):
    config, _ = config_from_flags(shlex.split(SCRIPTS[script]))
    single = by_site(shipped(PER_TASK[Path(script).stem])["placements"])
    found = by_site(config["model"]["init_args"]["placements"])
    assert found.keys() == single.keys()
    for site, unit in found.items():
        assert unit["class_path"].endswith("PerTask")
        assert unit["init_args"]["tasks"] == ["vqa", "gqa", "nlvr2", "caption"]
        assert unit["init_args"]["unit"] == single[site]


def test_dora_without_its_settings_adapts_nothing_and_says_so():
    words = ["--backbone", "facebook/bart-base", "--use_dora", "--unfreeze_bias"]
    config, method = config_from_flags(words)
    assert config["model"]["init_args"]["placements"] == []
    assert method.notes == ["--use_dora: without --lora_settings no layer is adapted"]


def test_dora_simple_detaches_the_norm():
    words = "--backbone facebook/bart-base --use_dora --lora_settings --dora_simple --unfreeze_bias --lora_dim 8"
    (entry,) = config_from_flags(shlex.split(words))[0]["model"]["init_args"]["placements"]
    assert entry["unit"]["init_args"] == {"rank": 8, "detach_norm": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--use_dora --lora_settings", "--use_dora without --unfreeze_bias"),
        ("--use_dora --lora_settings --unfreeze_bias --use_lora --use_single_lora", "--use_dora beside --use_lora"),
    ],
)
def test_what_dora_means_and_we_do_not_build_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        config_from_flags(["--backbone", "facebook/bart-base", *words.split()])
