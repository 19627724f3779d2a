"""What an original command line means: units, where they go, and what is trained, as the nodes of a config."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from typing import Any

from vlpet_lightning.interop.specs import spec
from vlpet_lightning.pet import (
    IA3,
    VLPET,
    Adapter,
    Compacter,
    FullGate,
    Gated,
    HyperFormer,
    L2NormGate,
    LargeGate,
    LayerNormGate,
    LoRA,
    LowRankAdapter,
    LowRankProjector,
    MiddleXGate,
    MiddleYGate,
    ParallelAdapter,
    PerTask,
    Prompt,
    SelfGated,
    SmallGate,
)

Node = dict[str, Any]
TASK_NAMES = {"nlvr": "nlvr2"}  # ours, where it is another
# sizes of the hypernetwork that no flag sets (src/adapters/config.py: MetaAdapterConfig)
TASK_EMBEDDING, TASK_HIDDEN, TASK_PROJECTED = 512, 128, 64


@dataclass
class Method:
    """A method of the original.

    Args:
        placements: Nodes of ``model.placements``.
        trainable: Rules.
        projector: Node of ``model.projector``, where the visual projection is another.
        notes: What the original silently ignores of the command line.
    """

    placements: list[Node] = field(default_factory=list)
    trainable: list[str] = field(default_factory=list)
    projector: Node | None = None
    notes: list[str] = field(default_factory=list)

    def put(self, at: str | list[str], unit: Node | None) -> None:
        """Add a placement; equal units share one."""
        if unit is None:
            return
        for entry in self.placements:
            if entry["unit"] == unit:
                entry["at"] += [at] if isinstance(at, str) else at
                return
        self.placements.append({"at": [at] if isinstance(at, str) else list(at), "unit": unit})


def tasks_of(args: argparse.Namespace) -> list[str]:
    """Our names of the command line's tasks."""
    return [TASK_NAMES.get(name, name) for name in args.tasks.replace(",", " ").split()]


def method_from_flags(args: argparse.Namespace, kind: str, width: int) -> Method:
    """Read a command line.

    Args:
        args: As :func:`vlpet_lightning.interop.flags.parse_flags` gives it.
        kind: ``bart`` or ``t5``: the original's code for T5 honours fewer flags.
        width: ``d`` of the backbone.

    Raises:
        ValueError: If it means a model that we do not build.
    """
    reader = _Reader(args, kind, width)
    reader.encoder()
    reader.decoder()
    reader.everywhere()
    reader.method.trainable = trainable_from_flags(args, kind)
    return reader.method


