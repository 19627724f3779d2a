"""Decoder-only models small enough for tests, with random weights, and batches of their features."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Idefics3Config,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
)

from tests.data_modules.tiny_data import DIM
from tests.tiny import WORDS as WORDS_OF_THE_WORLD
from vlpet_lightning import Batch
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.backbones.causal import CausalBackbone
from vlpet_lightning.backbones.template import Template
from vlpet_lightning.batch import IGNORED
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import Placement
from vlpet_lightning.pet.extension import Extension

PAD, START, END = 0, 7, 2
IMAGE, WORDS = 50, (10, 40)  # token of images, and range of ordinary tokens
WIDTH, VALUES, TOWER, SIDE, PATCH = 32, 16, 24, 32, 8  # of the decoder, its values, the tower and images
DECODER = {  # two key-value heads for four heads
    "vocab_size": 60,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": END,
    "max_position_embeddings": 128,
}
SIGLIP = {
    "hidden_size": TOWER,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class Tiny:
    """A model for tests.

    Args:
        config: Its configuration.
        template: Its prompt.
        per_image: Number of tokens of an image.
        norms: Number of norms in the decoder.
        extract: Returns the tower's output ``(n, F, D)`` for the library's model and ``(n, 3, 32, 32)`` pixels.
        inputs: Returns the library's other inputs for ``(N, 3, 32, 32)`` pixels, a sequence of tokens of which the
            first ones are the prompt, and the number of those.
        projector: Beginnings of the names of the projector's parameters.
        attentions: Implementations of the decoder's attention.
        softcap: Bound of the logits that the installed library leaves out.
        image_size: Height and width of its images, if it takes any size.
    """

    config: PretrainedConfig
    template: Template
    per_image: int
    norms: int
    extract: Callable[[Any, Tensor], Tensor]
    inputs: Callable[[Tensor, Tensor, int], dict[str, Tensor]]
    projector: tuple[str, ...]
    attentions: tuple[str, ...] = ("sdpa", "eager")
    softcap: float | None = None
    image_size: tuple[int, int] | None = None

    @property
    def backbone(self) -> CausalBackbone:
        """Description of the model, with its template and the size of its images."""
        backbone: Any = BACKBONES[self.config.model_type]
        backbone = backbone.with_template(self.template)
        return backbone if self.image_size is None else backbone.with_image_size(*self.image_size)


def smolvlm_tower(lm: Any, pixels: Tensor) -> Tensor:
    """Return the output of the tower of an Idefics3 or SmolVLM."""
    patches = torch.ones(len(pixels), SIDE // PATCH, SIDE // PATCH, dtype=torch.bool)
    return lm.model.vision_model(pixels, patch_attention_mask=patches).last_hidden_state


def smolvlm(config: type[PretrainedConfig]) -> Tiny:
    """Return a tiny Idefics3 or SmolVLM."""
    return Tiny(
        config(
            text_config={"model_type": "llama"} | DECODER,
            vision_config=SIGLIP,
            scale_factor=2,
            image_token_id=IMAGE,
        ),
        Template((3, 4), (51, 52), (51,), (5,), (6, START), end=END, pad=PAD),
        per_image=4,
        norms=5,
        extract=smolvlm_tower,
        inputs=lambda pixels, ids, prompt: {"pixel_values": pixels[None]},
        projector=("model.connector",),
    )


CAPPED = "softcapping" in inspect.getsource(BACKBONES["paligemma"].model_class.forward)  # not in transformers 5.17


def paligemma(norms: int, attentions: tuple[str, ...], **text: Any) -> Tiny:
    """Return a tiny PaliGemma."""
    config = PaliGemmaConfig(
        text_config={"head_dim": 8} | DECODER | text,
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False} | SIGLIP,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        image_token_index=IMAGE,
    )
    return Tiny(
        config,
        Template((), (), (), (1,), (START,), end=END, pad=PAD),
        per_image=16,
        norms=norms,
        extract=lambda lm, pixels: lm.model.vision_tower(pixels).last_hidden_state,
        inputs=lambda pixels, ids, prompt: {
            "pixel_values": pixels,
            "token_type_ids": (torch.arange(ids.shape[1]) >= prompt)[None].long(),
        },
        projector=("model.multi_modal_projector",),
        attentions=attentions,
        softcap=None if CAPPED else text.get("final_logit_softcapping"),
    )


# the window is shorter than an image, and the bounds are below the largest scores and logits
GEMMA2 = {
    "sliding_window": 7,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 8,
}
QWEN = Qwen2_5_VLConfig(
    text_config=DECODER | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    vision_config={
        "depth": 2,
        "hidden_size": TOWER,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,  # two tokens
        "fullatt_block_indexes": [1],
    },
    image_token_id=IMAGE,
    video_token_id=53,
    vision_start_token_id=51,
    vision_end_token_id=52,
)
ROWS, COLUMNS = 4, 3  # image tokens


def qwen_pixels(pixels: Tensor) -> dict[str, Tensor]:
    """Return the tower's inputs, as Qwen's image processor, for the left part of ``(n, 3, 32, 32)`` pixels."""
    cut = pixels[..., : COLUMNS * 8]
    split = cut.reshape(len(cut), 3, ROWS, 2, 4, COLUMNS, 2, 4).permute(0, 2, 5, 3, 6, 1, 4, 7)
    twice = split.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # two frames
    grid = torch.tensor([[1, 2 * ROWS, 2 * COLUMNS]]).expand(len(cut), -1)
    return {"pixel_values": twice.reshape(-1, 3 * 2 * 4 * 4), "image_grid_thw": grid}


def qwen_tower(lm: Any, pixels: Tensor) -> Tensor:
    """Return the states before the merger, in the order of image tokens."""
    inputs = qwen_pixels(pixels)
    states = lm.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).last_hidden_state
    cells = [(row, column) for row in range(ROWS) for column in range(COLUMNS)]
    windows = sorted(range(len(cells)), key=lambda cell: (cells[cell][0] // 2, cells[cell][1] // 2, cell))
    found = torch.empty(len(pixels), len(cells), 4, TOWER)
    found[:, windows] = states.view_as(found)
    return found.flatten(1, 2)


QWEN25VL = Tiny(
    QWEN,
    Template((3, 4), (51,), (52,), (5,), (6, START), end=END, pad=PAD),
    per_image=ROWS * COLUMNS,
    norms=5,
    extract=qwen_tower,
    inputs=lambda pixels, ids, prompt: qwen_pixels(pixels) | {"mm_token_type_ids": (ids == IMAGE).int()},
    projector=("model.visual.merger",),
    image_size=(ROWS * 8, COLUMNS * 8),
)
LLAVA = Tiny(
    LlavaOnevisionConfig(
        text_config=DECODER
        | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False} | SIGLIP,
        image_token_index=IMAGE,
        video_token_index=53,
    ),
    Template((3, 4), (), (), (5,), (6, START), end=END, pad=PAD),
    per_image=17,
    norms=5,
    extract=lambda lm, pixels: lm.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1],
    inputs=lambda pixels, ids, prompt: {
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[SIDE, SIDE]]).expand(len(pixels), -1),
        "batch_num_images": torch.tensor([2]),  # more than one: no image is divided
    },
    projector=("model.multi_modal_projector", "model.image_newline"),
)
MODELS = {
    "llava": LLAVA,
    "qwen2.5": QWEN25VL,
    "idefics3": smolvlm(Idefics3Config),
    "smolvlm": smolvlm(SmolVLMConfig),
    "paligemma": paligemma(norms=5, attentions=("sdpa", "eager"), model_type="gemma"),
    "paligemma2": paligemma(norms=9, attentions=("eager",), model_type="gemma2", **GEMMA2),
}


def build(
    name: str,
    placements: list[Placement] | None = None,
    trainable: tuple[str, ...] = (),
    extension: Extension | None = None,
) -> VLModel:
    """Build a tiny model whose weights are large enough that every token matters; without rules, all are trained."""
    tiny = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = tiny.backbone.build(tiny.config).eval()
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
        model = VLModel(
            tiny.backbone,
            lm,
            feature_dim=TOWER,
            placements=placements or [],
            trainable=trainable or ["visual_embedding"],
            extension=extension,
        )
    return (model if trainable else model.requires_grad_(True)).eval()


def draw(images: int = 1, samples: int = 3, seed: int = 0) -> tuple[Batch, Tensor]:
    """Return a batch without features, whose last sample is the shortest, and its ``(B, N, 3, 32, 32)`` pixels."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(*WORDS, (samples, 5), generator=generator)
    labels = torch.randint(*WORDS, (samples, 4), generator=generator)
    words[:, -1] = END
    words[-1, 3:] = torch.tensor([END, PAD])
    labels[-1, 2:] = torch.tensor([END, IGNORED])
    pixels = torch.randn(samples, images, 3, SIDE, SIDE, generator=generator)
    task = "vqa" if images == 1 else "nlvr2"
    batch = Batch(task=task, input_ids=words, features=torch.empty(0), labels=labels)
    return batch, pixels


