"""Every name in the original's state dicts is mapped to the model built from its command line."""

from __future__ import annotations

import pytest
import torch
from transformers import BartConfig, T5Config

from tests.interop.original import originals
from tests.interop.original.originals import BART_BASE, T5_BASE, TASKS, Sizes
from vlpet_lightning.backbones import BACKBONES
from vlpet_lightning.backbones.bart import BART_BASE as BART_CONFIG
from vlpet_lightning.backbones.t5 import T5_BASE as T5_CONFIG
from vlpet_lightning.interop import model_from_original, original_tensors
from vlpet_lightning.interop.original.checkpoint import _check_fit, match_names
from vlpet_lightning.interop.original.flags import parse_flags
from vlpet_lightning.interop.original.methods import method_from_flags
from vlpet_lightning.model import VLModel
from vlpet_lightning.pet.serialization import from_plain, placements_from_plain

ALL = ["--tasks", ",".join(TASKS), "--n_boxes", "36", "--downsample"]
VALUE = ["--use_single_adapter", "--use_decoder_enc_attn_value_parallel_adapter_down_dim"]
GATES = {
    "large": ["--use_encoder_adapter_gating_large_x_lowrank", "--adapter_gating_down_dim"],
    "middle_x": ["--use_encoder_adapter_gating_middle_xy_add"],
    "middle_y": ["--use_encoder_adapter_gating_middle_ia3_add"],
    "small": ["--use_encoder_adapter_gating_small_xy_cat"],
}


def vlpet_flags(kind: str, rank: int) -> list[str]:
    words = ["--use_encoder_adapter_down_multihead", "--encoder_adapter_multihead_num_head", "4"]
    words += ["--adapter_down_dim", str(rank), *VALUE, "--unfreeze_encoder_layer_norms", *GATES[kind]]
    return words + ([str(rank)] if kind == "large" else [])


ADAPTER = ["--use_adapter", "--reduction_factor", "8", "--unfreeze_layer_norms"]
COMPACTER = ["--use_compacter", "--reduction_factor", "8", "--hypercomplex_division", "2", "--use_single_adapter"]
COMPACTER += ["--shared_phm_rule", "False", "--factorized_phm", "False", "--unfreeze_layer_norms"]
HYPER = [
    "--use_hyperformer",
    "--reduction_factor",
    "8",
    "--projected_task_embedding_dim",
    "8",
    "--unfreeze_layer_norms",
]
PROMPT = ["--encoder_prompt_len", "40", "--mid_dim", "800"]

