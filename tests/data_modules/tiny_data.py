"""A small data root in the benchmark's own formats, and a tokenizer for its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data_modules.store.writer import FeatureWriter

TOKENS, DIM = 4, 8
COLOURS = ("red", "green", "blue")
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # BART's, ids 0 to 4


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def vqa_record(number: int, image: str) -> dict[str, Any]:
    return {
        "question_id": number,
        "img_id": image,
        "sent": f"What colour is thing {number}?",
        "label": {COLOURS[number % 3]: 1.0, COLOURS[(number + 1) % 3]: 0.3},
        "answer_type": "other",
        "question_type": "what colour is",
    }


def vqa_answers(number: int) -> dict[str, Any]:
    answers = [COLOURS[number % 3]] * 9 + [COLOURS[(number + 1) % 3]]
    return {
        "question_id": number,
        "answer_type": "other",
        "question_type": "what colour is",
        "answers": [{"answer": answer, "answer_id": i + 1} for i, answer in enumerate(answers)],
    }


def gqa_record(number: int, image: str) -> dict[str, Any]:
    answer = ("left", "right")[number % 2]
    return {"question_id": f"g{number}", "img_id": image, "sent": f"Where is {number}?", "label": {answer: 1.0}}


def nlvr2_record(number: int, split: str) -> dict[str, Any]:
    return {
        "uid": f"nlvr2_{split}_{number}",
        "identifier": f"{split}-{number}-0-0",
        "img0": f"{split}-{number}-img0",
        "img1": f"{split}-{number}-img1",
        "sent": f"There are {number} things in the two images.",
        "label": number % 2,
    }


def caption_record(number: int, split: str) -> dict[str, Any]:
    sentences = [{"raw": f" A {COLOURS[(number + i) % 3]} thing. "} for i in range(2)]
    return {"split": split, "filename": f"{coco(number)}.jpg", "cocoid": number, "sentences": sentences}


def coco(number: int) -> str:
    return f"COCO_val2014_{number:012d}"


def write_world(root: Path, train: int = 7, held_out: int = 4) -> None:
    """Write annotations and features of all tasks and splits; the features of image ``i`` are all ``i``."""
    sizes = {"train": train, "val": held_out, "test": held_out}
    starts = {"train": 0, "val": train, "test": train + held_out}
    for split, size in sizes.items():
        numbers = range(starts[split], starts[split] + size)
        write_json(root / f"vqa/karpathy_{split}.json", [vqa_record(i, coco(i)) for i in numbers])
    total = sum(sizes.values())
    answers = {"annotations": [vqa_answers(i) for i in range(total)]}
    write_json(root / "vqa/v2_mscoco_val2014_annotations.json", answers)
    for name, numbers in (("train", range(0, train)), ("valid", range(train, train + 2)), ("testdev", range(50, 54))):
        write_json(root / f"GQA/{name}.json", [gqa_record(i, str(i)) for i in numbers])
    for name, size in (("train", train), ("valid", held_out), ("test", held_out)):
        write_json(root / f"nlvr/{name}.json", [nlvr2_record(i, name) for i in range(size)])
    karpathy = ["train", "restval"] * train + ["val"] * held_out + ["test"] * held_out
    images = [caption_record(i, split) for i, split in enumerate(karpathy[train:])]
    write_json(root / "COCO/dataset_coco.json", {"images": images})
    write_features(root / "features/COCO", [coco(i) for i in range(total + 2 * train)])
    write_features(root / "features/VG", [str(i) for i in range(train + 2)])
    write_features(root / "features/GQA", [str(i) for i in range(50, 54)])
    nlvr = [
        f"{s}-{i}-img{k}"
        for s, n in (("train", train), ("valid", held_out), ("test", held_out))
        for i in range(n)
        for k in (0, 1)
    ]
    write_features(root / "features/nlvr", nlvr)


def write_features(path: Path, ids: list[str], dim: int = DIM) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.arange(len(ids), dtype=np.float16)[:, None, None]
    with FeatureWriter(path, tokens=TOKENS, dim=dim) as writer:
        writer.add(ids, np.broadcast_to(values, (len(ids), TOKENS, dim)))


def write_tokenizer(path: Path, texts: list[str] | None = None, vocabulary: int = 400) -> None:
    """Train a byte-level BPE like BART's on texts, by default on the world's words."""
    texts = texts or [
        "What colour is thing 1234567890?",
        "vqa: gpa: gqa: nlvr: caption: There are things in the two images.",
    ]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*texts, *COLOURS, "true", "false", "left", "right"] * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = dict(zip(("bos", "pad", "eos", "unk", "mask"), SPECIALS, strict=True))
    specials = {f"{name}_token": token for name, token in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(path)