class _Reader:
    def __init__(self, args: argparse.Namespace, kind: str, width: int) -> None:
        self.args = args
        self.bart = kind == "bart"
        self.width = width
        self.method = Method()
        self.plain = "normal" if self.bart else "uniform"  # what fresh linear layers get inside the backbone
        self._check()

    # refusals -------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        args = self.args
        families = ("use_adapter", "use_compacter", "use_lradapter", "use_hyperformer")
        chosen = [name for name in families if getattr(args, name)]
        multihead = self._split() is not None
        standard = bool(chosen) and "use_hyperformer" not in chosen
        problems = {
            f"more than one kind of adapters: {', '.join(chosen)}": len(chosen) > 1,
            "multi-head encoder modules beside standard ones, which leave them unused: add --no_encoder_adapter": (
                multihead and standard and not args.no_encoder_adapter
            ),
            "gates or layer norms around a hypernetwork's adapters": (
                args.use_hyperformer
                and (
                    self._gate() is not None or args.add_layer_norm_before_adapter or args.add_layer_norm_after_adapter
                )
            ),
            "--use_hyperformer needs --unique_hyper_net or --efficient_unique_hyper_net, not both": (
                args.use_hyperformer and args.unique_hyper_net == args.efficient_unique_hyper_net
            ),
            "--use_encoder_gating_large_x_lowrank beside another encoder module": (
                args.use_encoder_gating_large_x_lowrank
                and (multihead or self._gate() is not None or self._standard(True))
            ),
            "--no_encoder_attn_adapter beside a gate or multi-head module": (
                args.no_encoder_attn_adapter and (multihead or self._gate() is not None)
            ),
            "tasks are not named (--tasks), but modules of their own are wanted": (
                not tasks_of(args) and self._needs_tasks()
            ),
        }
        found = [name for name, is_so in problems.items() if is_so]
        if not self.bart:
            found += [f"--{name} with T5, whose code does not read it" for name in BART_ONLY if getattr(args, name)]
        if found:
            raise ValueError(
                f"flags of the original that change the model in a way not supported here: {'; '.join(found)}"
            )

    def _needs_tasks(self) -> bool:
        args = self.args
        controllers = self._standard(True) or self._standard(False) or any(getattr(args, name) for name in VALUE_LIKE)
        prompts = args.encoder_prompt_len > 0 or args.decoder_prompt_len > 0
        return bool(
            (controllers and not args.use_single_adapter)
            or (args.use_lora and self.bart and not args.use_single_lora)
            or (prompts and not args.use_single_prompt)
            or args.use_hyperformer
        )

    def _note(self, text: str) -> None:
        self.method.notes.append(text)

    # parts ----------------------------------------------------------------------------------------------------------

    def _standard(self, encoder: bool) -> bool:
        args = self.args
        family = args.use_adapter or args.use_compacter or args.use_lradapter
        return family and not (args.no_encoder_adapter if encoder else args.no_decoder_adapter)

    def _per_task(self, unit: Node, single: bool, share: list[str]) -> Node:
        if single:
            return unit
        return spec(PerTask, unit=unit, tasks=tasks_of(self.args), share=share or None)

    def _controller(self, *, rank: int | None = None, flow: str | None = None, scale: float | None = None) -> Node:
        """An AdapterController: one adapter for all tasks, or one a task (src/adapters/adapter_controller.py)."""
        args = self.args
        norms = ["before"] * args.add_layer_norm_before_adapter + ["after"] * args.add_layer_norm_after_adapter
        share = ["down"] * args.share_down_sampler + ["up"] * args.share_up_sampler
        plain = args.use_adapter or any(getattr(args, name) for name in VALUE_LIKE)  # of several kinds the original
        if args.use_compacter and not plain:  # takes the first of its list
            node = self._compacter(flow, scale)
            if args.shared_phm_rule_over_tasks and not args.shared_phm_rule:
                share += ["down.rule", "up.rule"]
        elif args.use_lradapter and not plain:
            rank = self.width // args.reduction_factor
            node = spec(LowRankAdapter, rank=rank, factor_rank=args.low_rank_rank, flow=flow, scale=scale)
            if args.low_rank_rank > 1:
                raise ValueError(
                    "--low_rank_rank above 1 fails in the original: its factors are multiplied elementwise"
                )
        else:
            init = None if self.bart else self.plain
            rank = self._rank() if rank is None else rank
            node = spec(Adapter, rank=rank, flow=flow, scale=scale, norms=norms or None, init=init)
        if norms and node["class_path"].rpartition(".")[2] != Adapter.__name__:
            raise ValueError("--add_layer_norm_* with adapters other than --use_adapter is not supported here")
        share += [f"norm_{name}" for name in norms]
        return self._per_task(node, args.use_single_adapter, share)

    def _rank(self) -> int:
        args = self.args
        return args.adapter_down_dim if args.use_adapter_down_dim else self.width // args.reduction_factor

    def _compacter(self, flow: str | None, scale: float | None) -> Node:
        args = self.args
        return spec(
            Compacter,
            rank=self._rank(),
            division=args.hypercomplex_division,
            factor_rank=args.phm_rank if args.factorized_phm else None,
            shared_rule=args.shared_phm_rule or None,
            flow=flow,
            scale=scale,
        )

    def _split(self) -> str | None:
        args = self.args
        names = {  # the order in which the original looks (my_transformers/modeling_bart.py: BartEncoderLayer)
            "down": args.use_encoder_adapter_down_multihead,
            "up": args.use_encoder_adapter_up_multihead,
            "both": args.use_encoder_adapter_down_up_multihead,
            "pairs": args.use_encoder_adapter_down_up_pair_multihead,
        }
        return next((name for name, is_so in names.items() if is_so), None)

    def _zero(self, is_so: bool) -> str | None:
        init = self.plain + "+zero" * is_so
        return None if init == "normal" else init  # the units' own default is left out

    def _gate(self) -> Node | None:
        args = self.args
        init = self._zero
        if args.use_encoder_adapter_gating_large_x:
            return spec(FullGate)
        if args.use_encoder_adapter_gating_large_x_lowrank:
            zero = init(args.use_encoder_gating_large_x_lowrank_up_zero_init)
            return spec(LargeGate, rank=args.adapter_gating_down_dim, init=zero)
        if args.use_encoder_adapter_gating_small_xy_cat:
            return spec(SmallGate, init=init(args.use_encoder_gating_small_up_zero_init))
        if args.use_encoder_adapter_gating_middle_xy_add:
            return spec(MiddleXGate, init=init(args.use_encoder_gating_middle_up_zero_init))
        if args.use_encoder_adapter_gating_middle_ia3_add:
            zero, one = args.use_encoder_gating_middle_ia3_zero_init, args.use_encoder_gating_middle_ia3_one_init
            return spec(MiddleYGate, init="zero" if zero else "one" if one else None)
        if args.use_encoder_adapter_gating_layernorm:
            return spec(LayerNormGate)
        return spec(L2NormGate) if args.use_encoder_adapter_gating_l2norm else None

    # stacks ---------------------------------------------------------------------------------------------------------

    def encoder(self) -> None:
        """What goes behind the sublayers of the encoder."""
        args = self.args
        scale = args.encoder_gating_scaling_factor if args.use_encoder_gating_scaling else 1.0
        for site, scaled, factor in (
            ("encoder.attn", args.use_encoder_attn_adapter_scaling, args.encoder_attn_adapter_scaling_factor),
            ("encoder.ffn", args.use_encoder_ff_adapter_scaling, args.encoder_ff_adapter_scaling_factor),
        ):
            if self._split() is not None and not self._deltas_scaled():
                self.method.put(site, self._vlpet(scale))
                continue
            self.method.put(site, self._wrapped(self._inside(site, factor if scaled else None), scale))

    def _deltas_scaled(self) -> bool:
        return self.args.use_encoder_adapter_scaling or self.args.use_encoder_x2_scaling

    def _vlpet(self, scale: float) -> Node:
        args = self.args
        split = self._split()
        return spec(
            VLPET,
            rank=args.adapter_down_dim,
            heads=args.encoder_adapter_multihead_num_head,
            split=None if split == "down" else split,
            gate=self._gate(),
            combine="add" if args.use_encoder_adapter_gating_add else None,
            scale=None if scale == 1.0 else scale,
            init=self._zero(args.use_encoder_multihead_up_zero_init),
        )

    def _inside(self, site: str, scale: float | None) -> Node | None:
        args = self.args
        if self._split() is not None:
            return spec(
                Adapter,
                rank=args.adapter_down_dim,
                heads=args.encoder_adapter_multihead_num_head,
                scale=args.encoder_adapter_scaling_factor if args.use_encoder_adapter_scaling else None,
                pretrained_scale=args.encoder_x2_scaling_factor if args.use_encoder_x2_scaling else None,
                init=self._zero(args.use_encoder_multihead_up_zero_init),
            )
        if args.use_encoder_gating_large_x_lowrank:
            gates = "sum" if args.use_encoder_gating_large_x_lowrank_add_x2_deltay else None
            return spec(SelfGated, rank=args.gating_down_dim, gates=gates)
        if self._standard(True) and not (site == "encoder.attn" and args.no_encoder_attn_adapter):
            return self._controller(scale=scale)
        return self._hyperformer() if args.use_hyperformer else None

    def _wrapped(self, unit: Node | None, scale: float) -> Node | None:
        gate = self._gate()
        if gate is None and scale == 1.0:
            return unit
        combine = "add" if self.args.use_encoder_adapter_gating_add and gate is not None else None
        return spec(Gated, unit=unit, gate=gate, combine=combine, scale=None if scale == 1.0 else scale)

    def _hyperformer(self) -> Node:
        args = self.args
        projected = args.projected_task_embedding_dim
        return spec(
            HyperFormer,
            tasks=tasks_of(args),
            rank=self.width // args.reduction_factor,
            embedding=TASK_EMBEDDING,
            hidden=TASK_HIDDEN,
            projected=TASK_PROJECTED if projected == -1 else projected,
            generators="one" if args.efficient_unique_hyper_net else None,
            std=None if self.bart else 0.01,
        )

    def decoder(self) -> None:
        """What goes into the decoder."""
        args = self.args
        cross = args.add_adapter_cross_attn
        if self._standard(False):
            self.method.put(["decoder.attn", *["decoder.cross"] * cross, "decoder.ffn"], self._controller())
        elif args.use_hyperformer:
            self.method.put(["decoder.attn", *["decoder.cross"] * cross, "decoder.ffn"], self._hyperformer())
        self._single_places(
            taken=set() if not self._standard(False) else {"attn", "ffn"} | ({"cross"} if cross else set())
        )
        self._value()
        if args.use_decoder_enc_attn_key_value_adapter_down_dim:
            self.method.put(
                "decoder.cross.memory", self._controller(rank=args.decoder_enc_attn_key_value_adapter_down_dim)
            )
        if args.use_decoder_ff_ia3:
            self.method.put(
                "decoder.ffn.inner", self._ia3(args.use_decoder_ff_ia3_add, args.use_decoder_ff_ia3_one_init)
            )

    def _single_places(self, taken: set[str]) -> None:
        args = self.args
        multihead = args.use_decoder_adapter_down_multihead
        places = {
            "attn": (args.use_decoder_self_attn_adapter_down_dim, args.decoder_self_attn_adapter_down_dim),
            "cross": (args.use_decoder_enc_attn_adapter_down_dim, args.decoder_enc_attn_adapter_down_dim),
            "ffn": (args.use_decoder_ff_adapter_down_dim, args.decoder_ff_adapter_down_dim),
        }
        for name, (wanted, rank) in places.items():
            if (wanted or multihead) and name in taken:
                raise ValueError(f"two adapters behind the decoder's {name} sublayer: the original leaves one unused")
            if wanted and multihead:
                raise ValueError(f"two adapters behind the decoder's {name} sublayer: the original leaves one unused")
            if multihead:
                heads = args.decoder_adapter_multihead_num_head
                self.method.put(f"decoder.{name}", spec(Adapter, rank=args.adapter_down_dim, heads=heads))
            elif wanted:
                unit = self._controller(rank=rank)
                if name == "cross" and args.use_decoder_enc_attn_adapter_gating_large_x_lowrank:
                    gate_rank = args.decoder_enc_attn_adapter_gating_large_x_lowrank_down_dim
                    unit = spec(Gated, unit=unit, gate=spec(LargeGate, rank=gate_rank))
                self.method.put(f"decoder.{name}", unit)

    def _ia3(self, add: bool, one: bool) -> Node:
        return spec(IA3, form="delta" if add else None, init="one" if one and add else "identity" if one else "normal")

    def _value(self) -> None:
        """The decoder's cross-attention value."""
        args = self.args
        wanted = {
            "--use_decoder_enc_attn_value_parallel_adapter_down_dim": (
                args.use_decoder_enc_attn_value_parallel_adapter_down_dim
            ),
            "--use_decoder_enc_attn_value_sequential_adapter_down_dim": (
                args.use_decoder_enc_attn_value_sequential_adapter_down_dim
            ),
            "--use_decoder_enc_attn_value_ia3": args.use_decoder_enc_attn_value_ia3,
        }
        chosen = [name for name, is_so in wanted.items() if is_so]
        if chosen and args.use_lora and self.bart:
            self._note(f"{', '.join(chosen)}: LoRA's attention does not read it")
            return
        if len(chosen) > 1:
            raise ValueError(f"several units on the cross-attention value, of which the original calls one: {chosen}")
        if chosen:
            self.method.put("decoder.cross.value", self._value_unit())
        elif args.use_decoder_enc_attn_value_residual_connection:
            self._note("--use_decoder_enc_attn_value_residual_connection: read beside a unit on the value alone")

    def _value_unit(self) -> Node:
        args = self.args
        gate_rank = None
        if args.use_decoder_enc_attn_value_parallel_adapter_down_dim:
            unit = self._parallel()
            if args.use_decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank:
                gate_rank = args.decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank_down_dim
        elif args.use_decoder_enc_attn_value_sequential_adapter_down_dim:
            unit = self._controller(rank=args.decoder_enc_attn_value_sequential_adapter_down_dim, flow="replace")
        else:
            unit = self._ia3(args.use_decoder_enc_attn_value_ia3_add, args.use_decoder_enc_attn_value_ia3_one_init)
        if args.use_decoder_enc_attn_value_sequential_adapter_gating_large_x_lowrank:
            gate_rank = args.decoder_enc_attn_value_sequential_adapter_gating_large_x_lowrank_down_dim
        if not args.use_decoder_enc_attn_value_residual_connection:
            if gate_rank is not None:
                self._note("a gate on the value: read with --use_decoder_enc_attn_value_residual_connection alone")
            return unit
        gate = None if gate_rank is None else spec(LargeGate, rank=gate_rank)
        return spec(Gated, unit=unit, gate=gate, residual="x")

    def _parallel(self) -> Node:
        args = self.args
        rank = args.decoder_enc_attn_value_parallel_adapter_down_dim
        scaled = args.use_decoder_enc_attn_value_parallel_adapter_scaling
        scale = args.decoder_enc_attn_value_parallel_adapter_scaling_factor if scaled else None
        if args.use_compacter:
            self._note("--use_compacter beside a unit on the value makes plain adapters everywhere")
        if args.use_single_adapter and not (args.add_layer_norm_before_adapter or args.add_layer_norm_after_adapter):
            return spec(ParallelAdapter, rank=rank, scale=scale, init=self._zero(args.use_decoder_enc_vpa_up_zero_init))
        return self._controller(rank=rank, flow="parallel", scale=scale)

    def everywhere(self) -> None:
        """LoRA, prompts and the visual projection."""
        args = self.args
        if args.use_lora and self.bart:
            unit = self._per_task(spec(LoRA, rank=args.lora_dim, alpha=args.lora_alpha), args.use_single_lora, [])
            attentions = ("encoder.attn", "decoder.attn", "decoder.cross")
            self.method.put([f"{at}.{part}" for at in attentions for part in ("query", "value")], unit)
        elif args.use_lora:
            self._note("--use_lora: T5 has no LoRA there; names that contain 'bias' are trained")
        for stack, length in (("encoder", args.encoder_prompt_len), ("decoder", args.decoder_prompt_len)):
            if length > 0:
                prompt = spec(Prompt, length=length, hidden=args.mid_dim, init=None if self.bart else self.plain)
                self.method.put(f"{stack}.prompt", self._per_task(prompt, args.use_single_prompt, []))
        if args.use_lowrank_visual_projector:
            if args.visual_projector_down_dim % args.visual_projector_multihead_num_head:
                raise ValueError("--visual_projector_multihead_num_head must divide --visual_projector_down_dim")
            gated = args.use_visual_projector_gating_large_x_lowrank
            self.method.projector = spec(
                LowRankProjector,
                rank=args.visual_projector_down_dim,
                gate_rank=args.visual_projector_gating_down_dim if gated else None,
                residual=args.use_visual_projector_residual_connection or None,
            )


