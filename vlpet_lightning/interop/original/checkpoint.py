"""Import of VL-PET, VL-Adapter and Ladder Side-Tuning models from their command lines and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.interop.original.flags import parse_flags
from vlpet_lightning.interop.original.methods import Method, grid_of, method_from_flags
from vlpet_lightning.interop.original.names import TIED, homes_of, side_layers
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet import LadderSideNetwork
from vlpet_lightning.pet.serialization import from_plain, placements_from_plain

ROOTS = {"bart": "model.", "t5": ""}  # prefix of the original's parameter names
OUR_TIED = re.compile(r"^lm\.(lm_head|(model\.)?(encoder|decoder)\.embed_tokens)\.weight$")


@dataclass(frozen=True)
class Matched:
    """Result of matching an original state dict to a model.

    Args:
        tensors: Matched tensors, by our names.
        used: Original names that were used.
        ignored: Original names that were not used: duplicates, and parameters that the original never reads.
    """

    tensors: dict[str, Tensor]
    used: list[str]
    ignored: list[str]


def _root(kind: str) -> str:
    if kind not in ROOTS:
        raise ValueError(f"the original has no {kind!r} backbone: choose from {', '.join(sorted(ROOTS))}")
    return ROOTS[kind]


def _plain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix added by DistributedDataParallel."""
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def _check_tied(state_dict: Mapping[str, Tensor], shared: str) -> None:
    unequal = [name for name in sorted(TIED & set(state_dict)) if not torch.equal(state_dict[name], state_dict[shared])]
    if unequal:
        raise ValueError(f"not tied to {shared} in this state dict: {unequal}")


