"""Flags of side networks (ylsung/Ladder-Side-Tuning, VL-T5/src: param.py, trainer_base.py)."""

from __future__ import annotations

import argparse
import ast

from vlpet_lightning.interop.original.rules import MAKE_MODULES
from vlpet_lightning.interop.original.specs import Node, spec
from vlpet_lightning.pet import LadderSideNetwork

FLAG = "--use_side_transformers"
CRITERIA = {"t5": "magnitude", "fisher": "importance"}  # part of the value: criterion of the pruning
VERSION = "v2"
OTHER_VERSIONS = {
    "v1": "crashes there, because it takes no importance",
    "v3": "is not implemented here: it chooses attention rows by head, and only the initial weights differ",
    "v4": "crashes there, because it is not given the number of heads",
    "v5": "is not implemented here: it prunes in ten steps, and only the initial weights differ",
}
# flags of modules inside the backbone
INSIDE = (
    "use_adapter",
    "use_compacter",
    "use_lradapter",
    "use_hyperformer",
    "use_lora",
    "use_dora",
    "encoder_prompt_len",
    "decoder_prompt_len",
    *MAKE_MODULES,
)


def layer_list(text: str) -> list[int] | None:
    """Parse a list of layers, which the original evaluates as Python code.

    >>> layer_list("[1, 3, 5]"), layer_list("None")
    ([1, 3, 5], None)

    Raises:
        argparse.ArgumentTypeError: If it is no list of integers in ascending order.
    """
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        value = text
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value or any(type(index) is not int for index in value):
        raise argparse.ArgumentTypeError(f"expected a list of layers like [1,3,5], got {text!r}")
    if list(value) != sorted(set(value)):
        raise argparse.ArgumentTypeError(f"expected layers in ascending order, got {text!r}")
    return list(value)


def side_network_problems(args: argparse.Namespace, kind: str, width: int) -> list[str]:
    """Return the reasons why the side network of a command line is not supported.

    Args:
        args: Result of :func:`vlpet_lightning.interop.original.flags.parse_flags`.
        kind: ``bart`` or ``t5``.
        width: Model width ``d`` of the backbone.
    """
    if not args.use_side_transformers:
        return []
    problems = []
    if kind != "t5":
        problems.append(
            f"{FLAG} with BART, whose code there has no side network (experiments/pet/lst.yaml is one on BART)"
        )
    beside = [name for name in INSIDE if getattr(args, name)]
    beside += [name for name, value in vars(args).items() if name.startswith("unfreeze_") and value]
    if beside:
        names = ", ".join(f"--{name}" for name in dict.fromkeys(beside))
        problems.append(f"{FLAG} beside {names}: with a side network, nothing else in the language model is trained")
    reduction = args.side_reduction_factor
    if reduction == 1:
        problems.append("--side_reduction_factor 1, with which there are no projections to and from the side network")
    elif reduction < 1 or width % reduction:
        problems.append(f"--side_reduction_factor {reduction}, which does not divide the width of {width}")
    if _criterion(args) is not None:
        version = args.load_side_pretrained_weights.rpartition("-")[2]
        if version != VERSION:
            why = OTHER_VERSIONS.get(version, "does not exist there")
            problems.append(
                f"--load_side_pretrained_weights {args.load_side_pretrained_weights}: pruning {version} {why}; "
                f"{VERSION} is supported"
            )
    return problems


def _criterion(args: argparse.Namespace) -> str | None:
    """Return the criterion of the pruning, or None if the side layers start fresh."""
    found = [criterion for part, criterion in CRITERIA.items() if part in args.load_side_pretrained_weights]
    return found[-1] if found else None


def side_network(args: argparse.Namespace) -> Node:
    """Build the node of the side network."""
    node = spec(
        LadderSideNetwork,
        reduction=args.side_reduction_factor,
        encoder_layers=args.encoder_side_layers,
        decoder_layers=args.decoder_side_layers,
        init="uniform",
        start="fresh" if _criterion(args) is None else "pruned",
    )
    if _criterion(args) is not None:
        node["init_args"]["importance"] = None
    return node


def ignored_side_flags(args: argparse.Namespace) -> list[str]:
    """Return remarks on flags of side networks that the original ignores."""
    value = args.load_side_pretrained_weights
    if not args.use_side_transformers:
        names = ("encoder_side_layers", "decoder_side_layers", "load_side_pretrained_weights")
        return [f"--{name}: read with {FLAG} alone" for name in names if getattr(args, name)]
    if value and _criterion(args) is None:
        return [f"--load_side_pretrained_weights {value}: it contains neither t5 nor fisher, so nothing is loaded"]
    return []


def side_steps(args: argparse.Namespace, experiment: str) -> list[str]:
    """Return lines on the step before training that a config cannot express: measuring the importance of the weights.

    Args:
        args: Result of :func:`vlpet_lightning.interop.original.flags.parse_flags`.
        experiment: Config that the converted one overlays.
    """
    if not args.use_side_transformers or _criterion(args) != "importance":
        return []
    return [
        f"--load_side_pretrained_weights {args.load_side_pretrained_weights}: before training, measure the importance:",
        f"  python -m vlpet_lightning importance --config {experiment} --config THIS_FILE "
        f"--samples {args.samples_for_fisher} --out importance.pt",
        "and set `importance` to it below; with null, the weights of the largest magnitude are taken",
    ]