# flags that create an adapter configuration of the plain kind whatever else is asked for (src/trainer_base.py)
VALUE_LIKE = (
    "use_decoder_enc_attn_value_parallel_adapter_down_dim",
    "use_decoder_enc_attn_key_value_adapter_down_dim",
    "use_decoder_enc_attn_value_sequential_adapter_down_dim",
)
BART_ONLY = (
    "use_encoder_attn_adapter_scaling",
    "use_encoder_ff_adapter_scaling",
    "no_encoder_attn_adapter",
    "use_encoder_adapter_up_multihead",
    "use_encoder_adapter_down_up_multihead",
    "use_encoder_adapter_down_up_pair_multihead",
    "use_encoder_adapter_gating_large_x",
    "use_encoder_adapter_gating_layernorm",
    "use_encoder_adapter_gating_l2norm",
    "use_encoder_adapter_gating_add",
    "use_encoder_gating_large_x_lowrank",
    "use_encoder_gating_large_x_lowrank_add_x2_deltay",
    "use_decoder_enc_attn_value_parallel_adapter_scaling",
    "use_decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank",
    "use_decoder_enc_attn_value_sequential_adapter_down_dim",
    "use_decoder_enc_attn_value_sequential_adapter_gating_large_x_lowrank",
    "use_decoder_enc_attn_value_residual_connection",
    "use_decoder_enc_attn_value_ia3",
    "use_decoder_ff_ia3",
    "use_decoder_enc_attn_key_value_adapter_down_dim",
    "use_decoder_enc_attn_adapter_down_dim",
    "use_decoder_enc_attn_adapter_gating_large_x_lowrank",
    "use_decoder_self_attn_adapter_down_dim",
    "use_decoder_ff_adapter_down_dim",
    "use_decoder_adapter_down_multihead",
    "use_lowrank_visual_projector",
    "unfreeze_decoder_input_layer_norms",
    "unfreeze_decoder_self_attn_layer_norms",
    "unfreeze_decoder_encoder_attn_layer_norms",
    "unfreeze_decoder_ff_layer_norms",
)


