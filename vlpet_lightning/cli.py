"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI for our modules and any data module."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from vlpet_lightning.config_errors import explain
from vlpet_lightning.folder_lock import locked_folder
from vlpet_lightning.module import VLModule
from vlpet_lightning.overlays import with_overlays
from vlpet_lightning.run.checkpoint_io import AtomicCheckpointIO
from vlpet_lightning.run.config_match import check_same
from vlpet_lightning.run.folder import CHECKPOINTS, check_free, go_into_run, warn_if_untrained
from vlpet_lightning.run.protocol_log import ProtocolLog
from vlpet_lightning.run.ranks import ending_together, is_first_process
from vlpet_lightning.run.resume import AUTO, RUN, announce, check_ckpt_path, loggers_of, resolve
from vlpet_lightning.run.score_table import ScoreTable
from vlpet_lightning.run.signals import leave_when_asked, undo

PROGRAM = "python -m vlpet_lightning"

# settings shared by model and data module, given once in the config
LINKS = (
    ("model.init_args.backbone", "data.init_args.tokenizer"),
    ("model.init_args.feature_dim", "data.init_args.feature_dim"),
)


class Parser(LightningArgumentParser):
    """Parser that reports errors without printing every option first."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: the usage of ``fit`` has fifty lines, and ``--help`` shows it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with one sentence that names the setting and the cure."""
        if not self.exit_on_error:  # parsers of nested classes raise; the outermost has the full message
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        words = parser.prog.replace(" [options]", "")
        self.exit(2, f"error: {explain(message)}\n(all settings: {words} --help)\n")


class RaisingParser(Parser):
    """Parser for Python code: an error is an exception instead of the end of the process."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        raise ValueError(explain(message)) from ex


class SaveConfig(SaveConfigCallback):
    """Save the resolved config into the run's folder, beside its metrics and checkpoints, and to W&B."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["overwrite"] = True  # a resumed run overwrites its config
        super().__init__(*args, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))


