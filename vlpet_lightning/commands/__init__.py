"""The verbs beside fit, validate, test and predict: a table from words to functions.

A function is named as ``module:function`` and imported when it is called: the library does not depend on the data
modules, and asking for help does not load a deep learning stack.
"""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """A function and the line that help shows for it.

    Args:
        function: ``module:function``.
        help: What it does, in a line.
        reads_words: The function takes the words of the command line as they are (it understands configs of ``fit``);
            otherwise its keyword arguments become options.
    """

    function: str
    help: str
    reads_words: bool = False


VERBS: dict[tuple[str, ...], Verb] = {
    ("params",): Verb(
        "vlpet_lightning.commands.params:params", "count a config's parameters, without weights or data", True
    ),
    ("export",): Verb(
        "vlpet_lightning.commands.export:export", "write a checkpoint's trained part as files to share", True
    ),
    ("import-original",): Verb(
        "vlpet_lightning.commands.import_original:import_original",
        "configs and checkpoints of the original implementation in ours",
        True,
    ),
    ("pretrain",): Verb("vlpet_lightning.commands.pretrain:pretrain", "train a small language model from a text world"),
    ("sweep",): Verb(
        "vlpet_lightning.commands.sweep:sweep", "run the points of a W&B sweep file, here or on SLURM", True
    ),
    ("report",): Verb("vlpet_lightning.commands.report:report", "tables and figures of finished runs"),
    ("data", "synthetic"): Verb(
        "data_modules.world.synthetic:synthetic", "render a small world in the benchmark's formats"
    ),
    ("data", "synthetic-video"): Verb(
        "data_modules.world.synthetic_video:synthetic_video", "render a small world of clips in VALUE's formats"
    ),
    ("data", "extract", "images"): Verb(
        "data_modules.extraction.commands:extract_images", "turn images into a feature store through open_clip"
    ),
    ("data", "extract", "video"): Verb(
        "data_modules.extraction.commands:extract_video", "turn videos into a feature store, one vector a frame"
    ),
    ("data", "download"): Verb(
        "data_modules.convert.download:download", "fetch the published features and annotations"
    ),
    ("data", "check"): Verb("data_modules.check.check:check", "what is wrong with a config's data, before a run", True),
    ("data", "verify"): Verb("data_modules.store.verify:verify", "compare feature stores with their checksums"),
    ("data", "info"): Verb("data_modules.store.verify:info", "what feature stores hold"),
    ("data", "recode"): Verb(
        "data_modules.store.recode:recode", "store a feature store's rows in 8 bits, or compressed"
    ),
    ("data", "convert", "hub"): Verb(
        "data_modules.convert.hub:convert_hub", "published parquet features to feature stores"
    ),
    ("data", "convert", "h5"): Verb(
        "data_modules.convert.trees:convert_h5", "a folder of one HDF5 file an image to a store"
    ),
    ("data", "convert", "npz"): Verb("data_modules.convert.trees:convert_npz", "a folder of VALUE's clips to a store"),
    ("data", "convert", "nlvr1"): Verb(
        "data_modules.convert.nlvr1:convert_nlvr1", "the NLVR corpus in the benchmark's format"
    ),
}
