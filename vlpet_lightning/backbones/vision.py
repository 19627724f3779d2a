"""The vision half of a decoder-only model: its tower, its projector, and features or pixels as their input."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from vlpet_lightning.backbones.base import Backbone
from vlpet_lightning.backbones.image_processor import load_image_processor
from vlpet_lightning.backbones.pixels import PIXELS, ProjectedPixels
from vlpet_lightning.backbones.projected_features import ProjectedFeatures
from vlpet_lightning.backbones.unloaded_tower import (
    NOT_LOADED,
    is_whole,
    load_without_tower,
    parts_outside,
    safetensors_files,
    weights_or_rows,
)
from vlpet_lightning.checksums import weights_digest
from vlpet_lightning.pet.operations import Applied, AttentionInImage, Operations

IN_THE_TOWER = (
    "the vision tower does not run in training, which reads its stored outputs; set image_input of VLCausal to pixels "
    "and `images` of the data module to the folder of the image files, or use projector or sites of the decoder"
)
IMAGE_SETTINGS = {  # their form, and the reason why a family has none
    "image_size": ("[height, width]", "a {} model has its own"),
    "tiling": ("[rows, columns]", "images of a {} model are not divided"),
}

Described = TypeVar("Described", bound="VisionBackbone")


class VisionBackbone(Backbone):
    """Tower and projector of a decoder-only model.

    Attributes:
        loads_tower: Whether :meth:`load` reads the weights of the vision tower; see :meth:`without_tower`.
        projector_path: Name of the projector in the model.
        tower_path: Name of the vision tower.
        tower_layers_path: Name of the list of the tower's layers, relative to the tower.
        image_settings: Names of the settings that determine the feature vectors of an image, beside the model's
            configuration; each is an attribute too, ``(height, width)`` or ``(rows, columns)``, or None.
    """

    loads_tower = True
    projector_path: ClassVar[str]
    tower_path: ClassVar[str]
    tower_layers_path: ClassVar[str] = "encoder.layers"
    image_settings: ClassVar[tuple[str, ...]] = ()
    _reads_pixels = False

    @property
    def reads_pixels(self) -> bool:
        return self._reads_pixels

    def refused_in_tower(self) -> dict[str, str]:
        """Return the reasons why units cannot be placed inside the tower; none if it runs."""
        return {} if self.reads_pixels else dict.fromkeys(("vision.attn", "vision.ffn"), IN_THE_TOWER)

    def with_sizes(self: Described, settings: Mapping[str, Any]) -> Described:
        """Return this description with those of its settings that are about images, which need no tokenizer.

        Raises:
            ValueError: If a size does not apply to the family, or is not a pair of positive numbers.
        """
        found = copy.copy(self)
        for name, (form, reason) in IMAGE_SETTINGS.items():
            value = settings.get(name)
            if value is None:
                continue
            if name not in self.image_settings:
                raise ValueError(f"{name} is {value}: {reason.format(self.kind)}, omit it")
            if len(value) != 2 or min(value) < 1:
                raise ValueError(f"{name} must be {form}, got {list(value)}")
            setattr(found, name, tuple(value))
        found._reads_pixels = bool(settings.get(PIXELS, False))
        return found

    def recorded_settings(self) -> dict[str, list[int] | None]:
        """Return the values of :attr:`image_settings`, as in the record of a feature store."""
        values = {name: getattr(self, name) for name in self.image_settings}
        return {name: None if value is None else list(value) for name, value in values.items()}

    def without_tower(self: Described) -> Described:
        """Return this description for models that are loaded without a vision tower that they do not run."""
        found = copy.copy(self)
        found.loads_tower = self.reads_pixels
        return found

    def from_pretrained(self, name_or_path: str, **settings: Any) -> Any:
        files = {} if self.loads_tower else safetensors_files(name_or_path)
        parts = self.tower_path, self.projector_path
        found = load_without_tower(self.model_class, *parts, files, name_or_path, **settings) if files else None
        if found is not None:
            return found
        found = super().from_pretrained(name_or_path, **settings)
        if not self.loads_tower:
            warnings.warn(
                f"the vision tower of {name_or_path!r} is loaded, too: its weights are not in safetensors files under "
                f"the names of the model; save it with save_pretrained to need less memory",
                stacklevel=2,
            )
        return found

    def check_whole(self, lm: Any) -> None:
        if not is_whole(lm):
            raise ValueError(NOT_LOADED)

    def save_processor(self, name_or_path: str, folder: Path) -> None:
        try:
            load_image_processor(name_or_path).save_pretrained(folder)
        except FileNotFoundError as error:
            warnings.warn(f"`ask` will not work with {folder}: {error}", stacklevel=2)

    def projector(self, lm: Any) -> nn.Module:
        """Return the module between vision tower and language model."""
        return lm.get_submodule(self.projector_path)

    def projector_function(self, lm: Any) -> Callable[[Tensor], Tensor]:
        """Return what maps ``(n, F, D)`` features of images to their tokens, by default the projector."""
        return self.projector(lm)

    def visual_parameters(self, lm: Any, visual: nn.Module) -> dict[str, nn.Parameter]:
        named = self.projector(lm).named_parameters()
        return {f"lm.{self.projector_path}.{name}": parameter for name, parameter in named}

    def visual_operations(self, lm: Any, visual: nn.Module) -> Operations:
        if self.reads_pixels:
            yield from self.tower_operations(lm)
        for part in self.projector(lm).modules():  # features need no gradient, the inputs of later layers do
            yield Applied(part, "images", ("tower", "projected"), "projected")

    def tower_operations(self, lm: Any) -> Operations:
        """Yield the operations of the tower, in the order of execution."""
        layers = (id(layer) for layer in self.all_layers(lm))
        attentions = dict(zip(layers, self.tower_attentions(lm.config), strict=True))
        unread = {id(part) for module in self.unread(lm) for part in module.modules()}
        for part in (part for parts in self.tower_parts(lm) for part in parts.modules()):
            states = "unread" if id(part) in unread else "tower"  # no gradient passes through what is not read
            if id(part) in attentions:  # its units act after it
                yield AttentionInImage(attentions[id(part)], states)
            yield Applied(part, "patches", (states,), states)

    def feature_dim(self, config: Any) -> int:
        """Return the dimension ``D`` of the feature vectors that the projector reads."""
        return config.vision_config.hidden_size

    def image_tokens(self, config: Any) -> int:
        """Return the number of tokens of an image."""
        raise NotImplementedError

    def patch_tokens(self, config: Any) -> Tensor:
        """Return which of an image's tokens stand for a part of it, ``(P,)`` bool."""
        return torch.ones(self.image_tokens(config), dtype=torch.bool)

    def whole_view(self, config: Any) -> slice:
        """Return the tokens of the view of the whole image, among those of an image; they are in row-major order."""
        return slice(0, int(self.patch_tokens(config).sum()))

    def vectors(self, config: Any) -> int:
        """Return the number of vectors of an image that the projector reads."""
        return self.view_vectors(config) * self.views

    def visual_embedding(self, lm: Any, feature_dim: int, grid: int | None, projector: Any = None) -> nn.Module:
        settings: dict[str, Any] = {
            "per_image": self.image_tokens(lm.config),
            "feature_dim": self.feature_dim(lm.config),
            "vectors": self.vectors(lm.config),
        }
        if not self.reads_pixels:
            return ProjectedFeatures(self.projector_function(lm), **settings)
        tower = partial(self.tower_output, lm)
        return ProjectedPixels(self.projector_function(lm), tower, self.pixel_shape(lm.config), **settings)

    def pixel_shape(self, config: Any) -> tuple[int, ...]:
        """Return the shape of the tower's input for one image, as made by :meth:`pixels`."""
        side = config.vision_config.image_size
        return (3, side, side)

    def tower_layers(self, lm: Any) -> Sequence[nn.Module]:
        """Return the layers of the vision tower whose output is used."""
        return self.all_layers(lm)

    def all_layers(self, lm: Any) -> Sequence[nn.Module]:
        """Return all layers of the vision tower."""
        tower = lm.get_submodule(self.tower_path)
        if hasattr(tower, "vision_model"):  # in older versions of transformers
            tower = tower.vision_model
        return list(tower.get_submodule(self.tower_layers_path))

    def tower_parts(self, lm: Any) -> Sequence[nn.Module]:
        return [lm.get_submodule(name) for name in parts_outside(lm, self.tower_path, self.projector_path)]

    def tower_attentions(self, config: Any) -> list[int]:
        tower = config.vision_config
        return [tower.hidden_size * self.views * self.view_vectors(config) ** 2] * tower.num_hidden_layers

    def tower_vectors(self, config: Any) -> int:
        return self.views * self.view_vectors(config)

    @property
    def views(self) -> int:
        """Number of views of an image, which the tower computes one by one."""
        return 1

    def view_vectors(self, config: Any) -> int:
        """Return the number of vectors that the tower computes for a view."""
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def check_trained(self, rules: Mapping[str, Collection[str]]) -> None:
        if self.reads_pixels:
            return
        tower, projector = f"lm.{self.tower_path}.", f"lm.{self.projector_path}."
        for rule, names in rules.items():
            inside = [name for name in names if name.startswith(tower) and not name.startswith(projector)]
            if inside:
                raise ValueError(
                    f"trainable rule {rule!r} selects {len(inside)} tensors of the vision tower, which stored features "
                    "give no gradient: set image_input of VLCausal to pixels, or remove the rule"
                )

    @property
    def processing(self) -> dict[str, Any]:
        """Settings of the library's image processor that replace its own."""
        return {}

    def pixels(self, config: Any, processor: Any, image: Image) -> Tensor:
        """Return the input of :meth:`tower_output` for an image, without the batch axis.

        Args:
            config: Configuration of the model.
            processor: The library's image processor.
            image: Image in RGB.

        Returns:
            ``(3, H, W)`` float32, or ``(views, 3, H, W)`` of an image that is divided.

        Raises:
            ValueError: If the image processor makes views of another size than the tower reads.
        """
        found = self.process(config, processor, image)
        side = config.vision_config.image_size
        if found.shape[-2:] != (side, side):
            height, width = found.shape[-2:]
            raise ValueError(
                f"the image processor makes {height} x {width} pixels of an image, the tower reads {side} x {side}: "
                "set the size in preprocessor_config.json to image_size in config.json"
            )
        return found.float()

    def process(self, config: Any, processor: Any, image: Image) -> Tensor:
        """Return what the library's image processor makes of an image, by default its only view."""
        found = processor(images=[image], return_tensors="pt", **self.processing)["pixel_values"]
        return found.flatten(0, -4)[0]

    def tower_output(self, lm: Any, pixels: Tensor) -> Tensor:
        """Return the ``(B, F, D)`` features of images, which the projector reads.

        Args:
            lm: The model.
            pixels: ``(B, ...)``, made by :meth:`pixels`.
        """
        raise NotImplementedError

    def tower_fingerprint(self, lm: Any) -> str:
        """Return a digest of the tower's weights, without those of a projector inside the tower.

        The first rows of its matrices are enough.
        """
        projector = {id(parameter) for parameter in self.projector(lm).parameters()}
        named = weights_or_rows(lm.get_submodule(self.tower_path))
        return weights_digest({name: tensor for name, tensor in named.items() if id(tensor) not in projector})
