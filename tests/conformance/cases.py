"""Table of cases: every method with its variants. A new method needs a new row.

Widths of the tiny backbones are in :class:`tests.conformance.bench.Sizes`; all ranks here are 8.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.conformance.bench import BUCKETS, HEADS, Case, Sizes
from vlpet_lightning.pet import (
    IA3,
    VLPET,
    Adapter,
    Compacter,
    DoRA,
    FullGate,
    Gated,
    HyperFormer,
    L2NormGate,
    LadderSideNetwork,
    LargeGate,
    LayerNormGate,
    LoRA,
    LowRankAdapter,
    MiddleXGate,
    MiddleYGate,
    ParallelAdapter,
    PerTask,
    Placement,
    Prompt,
    SelfGated,
    SmallGate,
)

R = 8
TASKS = ("vqa", "nlvr2", "caption")
ENCODER = ("encoder.attn", "encoder.ffn")
EVERYWHERE = (*ENCODER, "decoder.attn", "decoder.cross", "decoder.ffn")
VALUE = ("decoder.cross.value",)
PROJECTIONS = tuple(f"{place}.{part}" for place in ("encoder.attn", "decoder.attn", "decoder.cross") for part in ("query", "value"))  # fmt: skip # noqa: E501
VLPET_RULES = ("pet", "visual_embedding", "encoder.layer_norm")
NORM_RULES = ("pet", "visual_embedding", "encoder.layer_norm", "decoder.layer_norm")


def at(sites: tuple[str, ...], kind: Any, **settings: Any) -> Placement:
    """Place a unit with the given settings at some sites."""
    return Placement(list(sites), partial(kind, **settings))


# formulas of parts ----------------------------------------------------------------------------------------------------


def bottleneck(s: Sizes) -> int:
    """Down and up projection with biases."""
    return 2 * s.width * R + R + s.width


def recipe(s: Sizes, gate: int) -> int:
    """Published VL-PET: gated adapters in the encoder, an adapter at the decoder's values, and the encoder's norms."""
    return 2 * s.layers * (bottleneck(s) + gate) + s.layers * bottleneck(s) + s.encoder_norms


def compacter(s: Sizes, *, rules: int = 2 * 2**3, factor_rank: int | None = None) -> int:
    """Division 2: two projections, each with two factors of a quarter of its size, or thin ones, and a bias."""
    small = 2 * (s.width // 2) * (R // 2) if factor_rank is None else 2 * factor_rank * (s.width // 2 + R // 2)
    return rules + 2 * small + R + s.width


def hypernet(s: Sizes, blocks: int, embeddings: int) -> int:
    """One stack's network with dimensions 6 (embedding), 5 (hidden) and 4 (projected), without the task embedding."""
    generator = (4 + 1) * (2 * s.width * R + R + s.width)
    parts = 2 if embeddings == 0 else 3
    project = parts * 6 * 5 + 5 + 5 * 4 + 4
    return s.layers * 6 + embeddings * 6 + project + 2 * 4 + blocks * generator


def prompt(s: Sizes) -> int:
    """Three tokens, ten hidden units."""
    return 3 * s.width + (s.width * 10 + 10) + (10 * s.width + s.width)


# placements that several rows have ------------------------------------------------------------------------------------


def vlpet(gate: Any = None, **settings: Any) -> list[Placement]:
    """The published recipe."""
    return [at(ENCODER, VLPET, rank=R, gate=gate, **settings), at(VALUE, ParallelAdapter, rank=R)]


LARGE = partial(LargeGate, rank=R)
ADAPTER = partial(Adapter, rank=R)
HYPER = {"tasks": TASKS, "rank": R, "embedding": 6, "hidden": 5, "projected": 4}
PROMPT = partial(Prompt, length=3, hidden=10)
IA3_SITES = ("encoder.attn.key", "encoder.attn.value", "encoder.ffn.inner", *(f"decoder.{part}" for part in ("attn.key", "attn.value", "cross.key", "cross.value", "ffn.inner")))  # fmt: skip # noqa: E501


def ia3(s: Sizes) -> int:
    """Keys and values of three attentions, and inner activations of two feed-forward sublayers."""
    return s.layers * (6 * s.width + 2 * s.inner)


def dora(s: Sizes) -> int:
    """Two factors and a magnitude at six projections a layer."""
    return 6 * s.layers * (2 * s.width * R + s.width)


