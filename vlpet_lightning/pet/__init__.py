"""PET methods: a unit ``(x, h) -> h``, a place, a rule. One method is one file; this package imports torch only."""

from vlpet_lightning.pet.adapter import Adapter
from vlpet_lightning.pet.compacter import Compacter
from vlpet_lightning.pet.dora import DoRA
from vlpet_lightning.pet.gated import Gated
from vlpet_lightning.pet.gates import (
    FullGate,
    Gate,
    L2NormGate,
    LargeGate,
    LayerNormGate,
    MiddleXGate,
    MiddleYGate,
    SmallGate,
)
from vlpet_lightning.pet.granularity import Granularity
from vlpet_lightning.pet.hyperformer import HyperFormer
from vlpet_lightning.pet.ia3 import IA3
from vlpet_lightning.pet.inject import Injected, UnitLinear, check_placements, inject
from vlpet_lightning.pet.ladder import LadderSideNetwork
from vlpet_lightning.pet.lora import LoRA
from vlpet_lightning.pet.low_rank_adapter import LowRankAdapter
from vlpet_lightning.pet.parallel_adapter import ParallelAdapter
from vlpet_lightning.pet.per_task import PerTask
from vlpet_lightning.pet.placement import AnySite, Placement, PromptSite, SideSite, Site
from vlpet_lightning.pet.projector import LowRankProjector
from vlpet_lightning.pet.prompt import Prompt
from vlpet_lightning.pet.self_gated import SelfGated
from vlpet_lightning.pet.side_network import SideNetwork
from vlpet_lightning.pet.unit import Context, Place, Unit, UnitFactory
from vlpet_lightning.pet.vlpet import VLPET

__all__ = [
    "IA3",
    "VLPET",
    "Adapter",
    "AnySite",
    "Compacter",
    "Context",
    "DoRA",
    "FullGate",
    "Gate",
    "Gated",
    "Granularity",
    "HyperFormer",
    "Injected",
    "L2NormGate",
    "LadderSideNetwork",
    "LargeGate",
    "LayerNormGate",
    "LoRA",
    "LowRankAdapter",
    "LowRankProjector",
    "MiddleXGate",
    "MiddleYGate",
    "ParallelAdapter",
    "PerTask",
    "Place",
    "Placement",
    "Prompt",
    "PromptSite",
    "SelfGated",
    "SideNetwork",
    "SideSite",
    "Site",
    "SmallGate",
    "Unit",
    "UnitFactory",
    "UnitLinear",
    "check_placements",
    "inject",
]
