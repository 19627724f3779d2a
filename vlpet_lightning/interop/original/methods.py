"""Translation of an original command line into config nodes: placements, trainable rules and visual projection."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field

from vlpet_lightning.interop.original.nodes import Nodes
from vlpet_lightning.interop.original.rules import trainable_from_flags
from vlpet_lightning.interop.original.side_network import ignored_side_flags, side_network
from vlpet_lightning.interop.original.specs import Node, spec
from vlpet_lightning.interop.original.unsupported_flags import check_buildable
from vlpet_lightning.pet import Adapter, DoRA, Gated, LargeGate, LoRA, LowRankProjector, Prompt, SelfGated

ATTENTIONS = ("encoder.attn", "decoder.attn", "decoder.cross")
QUERIES_AND_VALUES = [f"{attention}.{part}" for attention in ATTENTIONS for part in ("query", "value")]


@dataclass
class Method:
    """Method of the original as config nodes.

    Args:
        placements: Nodes of ``model.placements``.
        trainable: Rules of ``model.trainable``.
        projector: Node of ``model.projector``, if the visual projection is not the default.
        notes: Remarks on flags that the original silently ignores.
    """

    placements: list[Node] = field(default_factory=list)
    trainable: list[str] = field(default_factory=list)
    projector: Node | None = None
    notes: list[str] = field(default_factory=list)

    def put(self, at: str | list[str], unit: Node | None) -> None:
        """Add a placement; equal units are merged into one placement."""
        if unit is None:
            return
        for entry in self.placements:
            if entry["unit"] == unit:
                entry["at"] += [at] if isinstance(at, str) else at
                return
        self.placements.append({"at": [at] if isinstance(at, str) else list(at), "unit": unit})


def method_from_flags(args: argparse.Namespace, kind: str, width: int) -> Method:
    """Translate a command line into a method.

    Args:
        args: Result of :func:`vlpet_lightning.interop.original.flags.parse_flags`.
        kind: ``bart`` or ``t5``; the original's code for T5 supports fewer flags.
        width: Model width ``d`` of the backbone.

    Raises:
        ValueError: If the flags describe an unsupported model.
    """
    reader = _Reader(args, kind, width)
    reader.encoder()
    reader.decoder()
    reader.everywhere()
    reader.method.notes = reader.nodes.notes
    reader.method.trainable = trainable_from_flags(args, kind)
    return reader.method


class _Reader:
    """Builder of a :class:`Method` from a command line, one stack at a time."""

    def __init__(self, args: argparse.Namespace, kind: str, width: int) -> None:
        self.args = args
        self.bart = kind == "bart"
        self.nodes = Nodes(args, kind, width)
        self.method = Method()
        check_buildable(args, kind, self.nodes)

    def encoder(self) -> None:
        """Add the units after the encoder's sublayers."""
        args = self.args
        scale = args.encoder_gating_scaling_factor if args.use_encoder_gating_scaling else 1.0
        for site, scaled, factor in (
            ("encoder.attn", args.use_encoder_attn_adapter_scaling, args.encoder_attn_adapter_scaling_factor),
            ("encoder.ffn", args.use_encoder_ff_adapter_scaling, args.encoder_ff_adapter_scaling_factor),
        ):
            if self.nodes.split() is not None and not self._deltas_scaled():
                self.method.put(site, self.nodes.vlpet(scale))
                continue
            self.method.put(site, self._wrapped(self._inside(site, factor if scaled else None), scale))

    def _deltas_scaled(self) -> bool:
        return self.args.use_encoder_adapter_scaling or self.args.use_encoder_x2_scaling

    def _inside(self, site: str, scale: float | None) -> Node | None:
        args = self.args
        if self.nodes.split() is not None:
            return spec(
                Adapter,
                rank=args.adapter_down_dim,
                heads=args.encoder_adapter_multihead_num_head,
                scale=args.encoder_adapter_scaling_factor if args.use_encoder_adapter_scaling else None,
                pretrained_scale=args.encoder_x2_scaling_factor if args.use_encoder_x2_scaling else None,
                init=self.nodes.zero(args.use_encoder_multihead_up_zero_init),
            )
        if args.use_encoder_gating_large_x_lowrank:
            gates = "sum" if args.use_encoder_gating_large_x_lowrank_add_x2_deltay else None
            return spec(SelfGated, rank=args.gating_down_dim, gates=gates)
        if self.nodes.standard(True) and not (site == "encoder.attn" and args.no_encoder_attn_adapter):
            return self.nodes.controller(scale=scale)
        return self.nodes.hyperformer() if args.use_hyperformer else None

    def _wrapped(self, unit: Node | None, scale: float) -> Node | None:
        gate = self.nodes.gate()
        if gate is None and scale == 1.0:
            return unit
        combine = "add" if self.args.use_encoder_adapter_gating_add and gate is not None else None
        return spec(Gated, unit=unit, gate=gate, combine=combine, scale=None if scale == 1.0 else scale)

    def decoder(self) -> None:
        """Add the units of the decoder."""
        args = self.args
        cross = args.add_adapter_cross_attn
        if self.nodes.standard(False):
            self.method.put(["decoder.attn", *["decoder.cross"] * cross, "decoder.ffn"], self.nodes.controller())
        elif args.use_hyperformer:
            self.method.put(["decoder.attn", *["decoder.cross"] * cross, "decoder.ffn"], self.nodes.hyperformer())
        self._single_places(
            taken=set() if not self.nodes.standard(False) else {"attn", "ffn"} | ({"cross"} if cross else set())
        )
        self._value()
        if args.use_decoder_enc_attn_key_value_adapter_down_dim:
            self.method.put(
                "decoder.cross.memory", self.nodes.controller(rank=args.decoder_enc_attn_key_value_adapter_down_dim)
            )
        if args.use_decoder_ff_ia3:
            self.method.put(
                "decoder.ffn.inner", self.nodes.ia3(args.use_decoder_ff_ia3_add, args.use_decoder_ff_ia3_one_init)
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
                unit = self.nodes.controller(rank=rank)
                if name == "cross" and args.use_decoder_enc_attn_adapter_gating_large_x_lowrank:
                    gate_rank = args.decoder_enc_attn_adapter_gating_large_x_lowrank_down_dim
                    unit = spec(Gated, unit=unit, gate=spec(LargeGate, rank=gate_rank))
                self.method.put(f"decoder.{name}", unit)

    def _value(self) -> None:
        """Add the unit at the decoder's cross-attention value."""
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
            self.nodes.notes.append(f"{', '.join(chosen)}: LoRA's attention does not read it")
            return
        if len(chosen) > 1:
            raise ValueError(f"several units on the cross-attention value, of which the original calls one: {chosen}")
        if chosen:
            self.method.put("decoder.cross.value", self._value_unit())
        elif args.use_decoder_enc_attn_value_residual_connection:
            self.nodes.notes.append(
                "--use_decoder_enc_attn_value_residual_connection: read beside a unit on the value alone"
            )

    def _value_unit(self) -> Node:
        args = self.args
        gate_rank = None
        if args.use_decoder_enc_attn_value_parallel_adapter_down_dim:
            unit = self.nodes.parallel()
            if args.use_decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank:
                gate_rank = args.decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank_down_dim
        elif args.use_decoder_enc_attn_value_sequential_adapter_down_dim:
            unit = self.nodes.controller(rank=args.decoder_enc_attn_value_sequential_adapter_down_dim, flow="replace")
        else:
            unit = self.nodes.ia3(args.use_decoder_enc_attn_value_ia3_add, args.use_decoder_enc_attn_value_ia3_one_init)
        if args.use_decoder_enc_attn_value_sequential_adapter_gating_large_x_lowrank:
            gate_rank = args.decoder_enc_attn_value_sequential_adapter_gating_large_x_lowrank_down_dim
        if not args.use_decoder_enc_attn_value_residual_connection:
            if gate_rank is not None:
                self.nodes.notes.append(
                    "a gate on the value: read with --use_decoder_enc_attn_value_residual_connection alone"
                )
            return unit
        gate = None if gate_rank is None else spec(LargeGate, rank=gate_rank)
        return spec(Gated, unit=unit, gate=gate, residual="x")

    def everywhere(self) -> None:
        """Add LoRA, prompts, the side network and the visual projection."""
        args = self.args
        self.nodes.notes += ignored_side_flags(args)
        if args.use_side_transformers:
            self.method.put("side", side_network(args))
        self._dora()
        if args.use_lora and self.bart:
            unit = self.nodes.per_task(spec(LoRA, rank=args.lora_dim, alpha=args.lora_alpha), args.use_single_lora, [])
            self.method.put(QUERIES_AND_VALUES, unit)
        elif args.use_lora:
            self.nodes.notes.append("--use_lora: T5 has no LoRA there; names that contain 'bias' are trained")
        for stack, length in (("encoder", args.encoder_prompt_len), ("decoder", args.decoder_prompt_len)):
            if length > 0:
                prompt = spec(Prompt, length=length, hidden=args.mid_dim, init=None if self.bart else self.nodes.plain)
                self.method.put(f"{stack}.prompt", self.nodes.per_task(prompt, args.use_single_prompt, []))
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

    def _dora(self) -> None:
        """DoRA's layers (NVlabs/DoRA, src/trainer_base.py: ``use_dora``); they exist with ``--lora_settings`` alone."""
        args = self.args
        if args.use_dora and args.lora_settings:
            self.method.put(QUERIES_AND_VALUES, spec(DoRA, rank=args.lora_dim, detach_norm=args.dora_simple or None))
        elif args.use_dora:
            self.nodes.notes.append("--use_dora: without --lora_settings no layer is adapted")


def grid_of(args: argparse.Namespace) -> int | None:
    """Return the side of the pooled grid, or None if features are not pooled."""
    return math.isqrt(args.n_boxes) if args.downsample else None