def ladder(s: Sizes) -> int:
    """Reduction 4: narrow layers with a projection and a gate each, one more projection per stack, one at the end."""
    narrow, inner, norm = s.width // 4, s.inner // 4, s.norm // 4
    biases = 4 * narrow + inner + narrow if s.tiny.biases else 0
    encoder = 4 * narrow**2 + (3 if s.tiny.gated else 2) * narrow * inner + 2 * norm + biases
    decoder = encoder + 4 * narrow**2 + norm + (4 * narrow if s.tiny.biases else 0)
    # the norm after the embedding is the backbone's
    positions_and_norm = (s.tiny.ends - 1) * norm if s.tiny.biases else BUCKETS * HEADS + norm
    down = s.width * narrow + narrow
    stacks = s.layers * (encoder + decoder + 2 * down + 2) + 2 * (positions_and_norm + down)
    return stacks + narrow * s.width + s.width


# peft's own layers, which are not of this project's making
MOVED = {"no_key_of_the_backbone_moves": "peft moves the weights of a layer that it wraps to base_layer"}
KEPT = {"a_used_method_can_be_set_to_the_identity_or_says_that_it_cannot": "peft resets no trained layer"}
KEPT |= {"from_the_identity_every_part_can_still_learn": "peft resets no trained layer"}
BREAKS = {"the_units_compile_to_one_graph": "DoRA's forward asks for the names of the active adapters"}


def peft(method: str, **settings: Any) -> dict[str, Any]:
    """A method of Hugging Face peft at queries and values."""
    return {"class_path": f"peft.{method}", "init_args": {"target_modules": ["q_proj", "v_proj", "q", "v"]} | settings}