def trainable_from_flags(args: argparse.Namespace, kind: str) -> list[str]:
    """The ``trainable`` rules that a command line means (src/trainer_base.py: unfreeze_parameters).

    T5's norms are of a class that ``--unfreeze_layer_norms`` does not look for, so that it trains none there.
    """
    bart = kind == "bart"
    everywhere = args.unfreeze_layer_norms and bart
    wanted = {
        "pet": _has_pet(args, bart),
        "visual_embedding": not args.freeze_vis_emb,
        "language_model": args.unfreeze_language_model,
        "token_embedding": args.unfreeze_lm_head,
        "encoder.layer_norm": args.unfreeze_encoder_layer_norms or everywhere,
        "decoder.layer_norm": args.unfreeze_decoder_layer_norms or everywhere,
        "decoder.layer_norm.embedding": args.unfreeze_decoder_input_layer_norms,
        "decoder.layer_norm.attn": args.unfreeze_decoder_self_attn_layer_norms,
        "decoder.layer_norm.cross": args.unfreeze_decoder_encoder_attn_layer_norms,
        "decoder.layer_norm.ffn": args.unfreeze_decoder_ff_layer_norms,
        "bias": args.unfreeze_bias or args.use_lora,
        "encoder.bias": args.unfreeze_encoder_bias,
        "decoder.bias": args.unfreeze_decoder_bias,
    }
    return [rule for rule, is_wanted in wanted.items() if is_wanted]


