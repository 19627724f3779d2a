"""Cost of training a config, without weights or data: parameters, FLOPs, memory and checkpoint size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from vlpet_lightning.batch import Batch
from vlpet_lightning.checks import positive
from vlpet_lightning.flops import sizes_of, tower_flops, training_flops
from vlpet_lightning.frozen_weights import cast_frozen
from vlpet_lightning.memory import fake_tensors, make_batch, optimizer_bytes, saved_for_backward, size
from vlpet_lightning.model import VLModel
from vlpet_lightning.module import VLModule
from vlpet_lightning.parameters import ParameterReport, count_parameters
from vlpet_lightning.tasks import VIDEO_TEXT, task

TEXT, TARGET = 20, 5  # tokens for tasks without a limit
ATTEMPTS = 8  # to build a model
CLIP_IMAGES = 8  # images of a clip for a decoder-only model (the default of `data extract video`)
FRAMES = 64  # of a clip (data_modules pools longer ones to it)


@dataclass(frozen=True)
class Step:
    """Shape of a training step, without padding.

    Args:
        task: Name of the task.
        samples: ``B``.
        text: ``T``.
        target: ``L``.
        vectors: ``F``, feature vectors per image or frames per clip; None is the number after pooling, or that of the
            model's own vision tower.
        precision: Of :data:`vlpet_lightning.memory.PRECISIONS`.
        gpu: Whether the kernels are those of a GPU.

    Raises:
        ValueError: If the task is unknown, or a number is out of range.
    """

    task: str
    samples: int
    text: int
    target: int
    vectors: int | None = None
    precision: str = "32-true"
    gpu: bool = True

    def __post_init__(self) -> None:
        task(self.task)
        for name in ("samples", "text", "target"):
            positive(name, getattr(self, name))
        if self.vectors is not None:
            positive("vectors", self.vectors)


@dataclass(frozen=True)
class Cost:
    """Cost of training with one config; all sizes are in bytes.

    Args:
        parameters: Parameter counts.
        flops: Model FLOPs of a training step for one sample (:mod:`vlpet_lightning.flops`).
        encoder_tokens: ``S``.
        weights: Parameters and buffers, without those of a vision tower that is not loaded.
        gradients: Gradients of the trained parameters.
        optimizer: State of the optimiser; None if it is unknown.
        activations: Activation memory of a step (:mod:`vlpet_lightning.memory`); None if it cannot be measured without
            values, as that of Qwen2.5-VL's tower.
        checkpoint: Tensors of a checkpoint: trained state and state of the optimiser; None if the latter is unknown.
        export: Tensors that ``export`` writes.
        build_seconds: Time to build the model without values.
        tower_flops: Model FLOPs of the vision tower for one sample, which stored features save; 0 if the tower runs.
        tower_weights: Weights of the vision tower, if it is not loaded.
        template_tokens: Tokens of the prompt template in ``encoder_tokens``; None if they are left out, as there is no
            tokenizer to count them with.
    """

    parameters: ParameterReport
    flops: int
    encoder_tokens: int
    weights: int
    gradients: int
    optimizer: int | None
    activations: int | None
    checkpoint: int | None
    export: int
    build_seconds: float
    tower_flops: int = 0
    tower_weights: int = 0
    template_tokens: int | None = 0

    @property
    def memory(self) -> int | None:
        """Sum of weights, gradients, optimiser state and activations."""
        if self.optimizer is None or self.activations is None:
            return None
        return self.weights + self.gradients + self.optimizer + self.activations

    def as_dict(self) -> dict[str, Any]:
        """Return the cost as plain numbers, for JSON."""
        return {**asdict(self), "memory": self.memory}


def cost_of(module: VLModule, step: Step) -> Cost:
    """Compute the cost of training a module, by building it and running a step on fake tensors.

    Args:
        module: A module that is not built; it stays so.
        step: Shape of the step.

    Raises:
        ValueError: If the units do not have the step's task, or the precision is not supported.
    """
    spec = task(step.task)
    with fake_tensors():
        start = time.perf_counter()
        model = _built(module).train()
        seconds = time.perf_counter() - start
        model.check_tasks([step.task])
        if module.frozen_dtype != "float32":
            cast_frozen(model, getattr(torch, module.frozen_dtype))
        clip = step.task in VIDEO_TEXT and not model.backbone.has_encoder
        pictures = CLIP_IMAGES if clip else spec.images
        vectors, width = step.vectors or model.visual.vectors or FRAMES, module.feature_dim
        if model.backbone.reads_pixels:
            if step.vectors is not None:
                raise ValueError(f"vectors is {step.vectors}: the model reads pixels, whose number is its own; omit it")
            visual: Any = model.visual
            vectors, width = visual.input_shape
        batch = make_batch(
            step.task,
            step.samples,
            text=step.text,
            target=step.target,
            features=(vectors,) if pictures == 1 else (pictures, vectors),
            width=width,
            weighted=spec.loss == "weighted_sample",
        )
        images, source = model.visual.tokens(batch.features), model.mask(batch).shape[1]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        state = optimizer_bytes(module.optimizer, trained)
        rows = model.added_rows
        unused = [] if model.backbone.reads_pixels else model.backbone.tower_parts(model.lm)
        tower = sum(map(size, tensors_of(*unused)))
        export = sum(map(size, model.own_state().values())) + (0 if rows is None else size(rows))
        return Cost(
            parameters=count_parameters(model),
            flops=training_flops(sizes_of(model), images=images, source=source, target=step.target),
            encoder_tokens=source,
            weights=sum(map(size, tensors_of(model))) - tower,
            gradients=sum(map(size, trained)),
            optimizer=state,
            activations=_activations(model, batch, step),
            checkpoint=None if state is None else export + state,
            export=export,
            build_seconds=seconds,
            tower_flops=pictures * tower_flops(model) if unused else 0,
            tower_weights=tower,
            template_tokens=model.backbone.template_tokens(pictures),
        )


def _activations(model: VLModel, batch: Batch, step: Step) -> int | None:
    try:
        return saved_for_backward(model, batch, precision=step.precision, gpu=step.gpu)
    except (DataDependentOutputException, DynamicOutputShapeException):  # of some vision towers
        return None


def tensors_of(*modules: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of modules."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _built(module: VLModule) -> VLModel:
    """Build a model on fake tensors, again where torch fails on the first tensor of a shape (peft's VeRA)."""
    for _ in range(ATTEMPTS):
        try:
            return module.build(pretrained=False)
        except RuntimeError as error:  # a tensor outside torch's cache of fake tensors cannot be swapped
            if "Couldn't swap" not in str(error):
                raise
            last = error
    raise last


def default_step(name: str, settings: Mapping[str, Any], **given: Any) -> Step:
    """Return the step of a task in a config; its lengths are the task's limits, or 20 and 5 tokens without a limit.

    Args:
        name: Name of the task.
        settings: The whole config as plain data; ``batch_size`` of its data and ``precision`` of its trainer are used.
        given: Fields of :class:`Step` that replace these; None keeps them.
    """
    spec = task(name)
    data = (settings.get("data") or {}).get("init_args") or {}
    trainer = settings.get("trainer") or {}
    found: dict[str, Any] = {
        "samples": spec.batch_size(data.get("batch_size") or 1),
        "text": spec.max_text or TEXT,
        "target": spec.max_target or TARGET,
        "precision": str(trainer.get("precision") or "32-true"),
    }
    return Step(name, **(found | {key: value for key, value in given.items() if value is not None}))