class VLCLI(LightningCLI):
    """LightningCLI whose config is complete and whose command line overrides a checkpoint's hyper-parameters."""

    parser_kind: ClassVar[type[Parser]] = Parser

    def __init__(self, args: Sequence[str] | None = None, run: bool = True, **kwargs: Any) -> None:
        self.runs = run
        super().__init__(
            VLModule,
            None,  # any LightningDataModule; parameter counting needs none
            save_config_callback=SaveConfig,
            parser_class=self.parser_kind,
            seed_everything_default=42,
            # our samplers divide rows among the ranks themselves
            trainer_defaults={"use_distributed_sampler": False},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # the module builds its own from `model.init_args.optimizer`
            # interpolations are resolved after merging all config files and the command line
            parser_kwargs={"parser_mode": "omegaconf+", "prog": PROGRAM},
            args=None if args is None else list(args),
            run=run,
            **kwargs,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning's version warns if arguments are passed while sys.argv also has some
        self.config = parser.parse_args(with_overlays(args))
        for part in (self.config, self.config.get(self.config.get("subcommand") or "")):
            if part is not None and "overlays" in part:
                part["overlays"] = None  # already merged; the saved config is complete

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if not self.runs:
            for name in ("ckpt_path", "weights_only"):  # accepted because saved configs have them; not used here
                parser.add_argument(f"--{name}", type=Any, default=None)
        parser.add_argument(
            "--overlays",
            type=list[str] | str | None,
            default=None,
            help="Base config files that this one is merged over; only allowed in a config file.",
        )
        for source, target in LINKS:
            parser.link_arguments(source, target)

    def _parse_ckpt_path(self) -> None:
        """Leave the config unchanged: Lightning would let a checkpoint's hyper-parameters override the command line."""

    def before_instantiate_classes(self) -> None:
        # load only tensors and plain values: unpickling a checkpoint would run arbitrary code
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        if "weights_only" in config:
            config["weights_only"] = True
        check_trainer(config.trainer)
        loggers = loggers_of(config)
        check_ckpt_path(config, self.subcommand)
        if self.subcommand != "fit":
            self.save_config_kwargs["config_filename"] = f"{self.subcommand}.yaml"  # saved beside the training config
            warn_if_untrained(config)
            for logger in loggers[:1]:
                go_into_run(logger, config.ckpt_path)
        elif config.ckpt_path == AUTO:
            folder = resolve(config)
            if config.ckpt_path is not None:
                self._check_same(folder)
            announce(folder / CHECKPOINTS, config.ckpt_path)
            leave_when_asked()  # until training begins
        elif config.ckpt_path is None:
            for logger in loggers[:1]:
                check_free(logger)

    def _set_seed(self) -> None:
        self.draws_seed = self._get(self.config, "seed_everything") is True
        super()._set_seed()

    def _check_same(self, folder: Path) -> None:
        """Refuse to resume a run of another seed, model or data, which would be mistaken for the requested run."""
        here = yaml.safe_load(self._parser("fit").dump(self.config.fit, skip_none=False))
        if self.draws_seed:
            del here["seed_everything"]  # every start draws a new seed
        cure = (
            f"Give this run another name ({RUN}), or resume it with other settings by --ckpt_path {here['ckpt_path']}"
        )
        check_same(folder, here, cure)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # any other was configured by the user
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add the callbacks of every run, unless the config lists them; the record must precede all that is logged."""
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        kinds = {type(callback) for callback in given}
        first = [] if ProtocolLog in kinds else [ProtocolLog()]
        last = [] if ScoreTable in kinds else [ScoreTable()]
        return super()._instantiate_trainer({**config, "callbacks": [*first, *given]}, [*callbacks, *last])

    def _run_subcommand(self, subcommand: str) -> None:
        self.model.loads_weights = self.config[subcommand].get("ckpt_path") is not None
        with self._run_lock():
            super()._run_subcommand(subcommand)

    def _run_lock(self) -> AbstractContextManager[None]:
        """Lock the run's folder; rank 0 does so for all ranks."""
        folder = getattr(self.trainer.loggers[0], "log_dir", None) if self.trainer.loggers else None
        if not isinstance(folder, str) or not _is_local_file_protocol(folder) or not is_first_process():
            return nullcontext()
        return locked_folder(
            Path(folder), "the run", f"give this run another folder (save_dir or version of trainer.logger, or {RUN})"
        )


def check_trainer(settings: Namespace) -> None:
    """Refuse negative numbers, some of which Lightning accepts and trains without the limit.

    Raises:
        ValueError: If a number is out of range.
    """
    for name, least, off in (("max_epochs", -1, -1), ("max_steps", -1, -1), ("gradient_clip_val", 0, "null")):
        value = settings.get(name)
        if value is not None and value < least:
            raise ValueError(f"trainer.{name} must be 0 or more, or {off} for no limit, got {value}")


class ModelOnly(VLCLI):
    """CLI that parses a full config and instantiates only its model."""

    part = "model"

    def _set_seed(self) -> None:
        """Do nothing: no random numbers are drawn."""

    def _dump_config(self) -> None:
        """Write out the part's settings alone, which are its hyper-parameters: the others take longer."""
        if not hasattr(self, "config_dump"):
            part = Namespace({self.part: self.config[self.part]})
            text = self.parser.dump(part, skip_link_targets=False, skip_none=False, skip_validation=True)
            self.config_dump = yaml.safe_load(text)

    def instantiate_classes(self) -> None:
        found = self.parser.instantiate_classes(Namespace({self.part: self.config[self.part]}))
        setattr(self, self.part, found[self.part])


class ModelFromPython(ModelOnly):
    """The same for Python code: a wrong config is an exception."""

    parser_kind = RaisingParser


class DataOnly(ModelOnly):
    """CLI that parses a full config and instantiates only its data module."""

    part = "data"
    data: LightningDataModule | None


class ParseOnly(ModelOnly):
    """CLI that parses a full config and instantiates nothing."""

    def instantiate_classes(self) -> None:
        """Instantiate nothing."""


def parse(args: Sequence[str]) -> None:
    """Parse a config as ``fit`` does, without instantiating anything; exits or raises as ``fit`` would.

    Args:
        args: Command-line arguments, e.g. ``["--config", "experiments/image_text.yaml"]``.
    """
    ParseOnly(args, run=False)


def module_from_config(args: Sequence[str]) -> VLModule:
    """Return the module that ``fit`` would train with these arguments, not built yet.

    Args:
        args: Command-line arguments, e.g. ``["--config", "experiments/image_text.yaml"]``.
    """
    return ModelOnly(args, run=False).model


def data_from_config(args: Sequence[str]) -> LightningDataModule | None:
    """Return the data module that ``fit`` would use with these arguments, not set up yet; None if there is none.

    Args:
        args: Command-line arguments, e.g. ``["--config", "experiments/image_text.yaml"]``.
    """
    return DataOnly(args, run=False).data


def main(args: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        RankLost: If another process of the run has ended early or does not respond.
    """
    try:
        with ending_together():
            VLCLI(args)
    finally:
        undo()