# name: flags, parameters added to the backbone, parameters of the model (None: not published)
FULL_SIZE = {
    **{
        f"bart-vl-pet-{kind}": (BART_BASE, vlpet_flags(kind, 96), originals.vlpet(BART_BASE, kind, 96), total)
        for kind, total in {
            "large": 145_606_464,
            "middle_x": 143_835_852,
            "middle_y": 143_835_840,
            "small": 143_845_068,
        }.items()
    },
    **{
        f"t5-vl-pet-{kind}": (T5_BASE, vlpet_flags(kind, 192), originals.vlpet(T5_BASE, kind, 192), total)
        for kind, total in {
            "large": 240_521_856,
            "middle_x": 233_439_384,
            "middle_y": 233_439_360,
            "small": 233_457_816,
        }.items()
    },
    "bart-vl-adapter": (
        BART_BASE,
        [*ADAPTER, "--use_single_adapter"],
        originals.vl_adapter(BART_BASE, 96),
        145_606_464,
    ),
    "t5-vl-adapter": (T5_BASE, [*ADAPTER, "--use_single_adapter"], originals.vl_adapter(T5_BASE, 96), 233_439_360),
    "bart-vl-adapter-per-task": (BART_BASE, ADAPTER, originals.vl_adapter(BART_BASE, 96), None),
    "bart-vl-adapter-half-shared": (
        BART_BASE,
        [*ADAPTER, "--share_down_sampler"],
        originals.vl_adapter(BART_BASE, 96),
        None,
    ),
    "bart-compacter": (BART_BASE, COMPACTER, originals.compacter(BART_BASE, 96, 2), 143_395_104),
    "t5-compacter": (T5_BASE, COMPACTER, originals.compacter(T5_BASE, 96, 2), 229_016_640),
    "bart-lora": (
        BART_BASE,
        ["--use_lora", "--lora_dim", "128", "--use_single_lora"],
        originals.lora(BART_BASE, 128),
        148_234_752,
    ),
    "bart-lora-per-task": (BART_BASE, ["--use_lora", "--lora_dim", "128"], originals.lora(BART_BASE, 128), None),
    "bart-prompt": (
        BART_BASE,
        [*PROMPT, "--use_single_prompt"],
        originals.prompt(BART_BASE, "encoder", 40, 800),
        142_417_952,
    ),
    "t5-prompt": (
        T5_BASE,
        [*PROMPT, "--use_single_prompt"],
        originals.prompt(T5_BASE, "encoder", 40, 800),
        225_801_248,
    ),
    "bart-prompts-per-task": (
        BART_BASE,
        [*PROMPT, "--decoder_prompt_len", "8"],
        originals.prompt(BART_BASE, "encoder", 40, 800) | originals.prompt(BART_BASE, "decoder", 8, 800),
        None,
    ),
    "bart-hyperformer": (
        BART_BASE,
        [*HYPER, "--unique_hyper_net"],
        originals.hyperformer(BART_BASE, 96, 512, 128, 8, one=False),
        148_103_952,
    ),
    "t5-hyperformer": (
        T5_BASE,
        [*HYPER, "--unique_hyper_net"],
        originals.hyperformer(T5_BASE, 96, 512, 128, 8, one=False),
        231_493_392,
    ),
    "bart-hyperformer-efficient": (
        BART_BASE,
        [*HYPER, "--efficient_unique_hyper_net"],
        originals.hyperformer(BART_BASE, 96, 512, 128, 8, one=True),
        None,
    ),
    "bart-full": (BART_BASE, ["--unfreeze_language_model"], {}, 141_156_864),
    "t5-full": (T5_BASE, ["--unfreeze_language_model"], {}, 224_540_160),
}


def empty_model(sizes: Sizes, flags: list[str]) -> VLModel:
    """Build the full-size model of a command line on the meta device."""
    backbone = BACKBONES[sizes.kind]
    config = BartConfig(**BART_CONFIG) if sizes.kind == "bart" else T5Config(**T5_CONFIG)
    config.vocab_size = sizes.vocabulary
    method = method_from_flags(parse_flags([*flags, *ALL]), sizes.kind, sizes.d)
    with torch.device("meta"):
        return VLModel(
            backbone,
            backbone.build(config),
            placements=placements_from_plain(method.placements),
            trainable=method.trainable,
            projector=from_plain(method.projector),
        )


@pytest.mark.parametrize("case", FULL_SIZE)
def test_released_state_dicts_fit_by_name_and_shape_at_full_size(case):
    sizes, flags, added, total = FULL_SIZE[case]
    names = originals.backbone(sizes) | added
    model = empty_model(sizes, flags)
    own = model.state_dict(keep_vars=True)
    matched = match_names(originals.zeros(names), own)
    _check_fit(matched.tensors, own)
    assert set(matched.used) | set(matched.ignored) == set(names)
    if total is not None:
        assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("case", ["bart-vl-pet-large", "t5-vl-pet-small", "bart-vl-adapter", "t5-vl-adapter"])
def test_a_missing_a_foreign_and_a_misshapen_tensor_are_all_named(case):
    sizes, flags, added, _ = FULL_SIZE[case]
    state = originals.zeros(originals.backbone(sizes) | added)
    gone = sorted(added)[0]
    # for a single adapter, the copy of any one task is enough
    gone_everywhere = [name for name in added if name.split(".adapters.")[0] == gone.split(".adapters.")[0]]
    for name in gone_everywhere if ".adapters." in gone else [gone]:
        del state[name]
    bent = next(name for name in state if name.endswith(("layers.0.fc1.weight", "DenseReluDense.wi.weight")))
    state[bent] = torch.zeros(3)
    state["model.encoder.surprise"] = torch.zeros(2)
    own = empty_model(sizes, flags).state_dict(keep_vars=True)
    with pytest.raises(ValueError) as error:
        _check_fit(match_names(state, own).tensors, own)
    words = ["missing: ['lm.", "surprise", "(3,) here"]
    assert [word for word in words if word not in str(error.value)] == []


