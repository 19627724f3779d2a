"""Table of the commands beside fit, validate, test and predict.

Functions are named as ``module:function`` and imported only when they are called. The library therefore does not
depend on the data modules, and ``--help`` does not import torch.
"""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """A command's function and its line in ``--help``.

    Args:
        function: ``module:function``.
        help: One-line description.
        reads_words: If True, the function parses the command line itself (it accepts configs of ``fit``); otherwise its
            keyword arguments become options.
    """

    function: str
    help: str
    reads_words: bool = False


VERBS: dict[tuple[str, ...], Verb] = {
    ("params",): Verb(
        "vlpet_lightning.commands.params:params", "count a config's parameters, without weights or data", True
    ),
    ("budget",): Verb(
        "vlpet_lightning.commands.budget:budget", "find ranks and sites that train a given share of parameters", True
    ),
    ("compare",): Verb(
        "vlpet_lightning.commands.compare:compare",
        "compare parameters, FLOPs, memory and checkpoint size of two configs",
        True,
    ),
    ("export",): Verb(
        "vlpet_lightning.commands.export:export", "write a checkpoint's trained weights as files to share", True
    ),
    ("import-original",): Verb(
        "vlpet_lightning.commands.import_original:import_original",
        "convert command lines and checkpoints of the original",
        True,
    ),
    ("importance",): Verb(
        "vlpet_lightning.commands.importance:importance",
        "measure the importance of a backbone's weights, for the pruned start of a side network",
        True,
    ),
    ("pretrain",): Verb("vlpet_lightning.commands.pretrain:pretrain", "train a small language model on text"),
    ("sweep",): Verb(
        "vlpet_lightning.commands.sweep:sweep", "run the points of a W&B sweep file, locally or on SLURM", True
    ),
    ("score",): Verb("data_modules.scoring.commands:score", "score a prediction file as the official scorers do", True),
    ("submission", "check"): Verb(
        "data_modules.scoring.submission:check_command",
        "check a result file before uploading it to an evaluation server",
        True,
    ),
    ("submission", "pack"): Verb(
        "data_modules.scoring.submission:pack", "pack result files into the zip archive of VALUE or COCO"
    ),
    ("ask",): Verb("vlpet_lightning.commands.ask:ask", "answer questions about image files", True),
    ("browse",): Verb("vlpet_lightning.commands.browse:browse", "write a page of one or two runs' predictions", True),
    ("report",): Verb(
        "vlpet_lightning.commands.report:report_command", "compare finished runs: tables and figures", True
    ),
    ("gates",): Verb("vlpet_lightning.commands.gates:gates", "statistics, heat maps and a page of a run's gates", True),
    ("data", "synthetic"): Verb(
        "data_modules.world.synthetic:synthetic", "render a small world in the benchmark's formats"
    ),
    ("data", "synthetic-video"): Verb(
        "data_modules.world.synthetic_video:synthetic_video", "render a small world of clips in VALUE's formats"
    ),
    ("data", "extract", "images"): Verb(
        "data_modules.extraction.commands:extract_images", "extract image features with open_clip into a store"
    ),
    ("data", "extract", "video"): Verb(
        "data_modules.extraction.commands:extract_video", "extract video features, one vector per frame"
    ),
    ("data", "download"): Verb(
        "data_modules.convert.download:download", "download the published features and annotations"
    ),
    ("data", "check"): Verb("data_modules.check.check:check", "check a config's data before a run", True),
    ("data", "verify"): Verb("data_modules.store.verify:verify", "compare feature stores with their checksums"),
    ("data", "info"): Verb("data_modules.store.verify:info", "describe feature stores"),
    ("data", "recode"): Verb(
        "data_modules.store.recode:recode", "store a feature store's rows in 8 bits, or compressed"
    ),
    ("data", "convert", "hub"): Verb(
        "data_modules.convert.hub:convert_hub", "convert published parquet features to stores"
    ),
    ("data", "convert", "h5"): Verb(
        "data_modules.convert.trees:convert_h5", "convert a folder of HDF5 files, one per image"
    ),
    ("data", "convert", "npz"): Verb(
        "data_modules.convert.trees:convert_npz", "convert a folder of VALUE's clips to a store"
    ),
    ("data", "convert", "nlvr1"): Verb(
        "data_modules.convert.nlvr1:convert_nlvr1", "convert the NLVR corpus to the benchmark's format"
    ),
}
