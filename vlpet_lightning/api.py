"""Short functions for notebooks: build a model, make a batch, load a run (docs/python.md).

Counting, saving and predicting are :func:`~vlpet_lightning.parameters.count_parameters`,
:func:`~vlpet_lightning.interop.export.pet_files.save_pet` and :class:`~vlpet_lightning.predictor.Predictor`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlpet_lightning.backbones import config_of
from vlpet_lightning.batch import Batch
from vlpet_lightning.cli import ModelFromPython
from vlpet_lightning.config_errors import unknown_setting
from vlpet_lightning.inputs import text_batch
from vlpet_lightning.module import MODULES, VLBart, VLModule
from vlpet_lightning.pet import Granularity, Placement
from vlpet_lightning.pet.serialization import check_written, placements_to_plain, to_plain
from vlpet_lightning.run.folder import CHECKPOINTS, CONFIG, run_folder
from vlpet_lightning.run.restore import load_checkpoint, seed_of
from vlpet_lightning.tasks import task as task_named
from vlpet_lightning.user_errors import for_the_user

Placements = Placement | Sequence[Placement] | Granularity
LAST = "last.ckpt"


def build(
    backbone: str | Path,
    placements: Placements | None = None,
    trainable: Sequence[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> VLModule:
    """Build a model with its backbone loaded and its units inserted.

    The result is a LightningModule, for a ``Trainer`` or for a loop of one's own: ``model(batch)`` gives logits,
    ``model.loss(batch)`` the loss, ``model.answer(batch)`` texts. New weights depend on ``seed_everything`` only.

    >>> import tempfile
    >>> import vlpet_lightning as vl
    >>> from vlpet_lightning.pet import VLPET, LargeGate, Placement
    >>> backbone = vl.random_backbone(tempfile.mkdtemp(), ["what color is it ?", "red"], width=32)
    >>> units = Placement(["encoder.attn", "encoder.ffn"], VLPET.with_(rank=8, gate=LargeGate.with_(rank=8)))
    >>> model = vl.build(backbone, units, feature_dim=16, grid=None)
    >>> type(model).__name__, model.rules
    ('VLBart', ['pet', 'visual_embedding'])
    >>> vl.build(backbone, Placement("encoder.mlp", VLPET))
    Traceback (most recent call last):
    ...
    ValueError: unknown site 'encoder.mlp' in placement 0: choose from decoder.attn, decoder.attn.key, ...

    Args:
        backbone: Folder or hub name of a pretrained BART, mBART or T5;
            :func:`~vlpet_lightning.backbones.small.random_backbone` writes a small one.
        placements: Units and their sites.
        trainable: Rules of :mod:`vlpet_lightning.trainable`; by default ``visual_embedding``, and ``pet`` if there are
            units.
        device: Device of the model. On ``meta`` nothing is loaded, and the model can only be counted.
        settings: Further arguments of :class:`~vlpet_lightning.module.VLModule`.

    Raises:
        FileNotFoundError: If there is no such backbone.
        ValueError: If the backbone is of another family, or a site, rule or setting is unknown or out of range.
    """
    kind = config_of(str(backbone), VLBart.kind).model_type
    if kind not in MODULES:
        raise ValueError(f"{str(backbone)!r} is a {kind} model: give one of {', '.join(MODULES)}, or use VLCausal")
    known = [name for name in signature(VLModule).parameters if name not in ("backbone", "placements", "trainable")]
    for name in settings:
        if name not in known:
            raise ValueError(unknown_setting(MODULES[kind].__name__, name, known))
    units = _listed(placements)
    if trainable is None:
        trainable = ["pet", "visual_embedding"] if units or settings.get("peft") else ["visual_embedding"]
    return _built(MODULES[kind](str(backbone), units, list(trainable), **settings), device)


def from_config(*configs: str | Path, device: str | torch.device = "cpu", **settings: Any) -> VLModule:
    """Build the model that ``fit`` would train with these config files.

    >>> import tempfile
    >>> import vlpet_lightning as vl
    >>> backbone = vl.random_backbone(tempfile.mkdtemp(), ["what color is it ?", "red"], width=32)
    >>> config = backbone / "lora.yaml"
    >>> _ = config.write_text('''
    ... model:
    ...   class_path: vlpet_lightning.VLBart
    ...   init_args:
    ...     placements:
    ...       - at: [encoder.attn.query]
    ...         unit: {class_path: vlpet_lightning.pet.LoRA, init_args: {rank: 128}}
    ...     trainable: [pet]
    ... ''')
    >>> vl.count_parameters(vl.from_config(config, device="meta")).trainable
    1179648
    >>> vl.count_parameters(vl.from_config(config, backbone=backbone)).trainable
    16384

    Args:
        configs: Config files, e.g. an experiment and an overlay; later files override earlier ones.
        device: As in :func:`build`.
        settings: Arguments of :class:`~vlpet_lightning.module.VLModule` that override the files.

    Raises:
        FileNotFoundError: If there is no such backbone.
        ValueError: If a file is missing, or a setting is unknown or of the wrong type.
    """
    return _built(_parsed(configs, settings).model, device)


def load_run(path: str | Path, *, device: str | torch.device = "cpu", **settings: Any) -> VLModule:
    """Load a trained model from the folder of its run.

    The first example runs in tests/test_api.py, which has a run:

    >>> import vlpet_lightning as vl
    >>> vl.load_run(folder).training  # doctest: +SKIP
    False
    >>> vl.load_run("runs/nothing")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no run at runs/nothing: give the folder that fit has written, or a file of its `checkpoints`

    Args:
        path: A run's folder, for its last checkpoint, or a checkpoint in it.
        device: Device of the model.
        settings: Arguments of :class:`~vlpet_lightning.module.VLModule` that override the run's config, e.g. a
            backbone that lies elsewhere now.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: If there is no checkpoint, config or backbone.
        ValueError: If the checkpoint cannot be read, or the settings describe another method than it has.
    """
    checkpoint = _checkpoint(Path(path))
    config = run_folder(checkpoint) / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"no {CONFIG} at {config}, where fit writes the settings of {checkpoint}")
    parsed = _parsed([config], settings)
    load_checkpoint(parsed.model, checkpoint, seed_of(parsed.config.get("seed_everything")))
    return parsed.model.to(device)


def make_batch(
    model: VLModule,
    task: str,
    texts: Sequence[str],
    features: Tensor,
    answers: Sequence[str] | None = None,
    *,
    prompt: str | None = None,
) -> Batch:
    """Make a batch of questions about images whose features are given.

    >>> import tempfile
    >>> import torch
    >>> import vlpet_lightning as vl
    >>> backbone = vl.random_backbone(tempfile.mkdtemp(), ["what color is it ?", "red"], width=32)
    >>> model = vl.build(backbone, feature_dim=16, grid=None)
    >>> batch = vl.make_batch(model, "vqa", ["what color is it ?"], torch.randn(1, 4, 16), answers=["red"])
    >>> model.tokenizer.batch_decode(batch.input_ids), model.tokenizer.batch_decode(batch.labels)
    (['<s> <unk> <unk> what color is it ? </s>'], ['<s> red </s>'])
    >>> model(batch).shape[:2], len(model.answer(batch))
    (torch.Size([1, 3]), 1)

    Args:
        model: The model, whose tokenizer is used.
        task: A task of the benchmark, e.g. ``vqa``; it determines prompt, length limits, loss and decoding.
        texts: ``B`` questions or statements; empty texts for captions.
        features: ``(B, F, D)`` feature vectors, or ``(B, 2, F, D)`` for ``nlvr2``; of a model with ``image_input:
            pixels``, what its ``pixel_reader()`` makes of the pictures.
        answers: ``B`` target texts for training; "true" or "false" for ``nlvr2``.
        prompt: Prompt to use instead of the original's.

    Raises:
        ValueError: If the numbers of texts, answers and features differ, the features do not fit task and model, or
            the model is on the meta device.
    """
    if not hasattr(model, "tokenizer"):
        raise ValueError("a model on the meta device has no weights and can only be counted: build it on another")
    spec = task_named(task)
    counts = {"texts": len(texts), "features": len(features)} | ({} if answers is None else {"answers": len(answers)})
    if len(set(counts.values())) > 1 or not len(texts):
        said = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"a batch needs as many texts, answers and features, at least one of each: got {said}")
    built = model.built()
    visual: Any = built.visual
    width = visual.input_shape[1] if built.backbone.reads_pixels else model.feature_dim
    wanted = f"(B, F, {width})" if spec.images == 1 else f"(B, {spec.images}, F, {width})"
    images = 1 if features.dim() == 3 else features.shape[1]
    if features.dim() not in (3, 4) or images != spec.images or features.shape[-1] != width:
        raise ValueError(f"features for {task} must have shape {wanted}, got {tuple(features.shape)}")
    batch = text_batch(model.tokenizer, spec, texts, features, answers, prompt)
    return batch.to(built.backbone.token_embedding(built.lm).device)


def _listed(placements: Placements | None) -> list[Placement]:
    if isinstance(placements, Granularity):
        return placements.placements()
    return [placements] if isinstance(placements, Placement) else list(placements or ())


def _built(module: VLModule, device: str | torch.device) -> VLModule:
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            module.model = module.build(pretrained=False)
        return module
    module.configure_model()
    return module.to(device)


def _override(name: str, value: Any) -> str:
    """Return a setting as an argument of the command line."""
    if isinstance(value, str | Path):
        return f"--model.init_args.{name}={value}"
    plain = placements_to_plain(_listed(value)) if name == "placements" else to_plain(value)
    check_written(plain)
    return f"--model.init_args.{name}={json.dumps(plain)}"


def _parsed(configs: Sequence[str | Path], settings: dict[str, Any]) -> ModelFromPython:
    """Parse config files as ``fit`` does, without building anything."""
    words = [word for path in configs for word in ("--config", str(path))]
    words += [_override(name, value) for name, value in settings.items()]
    try:
        return ModelFromPython(words, run=False)
    except ValueError as error:  # jsonargparse wraps the errors of our constructors
        meant = for_the_user(error)
        raise error if meant is None else meant from None


def _checkpoint(path: Path) -> Path:
    """Return a checkpoint, given itself or its run."""
    if path.is_file():
        return path
    folder = path / CHECKPOINTS
    if (folder / LAST).is_file():
        return folder / LAST
    found = sorted(folder.glob("*.ckpt"))
    if len(found) == 1:
        return found[0]
    if found:
        raise FileNotFoundError(f"no {LAST} in {folder}: give one of {', '.join(file.name for file in found)}")
    raise FileNotFoundError(f"no run at {path}: give the folder that fit has written, or a file of its `{CHECKPOINTS}`")