# ablations, at a small size and with real numbers ---------------------------------------------------------------------

SMALL = Sizes("bart", 16, 24, 2, 60, positions=34, features=12, heads=4)
SMALL_CONFIG = BartConfig(
    vocab_size=60,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=32,
)
SINGLE = ["--use_single_adapter", "--tasks", ",".join(TASKS)]
ENCODER = {
    split: [
        f"--use_encoder_adapter_{name}multihead",
        "--adapter_down_dim",
        "8",
        "--encoder_adapter_multihead_num_head",
        "4",
        *SINGLE,
    ]
    for split, name in {"down": "down_", "up": "up_", "both": "down_up_", "pairs": "down_up_pair_"}.items()
}


def multiheads(split: str) -> originals.Shapes:
    found: originals.Shapes = {}
    for name in originals.encoder_modules(SMALL, "{}_adapter_multihead"):
        found |= originals.multihead(name, 16, 8, 4, split)
    return found


def at_every(names, make) -> originals.Shapes:
    found: originals.Shapes = {}
    for name in names:
        found |= make(name)
    return found


def gates_of(kind: str) -> originals.Shapes:
    names = originals.encoder_modules(SMALL, "encoder_{}_adapter_gating")
    return at_every(names, lambda name: originals.gate(name, 16, kind, 6))


def in_decoder(what: str, make) -> originals.Shapes:
    return at_every((f"{at}{what}" for at in originals.layers(SMALL, "decoder")), make)


def one_adapter(rank: int):
    return lambda name: originals.adapter(name, 16, rank)


