"""Pretraining of a small language model on pairs of texts."""

import json

import pytest
import torch
from transformers import AutoTokenizer, BartForConditionalGeneration

from vlpet_lightning import VLCausal
from vlpet_lightning.backbones import ADDED_TOKENS, BACKBONES
from vlpet_lightning.backbones.image_processor import load_image_processor
from vlpet_lightning.backbones.small import small_bart, word_tokenizer
from vlpet_lightning.backbones.small_vlm import chat_tokenizer
from vlpet_lightning.backbones.template import read_template
from vlpet_lightning.backbones.tokenizer import load_tokenizer
from vlpet_lightning.commands.pretrain import RECORD, pretrain
from vlpet_lightning.pretraining.pairs import Pair
from vlpet_lightning.pretraining.prompts import Prompts

COLORS = ("red", "green", "blue")
SMALL = {"width": 32, "layers": 1, "heads": 2, "batch_size": 16}


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    pairs = [
        {"source": f"vqa: What color is thing {number % 5}? It is {COLORS[number % 3]}.", "target": COLORS[number % 3]}
        for number in range(60)
    ]
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({**pair, "kind": "vqa"}) for pair in pairs) + "\n")
    return folder


def test_it_learns_its_text_and_is_loaded_as_a_backbone(text, tmp_path):
    pretrain(text=text, out=tmp_path / "lm", steps=150, lr=3e-3, **SMALL)
    results = json.loads((tmp_path / "lm" / RECORD).read_text())["results"]
    assert results["vqa"]["exact_match"] > 90
    lm = BartForConditionalGeneration.from_pretrained(tmp_path / "lm")
    tokenizer = load_tokenizer(str(tmp_path / "lm"))
    assert len(tokenizer) == lm.config.vocab_size  # the added tokens occur once


def test_a_smolvlm_learns_to_answer_in_its_own_prompt(tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    pairs = [
        {
            "source": f"vqa: What color is thing {number % 5}? {COLORS[number % 3]}",
            "target": COLORS[number % 3],
            "kind": "vqa",
            "text": f"What color is thing {number % 5}?",
            "images": [f"a {COLORS[number % 3]} thing {number % 5}"],
        }
        for number in range(60)
    ]
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    pretrain(text=folder, out=tmp_path / "lm", kind="smolvlm", steps=60, lr=5e-3, **SMALL)
    record = json.loads((tmp_path / "lm" / RECORD).read_text())
    assert record["settings"]["kind"] == "smolvlm"
    assert record["results"]["vqa"]["exact_match"] > 90
    module = VLCausal(str(tmp_path / "lm"), trainable=["visual_embedding"])
    module.configure_model()
    image = load_image_processor(str(tmp_path / "lm"))(images=[torch.zeros(3, 64, 64, dtype=torch.uint8)])
    assert image["pixel_values"][0].shape[-2:] == (128, 128)
    pretrain(text=folder, out=tmp_path / "lm", kind="smolvlm", steps=60, lr=5e-3, **SMALL)
    assert "up to date" in capsys.readouterr().out


def test_text_without_its_parts_is_refused_by_a_smolvlm(text, tmp_path):
    with pytest.raises(ValueError, match="a pair has no text and images, which the prompt of this model needs"):
        pretrain(text=text, out=tmp_path / "lm", kind="smolvlm", steps=1, **SMALL)


def test_prompts_have_the_sequence_of_the_model_with_images():
    tokenizer = chat_tokenizer(["<|im_start|>User: Assistant: a red circle. What color? blue"])
    prompt = BACKBONES["smolvlm"].text_template.replace("{text}", "a {text}")
    template = read_template(tokenizer, prompt, BACKBONES["smolvlm"].image_template)
    pair = Pair("", "blue", "nlvr2", "What color?", ("a red", "circle"))
    prompts = Prompts([pair, pair._replace(images=("a",))], tokenizer, template)
    image = "<fake_token_around_image><global-img>{}<fake_token_around_image>"
    text = f"<|im_start|>user:{image.format('a red')}{image.format('circle')}a True or false? What color?"
    expected = tokenizer(f"{text}<end_of_utterance>assistant: blue<end_of_utterance>")["input_ids"]
    ids, labels = prompts.batch([0, 1])
    assert ids[0].tolist() == expected
    assert labels[0].tolist() == [-100] * (len(expected) - 2) + expected[-2:]
    left = prompts.prompts([0, 1])
    assert left[0].tolist() == expected[:-2]
    assert left[1, left[1] != 0].tolist() == ids[1][(labels[1] == -100) & (ids[1] != 0)].tolist()


def test_a_backbone_of_the_same_text_and_settings_is_not_trained_again(text, tmp_path, capsys):
    pretrain(text=text, out=tmp_path / "lm", steps=2, **SMALL)
    before = (tmp_path / "lm" / "model.safetensors").stat().st_mtime_ns
    pretrain(text=text, out=tmp_path / "lm", steps=2, **SMALL)
    assert "up to date" in capsys.readouterr().out
    assert (tmp_path / "lm" / "model.safetensors").stat().st_mtime_ns == before
    pretrain(text=text, out=tmp_path / "lm", steps=3, **SMALL)
    assert json.loads((tmp_path / "lm" / RECORD).read_text())["settings"]["steps"] == 3


def test_a_folder_of_someone_else_is_not_overwritten(text, tmp_path):
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="was not written by this command"):
        pretrain(text=text, out=tmp_path / "lm", steps=2, **SMALL)
    assert [path.name for path in (tmp_path / "lm").iterdir()] == ["mine.txt"]