@torch.no_grad()
def with_features(name: str, model: VLModel, batch: Batch, pixels: Tensor) -> Batch:
    """Add the features of the pixels; of one image without an axis for it."""
    enabled, model.enabled = model.enabled, False  # Qwen's tower also runs the merger, whose units need a batch
    features = MODELS[name].extract(model.lm, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
    model.enabled = enabled
    batch.features = features[:, 0] if pixels.shape[1] == 1 else features
    return batch


def library_inputs(name: str, ids: Tensor, pixels: Tensor, answer: list[int]) -> tuple[dict[str, Tensor], int]:
    """Return the library's inputs for one sample, as its own processor would, and the length of the prompt.

    Args:
        name: Name of the model.
        ids: ``(T,)`` padded token ids of the text.
        pixels: ``(N, 3, 32, 32)`` pixels.
        answer: Tokens after the prompt.
    """
    tiny = MODELS[name]
    part = tiny.template
    image = [*part.image_before, *[IMAGE] * tiny.per_image, *part.image_after]
    text = [token for token in ids.tolist() if token not in (PAD, END)]
    prompt = [*part.before, *image * len(pixels), *part.between, *text, *part.after]
    tokens = torch.tensor([[*prompt, *answer]])
    return {"input_ids": tokens} | tiny.inputs(pixels, tokens, len(prompt)), len(prompt)


MARKS = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>")


def save_smolvlm(folder: Path, seed: int = 0) -> Path:
    """Write a tiny SmolVLM that reads the features of tests/data_modules/tiny_data.py, with its tokenizer."""
    words = [*WORDS_OF_THE_WORLD, "User", "Assistant", ":", "What", "colour", "thing", *map(str, range(20))]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "<unk>", *MARKS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end_of_utterance>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": list(MARKS)})
    fast.save_pretrained(folder)
    config = SmolVLMConfig(
        text_config={"model_type": "llama"}
        | DECODER
        | {"vocab_size": len(fast), "pad_token_id": 0, "eos_token_id": vocabulary["<end_of_utterance>"]},
        vision_config=SIGLIP | {"hidden_size": DIM, "image_size": 2 * PATCH},  # 4 patches
        scale_factor=2,
        image_token_id=vocabulary["<image>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BACKBONES["smolvlm"].build(config).save_pretrained(folder)
    side = {"longest_edge": config.vision_config.image_size}
    SmolVLMImageProcessor(size=side, max_image_size=side).save_pretrained(folder)
    return folder
