"""Config nodes of the units described by an original command line; their placement is decided in ``methods``."""

from __future__ import annotations

import argparse

from vlpet_lightning.interop.original.rules import VALUE_LIKE
from vlpet_lightning.interop.original.specs import Node, spec
from vlpet_lightning.pet import (
    IA3,
    VLPET,
    Adapter,
    Compacter,
    FullGate,
    HyperFormer,
    L2NormGate,
    LargeGate,
    LayerNormGate,
    LowRankAdapter,
    MiddleXGate,
    MiddleYGate,
    ParallelAdapter,
    PerTask,
    SmallGate,
)

TASK_NAMES = {"nlvr": "nlvr2"}  # original task name: ours, if they differ
# sizes of the hypernetwork that no flag sets (src/adapters/config.py: MetaAdapterConfig)
TASK_EMBEDDING, TASK_HIDDEN, TASK_PROJECTED = 512, 128, 64


def tasks_of(args: argparse.Namespace) -> list[str]:
    """Return the tasks of a command line by our names."""
    return [TASK_NAMES.get(name, name) for name in args.tasks.replace(",", " ").split()]


class Nodes:
    """Factory of config nodes from flags.

    Args:
        args: Result of :func:`vlpet_lightning.interop.original.flags.parse_flags`.
        kind: ``bart`` or ``t5``.
        width: Model width ``d`` of the backbone.

    Attributes:
        plain: Initialisation of new linear layers inside the backbone.
        notes: Remarks on flags that the original silently ignores.
    """

    def __init__(self, args: argparse.Namespace, kind: str, width: int) -> None:
        self.args = args
        self.bart = kind == "bart"
        self.width = width
        self.plain = "normal" if self.bart else "uniform"
        self.notes: list[str] = []

    def standard(self, encoder: bool) -> bool:
        args = self.args
        family = args.use_adapter or args.use_compacter or args.use_lradapter
        return family and not (args.no_encoder_adapter if encoder else args.no_decoder_adapter)

    def per_task(self, unit: Node, single: bool, share: list[str]) -> Node:
        if single:
            return unit
        return spec(PerTask, unit=unit, tasks=tasks_of(self.args), share=share or None)

    def controller(self, *, rank: int | None = None, flow: str | None = None, scale: float | None = None) -> Node:
        """Build the node of an AdapterController: one adapter for all tasks, or one per task.

        Source: src/adapters/adapter_controller.py.
        """
        args = self.args
        norms = ["before"] * args.add_layer_norm_before_adapter + ["after"] * args.add_layer_norm_after_adapter
        share = ["down"] * args.share_down_sampler + ["up"] * args.share_up_sampler
        # if several kinds are requested, the original uses the first in its list
        plain = args.use_adapter or any(getattr(args, name) for name in VALUE_LIKE)
        if args.use_compacter and not plain:
            node = self.compacter(flow, scale)
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
            rank = self.rank() if rank is None else rank
            node = spec(Adapter, rank=rank, flow=flow, scale=scale, norms=norms or None, init=init)
        if norms and node["class_path"].rpartition(".")[2] != Adapter.__name__:
            raise ValueError("--add_layer_norm_* with adapters other than --use_adapter is not supported here")
        share += [f"norm_{name}" for name in norms]
        return self.per_task(node, args.use_single_adapter, share)

    def rank(self) -> int:
        args = self.args
        return args.adapter_down_dim if args.use_adapter_down_dim else self.width // args.reduction_factor

    def compacter(self, flow: str | None, scale: float | None) -> Node:
        args = self.args
        return spec(
            Compacter,
            rank=self.rank(),
            division=args.hypercomplex_division,
            factor_rank=args.phm_rank if args.factorized_phm else None,
            shared_rule=args.shared_phm_rule or None,
            flow=flow,
            scale=scale,
        )

    def split(self) -> str | None:
        args = self.args
        names = {  # in the order checked by the original (my_transformers/modeling_bart.py: BartEncoderLayer)
            "down": args.use_encoder_adapter_down_multihead,
            "up": args.use_encoder_adapter_up_multihead,
            "both": args.use_encoder_adapter_down_up_multihead,
            "pairs": args.use_encoder_adapter_down_up_pair_multihead,
        }
        return next((name for name, is_so in names.items() if is_so), None)

    def zero(self, is_so: bool) -> str | None:
        init = self.plain + "+zero" * is_so
        return None if init == "normal" else init  # the units' default is omitted

    def gate(self) -> Node | None:
        args = self.args
        init = self.zero
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

    def vlpet(self, scale: float) -> Node:
        args = self.args
        split = self.split()
        return spec(
            VLPET,
            rank=args.adapter_down_dim,
            heads=args.encoder_adapter_multihead_num_head,
            split=None if split == "down" else split,
            gate=self.gate(),
            combine="add" if args.use_encoder_adapter_gating_add else None,
            scale=None if scale == 1.0 else scale,
            init=self.zero(args.use_encoder_multihead_up_zero_init),
        )

    def hyperformer(self) -> Node:
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

    def ia3(self, add: bool, one: bool) -> Node:
        return spec(IA3, form="delta" if add else None, init="one" if one and add else "identity" if one else "normal")

    def parallel(self) -> Node:
        args = self.args
        rank = args.decoder_enc_attn_value_parallel_adapter_down_dim
        scaled = args.use_decoder_enc_attn_value_parallel_adapter_scaling
        scale = args.decoder_enc_attn_value_parallel_adapter_scaling_factor if scaled else None
        if args.use_compacter:
            self.notes.append("--use_compacter beside a unit on the value makes plain adapters everywhere")
        if args.use_single_adapter and not (args.add_layer_norm_before_adapter or args.add_layer_norm_after_adapter):
            return spec(ParallelAdapter, rank=rank, scale=scale, init=self.zero(args.use_decoder_enc_vpa_up_zero_init))
        return self.controller(rank=rank, flow="parallel", scale=scale)
