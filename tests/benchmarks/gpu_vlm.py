"""Training steps and generation of decoder-only models with random weights; training also with their vision tower."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch

from tests.benchmarks.contenders import our_optimizer, training_pass
from tests.benchmarks.pairs import seconds_of
from vlpet_lightning.backbones import BACKBONES, backbone_of
from vlpet_lightning.backbones.pixels import PIXELS
from vlpet_lightning.backbones.unloaded_tower import Unloaded, parts_outside
from vlpet_lightning.batch import Batch
from vlpet_lightning.flops import sizes_of, training_flops
from vlpet_lightning.frozen_weights import cast_frozen
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import VLPET, LargeGate, ParallelAdapter, Placement

TEXT, TARGET, RANK = 20, 10, 32
BEAMS, LENGTH = 5, 20
SIZES = {  # batch sizes of models known by name; the largest models last
    "HuggingFaceTB/SmolVLM-256M-Instruct": 64,
    "google/paligemma2-3b-pt-224": 16,
    "Qwen/Qwen2.5-VL-3B-Instruct": 16,
}
IMAGE_SIZES = {"Qwen/Qwen2.5-VL-3B-Instruct": [448, 448]}
TINY = {
    "text_config": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "scale_factor": 2,
}
GATED = partial(VLPET, rank=RANK, gate=partial(LargeGate, rank=RANK))
PLACEMENTS = [  # of experiments/vlm/pet/vlpet_large.yaml
    Placement(["decoder.attn", "decoder.ffn"], GATED, "prefix"),
    Placement("decoder.attn.value", partial(ParallelAdapter, rank=RANK)),
]
IN_TOWER = Placement(["vision.attn", "vision.ffn"], GATED)


def make_model(family: Any, config: Any, device: str, pixels: bool) -> VLModel:
    """Build a model with random weights and VL-PET-large; without the values of a tower that does not run."""
    with torch.device(device):
        lm = family.build(config)
        for name in [] if pixels else parts_outside(lm, family.tower_path, family.projector_path):
            lm.set_submodule(name, Unloaded(lm.get_submodule(name), {}))
        model = VLModel(
            family,
            lm,
            feature_dim=family.feature_dim(config),
            placements=[*PLACEMENTS, IN_TOWER] if pixels else PLACEMENTS,
            trainable=("pet", "visual_embedding"),
        )
    cast_frozen(model, torch.bfloat16)
    return model.train()


def make_batch(model: VLModel, size: int, device: str) -> Batch:
    """Draw a batch of VQA's shape, whose images are random features or pixels."""
    visual: Any = model.visual
    generator = torch.Generator().manual_seed(0)
    return Batch(
        task="vqa",
        input_ids=torch.randint(3, 60, (size, TEXT), generator=generator),
        features=torch.randn(size, *visual.input_shape, generator=generator),
        labels=torch.randint(3, 60, (size, TARGET), generator=generator),
    ).to(device)


def decoder_only(run: Any) -> None:
    """Speed and memory of decoder-only models, in bf16 with random weights, with and without CUDA graphs.

    Args:
        run: The :class:`tests.benchmarks.gpu.Session`.
    """
    for name, size in {"tiny": 4}.items() if run.tiny else SIZES.items():
        for pixels in (False, True):
            run.check_time()
            run.forget()
            family: Any = BACKBONES["idefics3"] if run.tiny else backbone_of(name)
            family = family.with_sizes({"image_size": IMAGE_SIZES.get(name), PIXELS: pixels})
            config = family.config_class(**TINY) if run.tiny else family.config(name)
            title = f"train {name}, random weights, batch {size}, {'tower and gates in it' if pixels else 'features'}"
            try:
                _measure(run, title, make_model(family, config, run.device, pixels), size, pixels)
            except torch.OutOfMemoryError:
                run.say(title, failed="out of memory")
            gc.collect()  # models with graphs refer to themselves


def _measure(run: Any, title: str, model: VLModel, size: int, pixels: bool) -> None:
    run.say(title, **_step(run, model, size))
    if pixels:
        return
    if run.cuda:
        run.forget()
        model.use_cuda_graphs()
        run.say(f"{title}, CUDA graphs", **_step(run, model, size))
        model.graphs = None
    run.say(title.replace("train", "generate"), **_search(run, model.eval(), size))


def _step(run: Any, model: VLModel, size: int) -> dict[str, float]:
    batch = make_batch(model, size, run.device)
    work = training_pass(model.loss, our_optimizer(model), [batch], device=run.device, bf16=True)
    first = seconds_of(work, run.device)
    seconds = run.median(work, repeats=4, warm_up=1)
    images, source = model.visual.tokens(batch.features), model.mask(batch).shape[1]
    flops = training_flops(sizes_of(model), images=images, source=source, target=TARGET)
    return {
        "samples_per_s": size / seconds,
        "first_step_s": first,
        "peak_gib": run.peak(),
        "model_tflops": size * flops / seconds / 1e12,
    }


def _search(run: Any, model: VLModel, size: int) -> dict[str, float]:
    batch = make_batch(model, size, run.device)
    search = partial(model.generate, batch, num_beams=BEAMS, max_length=LENGTH)
    with run.autocast(True):
        figures = {"samples_per_s": size / run.median(search, 3, 1)}
        if run.cuda:
            expected = search()
            model.use_generation_graphs()
            figures["samples_per_s_with_graphs"] = size / run.median(search, 3, 2)
            found = search()
            answers = min(found.shape[1], expected.shape[1])
            same = (found[:, :answers] == expected[:, :answers]).all(dim=1)  # rounding differs between batch sizes
            figures["equal_answers"] = same.float().mean().item()
    return figures
