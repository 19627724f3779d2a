"""Answers to questions about image files, from an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from vlpet_lightning.answers import Answer, answer_batch, top_answers
from vlpet_lightning.backbones import load_tokenizer
from vlpet_lightning.backbones.causal import CausalBackbone
from vlpet_lightning.backbones.pixels import PIXELS
from vlpet_lightning.batch import Batch
from vlpet_lightning.checks import positive
from vlpet_lightning.inputs import prompted, text_batch
from vlpet_lightning.interop.export.model_card import HERE
from vlpet_lightning.interop.export.pet_files import load_pet
from vlpet_lightning.interop.export.record import read_record
from vlpet_lightning.tasks import IMAGE_TEXT, TaskSpec
from vlpet_lightning.tasks import task as task_named
from vlpet_lightning.vision.features import (
    ENCODER,
    build_encoder,
    check_record,
    check_same_extractor,
    differences,
    read_features_record,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlpet_lightning.vision.choice import AnyEncoder

    Picture = str | Path | Image
    Pictures = Picture | tuple[Picture, ...]

BATCH = 32


class Source(NamedTuple):
    """Features of a task: their record, and the folders with their encoder's files."""

    record: dict[str, Any]
    folders: tuple[Path, ...]


class Predictor:
    """Answer questions about pictures with an exported model.

    Pictures are encoded as the features of the training data were, which the export records. A question about several
    pictures (NLVR2) takes a tuple of them; lists are batches.

    The example runs in tests/test_predictor.py, which has an export and a picture:

    >>> from vlpet_lightning import Predictor
    >>> predictor = Predictor(folder)  # doctest: +SKIP
    >>> answer = predictor(photo, "What is on the table?")  # doctest: +SKIP
    >>> isinstance(answer, str)  # doctest: +SKIP
    True
    >>> best, second = predictor(photo, "What is on the table?", top=2)  # doctest: +SKIP
    >>> best.probability >= second.probability  # doctest: +SKIP
    True
    >>> len(predictor([photo, photo], "What is on the table?"))  # doctest: +SKIP
    2

    Args:
        folder: Folder written by ``export``.
        backbone: Folder or hub name of the pretrained language model; by default the name in the export.
        device: Device of model and encoder; by default a GPU if there is one.
        store: Feature store of the training data, for exports that do not record it; its record must not contradict
            that of the export.
        encoder_weights: File of the encoder's weights, if the features were made with a file of weights.
        architecture: JSON file of the encoder's architecture, if the export lacks it.
        batch_size: Number of questions answered at once.

    Raises:
        FileNotFoundError: If a file of the export or of the encoder, or the backbone is missing.
        ValueError: If the features are of another extractor than the model was trained on, or their extractor is
            unknown; if the model answers questions about clips only; or if there is no such device.
    """

    def __init__(
        self,
        folder: str | Path,
        backbone: str | None = None,
        *,
        device: str | None = None,
        store: str | Path | None = None,
        encoder_weights: str | None = None,
        architecture: str | None = None,
        batch_size: int = BATCH,
    ) -> None:
        record = read_record(folder)
        self.batch_size = positive("batch_size", batch_size)
        self.device = _device(device)
        protocol = record.get("protocol") or {}
        trained = tuple(record.get("features") or protocol.get("tasks") or IMAGE_TEXT)
        self.tasks = tuple(name for name in trained if name in IMAGE_TEXT)
        if not self.tasks:
            raise ValueError(
                f"the model of {folder} was trained on {', '.join(trained)}, which are about clips: give one that was "
                f"trained on {', '.join(IMAGE_TEXT)}"
            )
        self.sources = _sources(record, Path(folder), store, self.tasks)
        self.model = load_pet(folder, backbone).to(self.device)
        name = backbone or (str(folder) if record["backbone"]["name"] == HERE else record["backbone"]["name"])
        own = (name, self.model) if isinstance(self.model.backbone, CausalBackbone) else None
        self.encoders = _encoders(self.sources, self.device, encoder_weights, architecture, own)
        self.tokenizer = load_tokenizer(name)
        self.prompts: dict[str, str] = dict(protocol.get("prompts") or {})

    @overload
    def __call__(self, image: Pictures, question: str = "", task: str | None = None) -> str: ...
    @overload
    def __call__(self, image: list[Pictures], question: str | list[str] = "", task: str | None = None) -> list[str]: ...
    @overload
    def __call__(self, image: Pictures, question: list[str], task: str | None = None) -> list[str]: ...
    @overload
    def __call__(self, image: Any, question: Any = "", task: str | None = None, *, top: int) -> Any: ...

    def __call__(self, image: Any, question: Any = "", task: str | None = None, *, top: int | None = None) -> Any:
        """Answer questions.

        Args:
            image: A file or picture, or a tuple of two for NLVR2; a list of these is a batch.
            question: Question or statement; a list is a batch. A single image or question is used for the whole batch.
                Captions have none. A question longer than the task's ``max_text`` is truncated, as in training;
                see :meth:`truncated`.
            task: ``vqa``, ``gqa``, ``nlvr2`` or ``caption``; by default ``nlvr2`` for two images, ``caption`` without
                a question, and ``vqa`` otherwise.
            top: If given, return this many answers with their probabilities, most probable first.

        Returns:
            The answer as text, or a list of :class:`~vlpet_lightning.answers.Answer` if ``top`` is given; for a batch,
            a list of these.

        Raises:
            FileNotFoundError: If an image file is missing.
            ValueError: If an image cannot be read, or the task and the number of images or questions do not fit.
        """
        single = not isinstance(image, list) and not isinstance(question, list)
        images, questions = _paired(image, question)
        spec = self.task(images, questions, task)
        found: list[Any] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            found += self._answers(spec, images[part], questions[part], top)
        return found[0] if single else found

    def task(self, images: Sequence[tuple[Any, ...]], questions: Sequence[str], name: str | None = None) -> TaskSpec:
        """Check that questions fit their task, and return the task.

        Args:
            images: ``B`` tuples of images.
            questions: ``B`` questions.
            name: The task; by default chosen from the number of images and the questions.

        Raises:
            ValueError: If they do not fit, or the model was not trained on the task.
        """
        if name is None:
            kinds = {default_task(len(some), text) for some, text in zip(images, questions, strict=True)}
            if len(kinds) > 1:
                raise ValueError(f"a batch of {' and '.join(sorted(kinds))}: ask about each of them in its own batch")
            (name,) = kinds
        spec = task_named(name)
        if spec.name not in IMAGE_TEXT:
            raise ValueError(f"task {name!r} is about clips: choose one of {', '.join(IMAGE_TEXT)}")
        if spec.name not in self.tasks:
            raise ValueError(f"the model was not trained on {name}: choose one of {', '.join(self.tasks)}")
        wrong = next((len(some) for some in images if len(some) != spec.images), None)
        if wrong is not None:
            raise ValueError(f"a question of {name} is about {spec.images} image(s), got {wrong}")
        asked = [text for text in questions if text.strip()]
        if name == "caption" and asked:
            raise ValueError(f"a caption answers no question, got {asked[0]!r}: leave it out, or give another task")
        if name != "caption" and len(asked) < len(questions):
            raise ValueError(f"{name} needs a question, got an empty one")
        return spec

    def truncated(self, spec: TaskSpec, questions: Sequence[str]) -> list[int]:
        """Return the indices of the questions that exceed the task's maximum length and are truncated."""
        if spec.max_text is None:
            return []
        inputs = prompted(spec, questions, self.prompts.get(spec.name))
        lengths = map(len, self.tokenizer(inputs)["input_ids"])
        return [number for number, length in enumerate(lengths) if length > spec.max_text]

    def _answers(
        self, spec: TaskSpec, images: Sequence[tuple[Any, ...]], questions: Sequence[str], top: int | None
    ) -> list[Any]:
        batch = self.batch(spec, images, questions)
        if top is None:
            return answer_batch(self.model, self.tokenizer, batch)
        answers: list[list[Answer]] = top_answers(self.model, self.tokenizer, batch, positive("top", top))
        return answers

    def batch(self, spec: TaskSpec, images: Sequence[tuple[Any, ...]], questions: Sequence[str]) -> Batch:
        """Build the model's input.

        Args:
            spec: Task of all questions.
            images: ``B`` tuples of image files or pictures.
            questions: ``B`` texts without the task prompt.
        """
        features = self.encode([picture for some in images for picture in some], spec.name)
        if spec.images > 1:
            features = features.view(len(images), spec.images, *features.shape[1:])
        return text_batch(self.tokenizer, spec, questions, features, prompt=self.prompts.get(spec.name)).to(self.device)

    def encode(self, pictures: Sequence[Any], task: str | None = None) -> Tensor:
        """Return the ``(n, tokens, dim)`` float16 features of image files or pictures, rounded as in a store.

        A model that reads pixels gets them in float32.

        Args:
            pictures: ``n`` files or pictures; duplicates are encoded once.
            task: Task whose features are made, which may have an extractor of its own; by default the model's first.
        """
        name = self.tasks[0] if task is None else task
        encoder = self.encoders[name]
        orientation = bool(self.sources[name].record["extractor"].get("exif_orientation", False))
        keys = [str(some) if isinstance(some, str | Path) else id(some) for some in pictures]
        distinct = dict(zip(keys, pictures, strict=True))
        places = {key: place for place, key in enumerate(distinct)}
        pixels = torch.stack([encoder.pixels(_picture(some, orientation)) for some in distinct.values()])
        found = encoder(pixels)
        found = found if self.model.backbone.reads_pixels else found.half()
        return found[[places[key] for key in keys]]


