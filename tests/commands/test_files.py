"""Config files by path or name."""

from pathlib import Path

import pytest

from vlpet_lightning.commands.files import as_words, find_config

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_a_config_is_found_by_name_from_any_folder_and_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("lora", ["pet"]) == EXPERIMENTS / "pet" / "lora.yaml"
    assert find_config("t5_base", ["", "pet", "backbone"]) == EXPERIMENTS / "backbone" / "t5_base.yaml"
    (tmp_path / "experiments" / "pet").mkdir(parents=True)
    (tmp_path / "experiments" / "pet" / "lora.yaml").write_text("")
    assert find_config("lora", ["pet"]) == Path("experiments/pet/lora.yaml")


def test_a_path_is_itself(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("")
    assert find_config(str(path), ["pet"]) == path


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(FileNotFoundError, match=r"no config 'vlpet_lage': did you mean 'vlpet_large'\? give a path"):
        find_config("vlpet_lage", ["pet"])
    with pytest.raises(FileNotFoundError, match=r"no config 'lora'.*image_text"):
        find_config("lora")


def test_words_are_arguments_of_fit():
    assert as_words([Path("a.yaml"), Path("b.yaml")]) == ["--config", "a.yaml", "--config", "b.yaml"]
