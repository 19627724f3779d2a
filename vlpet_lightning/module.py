"""LightningModules: steps, optimiser groups, learning rate schedule, and checkpoints without the frozen backbone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from vlpet_lightning.answers import Answer, answer_batch, evaluation_mode, top_answers
from vlpet_lightning.backbones import (
    BACKBONES,
    Backbone,
    check_compilable,
    config_of,
    load_tokenizer,
    vocabulary_size,
)
from vlpet_lightning.batch import Batch
from vlpet_lightning.checks import above_zero, choice, positive, within
from vlpet_lightning.compilation import compile_layers
from vlpet_lightning.cuda_graphs import check_trainer
from vlpet_lightning.frozen_weights import cast_frozen
from vlpet_lightning.interop.export.backbone_record import backbone_checksums
from vlpet_lightning.interop.export.pet_files import load_weights
from vlpet_lightning.interop.hf.hf_peft import HFPeft
from vlpet_lightning.loss_guard import LossGuard
from vlpet_lightning.method_record import RECORD, check_same_method
from vlpet_lightning.model import VLModel
from vlpet_lightning.optim import HFAdamW, decay_groups, linear_schedule
from vlpet_lightning.parameters import unit_summary
from vlpet_lightning.pet import Granularity, Placement, check_placements
from vlpet_lightning.pet.placement import check_linear_sites
from vlpet_lightning.run.ddp import configure_ddp
from vlpet_lightning.run.pending_validation import keep_pending_validation
from vlpet_lightning.tasks import TASKS
from vlpet_lightning.trainable import check_rules
from vlpet_lightning.version import __version__
from vlpet_lightning.weight_decay import NoDecay, exemption


def run_seed() -> int:
    """Return the seed set by ``seed_everything``, or 0 if none was set."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


