"""LightningModule of decoder-only vision-and-language models."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from vlpet_lightning.backbones import BACKBONES, Backbone, backbone_of
from vlpet_lightning.backbones.causal import CausalBackbone
from vlpet_lightning.backbones.pixels import PIXELS, PixelReader
from vlpet_lightning.checks import choice
from vlpet_lightning.module import VLModule
from vlpet_lightning.pet import Granularity, Placement
from vlpet_lightning.protocol import OWN_TEMPLATE
from vlpet_lightning.tasks import TaskSpec

SPLITS = {  # that a stage reads
    TrainerFn.FITTING: ("train", "val"),
    TrainerFn.VALIDATING: ("val",),
    TrainerFn.TESTING: ("test",),
    TrainerFn.PREDICTING: ("test",),
}
# settings of VLModule that do not apply, with the reason
REFUSED = {
    "mask_padding": "the units' sequence includes the answer, which the mask of an encoder does not cover",
    "projector": "the model has a projector of its own",
}


class VLCausal(VLModule):
    """Decoder-only vision-and-language model, trained on stored inputs of its projector, or on image files.

    With stored features, the vision tower never runs, and its weights are not loaded.

    Args:
        backbone: Folder or hub name of the pretrained model, of a family in :mod:`vlpet_lightning.backbones`.
        placements: PET units and their sites.
        trainable: Rules that select the trained parameters; ``visual_embedding`` is the model's projector.
        template: Prompt with ``{images}`` and ``{text}``; null for that of the family.
        image_template: Text around the tokens of an image, with ``{tokens}`` once for each view; null for that of the
            family.
        image_size: ``[height, width]`` of all images in pixels, for families that take images of any size.
        tiling: ``[rows, columns]`` of the tiles of all images, for families that divide images; null for one view.
        image_input: ``features`` are stored inputs of the projector; ``pixels`` runs the vision tower on image files,
            as units at ``vision.attn`` and ``vision.ffn`` need. ``images`` of the data module is then their folder.
        dropout: Must be 0; the dropout of units is a setting of theirs.
        feature_dim: Width of the features; null for that of the model's vision tower, the only one that fits.
        grid: Must be null: the projector reads all feature vectors.
        kwargs: As for :class:`VLModule`.

    Raises:
        ValueError: If the backbone is of another family, or a setting does not apply.
    """

    def __init__(
        self,
        backbone: str,
        placements: list[Placement] | Granularity | None = None,
        trainable: list[str] | None = None,
        *,
        template: str | None = None,
        image_template: str | None = None,
        image_size: list[int] | None = None,
        tiling: list[int] | None = None,
        image_input: Literal["features", "pixels"] = "features",
        dropout: float = 0.0,
        feature_dim: int | None = None,
        grid: int | None = None,
        **kwargs: Any,
    ) -> None:
        family = backbone_of(backbone)
        if not isinstance(family, CausalBackbone):
            known = sorted(kind for kind, one in BACKBONES.items() if isinstance(one, CausalBackbone))
            raise ValueError(
                f"VLCausal needs a decoder-only model ({', '.join(known)}), {backbone!r} is {family.kind!r}: use the "
                "module of that kind"
            )
        for name, reason in REFUSED.items():
            if kwargs.get(name):
                raise ValueError(f"{name} is {kwargs[name]!r}, which VLCausal does not support: {reason}")
        if dropout:
            raise ValueError(f"dropout is {dropout}: decoder-only models have none, set it to 0")
        if grid is not None:
            raise ValueError(f"grid is {grid}: the projector reads all feature vectors, set it to null")
        width = family.feature_dim(family.config(backbone))
        if feature_dim not in (None, width):
            raise ValueError(f"feature_dim is {feature_dim}, but the projector of {backbone!r} reads {width}: omit it")
        self.__dict__["kind"] = family.kind  # before torch's own constructor, which checks the placements
        given = {"text": template, "image": image_template, "image_size": image_size, "tiling": tiling}
        self.template: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if choice("image_input", image_input, ("features", PIXELS)) == PIXELS:
            self.template[PIXELS] = True
            for name in ("cuda_graphs", "generation_graphs"):
                if kwargs.get(name):
                    raise ValueError(
                        f"{name} is true, but vision towers compute with values on the host, which graphs cannot "
                        f"record: set {name} to false, or image_input to features"
                    )
        family.with_sizes(self.template)
        super().__init__(backbone, placements, trainable, feature_dim=width, dropout=0.0, grid=None, **kwargs)
        if self.extension is not None and not self.extension.at:
            raise ValueError(
                "peft names its layers by target_modules, which may match the vision tower too: place it at sites, "
                "e.g. at: [decoder.attn.query, decoder.attn.value]"
            )

    @property
    def prompt_template(self) -> Any:
        """The templates of the config, for the protocol record."""
        return {name: value for name, value in self.template.items() if name in ("text", "image")} or OWN_TEMPLATE

    def family(self) -> Any:
        family: Any = BACKBONES[self.kind]
        return family.with_sizes(self.template)

    def pixel_reader(self) -> PixelReader:
        """Return the conversion of pictures to the pixels of a batch, for a model with ``image_input: pixels``.

        Raises:
            FileNotFoundError: If the model has no image processor.
            ValueError: If the image processor does not fit the model.
        """
        family = self.family()
        reader = PixelReader(family, family.config(self.backbone_name), self.backbone_name)
        reader(Image.new("RGB", (64, 64)))
        return reader

    def configure_model(self) -> None:
        """Load the model, and check that the data fits it."""
        super().configure_model()
        data = self._data()
        if not hasattr(data, "store"):  # none, or a data module of the user's own
            return
        self.check_window(data.tasks, {name: data.images_per_sample(spec) for name, spec in data.tasks.items()})
        if not self.family().reads_pixels:
            self.check_features(data)
        self.use_data(data)

    def use_data(self, data: Any) -> None:
        super().use_data(data)
        if self.family().reads_pixels and hasattr(data, "read_images_with"):
            data.read_images_with(self.pixel_reader())

    def check_window(self, tasks: Mapping[str, TaskSpec], counts: Mapping[str, int] | None = None) -> None:
        """Check that the longest sequence that the tasks' limits allow fits the model's window.

        Args:
            tasks: The tasks by name.
            counts: Number of images per sample of each task; by default that of the task.

        Raises:
            ValueError: If it does not.
        """
        model = self.built()
        backbone: Any = model.backbone
        window = getattr(backbone.text_config(model.lm.config), "max_position_embeddings", None)
        for name, spec in tasks.items():
            count = spec.images if counts is None else counts[name]
            images = count * backbone.image_tokens(model.lm.config)
            template = backbone.template_tokens(count) + 1  # the last one is the decoder's first input
            length = template + images + (spec.max_text or 0) + (spec.max_target or 0)
            if window is not None and length > window:
                raise ValueError(
                    f"a sample of {name} may have {length:,} tokens ({images:,} of images), and {self.backbone_name!r} "
                    f"reads at most {window:,}: use smaller images, or a model with a longer window"
                )

    def check_features(self, data: Any) -> None:
        """Check that the features of the data are those of the model's own tower.

        Raises:
            ValueError: If a store was written with another tower, or with other image settings.
        """
        model = self.built()
        family: Any = model.backbone
        digest = family.tower_fingerprint(model.lm)
        splits = SPLITS[TrainerFn(self.trainer.state.fn)]
        for task, split in product(data.tasks, splits):
            extractor = data.store(data.tasks[task], split).meta.get("extractor") or {}
            if "model" not in extractor:  # written by other code
                continue
            if extractor.get("tower_fingerprint") != digest:
                raise ValueError(
                    f"the {split} features of {task} are of {extractor['model']}, not of the tower of "
                    f"{self.backbone_name!r}: extract them with `data extract images --model hf:{self.backbone_name}`"
                )
            for name, value in family.recorded_settings().items():
                if extractor.get(name) != value:
                    raise ValueError(
                        f"the {split} features of {task} were made with {name} {extractor.get(name)}, the model has "
                        f"{value}: set the model's {name} to that of the features, or extract them with the model's"
                    )

    def architecture(self, pretrained: bool = True) -> Backbone:
        if not pretrained and not Path(self.backbone_name, "tokenizer.json").is_file():
            return self.family()
        family: Any = BACKBONES[self.kind]
        found = family.with_settings(self.backbone_name, self.template)
        return found if self.loads_whole_backbone else found.without_tower()