def match_names(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Matched:
    """Map original tensors to our names.

    The heads of a projection are stacked into one linear layer, and identical copies for several tasks are merged.

    Args:
        state_dict: Original tensors, by names without ``module.`` prefixes.
        own: The model's state dict.

    Raises:
        ValueError: If tensors differ between tasks where the model has a single shared tensor.
    """
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    heads: dict[str, dict[int, Tensor]] = {}
    homes = homes_of(state_dict)
    ignored = [name for name in state_dict if name not in homes]
    for name, home in sorted(homes.items()):
        for target in home.among(own):
            if home.part is not None:
                heads.setdefault(target, {})[home.part] = state_dict[name]
            elif target not in found:
                found[target], origin[target] = state_dict[name], name
            elif found[target].shape == state_dict[name].shape and torch.equal(found[target], state_dict[name]):
                ignored.append(name)
            else:
                raise ValueError(
                    f"adapters differ from task to task: {name} is not {origin[target]}; one shared adapter is expected"
                )
    for target, parts in heads.items():
        found[target] = torch.cat([parts[number] for number in sorted(parts)])
    return Matched(found, [name for name in sorted(state_dict) if name not in ignored], ignored)


def fill(model: VLModel, state_dict: Mapping[str, Tensor]) -> Matched:
    """Load an original state dict into a model.

    Args:
        model: Model to load into; it is not changed if an error is raised.
        state_dict: Original tensors, by names with or without ``module.`` prefixes.

    Raises:
        ValueError: If the state dict does not match; the message lists all missing and unknown tensors and all
            differing shapes.
    """
    state_dict = _plain(state_dict)
    kind = model.backbone.kind
    root = _root(kind)
    visual = f"{root}encoder.visual_embedding."
    lacking = [name for name in (visual, f"{root}shared.weight") if not any(key.startswith(name) for key in state_dict)]
    if lacking:
        raise ValueError(f"not a state dict of the original's {kind.upper()}: it lacks {' and '.join(lacking)}")
    _check_tied(state_dict, f"{root}shared.weight")
    _check_side_layers(model.side, state_dict)
    own = model.state_dict(keep_vars=True)
    matched = match_names(state_dict, own)
    _check_fit(matched.tensors, own)
    model.load_state_dict(matched.tensors, strict=False)
    return matched


def _check_side_layers(side: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Check that the side layers are beside the same layers; their shapes do not show it."""
    if isinstance(side, LadderSideNetwork):
        for stack, found in side_layers(state_dict).items():
            if found and tuple(found) != side.side_layers[stack]:
                raise ValueError(
                    f"the state dict has side layers beside the {stack}'s layers {found}, the model that the flags "
                    f"mean beside {list(side.side_layers[stack])}: give --{stack}_side_layers as in training"
                )


def _check_fit(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    # a tensor may have several names in our model too, if layers or tasks share a module
    given = {id(own[name]) for name in tensors if name in own}
    missing = sorted(
        name for name in own if name not in tensors and not OUR_TIED.match(name) and id(own[name]) not in given
    )
    unknown = sorted(set(tensors) - set(own))
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} here, {tuple(own[name].shape)} in the model that the flags mean"
        for name in sorted(set(own) & set(tensors))
        if own[name].shape != tensors[name].shape
    ]
    problems = [f"missing: {missing}"] * bool(missing) + [f"not of this model: {unknown}"] * bool(unknown) + shapes
    if problems:
        raise ValueError("the state dict does not fit the model that the flags mean: " + "; ".join(problems))


def _sizes_from_weights(method: Method, state_dict: Mapping[str, Tensor]) -> None:
    """Set the hypernetwork's sizes from the weights, since no flag of the original gives them."""
    embedding = next((t for name, t in state_dict.items() if ".task_to_embeddings." in name), None)
    hidden = next((t for name, t in state_dict.items() if name.endswith("task_embeding_generator.0.weight")), None)
    if embedding is None or hidden is None:
        return
    for entry in method.placements:
        node = entry["unit"]
        while node is not None and "HyperFormer" not in node["class_path"]:
            node = node.get("init_args", {}).get("unit")
        if node is not None:
            node["init_args"] |= {"embedding": embedding.numel(), "hidden": hidden.shape[0]}


def model_from_original(
    state_dict: Mapping[str, Tensor], flags: Sequence[str], backbone_config: PretrainedConfig
) -> VLModel:
    """Build a model from an original command line and load an original checkpoint into it.

    Args:
        state_dict: All parameters and buffers by the original's names, with or without ``module.`` prefixes.
        flags: The original's command-line flags, one string per word.
        backbone_config: The language model's configuration; its vocabulary size is taken from the weights.

    Returns:
        The model in evaluation mode, with trainable parameters selected by the flags.

    Raises:
        ValueError: If the flags are unknown or unsupported, or the weights do not fit the model.
    """
    args = parse_flags(flags)
    kind = backbone_config.model_type
    root = _root(kind)
    state_dict = _plain(state_dict)
    projection = "visual_projector_multihead_down.0" if args.use_lowrank_visual_projector else "feat_embedding.0"
    needed = (f"{root}encoder.visual_embedding.{projection}.weight", f"{root}shared.weight")
    lacking = [name for name in needed if name not in state_dict]
    if lacking:
        raise ValueError(f"not a state dict of the original's {kind.upper()}: it lacks {' and '.join(lacking)}")
    method = method_from_flags(args, kind, backbone_config.d_model)
    _sizes_from_weights(method, state_dict)
    config = type(backbone_config).from_dict(backbone_config.to_dict())  # a copy: the caller's config is not changed
    config.vocab_size = state_dict[needed[1]].shape[0]
    backbone = BACKBONES[kind]
    model = VLModel(
        backbone,
        backbone.build(config),
        feature_dim=state_dict[needed[0]].shape[1],
        grid=grid_of(args),
        placements=placements_from_plain(method.placements),
        trainable=method.trainable,
        projector=from_plain(method.projector),
    )
    fill(model, state_dict)
    return model.eval()


def original_tensors(names: Sequence[str], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Map our tensors (weights or gradients) to the original's names.

    Args:
        names: Original names, e.g. the keys of an original state dict; see
            :func:`vlpet_lightning.interop.original.names.homes_of`.
        tensors: Tensors by our names.

    Yields:
        ``(original name, tensor)`` for every name with a tensor; for a multi-head projection, the rows of each head.
    """
    homes = homes_of(names)
    places = {name: home.among(tensors)[0] for name, home in homes.items()}
    count: dict[str, int] = {}
    for name, home in homes.items():
        if home.part is not None:
            count[places[name]] = max(count.get(places[name], 0), home.part + 1)
    for name, home in homes.items():
        ours = places[name]
        if ours in tensors:
            yield name, tensors[ours] if home.part is None else tensors[ours].chunk(count[ours])[home.part]
