"""Decoder-only models small enough for tests, with random weights, and batches of their features."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image, Resampling
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Idefics3Config,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    PaliGemmaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
    SmolVLMConfig,
    SmolVLMImageProcessor,
)
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

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


@torch.no_grad()
def enlarge(lm: Any) -> None:
    """Draw weights that are large enough that every token matters."""
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.2)


def build(
    name: str,
    placements: list[Placement] | None = None,
    trainable: tuple[str, ...] = (),
    extension: Extension | None = None,
    pixels: bool = False,
) -> VLModel:
    """Build a tiny model whose weights are large enough that every token matters; without rules, all are trained."""
    tiny = MODELS[name]
    backbone = tiny.backbone.with_sizes({"pixels": pixels})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = backbone.build(tiny.config).eval()
        enlarge(lm)
        model = VLModel(
            backbone,
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


def with_pixels(name: str, model: VLModel, batch: Batch, pixels: Tensor) -> Batch:
    """Add the pixels to the batch of a model that runs its tower; of one image without an axis for it."""
    flat = pixels.flatten(0, 1)
    inputs = qwen_pixels(flat)["pixel_values"] if name == "qwen2.5" else flat
    visual: Any = model.visual
    rows = inputs.reshape(*pixels.shape[:2], *visual.input_shape)
    batch.features = rows[:, 0] if pixels.shape[1] == 1 else rows
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


def library_logits(name: str, lm: Any, batch: Batch, pixels: Tensor) -> Iterator[Tensor]:
    """Yield the library's logits ``(L, vocabulary)`` of each sample's real labels, from its pixels."""
    for row in range(len(batch)):
        answer = [token for token in batch.labels[row].tolist() if token != IGNORED]  # type: ignore[index]
        inputs, prompt = library_inputs(name, batch.input_ids[row], pixels[row], answer[:-1])
        found = lm(**inputs).logits[0, prompt - 1 :]
        bound = MODELS[name].softcap
        yield found if bound is None else bound * torch.tanh(found / bound)


@torch.no_grad()
def check_greedy_answers(model: VLModel, batch: Batch) -> None:
    """Check that a greedy search with a cache finds the most probable token after each beginning."""
    tokens = model.generate(batch, num_beams=1, max_length=6)
    for length in range(1, tokens.shape[1]):
        following = model.decode(batch, tokens[:, :length])[:, -1].argmax(dim=-1)
        running = (tokens[:, :length] != END).all(dim=1)
        assert torch.equal(tokens[running, length], following[running])


SQUARE = 2 * PATCH  # side of the images of saved models
TILED = (2 * SQUARE, 3 * SQUARE)  # height and width of divided images
QWEN_SIZE = (48, 32)  # height and width: 6 x 4 tokens in windows of 2 x 2


@dataclass(frozen=True)
class Saved:
    """A model that :func:`save` writes.

    Args:
        kind: Its kind.
        marks: Special tokens, of which the first one ends an answer and the second one stands for an image.
        config: Returns its configuration for the size of the vocabulary and the ids of the end and image tokens.
        processor: Returns its image processor.
        prompt: Prompt of the library's chat template, with ``{image}`` and ``{text}``.
        image: Returns the library's text for an image from its number of image tokens.
        inputs: Returns the library's other inputs for its image processor, an image, and a ``(1, S)`` mask of the image
            tokens.
        settings: Settings of the module.
    """

    kind: str
    marks: tuple[str, ...]
    config: Callable[[int, int, int], PretrainedConfig]
    processor: Callable[[], Any]
    prompt: str
    image: Callable[[int], str]
    inputs: Callable[[Any, Image, Tensor], dict[str, Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)


def smolvlm_config(words: int, end: int, image: int) -> PretrainedConfig:
    """Return a SmolVLM that reads the features of tests/data_modules/tiny_data.py: 4 patches, one token."""
    return SmolVLMConfig(
        text_config={"model_type": "llama"} | DECODER | {"vocab_size": words, "pad_token_id": 0, "eos_token_id": end},
        vision_config=SIGLIP | {"hidden_size": DIM, "image_size": SQUARE},
        scale_factor=2,
        image_token_id=image,
    )


def paligemma_config(words: int, end: int, image: int) -> PretrainedConfig:
    """Return a PaliGemma."""
    config = copy.deepcopy(MODELS["paligemma"].config)
    config.text_config.vocab_size, config.text_config.eos_token_id, config.image_token_id = words, end, image
    config.vision_config.image_size = SQUARE
    return config


def qwen_config(words: int, end: int, image: int) -> PretrainedConfig:
    """Return a Qwen2.5-VL whose images have more than one window."""
    config = copy.deepcopy(QWEN)
    config.text_config.vocab_size, config.text_config.eos_token_id, config.image_token_id = words, end, image
    return config


def llava_config(words: int, end: int, image: int) -> PretrainedConfig:
    """Return a LLaVA-OneVision that reads the last layer but one of its tower."""
    config = copy.deepcopy(LLAVA.config)
    config.text_config.vocab_size, config.text_config.eos_token_id, config.image_token_id = words, end, image
    config.vision_config.num_hidden_layers, config.vision_config.image_size = 2, SQUARE
    config.vision_feature_layer = -2
    config.image_grid_pinpoints = [[SQUARE, SQUARE], list(TILED)]
    return config


def one_of_two(processor: Any, image: Image) -> dict[str, Tensor]:
    """Return the inputs of one of two images, which LLaVA-OneVision does not divide."""
    found = processor(images=[[image, image]], return_tensors="pt")
    return {name: found[name][:1] for name in ("pixel_values", "image_sizes")} | {"batch_num_images": torch.tensor([2])}


def llava_processor() -> Any:
    """Return the image processor of a LLaVA-OneVision that divides images into 6 tiles."""
    size = {"height": SQUARE, "width": SQUARE}
    return LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[SQUARE, SQUARE], list(TILED)])


SMOLVLM = Saved(
    "smolvlm",
    (
        *("<end_of_utterance>", "<image>", "<|im_start|>", "<fake_token_around_image>", "<global-img>"),
        *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2, 3)),
    ),
    smolvlm_config,
    lambda: SmolVLMImageProcessor(size={"longest_edge": 4 * SQUARE}, max_image_size={"longest_edge": SQUARE}),
    "<|im_start|>User:{image}{text}<end_of_utterance>\nAssistant:",
    lambda tokens: get_image_prompt_string(0, 0, tokens, "<fake_token_around_image>", "<image>", "<global-img>"),
    lambda processor, image, places: processor(images=[[image]], do_image_splitting=False, return_tensors="pt"),
)
LLAVA_ONEVISION = Saved(
    "llava_onevision",
    ("<|im_end|>", "<image>", "<|im_start|>"),
    llava_config,
    llava_processor,
    "<|im_start|>user\n{image}\n{text}<|im_end|>\n<|im_start|>assistant\n",
    lambda tokens: "<image>" * tokens,
    lambda processor, image, places: one_of_two(processor, image),
)
SAVED = {
    "smolvlm": SMOLVLM,
    "smolvlm tiled": replace(
        SMOLVLM,
        image=lambda tokens: get_image_prompt_string(
            2, 3, tokens // 7, "<fake_token_around_image>", "<image>", "<global-img>"
        ),
        inputs=lambda processor, image, places: processor(
            images=[[image.resize(TILED[::-1], processor.resample)]],
            size={"longest_edge": max(TILED)},
            return_tensors="pt",
        ),
        settings={"tiling": [2, 3]},
    ),
    "qwen2.5": Saved(
        "qwen2_5_vl",
        ("<|im_end|>", "<|image_pad|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"),
        qwen_config,
        lambda: Qwen2VLImageProcessor(patch_size=4, size={"shortest_edge": 64, "longest_edge": 4096}),
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{image}{text}<|im_end|>\n"
        "<|im_start|>assistant\n",
        lambda tokens: f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>",
        lambda processor, image, places: (
            processor(images=[image.resize(QWEN_SIZE[::-1], Resampling.BICUBIC)], return_tensors="pt")
            | {"mm_token_type_ids": places.int()}
        ),
        {"image_size": list(QWEN_SIZE)},
    ),
    "paligemma": Saved(
        "paligemma",
        ("<eos>", "<image>", "<bos>"),
        paligemma_config,
        lambda: SiglipImageProcessor(size={"height": SQUARE, "width": SQUARE}),
        "{image}<bos>{text}\n",
        lambda tokens: "<image>" * tokens,
        lambda processor, image, places: (
            processor(images=[image], return_tensors="pt")
            | {"token_type_ids": (torch.arange(places.shape[1]) == places.shape[1] - 1)[None].long()}
        ),
    ),
    "llava": LLAVA_ONEVISION,
    "llava tiled": replace(
        LLAVA_ONEVISION,
        inputs=lambda processor, image, places: processor(
            images=[image.resize(TILED[::-1], Resampling.BICUBIC)], return_tensors="pt"
        ),
        settings={"tiling": [2, 3]},
    ),
}


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny model of :data:`SAVED` with random weights, its tokenizer and its image processor."""
    saved = SAVED[name]
    words = [
        *WORDS_OF_THE_WORLD,
        "\n",
        "\n\n",
        "User",
        "Assistant",
        ":",
        "What",
        "colour",
        "thing",
        *map(str, range(20)),
    ]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "<unk>", *saved.marks, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    parts = Regex(r"\w+|[^\w\s]+|\n+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(parts, "removed", invert=True)
    end, image, *_ = saved.marks
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": list(saved.marks)})
    fast.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = BACKBONES[saved.kind].build(saved.config(len(fast), vocabulary[end], vocabulary[image]))
        enlarge(lm)
    lm.save_pretrained(folder)
    saved.processor().save_pretrained(folder)
    return folder


def save_smolvlm(folder: Path, seed: int = 0) -> Path:
    """Write a tiny SmolVLM that reads the features of tests/data_modules/tiny_data.py."""
    return save("smolvlm", folder, seed)