GATED_VALUE = "encoder_attn.decoder_enc_attn_value_parallel_adapter_gating"
ABLATIONS = {
    **{f"heads-{split}": (ENCODER[split], multiheads(split)) for split in ENCODER},
    "full-gate": (
        [*ENCODER["down"], "--use_encoder_adapter_gating_large_x"],
        multiheads("down") | gates_of("full"),
    ),
    "layer-norm-gate": (
        [*ENCODER["down"], "--use_encoder_adapter_gating_layernorm"],
        multiheads("down") | gates_of("layernorm"),
    ),
    "gate-around-adapter": (
        [
            "--use_adapter",
            "--no_decoder_adapter",
            "--reduction_factor",
            "4",
            *SINGLE,
            "--use_encoder_adapter_gating_large_x_lowrank",
            "--adapter_gating_down_dim",
            "6",
        ],
        at_every(originals.encoder_modules(SMALL, "{}_adapter"), one_adapter(4)) | gates_of("large"),
    ),
    "gate-around-adapters-per-task": (
        [
            "--use_adapter",
            "--no_decoder_adapter",
            "--reduction_factor",
            "4",
            "--tasks",
            ",".join(TASKS),
            "--use_encoder_adapter_gating_middle_xy_add",
        ],
        at_every(originals.encoder_modules(SMALL, "{}_adapter"), one_adapter(4)) | gates_of("middle_x"),
    ),
    "gate-beside-lora": (
        ["--use_lora", "--lora_dim", "4", "--use_single_lora", "--use_encoder_adapter_gating_middle_ia3_add", *SINGLE],
        originals.lora(SMALL, 4) | gates_of("middle_y"),
    ),
    "gating-only": (
        ["--use_encoder_gating_large_x_lowrank", "--gating_down_dim", "6", *SINGLE],
        at_every(
            originals.encoder_modules(SMALL, "encoder_{}_gating"), lambda name: originals.gate(name, 16, "large", 6)
        ),
    ),
    "compacter-shared-factorized": (
        ["--use_compacter", "--reduction_factor", "4", "--hypercomplex_division", "2", *SINGLE],
        {"phm_rule": (2, 2, 2)}
        | at_every(
            (*originals.encoder_modules(SMALL, "{}_adapter"), *originals.decoder_modules(SMALL)),
            lambda name: {
                key: shape
                for task in TASKS
                for side, inputs, outputs in (("down", 16, 4), ("up", 4, 16))
                for key, shape in {
                    f"{name}.adapters.{task}.{side}_sampler.phm_rule": (2, 2, 2),
                    f"{name}.adapters.{task}.{side}_sampler.W_left": (2, inputs // 2, 1),
                    f"{name}.adapters.{task}.{side}_sampler.W_right": (2, 1, outputs // 2),
                    f"{name}.adapters.{task}.{side}_sampler.b": (outputs,),
                }.items()
            },
        ),
    ),
    "low-rank-adapter": (
        ["--use_lradapter", "--reduction_factor", "4", "--no_decoder_adapter", *SINGLE],
        at_every(
            originals.encoder_modules(SMALL, "{}_adapter"),
            lambda name: {
                key: shape
                for task in TASKS
                for side, inputs, outputs in (("down", 16, 4), ("up", 4, 16))
                for key, shape in {
                    f"{name}.adapters.{task}.{side}_sampler.W_left": (inputs, 1),
                    f"{name}.adapters.{task}.{side}_sampler.W_right": (1, outputs),
                    f"{name}.adapters.{task}.{side}_sampler.b": (outputs,),
                }.items()
            },
        ),
    ),
    "norms-around-adapters-per-task": (
        [
            "--use_adapter",
            "--no_decoder_adapter",
            "--reduction_factor",
            "4",
            "--tasks",
            ",".join(TASKS),
            "--add_layer_norm_before_adapter",
            "--add_layer_norm_after_adapter",
        ],
        at_every(
            originals.encoder_modules(SMALL, "{}_adapter"),
            lambda name: (
                originals.adapter(name, 16, 4)
                | originals.norm(f"{name}.pre_layer_norm", 16)
                | originals.norm(f"{name}.post_layer_norm", 16)
            ),
        ),
    ),
    "gated-value-with-residual": (
        [
            *VALUE,
            "--decoder_enc_attn_value_parallel_adapter_down_dim",
            "4",
            "--tasks",
            "vqa",
            "--use_decoder_enc_attn_value_residual_connection",
            "--use_decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank",
            "--decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank_down_dim",
            "6",
        ],
        in_decoder("encoder_attn.attn_value_parallel_adapter", one_adapter(4))
        | in_decoder(GATED_VALUE, lambda name: originals.gate(name, 16, "large", 6)),
    ),
    "sequential-value": (
        [
            "--use_decoder_enc_attn_value_sequential_adapter_down_dim",
            *SINGLE,
            "--decoder_enc_attn_value_sequential_adapter_down_dim",
            "4",
        ],
        in_decoder("encoder_attn.enc_attn_value_sequential_adapter", one_adapter(4)),
    ),
    "key-value-adapter": (
        [
            "--use_decoder_enc_attn_key_value_adapter_down_dim",
            *SINGLE,
            "--decoder_enc_attn_key_value_adapter_down_dim",
            "4",
        ],
        in_decoder("decoder_enc_attn_key_value_adapter", one_adapter(4)),
    ),
    "gated-cross-adapter": (
        [
            "--use_decoder_enc_attn_adapter_down_dim",
            "--decoder_enc_attn_adapter_down_dim",
            "4",
            *SINGLE,
            "--use_decoder_enc_attn_adapter_gating_large_x_lowrank",
            "--decoder_enc_attn_adapter_gating_large_x_lowrank_down_dim",
            "6",
        ],
        in_decoder("decoder_enc_attn_adapter", one_adapter(4))
        | in_decoder("decoder_enc_attn_adapter_gating", lambda name: originals.gate(name, 16, "large", 6)),
    ),
    "single-decoder-adapters": (
        [
            "--use_decoder_self_attn_adapter_down_dim",
            "--decoder_self_attn_adapter_down_dim",
            "4",
            *SINGLE,
            "--use_decoder_ff_adapter_down_dim",
            "--decoder_ff_adapter_down_dim",
            "6",
        ],
        in_decoder("decoder_self_attn_adapter", one_adapter(4)) | in_decoder("decoder_ff_adapter", one_adapter(6)),
    ),
    "multi-head-decoder-adapters": (
        [
            "--use_decoder_adapter_down_multihead",
            "--decoder_adapter_multihead_num_head",
            "2",
            "--adapter_down_dim",
            "4",
            *SINGLE,
        ],
        at_every(
            (
                f"{at}{name}_adapter_multihead"
                for at in originals.layers(SMALL, "decoder")
                for name in ("self_attn", "enc_attn", "ff")
            ),
            lambda name: originals.multihead(name, 16, 4, 2),
        ),
    ),
    "ia3": (
        ["--use_decoder_enc_attn_value_ia3", "--use_decoder_ff_ia3", "--use_decoder_ff_ia3_add", *SINGLE],
        in_decoder("encoder_attn.attn_value_ia3", lambda name: {name: (16,)})
        | in_decoder("decoder_ff_ia3", lambda name: {name: (24,)}),
    ),
}
FEATURES = ["--n_boxes", "4", "--downsample"]


def numbers(shapes: originals.Shapes, single: bool) -> dict[str, torch.Tensor]:
    """Build a random state dict, with equal values for tied embeddings and for tasks that share an adapter."""
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, torch.Tensor] = {}

    def owner(name: str) -> str:
        if shapes[name] == (SMALL.vocabulary, SMALL.d):
            return "model.shared.weight"
        if name.endswith("phm_rule") and "phm_rule" in shapes:
            return "phm_rule"
        if not single:
            return name
        for task in TASKS[1:]:
            name = name.replace(f".adapters.{task}.", f".adapters.{TASKS[0]}.").replace(f"s.{task}", f"s.{TASKS[0]}")
        return name

    for name in shapes:
        if owner(name) not in drawn:
            drawn[owner(name)] = torch.randn(shapes[name], generator=generator)
    return {name: drawn[owner(name)] for name in shapes}


@pytest.mark.parametrize("case", ABLATIONS)
def test_ablations_of_the_original_are_built_filled_and_written_back(case):
    flags, added = ABLATIONS[case]
    state = numbers(originals.bart(SMALL) | added, single="per-task" not in case)
    model = model_from_original(state, [*flags, *FEATURES], SMALL_CONFIG)
    back = dict(original_tensors(list(state), model.state_dict()))
    tied = {name for name in state if name not in back}
    assert all(state[name].shape == (60, 16) for name in tied)
    assert set(added) <= set(back)
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())
    units = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("visual.")}
    written = dict(original_tensors(list(added), {name: model.get_parameter(name) for name in units}))
    assert set(written) == set(added)  # everything that the flags add is trained