def _picture(picture: Any, exif_orientation: bool) -> Any:
    """Return a file's or an open picture in 8-bit RGB."""
    from vlpet_lightning.vision.images import read_image, to_rgb

    if not isinstance(picture, str | Path):
        return to_rgb(picture, exif_orientation=exif_orientation)
    if not Path(picture).is_file():
        raise FileNotFoundError(f"there is no image {picture}")
    try:
        return read_image(Path(picture), exif_orientation=exif_orientation)
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"the image {picture} cannot be read ({error}): give another file") from error


def _device(name: str | None) -> str:
    """Return the device to use: a GPU if none is named and there is one."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: no GPU can be used here, give cpu")
    return name


def default_task(images: int, question: str) -> str:
    """Return the task that a number of images and a question suggest."""
    return "nlvr2" if images == 2 else "vqa" if question.strip() else "caption"


def _paired(image: Any, question: Any) -> tuple[list[tuple[Any, ...]], list[str]]:
    images = image if isinstance(image, list) else [image]
    questions = question if isinstance(question, list) else [question]
    count = max(len(images), len(questions))
    if not images or not questions or {len(images), len(questions)} - {1, count}:
        raise ValueError(f"{len(images)} images and {len(questions)} questions: give as many of both, or one of either")
    images, questions = (some * count if len(some) == 1 else some for some in (images, questions))
    return [some if isinstance(some, tuple) else (some,) for some in images], questions


def _sources(record: dict[str, Any], folder: Path, store: str | Path | None, tasks: Sequence[str]) -> dict[str, Source]:
    """Return the features of each task.

    Args:
        record: Record of the export.
        folder: Folder of the export.
        store: Feature store of the training data, if one is given.
        tasks: Tasks that the model answers.
    """
    recorded: dict[str, Any] = record.get("features") or {}
    if not isinstance(recorded, dict):
        raise ValueError(f"the features of the export {folder} cannot be read ({recorded!r}): export again")
    for name, features in recorded.items():
        check_record(features, f"features.{name} of the export {folder}")
    if not recorded and (record["backbone"].get("template") or {}).get(PIXELS):  # the model's own image processor
        unrecorded = Source({"extractor": {"exif_orientation": True}}, ())
        return dict.fromkeys(tasks, unrecorded)
    if not recorded and store is None:
        raise ValueError(
            f"{folder} does not record the features that its model was trained on: give the feature store (--store)"
        )
    found = {}
    for name in recorded:
        own = folder / ENCODER / name
        found[name] = Source(recorded[name], (own if own.is_dir() else folder / ENCODER,))
    if store is not None:
        given, place = read_features_record(store), Path(store)
        if not recorded:
            if given["dim"] != record["model"]["feature_dim"]:
                raise ValueError(
                    f"the model reads features {record['model']['feature_dim']} wide, and {store} has {given['dim']}: "
                    "give the store that it was trained on"
                )
            return {name: Source(given, (place,)) for name in tasks}
        same = [name for name in found if not differences(given, found[name].record)]
        if not same:
            check_same_extractor(given, next(iter(recorded.values())), f"the store {store}")
        found |= {name: Source(found[name].record, (place, *found[name].folders)) for name in same}
    return {name: found[name] for name in tasks}


def _encoders(
    sources: dict[str, Source],
    device: str,
    weights: str | None,
    architecture: str | None,
    own: tuple[str, Any] | None,
) -> dict[str, AnyEncoder]:
    """Build the encoder of each task; tasks with the same extractor share one."""
    found: dict[str, AnyEncoder] = {}
    if own is not None and own[1].backbone.reads_pixels:
        return {name: _pixel_encoder(source.record, *own) for name, source in sources.items()}
    for name, source in sources.items():
        same = [one for one in found if not differences(sources[one].record, source.record)]
        if same:
            found[name] = found[same[0]]
        else:
            found[name] = build_encoder(*source, device=device, weights=weights, architecture=architecture, own=own)
    return found


def _pixel_encoder(record: Mapping[str, Any], name: str, model: Any) -> AnyEncoder:
    """Return the image processor of a model that runs its own tower; checked if the record has its settings."""
    from vlpet_lightning.vision.towers import PixelEncoder

    encoder = PixelEncoder(name, model)
    if "model" in record["extractor"]:
        encoder.check(record["extractor"])
    return encoder