def test_missing_and_malformed_text_is_named(text, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text at .*nowhere/train\.jsonl"):
        pretrain(text=tmp_path / "nowhere", out=tmp_path / "lm", **SMALL)
    (text / "val.jsonl").write_text('{"source": "a", "target": "b", "kind": "vqa"}\n{"source": "a"}\n')
    with pytest.raises(ValueError, match=r"val\.jsonl:2 is not a JSON object"):
        pretrain(text=text, out=tmp_path / "lm", **SMALL)


@pytest.mark.parametrize(("setting", "value"), [("steps", -5), ("batch_size", 0), ("lr", -1.0), ("order_std", -1.0)])
def test_an_impossible_number_is_refused_before_anything_is_read(tmp_path, setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be .*, got {value}"):
        pretrain(text=tmp_path / "none", out=tmp_path / "lm", **{setting: value})


def test_the_same_seed_gives_the_same_weights(text, tmp_path):
    for name in ("a", "b"):
        pretrain(text=text, out=tmp_path / name, steps=3, **SMALL)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_the_tokenizer_knows_words_specials_and_added_tokens_at_the_end():
    tokenizer = word_tokenizer(["A red circle.", "a blue <mask>"])
    assert tokenizer("A RED zebra.")["input_ids"] == [
        0,
        *tokenizer.convert_tokens_to_ids(["a", "red", "<unk>", "."]),
        2,
    ]
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 4]
    assert tokenizer.convert_tokens_to_ids(ADDED_TOKENS) == list(range(len(tokenizer) - 200, len(tokenizer)))


def test_the_tokenizer_is_the_same_after_saving(tmp_path):
    tokenizer = word_tokenizer(["a red circle"])
    tokenizer.save_pretrained(tmp_path)
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("a red circle")["input_ids"] == tokenizer("a red circle")["input_ids"]
    )


def test_tokens_of_images_are_never_said():
    lm = small_bart(230, width=16, layers=1, heads=2).eval()
    ids = torch.arange(5, 20).reshape(3, 5)
    probabilities = lm(input_ids=ids, decoder_input_ids=ids).logits.softmax(dim=-1)
    assert probabilities[..., -200:].max() == 0
    assert lm.model.shared.weight[-200:].std().item() == pytest.approx(1.0, abs=0.1)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="3 heads do not divide a width of 32"):
        small_bart(230, width=32, layers=1, heads=3)
