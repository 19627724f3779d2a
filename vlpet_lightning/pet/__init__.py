"""PET methods: a unit ``(x, h) -> h``, a place, a rule. One method is one file; this package imports torch only."""

from vlpet_lightning.pet.gates import Gate, LargeGate, MiddleXGate, MiddleYGate, SmallGate
from vlpet_lightning.pet.inject import Injected, UnitLinear, check_placements, inject
from vlpet_lightning.pet.parallel_adapter import ParallelAdapter
from vlpet_lightning.pet.placement import Placement, Site
from vlpet_lightning.pet.unit import Context, Unit, UnitFactory
from vlpet_lightning.pet.vlpet import VLPET

__all__ = [
    "VLPET",
    "Context",
    "Gate",
    "Injected",
    "LargeGate",
    "MiddleXGate",
    "MiddleYGate",
    "ParallelAdapter",
    "Placement",
    "Site",
    "SmallGate",
    "Unit",
    "UnitFactory",
    "UnitLinear",
    "check_placements",
    "inject",
]