class VLModule(LightningModule):
    """Vision-and-language model for parameter-efficient multi-task training.

    Args:
        backbone: Folder or hub name of the pretrained language model.
        placements: PET units and their sites, or a :class:`vlpet_lightning.pet.Granularity` as shorthand for them.
        trainable: Rules that select the trained parameters: see :data:`vlpet_lightning.trainable.RULES`.
        feature_dim: Width of the image features.
        grid: Side of the grid to which features are pooled; null disables pooling.
        dropout: Dropout rate of the whole language model, including frozen layers (the original's ``--dropout``).
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        no_decay: Kinds of parameters exempt from weight decay. ``bias`` is every name that contains "bias" or
            "LayerNorm.weight", as in the original; the corrected protocol adds ``norm``, ``gate``, ``vector`` (a unit's
            one-dimensional parameters) and ``prompt``.
        warmup_ratio: Fraction of all steps used for warm-up.
        optimizer: Factory of the optimiser, called with parameter groups that contain ``lr`` and ``weight_decay``.
        start: Initialisation of the units. ``original`` follows the released code, whose gates start near 0.5;
            ``identity`` starts from the pretrained function.
        mask_padding: Hide padding from the units (corrected protocol).
        projector: Factory of the visual projection; a linear layer by default.
        compile_model: Compile the layers for training.
        cuda_graphs: Launch the kernels of a training step as CUDA graphs, one per task and shape. Needs a single GPU
            and no accumulation of gradients; evaluation does not use these graphs.
        generation_graphs: Launch the kernels of beam and greedy search as CUDA graphs where the model is on a GPU, from
            the second batch of a task and shape on. Not yet measured on a GPU.
        frozen_dtype: Type in which the frozen weights of linear layers are stored. ``bfloat16`` saves memory and time
            and needs a trainer with ``precision: bf16-mixed``; checkpoints and exports do not depend on it.
        peft: Method of Hugging Face peft to use in addition to the placements:
            ``{class_path: peft.LoraConfig, at: [...], init_args: {...}}``, trained by the rule ``pet``. ``at`` lists
            sites that are single linear layers; without it, ``init_args`` names layers by ``target_modules``.
        pet_weights: Folder written by ``export`` for this method; its weights initialise the model.

    Raises:
        ValueError: If a site or rule is unknown, or a number is out of range.
    """

    kind: str

    def __init__(
        self,
        backbone: str,
        placements: list[Placement] | Granularity | None = None,
        trainable: list[str] | None = None,
        *,
        feature_dim: int = 2048,
        grid: int | None = 6,
        dropout: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        no_decay: list[NoDecay] | None = None,
        warmup_ratio: float = 0.1,
        optimizer: Callable[[Iterable], Optimizer] = HFAdamW,
        start: Literal["original", "identity"] = "original",
        mask_padding: bool = False,
        projector: Callable[[int, int], nn.Module] | None = None,
        compile_model: bool = False,
        cuda_graphs: bool = False,
        generation_graphs: bool = False,
        frozen_dtype: Literal["float32", "bfloat16"] = "float32",
        peft: dict[str, Any] | None = None,
        pet_weights: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone_name = backbone
        self.placements = placements.placements() if isinstance(placements, Granularity) else placements or []
        self.rules = trainable or ["visual_embedding"]
        family = self.family()
        check_placements(self.placements, family.sites, family.refused_sites)
        check_rules(self.rules)
        self.feature_dim = positive("feature_dim", feature_dim)
        self.grid = None if grid is None else positive("grid", grid)
        self.dropout = within("dropout", dropout, 0, 1)
        self.lr = above_zero("lr", lr)
        self.weight_decay = within("weight_decay", weight_decay, 0)
        self.no_decay: list[NoDecay] = ["bias"] if no_decay is None else no_decay
        self.warmup_ratio = within("warmup_ratio", warmup_ratio, 0, 1)
        self.optimizer = optimizer
        self.start = start
        self.mask_padding = mask_padding
        self.projector = projector
        self.compile_model = compile_model
        self.cuda_graphs = cuda_graphs
        self.generation_graphs = generation_graphs
        self.frozen_dtype = choice("frozen_dtype", frozen_dtype, ("float32", "bfloat16"))
        self.extension = None if peft is None else HFPeft(peft)
        check_linear_sites(self.extension.at if self.extension else (), family.sites, family.refused_sites)
        self.pet_weights = pet_weights
        self.loads_weights = False  # whether initial weights are replaced by those of a checkpoint
        self.loads_whole_backbone = False  # whether to load also parts that training does not run
        self.strict_loading = False  # checkpoints omit the frozen backbone; on_load_checkpoint is strict instead
        self.scores: dict[str, dict[str, float]] = {}  # filled by the metric callbacks: "val/vqa" -> {"accuracy": ...}
        self.model: VLModel | None = None
        self._guard = LossGuard()
        self._settings: list[dict[str, Any]] = []  # settings from the config, one entry per parameter group

    # building ------------------------------------------------------------------------------------------------------

    def family(self) -> Backbone:
        """Return the description of the backbone's family, with the settings that need no file of the backbone."""
        return BACKBONES[self.kind]

    def architecture(self, pretrained: bool = True) -> Backbone:
        """Return the description of the backbone.

        Args:
            pretrained: Whether the backbone's files can be read.
        """
        return BACKBONES[self.kind]

    def build(self, *, pretrained: bool = True) -> VLModel:
        """Build the model with pretrained weights or, for counting on the meta device, with random ones.

        Raises:
            FileNotFoundError: If the pretrained weights do not exist.
            ValueError: If the backbone is of the wrong kind, or a rule matches nothing.
        """
        backbone = self.architecture(pretrained)
        config = config_of(self.backbone_name, self.kind)
        if config.model_type != self.kind:
            module = MODULES[config.model_type].__name__ if config.model_type in MODULES else "VLCausal"
            cure = f": use {module}" if config.model_type in BACKBONES else ""
            raise ValueError(
                f"{type(self).__name__} needs a {self.kind} backbone, {self.backbone_name!r} is "
                f"{config.model_type!r}{cure}"
            )
        vocabulary = vocabulary_size(self.backbone_name, config)
        added = vocabulary - backbone.text_config(config).vocab_size
        if pretrained:
            lm = backbone.load(self.backbone_name, vocabulary, self.dropout)
        else:
            lm = backbone.build(backbone.configured(config, vocabulary, self.dropout))
        model = VLModel(
            backbone,
            lm,
            feature_dim=self.feature_dim,
            grid=self.grid,
            placements=self.placements,
            trainable=self.rules,
            added_vocabulary=added,
            mask_padding=self.mask_padding,
            projector=self.projector,
            extension=self.extension,
        )
        if pretrained and self.pet_weights is None and not self.loads_weights:
            model.start_from_backbone()
        if self.start == "identity":
            model.start_as_identity()
        return model

    def configure_model(self) -> None:
        """Load the backbone and insert the units; data is set up earlier, so missing data files are reported first."""
        self.check_images(self._data())
        if self.model is None:
            self._load()
        if self._trainer is not None:
            configure_ddp(self, self.trainer, self.built().may_skip_parameters)

    def _load(self) -> None:
        if self.compile_model:
            check_compilable()
        if self.frozen_dtype != "float32":
            self._check_precision()
        if self.cuda_graphs and self._trainer is not None and self.trainer.state.fn == "fit":
            check_trainer(self.trainer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run_seed())  # new weights depend on the seed only, not on earlier random draws
            model = self.build()
            if self.pet_weights is not None:
                load_weights(model, self.pet_weights)
            self.model = model.train()  # a loaded backbone is in evaluation mode, without dropout
        self.tokenizer = load_tokenizer(self.backbone_name)
        self.model.check_tasks(getattr(self._data(), "tasks", ()))
        if self.frozen_dtype != "float32":
            self.model.backbone_checksums = backbone_checksums(self.model)
            cast_frozen(self.model, getattr(torch, self.frozen_dtype))
        if self.generation_graphs:
            self.model.use_generation_graphs()
        if self.compile_model:
            compile_layers(
                self.model.layers(), fullgraph=self.extension is None
            )  # some peft layers (DoRA) cannot be traced whole

    def _data(self) -> Any:
        """Return the trainer's data module, or None."""
        return None if self._trainer is None else getattr(self._trainer, "datamodule", None)

    def use_data(self, data: Any) -> None:
        """Check that a data module fits the model, and give it what it needs from the model.

        Raises:
            ValueError: If it does not fit.
        """
        self.check_images(data)

    def check_images(self, data: Any) -> None:
        """Check that model and data module agree on features or pixels.

        Args:
            data: The data module; those without ``images`` are not checked.

        Raises:
            ValueError: If they do not agree.
        """
        if not hasattr(data, "images"):
            if hasattr(data, "store") and self.family().reads_pixels:
                raise ValueError(
                    f"image_input is pixels, which {type(data).__name__} does not read: set image_input to features"
                )
            return
        if data.images is not None and not self.family().reads_pixels:
            raise ValueError(
                f"the data module reads the image files of {data.images}, and {type(self).__name__} reads stored "
                "features: remove `images` of the data module, or set image_input of VLCausal to pixels"
            )
        if data.images is None and self.family().reads_pixels:
            raise ValueError(
                "image_input is pixels, and the data module reads stored features: set its `images` to the folder of "
                "the image files, or image_input to features"
            )

    def _check_precision(self) -> None:
        precision = None if self._trainer is None else self.trainer.precision
        if precision not in (None, "bf16-mixed"):
            raise ValueError(
                f"frozen_dtype {self.frozen_dtype} needs autocast, the trainer has precision {precision}: set "
                "trainer.precision to bf16-mixed, or frozen_dtype to float32"
            )

    def built(self) -> VLModel:
        """Return the model.

        Raises:
            RuntimeError: If the model has not been built yet.
        """
        if self.model is None:
            raise RuntimeError("the model is not built yet: call configure_model() first")
        return self.model

    # in Python -----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, *, return_gates: bool = False) -> Any:
        """Compute logits and, on request, the gates; see :meth:`vlpet_lightning.model.VLModel.forward`."""
        return self.built()(batch, return_gates=return_gates)

    def loss(self, batch: Batch) -> Tensor:
        """Compute the task's scalar loss over a batch, for a training loop without a trainer."""
        return self.built().loss(batch)

    @overload
    def answer(self, batch: Batch) -> list[str]: ...
    @overload
    def answer(self, batch: Batch, *, top: int) -> list[list[Answer]]: ...

    def answer(self, batch: Batch, *, top: int | None = None) -> Any:
        """Answer the questions of a batch, without dropout also during training.

        Args:
            batch: ``B`` questions.
            top: If given, return this many answers with their probabilities, most probable first.

        Returns:
            ``B`` texts, for classification tasks "true" or "false"; or ``B`` lists of
            :class:`~vlpet_lightning.answers.Answer` if ``top`` is given.
        """
        with evaluation_mode(self.built()) as model:
            if top is None:
                return answer_batch(model, self.tokenizer, batch)
            return top_answers(model, self.tokenizer, batch, positive("top", top))

    # steps ---------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Check the trainer again, because a callback may change the accumulation of gradients."""
        if self.cuda_graphs:
            check_trainer(self.trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout from (seed, rank, step), so that resuming needs no saved random state."""
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(hash((run_seed(), self.global_rank, step)) % 2**63)
        self._drop_logged_losses()

    def _drop_logged_losses(self) -> None:
        """Remove the losses of earlier steps: Lightning would log them again beside the loss of this step's task."""
        results = self.trainer.fit_loop.epoch_loop._results
        for key in [key for key in results if key.startswith("training_step.train/")]:
            del results[key]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the task's loss, over the union of all ranks' batches if there are several ranks."""
        total, count = self.built().loss_terms(batch)
        if self.trainer.world_size > 1:
            # DDP averages gradients over ranks: divide by the count of the whole batch, in which fillers count 0
            count = self.trainer.strategy.reduce(count.float(), reduce_op="sum")
            total = total * self.trainer.world_size
        loss = total / count.clamp(min=1)
        self._guard.look(loss, batch, self.global_step)
        self.log(f"train/{batch.task}/loss", loss.detach(), batch_size=len(batch), on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[str]]:
        return {"predictions": self.answer(batch)}

    test_step = validation_step
    predict_step = validation_step

    def on_validation_epoch_start(self) -> None:
        self.scores.clear()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        self._log_average("val")

    def on_test_epoch_end(self) -> None:
        self._log_average("test")

    def _log_average(self, stage: str) -> None:
        """Log the benchmark average: the mean of every task's main score."""
        scores = [self.scores.get(f"{stage}/{name}", {}).get(spec.score) for name, spec in TASKS.items()]
        found = [score for score in scores if score is not None]
        if found:
            average = sum(found) / len(found)  # equal on all ranks; reducing by max is exact, a mean may round
            self.log(f"{stage}/average", average, prog_bar=True, sync_dist=True, reduce_fx="max", batch_size=1)

    # optimisation --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        named = [(name, p) for name, p in self.built().named_parameters() if p.requires_grad]
        groups = decay_groups(named, exemption(self.built(), self.no_decay), self.weight_decay)
        for group in groups:
            group["lr"] = self.lr
        optimizer = self.optimizer(groups)
        self._settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        schedule = linear_schedule(optimizer, int(self.trainer.estimated_stepping_batches), self.warmup_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Apply this run's optimiser settings, because resuming restores those of the checkpoint."""
        if self.cuda_graphs:
            self.built().use_cuda_graphs()
        schedule: Any = self.lr_schedulers()
        for index, (group, settings) in enumerate(zip(schedule.optimizer.param_groups, self._settings, strict=True)):
            group.update(settings, initial_lr=settings["lr"])
            schedule.base_lrs[index] = settings["lr"]
            group["lr"] = settings["lr"] * schedule.lr_lambdas[index](schedule.last_epoch)

    # checkpoints ---------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Tensor]:
        """Return the trained parameters and all other tensors that are not part of the backbone, by checkpoint name."""
        return {f"model.{name}": tensor for name, tensor in self.built().own_state().items()}

    def describe(self) -> dict[str, Any]:
        """Describe backbone and units in plain types, for comparison with a checkpoint's record."""
        units: dict[str, str] = {}
        for place in self.built().injected:
            units.setdefault(place.site, unit_summary(place.unit))
        return {
            "backbone": self.backbone_name,
            "units": units,
            "rules": list(self.rules),
            "mask_padding": self.mask_padding,
            "peft": None if self.extension is None else self.extension.settings(),
            "template": self.built().backbone.settings(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._guard.settle()
        if self._trainer is not None:
            keep_pending_validation(self._trainer, checkpoint)
        checkpoint["state_dict"] = self.own_state()
        rows = self.built().added_rows
        rows = None if rows is None else rows.clone()  # saving a view would save the whole token embedding
        checkpoint[RECORD] = {
            "version": __version__,
            **self.describe(),
            "no_decay": list(self.no_decay),
            "added_rows": rows,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint matches this method before any weight is changed.

        To resume training, the parameter groups must match as well.

        Raises:
            ValueError: If the checkpoint differs; the message names all differences.
        """
        theirs = checkpoint.get(RECORD)
        if theirs is None:
            raise ValueError("this checkpoint was not written by vlpet_lightning: it has no record of its method")
        mine = {**self.describe(), "no_decay": list(self.no_decay)}
        trains = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        check_same_method(theirs, mine, checkpoint["state_dict"], self.own_state(), trains=trains)
        if theirs.get("added_rows") is not None:
            self.built().set_added_rows(theirs["added_rows"])


class VLBart(VLModule):
    """Model with a BART backbone (paper sections 3 and 4.1); see :class:`VLModule` for the arguments."""

    kind = "bart"

    def __init__(
        self,
        backbone: str = "facebook/bart-base",
        placements: list[Placement] | Granularity | None = None,
        trainable: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, placements, trainable, **kwargs)


class VLMBart(VLModule):
    """Model with an mBART backbone; see :class:`VLModule` for the arguments."""

    kind = "mbart"

    def __init__(
        self,
        backbone: str = "facebook/mbart-large-50",
        placements: list[Placement] | Granularity | None = None,
        trainable: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, placements, trainable, **kwargs)


class VLT5(VLModule):
    """Model with a T5 backbone, including T5 v1.1 and Flan-T5; see :class:`VLModule` for the arguments."""

    kind = "t5"

    def __init__(
        self,
        backbone: str = "t5-base",
        placements: list[Placement] | Granularity | None = None,
        trainable: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, placements, trainable, **kwargs)


MODULES: dict[str, type[VLModule]] = {module.kind: module for module in (VLBart, VLMBart, VLT5)}