CASES = (
    # VL-PET: the four granularities as published
    Case("vlpet-large", vlpet(LARGE), lambda s: recipe(s, bottleneck(s)), trainable=VLPET_RULES),
    Case("vlpet-middle-x", vlpet(MiddleXGate), lambda s: recipe(s, s.width + 1), trainable=VLPET_RULES),
    Case("vlpet-middle-y", vlpet(MiddleYGate), lambda s: recipe(s, s.width), trainable=VLPET_RULES),
    Case("vlpet-small", vlpet(SmallGate), lambda s: recipe(s, 2 * s.width + 1), trainable=VLPET_RULES),
    # and the paper's ablations
    Case(
        "vlpet-small-masked",
        vlpet(SmallGate),
        lambda s: recipe(s, 2 * s.width + 1),
        trainable=VLPET_RULES,
        mask_padding=True,
    ),
    Case(
        "vlpet-large-scaled-zero",  # as in T5's recipe
        vlpet(partial(LargeGate, rank=R, init="uniform+zero"), scale=0.3, init="uniform+zero"),
        lambda s: recipe(s, bottleneck(s)),
        trainable=VLPET_RULES,
    ),
    Case(
        "vlpet-middle-y-paper",
        vlpet(partial(MiddleYGate, form="paper", scale=2.0)),
        lambda s: recipe(s, s.width),
        trainable=VLPET_RULES,
    ),
    Case(
        "vlpet-full-gate",
        [at(ENCODER, VLPET, rank=R, gate=FullGate)],
        lambda s: 2 * s.layers * (bottleneck(s) + s.width**2 + s.width),
    ),
    Case(
        "vlpet-layer-norm-gate",
        [at(ENCODER, VLPET, rank=R, gate=LayerNormGate)],
        lambda s: 2 * s.layers * (bottleneck(s) + 2 * s.width),
        start="never",
    ),
    Case(
        "vlpet-l2-norm-gate",
        [at(ENCODER, VLPET, rank=R, gate=L2NormGate)],
        lambda s: 2 * s.layers * bottleneck(s),
        start="never",
    ),
    Case(
        "vlpet-added-gate",
        [at(ENCODER, VLPET, rank=R, gate=LARGE, combine="add")],
        lambda s: 4 * s.layers * bottleneck(s),
        start="never",
    ),
    Case("vlpet-ungated", [at(ENCODER, VLPET, rank=R)], lambda s: 2 * s.layers * bottleneck(s)),
    Case(
        "vlpet-ungated-zero",
        [at(ENCODER, VLPET, rank=R, init="normal+zero")],
        lambda s: 2 * s.layers * bottleneck(s),
        start="identity",
    ),
    Case("vlpet-heads-both", [at(ENCODER, VLPET, rank=R, split="both")], lambda s: 2 * s.layers * bottleneck(s)),
    Case(
        "vlpet-pairs",
        [at(ENCODER, VLPET, rank=R, split="pairs", gate=SmallGate)],
        lambda s: 2 * s.layers * (s.width * R + R + s.width * R // 4 + s.width + 2 * s.width + 1),
    ),
    # adapters
    Case(
        "adapter",
        [at(EVERYWHERE, Adapter, rank=R)],
        lambda s: 5 * s.layers * bottleneck(s) + s.encoder_norms + s.decoder_norms,
        trainable=NORM_RULES,
    ),
    Case(
        "adapter-zero",
        [at(EVERYWHERE, Adapter, rank=R, init="uniform+zero")],
        lambda s: 5 * s.layers * bottleneck(s),
        start="identity",
    ),
    Case(
        "adapter-parallel", [at(EVERYWHERE, Adapter, rank=R, flow="parallel")], lambda s: 5 * s.layers * bottleneck(s)
    ),
    Case(
        "adapter-scaled",
        [at(ENCODER, Adapter, rank=R, scale=4.0, pretrained_scale=0.5, init="normal+zero")],
        lambda s: 2 * s.layers * bottleneck(s),
    ),
    Case(
        "adapter-norm-before",
        [at(ENCODER, Adapter, rank=R, norms=["before"])],
        lambda s: 2 * s.layers * (bottleneck(s) + 2 * s.width),
    ),
    Case(
        "adapter-norms",
        [at(ENCODER, Adapter, rank=R, norms=["before", "after"])],
        lambda s: 2 * s.layers * (bottleneck(s) + 4 * s.width),
    ),
    Case("adapter-memory", [at(("decoder.cross.memory",), Adapter, rank=R)], lambda s: s.layers * bottleneck(s)),
    Case(
        "adapter-replace",
        [at(VALUE, Adapter, rank=R, flow="replace")],
        lambda s: s.layers * bottleneck(s),
        start="never",
    ),
    Case(
        "adapter-per-task",
        [at(EVERYWHERE, PerTask, unit=ADAPTER, tasks=TASKS)],
        lambda s: 3 * 5 * s.layers * bottleneck(s),
        tasks=TASKS,
    ),
    Case(
        "adapter-half-shared",
        [at(EVERYWHERE, PerTask, unit=ADAPTER, tasks=TASKS, share=["down"])],
        lambda s: 5 * s.layers * (s.width * R + R + 3 * (s.width * R + s.width)),
        tasks=TASKS,
    ),
    # LoRA
    Case("lora", [at(PROJECTIONS, LoRA, rank=R)], lambda s: 6 * s.layers * 2 * s.width * R, start="identity"),
    Case(
        "lora-per-task",
        [at(PROJECTIONS, PerTask, unit=partial(LoRA, rank=R), tasks=TASKS)],
        lambda s: 3 * 6 * s.layers * 2 * s.width * R,
        start="identity",
        tasks=TASKS,
    ),
    # DoRA: a magnitude for each row beside LoRA's two factors
    Case("dora", [at(PROJECTIONS, DoRA, rank=R)], dora, start="identity"),
    Case("dora-detached", [at(PROJECTIONS, DoRA, rank=R, scale=0.25, detach_norm=True)], dora, start="identity"),
    # Compacter and related methods
    Case("compacter", [at(EVERYWHERE, Compacter, rank=R)], lambda s: 5 * s.layers * compacter(s)),
    Case(
        "compacter-shared-rule",
        [at(EVERYWHERE, Compacter, rank=R, shared_rule=True)],
        lambda s: 5 * s.layers * compacter(s, rules=0) + 2**3,
    ),
    Case(
        "compacter-factorized",
        [at(EVERYWHERE, Compacter, rank=R, factor_rank=1)],
        lambda s: 5 * s.layers * compacter(s, factor_rank=1),
    ),
    Case(
        "low-rank-adapter",
        [at(EVERYWHERE, LowRankAdapter, rank=R, factor_rank=2)],
        lambda s: 5 * s.layers * (4 * (s.width + R) + R + s.width),
    ),
    # HyperFormer
    Case(
        "hyperformer-block",
        [at(EVERYWHERE, HyperFormer, **HYPER)],
        lambda s: hypernet(s, 2, 0) + hypernet(s, 3, 0) + 3 * 6,
        tasks=TASKS,
    ),
    Case(
        "hyperformer-one",
        [at(EVERYWHERE, HyperFormer, generators="one", **HYPER)],
        lambda s: 2 * hypernet(s, 1, 3) + 3 * 6,
        tasks=TASKS,
    ),
    # prompts
    Case("prompt-encoder", [Placement(["encoder.prompt"], PROMPT)], prompt, start="never"),
    Case("prompt-decoder", [Placement(["decoder.prompt"], PROMPT)], prompt, start="never"),
    Case(
        "prompt-both", [Placement(["encoder.prompt", "decoder.prompt"], PROMPT)], lambda s: 2 * prompt(s), start="never"
    ),
    Case(
        "prompt-per-task",
        [at(("encoder.prompt", "decoder.prompt"), PerTask, unit=PROMPT, tasks=TASKS)],
        lambda s: 2 * 3 * prompt(s),
        start="never",
        tasks=TASKS,
    ),
    # IA3
    Case("ia3-scale", [at(IA3_SITES, IA3)], ia3, start="identity"),
    Case("ia3-delta", [at(IA3_SITES, IA3, form="delta")], ia3, start="identity"),
    Case("ia3-normal", [at(IA3_SITES, IA3, init="normal")], ia3),
    Case("ia3-delta-one", [at(IA3_SITES, IA3, form="delta", init="one")], ia3),
    # gates without VL-PET's adapter (paper table 9, and the original's flags)
    Case("self-gated", [at(ENCODER, SelfGated, rank=R)], lambda s: 2 * s.layers * bottleneck(s), start="never"),
    Case(
        "self-gated-sum",
        [at(ENCODER, SelfGated, rank=R, gates="sum")],
        lambda s: 2 * s.layers * bottleneck(s),
        start="never",
    ),
    Case(
        "gated-compacter",
        [at(ENCODER, Gated, unit=partial(Compacter, rank=R, shared_rule=True), gate=LARGE)],
        lambda s: 2 * s.layers * (compacter(s, rules=0) + bottleneck(s)) + 2**3,
    ),
    Case(
        "gated-adapter",
        [at(ENCODER, Gated, unit=ADAPTER, gate=SmallGate, reads="sublayer", scale=0.3)],
        lambda s: 2 * s.layers * (bottleneck(s) + 2 * s.width + 1),
    ),
    Case(
        "gated-beside-lora",
        [at(PROJECTIONS, LoRA, rank=R), at(ENCODER, Gated, gate=MiddleXGate)],
        lambda s: 6 * s.layers * 2 * s.width * R + 2 * s.layers * (s.width + 1),
    ),
    Case(
        "gated-per-task",
        [at(ENCODER, Gated, unit=partial(PerTask, unit=ADAPTER, tasks=TASKS), gate=MiddleYGate)],
        lambda s: 2 * s.layers * (3 * bottleneck(s) + s.width),
        tasks=TASKS,
    ),
    Case(
        "gated-value-residual",
        [at(VALUE, Gated, unit=partial(ParallelAdapter, rank=R), gate=LARGE, residual="x")],
        lambda s: 2 * s.layers * bottleneck(s),
        start="never",
    ),
    # side networks
    Case("ladder", [at(("side",), LadderSideNetwork)], ladder, start="never"),
    # rules alone
    Case("bitfit", [], lambda s: s.biases, start="identity", trainable=("bias", "visual_embedding")),
    Case(
        "layer-norms",
        [],
        lambda s: s.encoder_norms + s.decoder_norms,
        start="identity",
        trainable=("encoder.layer_norm", "decoder.layer_norm", "visual_embedding"),
    ),
    Case(
        "full",
        [],
        lambda s: s.backbone,
        start="identity",
        trainable=("language_model", "visual_embedding"),
    ),
    Case("frozen", [], lambda s: 0, start="identity", trainable=("visual_embedding",)),
    # methods of Hugging Face peft
    Case(
        "peft-lora",
        [],
        lambda s: 6 * s.layers * 2 * s.width * R,
        start="identity",
        peft=peft("LoraConfig", r=R),
        impossible=MOVED | KEPT,
    ),
    Case(
        "peft-dora",
        [],
        dora,
        start="identity",
        peft=peft("LoraConfig", r=R, use_dora=True),
        impossible=MOVED | KEPT | BREAKS,
    ),
    Case(
        "peft-vera",
        [],
        lambda s: 6 * s.layers * (R + s.width),
        start="identity",
        peft=peft("VeraConfig", r=R),
        impossible=MOVED | KEPT,
    ),
    Case(
        "peft-ia3",
        [],
        lambda s: 6 * s.layers * s.width,
        start="identity",
        peft=peft("IA3Config", feedforward_modules=[]),
        impossible=MOVED | KEPT,
    ),
)