def test_a_low_rank_visual_projector_is_read_too():
    shapes = originals.bart(SMALL)
    root = "model.encoder.visual_embedding."
    for name in [key for key in shapes if "feat_embedding" in key]:
        del shapes[name]
    for index in range(2):
        shapes |= originals.linear(f"{root}visual_projector_multihead_down.{index}", 12, 2)
    shapes |= originals.linear(f"{root}visual_projector_multihead_up", 4, 16)
    shapes |= originals.linear(f"{root}visual_projector_gating_large_x_down", 12, 6)
    shapes |= originals.linear(f"{root}visual_projector_gating_large_x_up", 6, 16)
    shapes |= originals.norm(f"{root}visual_projector_layer_norm", 16)
    flags = ["--use_lowrank_visual_projector", "--visual_projector_down_dim", "4"]
    flags += ["--visual_projector_multihead_num_head", "2", "--use_visual_projector_gating_large_x_lowrank"]
    flags += ["--visual_projector_gating_down_dim", "6"]
    state = numbers(shapes, single=True)
    model = model_from_original(state, [*flags, *FEATURES], SMALL_CONFIG)
    features = torch.randn(1, 4, 12)
    down = torch.cat([state[f"{root}visual_projector_multihead_down.{i}.weight"] for i in range(2)])
    bias = torch.cat([state[f"{root}visual_projector_multihead_down.{i}.bias"] for i in range(2)])

    def side(name, value):
        return value @ state[f"{root}{name}.weight"].T + state[f"{root}{name}.bias"]

    def gelu(value):
        return torch.nn.functional.gelu(value, approximate="tanh")

    expected = side("visual_projector_multihead_up", gelu(features @ down.T + bias))
    gate = side("visual_projector_gating_large_x_up", gelu(side("visual_projector_gating_large_x_down", features)))
    torch.testing.assert_close(model.visual.feature[0](features), expected * torch.sigmoid(gate))