def _has_pet(args: argparse.Namespace, bart: bool) -> bool:
    """Whether the command line makes modules with parameters of their own."""
    adapters = args.use_adapter or args.use_compacter or args.use_lradapter
    switches = (
        adapters and not (args.no_encoder_adapter and args.no_decoder_adapter),
        args.use_hyperformer,
        args.use_lora and bart,
        args.encoder_prompt_len > 0,
        args.decoder_prompt_len > 0,
        *(getattr(args, name) for name in MAKE_MODULES if not (args.use_lora and bart and "enc_attn_value" in name)),
    )
    return any(switches)


MAKE_MODULES = (
    *VALUE_LIKE,
    "use_encoder_adapter_down_multihead",
    "use_encoder_adapter_up_multihead",
    "use_encoder_adapter_down_up_multihead",
    "use_encoder_adapter_down_up_pair_multihead",
    "use_encoder_adapter_gating_large_x",
    "use_encoder_adapter_gating_large_x_lowrank",
    "use_encoder_adapter_gating_small_xy_cat",
    "use_encoder_adapter_gating_middle_xy_add",
    "use_encoder_adapter_gating_middle_ia3_add",
    "use_encoder_adapter_gating_layernorm",
    "use_encoder_gating_large_x_lowrank",
    "use_decoder_enc_attn_value_ia3",
    "use_decoder_ff_ia3",
    "use_decoder_enc_attn_adapter_down_dim",
    "use_decoder_self_attn_adapter_down_dim",
    "use_decoder_ff_adapter_down_dim",
    "use_decoder_adapter_down_multihead",
)


def grid_of(args: argparse.Namespace) -> int | None:
    """Side of the pooled grid; None where features are not pooled."""
    return math.isqrt(args.n_boxes) if args.downsample else None
