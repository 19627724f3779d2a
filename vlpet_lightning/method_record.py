"""Record of the method in a checkpoint, and its comparison with the model that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlpet_lightning.parameters import unit_differences

RECORD = "vlpet"  # key of the record in a checkpoint


def check_same_method(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    saved: Mapping[str, Tensor],
    mine: Mapping[str, Tensor],
    *,
    trains: bool,
) -> None:
    """Check that a checkpoint and a model use the same method, before any weight is changed.

    Args:
        theirs: The checkpoint's record: ``units``, ``rules``, ``mask_padding``, ``peft``, ``no_decay``.
        ours: The same record of the model.
        saved: Tensors of the checkpoint.
        mine: Tensors that a checkpoint of the model would contain.
        trains: Whether the optimiser state is loaded as well. It is indexed by group and position, so trained
            parameters and exemptions from weight decay must match.

    Raises:
        ValueError: If the methods differ; the message names all differences.
    """
    differences = unit_differences(theirs["units"], ours["units"])
    if theirs["mask_padding"] != ours["mask_padding"]:
        differences.append(f"mask_padding: {theirs['mask_padding']} there, {ours['mask_padding']} here")
    if theirs.get("peft") != ours["peft"]:
        differences.append(f"peft: {theirs.get('peft')} there, {ours['peft']} here")
    (template, pixels), (wanted, reads) = _parted(theirs.get("template")), _parted(ours["template"])
    if template != wanted:
        differences.append(f"template: {template} there, {wanted} here")
    if pixels != reads:
        differences.append(f"image_input: {pixels} there, {reads} here")
    wrong = sorted(set(mine) ^ set(saved))
    wrong += [name for name in sorted(set(mine) & set(saved)) if mine[name].shape != saved[name].shape]
    if wrong:
        differences.append(f"{len(wrong)} tensors missing, unexpected or of another shape, e.g. {wrong[:3]}")
    if wrong or trains:
        for name, key in (("trainable", "rules"), ("no_decay", "no_decay")):
            there, here = theirs.get(key, ours[key]), ours[key]
            if set(there) != set(here):
                differences.append(
                    f"{name}: {', '.join(there) or 'nothing'} there, {', '.join(here) or 'nothing'} here"
                )
    if differences:
        raise ValueError(
            "this checkpoint is of another method: "
            + "; ".join(differences)
            + ". Give the config it was trained with (config.yaml in its run folder)"
        )


def _parted(settings: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
    """Return the settings of a decoder-only model without its image input, and that."""
    if settings is None:
        return None, "features"
    rest = {name: value for name, value in settings.items() if name != "pixels"}
    return rest, "pixels" if settings.get("pixels") else "features"
