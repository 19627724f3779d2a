"""Mapping from parameter names of HenryHZY/VL-PET (and of VL-Adapter and Ladder Side-Tuning) to ours.

One original name may correspond to several of ours: an adapter is ``unit.down`` on its own, ``unit.unit.down`` inside a
gate, and ``unit.units.vqa.down`` if each task has its own. The model being loaded determines which one applies.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlpet_lightning.interop.original.nodes import TASK_NAMES

VISUAL = re.compile(r"^(?:model\.)?encoder\.visual_embedding\.")
# other names of the token embedding
TIED = {
    "lm_head.weight",
    *(
        f"{root}{name}.weight"
        for root in ("", "model.")
        for name in ("encoder.embed_tokens", "decoder.embed_tokens", "encoder.visual_embedding.obj_order_embedding")
    ),
}
VISUAL_PARTS = {
    "feat_embedding.": "feature.",
    "absolute_vis_pos_embedding.": "box.",
    "img_order_embedding.": "image_order.",
    "visual_projector_multihead_down.": "feature.0.down.",
    "visual_projector_multihead_up.": "feature.0.up.",
    "visual_projector_gating_large_x_": "feature.0.gate_",
    "visual_projector_layer_norm.": "feature.1.",
}


@dataclass(frozen=True)
class Home:
    """Destination of an original tensor.

    Args:
        names: Candidates among our names, the simplest first; ``*`` matches any word.
        part: Index among the tensors that are stacked into one of ours (a head's rows); None for a whole tensor.
    """

    names: tuple[str, ...]
    part: int | None = None

    def among(self, ours: Collection[str]) -> list[str]:
        """Return the first candidate found in ``ours`` (``*`` may match several), or the simplest if none is found."""
        for name in self.names:
            found = [name] if name in ours else []
            if "*" in name:
                pattern = re.compile(re.escape(name).replace(r"\*", r"\w+") + "$")
                found = [one for one in ours if pattern.match(one)]
            if found:
                return found
        return [self.names[0]]


# modules of an original layer: pattern of the name relative to the layer, stack, and our name of the unit
BART_MODULES = (
    (r"(attn_adapter(?:_multihead)?|encoder_attn_(?:adapter_)?gating)", "encoder", "self_attn.out_proj.unit"),
    (r"(ff_adapter(?:_multihead)?|encoder_ff_(?:adapter_)?gating)", "encoder", "fc2.unit"),
    (r"(self_attn_adapter(?:_multihead)?|decoder_self_attn_adapter)", "decoder", "self_attn.out_proj.unit"),
    (
        r"(enc_attn_adapter(?:_multihead)?|decoder_enc_attn_adapter(?:_gating)?)",
        "decoder",
        "encoder_attn.out_proj.unit",
    ),
    (r"(ff_adapter(?:_multihead)?|decoder_ff_adapter)", "decoder", "fc2.unit"),
    (r"(decoder_ff_ia3)", "decoder", "fc2.input_unit"),
    (r"(decoder_enc_attn_key_value_adapter)", "decoder", "encoder_attn.k_proj.input_unit"),
    (
        r"encoder_attn\.(attn_value_parallel_adapter|enc_attn_value_sequential_adapter|attn_value_ia3"
        r"|decoder_enc_attn_value_(?:parallel|sequential)_adapter_gating)",
        "decoder",
        "encoder_attn.v_proj.unit",
    ),
    (r"(self_attn|encoder_attn)\.([qv])_proj(?=\.lora_)", "", r"\1.\2_proj.unit"),
)
T5_MODULES = (
    (r"layer\.0\.(attn_adapter(?:_multihead)?|encoder_attn_adapter_gating)", "", "layer.0.SelfAttention.o.unit"),
    (r"layer\.1\.(ff_adapter(?:_multihead)?|encoder_ff_adapter_gating)", "encoder", "layer.1.DenseReluDense.wo.unit"),
    (r"layer\.1\.(enc_attn_adapter)", "decoder", "layer.1.EncDecAttention.o.unit"),
    (r"layer\.2\.(ff_adapter)", "decoder", "layer.2.DenseReluDense.wo.unit"),
    (r"layer\.1\.EncDecAttention\.(attn_value_parallel_adapter)", "decoder", "layer.1.EncDecAttention.v.unit"),
)
LAYER = re.compile(r"^(?:model\.)?(encoder|decoder)\.(layers|block)\.(\d+)\.")

# patterns for the part after the module's name; those of gates come with our name inside the gate
CONTROLLER = re.compile(r"^\.adapters\.(\w+)\.(down|up)_sampler\.(.+)$")
NORM = re.compile(r"^\.(pre|post)_layer_norm\.(weight|bias)$")
HEADS = re.compile(r"^_(down|up)\.(?:(\d+)\.)?(weight|bias)$")
LORA = re.compile(r"^\.lora_([AB])s\.(\w+)$")
GATES = (
    (re.compile(r"^_large_x_(down|up)\.(weight|bias)$"), r"\1.\2"),
    (re.compile(r"^_large_x\.(weight|bias)$"), r"full.\1"),
    (re.compile(r"^_(?:small_xy_cat|middle_xy_add)\.(weight|bias)$"), r"score.\1"),
    (re.compile(r"^_middle_ia3_add$"), "vector"),
    (re.compile(r"^_layernorm\.(weight|bias)$"), r"norm.\1"),
)
RULE = "phm_rule"  # the rule shared by all layers (src/modeling_bart.py: VLBart.set_phm_rule)
SHARED_RULE = "shared.phm_rule_*.weight"  # `*` matches any word
LOW_RANK = {"W_left": "left", "W_right": "right"}

PROMPT = re.compile(
    r"^(?:model\.)?((?:encoder\.)?)prompt_modules\.prompts\.(\w+)\.prefix_embedding\.(0|1|3)\.(weight|bias)$"
)
PROMPT_PARTS = {"0": "embedding", "1": "down", "3": "up"}
TASK_EMBEDDING = re.compile(
    r"^(?:model\.)?(?:shared_task_embed|(?:encoder|decoder)\.task_embed)\.task_to_embeddings\.(\w+)$"
)
HYPERNET = re.compile(r"^(?:model\.)?(encoder|decoder)\.adapter_layers_hyper_net\.(.+)$")
HYPERNET_PARTS = (
    (re.compile(r"^layer_id_embeddings\."), "layer_embedding."),
    (re.compile(r"^adapters_block_type\."), "block_embedding."),
    (re.compile(r"^task_hypernet\.task_embeding_generator\."), "project."),
    (re.compile(r"^LayerNorm\."), "LayerNorm."),
    (re.compile(r"^(?:(\w+?)_)?(down|up)_sampler_hyper_net\.(weight|bias)_generator\.0\."), r"\2.\1.\3_generator."),
)

# side networks (ylsung/Ladder-Side-Tuning, VL-T5/src/my_transformers/modeling_t5.py)
SIDE_BLOCK = re.compile(r"^(encoder|decoder)\.side_block\.(\d+)\.")
SIDE_LAYER = re.compile(r"^(encoder|decoder)\.side_(block|downsamples|gate_params)\.(\d+)")
SIDE_LAYER_PARTS = {"block": "stack.block.{}", "downsamples": "rungs.{}.down", "gate_params": "rungs.{}.gate"}
SIDE_PARTS = (
    (re.compile(r"^(encoder|decoder)\.side_first_downsample\."), r"side.\1.rungs.0.first."),
    (re.compile(r"^(encoder|decoder)\.final_side_layer_norm\."), r"side.\1.stack.final_layer_norm."),
    (re.compile(r"^side_final_upsample\."), "side.up."),
)
SideLayers = Mapping[str, Sequence[int]]  # by stack: the backbone's layers that have a side layer


def side_layers(names: Collection[str]) -> SideLayers:
    """Return the layers of the backbone that have a side layer, from all names of an original state dict."""
    found: dict[str, set[int]] = {"encoder": set(), "decoder": set()}
    for match in map(SIDE_BLOCK.match, names):
        if match is not None:
            found[match[1]].add(int(match[2]))
    return {stack: sorted(indices) for stack, indices in found.items()}


def homes_of(names: Collection[str]) -> dict[str, Home]:
    """Return the destinations of the tensors of an original state dict.

    Not included are tied copies of the token embedding, and gates of layers without a side layer, which the original
    creates and never reads.

    Args:
        names: Names in the state dict. If there is a side network, the names of all side layers must be among them:
            the original counts layers of the backbone, ours counts side layers.
    """
    beside = side_layers(names)
    return {name: home for name in names if (home := home_of(name, beside)) is not None}


def home_of(original: str, beside: SideLayers) -> Home | None:
    """Return the destination of an original tensor, or None if it has none; see :func:`homes_of`."""
    if original in TIED:
        return None
    if original == RULE:
        return Home((SHARED_RULE,))
    layer = SIDE_LAYER.match(original)
    if layer is not None:
        return _side_layer(layer, original[layer.end() :], beside[layer[1]])
    for pattern, ours in SIDE_PARTS:
        if pattern.match(original):
            return Home((pattern.sub(ours, original),))
    for reading in (_visual, _prompt, _task_embedding, _hypernet, _in_layer):
        found = reading(original)
        if found is not None:
            return found
    return Home((f"lm.{original}",))


def _side_layer(layer: re.Match[str], rest: str, beside: Sequence[int]) -> Home | None:
    stack, part, index = layer[1], layer[2], int(layer[3])
    if index not in beside:
        return None
    return Home((f"side.{stack}.{SIDE_LAYER_PARTS[part].format(beside.index(index))}{rest}",))


def _ours(task: str) -> str:
    return TASK_NAMES.get(task, task)


def _visual(original: str) -> Home | None:
    match = VISUAL.match(original)
    if match is None:
        return None
    rest = original[match.end() :]
    for theirs, ours in VISUAL_PARTS.items():
        if rest.startswith(theirs):
            rest = ours + rest[len(theirs) :]
            break
    head = re.match(r"(feature\.0\.down)\.(\d+)\.(weight|bias)$", rest)
    if head:
        return Home((f"visual.{head[1]}.{head[3]}",), int(head[2]))
    return Home((f"visual.{rest}",))


def _prompt(original: str) -> Home | None:
    match = PROMPT.match(original)
    if match is None:
        return None
    stack = "encoder" if match[1] else "decoder"  # the original's model itself owns the decoder's prompt
    leaf = f"{PROMPT_PARTS[match[3]]}.{match[4]}"
    return Home((f"prompts.{stack}.{leaf}", f"prompts.{stack}.units.{_ours(match[2])}.{leaf}"))


def _task_embedding(original: str) -> Home | None:
    match = TASK_EMBEDDING.match(original)
    return None if match is None else Home((f"shared.task_embedding.vectors.{_ours(match[1])}",))


def _hypernet(original: str) -> Home | None:
    match = HYPERNET.match(original)
    if match is None:
        return None
    rest = match[2]
    for pattern, ours in HYPERNET_PARTS:
        found = pattern.match(rest)
        if found:
            rest = found.expand(ours).replace("..", ".all.") + rest[found.end() :]
            break
    return Home((f"shared.hypernet_{match[1]}.{rest}",))


def _in_layer(original: str) -> Home | None:
    layer = LAYER.match(original)
    if layer is None:
        return None
    rest = original[layer.end() :]
    for pattern, stack, leaf in BART_MODULES if layer[2] == "layers" else T5_MODULES:
        found = re.match(pattern, rest)
        if found is None or (stack and stack != layer[1]):
            continue
        home = _inside(rest[found.end() :], found[1])
        if home is not None:
            root = f"lm.{layer[0]}{found.expand(leaf)}."
            return Home(tuple(name if name == SHARED_RULE else root + name for name in home.names), home.part)
    return None


def _inside(rest: str, module: str) -> Home | None:
    """Return the destination relative to the unit."""
    if module.endswith("_ia3"):
        return Home(("vector", "unit.vector")) if not rest else None
    if module.endswith("gating"):
        return _gate(rest, alone="adapter" not in module)
    controller = CONTROLLER.match(rest)
    if controller:
        task, side, leaf = controller.groups()
        if leaf == "phm_rule":
            return Home((*_readings([f"{side}.rule.weight"], _ours(task)), SHARED_RULE))
        names = dict.fromkeys([f"{side}.{leaf}", f"{side}.{LOW_RANK.get(leaf, leaf)}"])
        return Home(tuple(_readings(list(names), _ours(task))))
    norm = NORM.match(rest)
    if norm:
        leaf = f"norm_{'before' if norm[1] == 'pre' else 'after'}.{norm[2]}"
        # with one adapter per task, the norm belongs to the controller and is shared by all tasks
        return Home(tuple(_readings([leaf], "*")))
    heads = HEADS.match(rest)
    if heads:
        leaf = f"{heads[1]}.{heads[3]}"
        return Home((leaf, f"unit.{leaf}"), None if heads[2] is None else int(heads[2]))
    lora = LORA.match(rest)
    if lora:
        return Home(tuple(_readings([f"lora_{lora[1]}.weight"], _ours(lora[2]))))
    return None


def _readings(leaves: list[str], task: str) -> Iterator[str]:
    for leaf in leaves:
        yield from (leaf, f"unit.{leaf}", f"units.{task}.{leaf}", f"unit.units.{task}.{leaf}")


def _gate(rest: str, *, alone: bool) -> Home | None:
    for pattern, ours in GATES:
        found = pattern.match(rest)
        if found:
            leaf = found.expand(ours)
            return Home((leaf, f"unit.{leaf}") if alone else (f"gate.{leaf}",))
    return None
