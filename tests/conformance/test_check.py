"""The suite detects broken methods: one broken unit per behaviour, as a third party could write it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tests.conformance import Case, ConformanceError, check
from tests.conformance.behaviours import IMPOSSIBLE, words
from vlpet_lightning.pet import Placement, Unit


class Scale(Unit):
    """A correct unit; the units below each break one behaviour."""

    def __init__(self, width):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))

    def forward(self, x, h):
        return h + h * self.vector

    @property
    def is_identity(self):
        return True

    def start_as_identity(self):
        nn.init.zeros_(self.vector)


class OtherType(Scale):
    def forward(self, x, h):
        return super().forward(x, h).double()


class Overflowing(Scale):
    def forward(self, x, h):
        return super().forward(x, h) if h.dtype == torch.float32 else h / 0


class FalseClaim(Scale):
    def __init__(self, width):
        super().__init__(width)
        nn.init.normal_(self.vector)


class HalfIdentity(Scale):
    def start_as_identity(self):
        with torch.no_grad():
            self.vector[1:] = 0


class Unused(Scale):
    def __init__(self, width):
        super().__init__(width)
        self.other = nn.Parameter(torch.zeros(width))


class FalseSkip(Scale):
    may_skip_parameters = True


class Counting(Scale):
    """Changes its state independently of training."""

    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, h):
        if self.training:
            self.calls += 1
        return super().forward(x, h)


class Stuck(Scale):
    """A product whose factors are both zero at the identity."""

    def __init__(self, width):
        super().__init__(width)
        self.other = nn.Parameter(torch.zeros(width))

    def forward(self, x, h):
        return h + h * self.vector * self.other

    def start_as_identity(self):
        nn.init.zeros_(self.vector)
        nn.init.zeros_(self.other)


class MovesWithoutSaving(Scale):
    """Has state that is not in checkpoints."""

    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("direction", torch.randn(width))

    def forward(self, x, h):
        return h + h * self.vector * self.direction


class Closure(Scale):
    """Cannot be pickled."""

    def __init__(self, width):
        super().__init__(width)
        self.function = lambda h: h * self.vector

    def forward(self, x, h):
        return h + self.function(h)


class Stateful(Scale):
    """Differs between the first and second call of a step, so recomputation in backward differs."""

    def __init__(self, width):
        super().__init__(width)
        self.seen = 0

    def forward(self, x, h):
        self.seen += self.training
        return h + h * self.vector * (1 + self.seen % 2)


class Lengths(Scale):
    """Depends on the number of tokens per call."""

    def forward(self, x, h):
        return h + h * self.vector * (1 + (h - h.mean(dim=1, keepdim=True)).square())


class Branching(Scale):
    """Reads a value with ``.item()``, which breaks the graph."""

    def forward(self, x, h):
        return h + h * self.vector if h.sum().item() != 0 else h


def case(unit, parameters=32, **settings):
    claims = {"start": "identity"} | settings
    count = lambda sizes: 2 * sizes.layers * parameters  # noqa: E731
    return Case("third-party", [Placement(["decoder.attn", "decoder.cross"], unit)], count, **claims)


BROKEN = {
    OtherType: "the output has the right shape and type",
    Overflowing: "bf16 autocast gives finite numbers",
    FalseClaim: "a fresh method is the identity where it says so",
    HalfIdentity: "a used method can be set to the identity",
    Unused: "every trained parameter gets a gradient",
    FalseSkip: "every trained parameter gets a gradient",
    Counting: "three steps change what is trained and nothing else",
    Stuck: "from the identity every part can still learn",
    MovesWithoutSaving: "a checkpoint gives the method back",
    Closure: "copies compute the same",
    Stateful: "gradient checkpointing gives the same gradients",
    Lengths: "generation with a cache equals generation without",
    Branching: "the units compile to one graph",
}


@pytest.mark.parametrize("kind", ["bart", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", BROKEN, ids=lambda unit: unit.__name__)
def test_a_broken_unit_fails_the_behaviour_that_it_breaks(unit, kind):
    for behaviour, reason in IMPOSSIBLE.items():
        if reason and words(behaviour) == BROKEN[unit]:
            pytest.skip(reason)
    with pytest.raises(ConformanceError, match=f"third-party on {kind}: it is not so that {BROKEN[unit]}"):
        check(case(unit, parameters=64 if unit in (Unused, Stuck) else 32), kind)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_sound_unit_passes(kind):
    check(case(Scale), kind)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (partial(case, Scale, parameters=31), "the number of parameters is the closed formula"),
        (partial(case, Scale, start="original"), "a fresh method is the identity where it says so and only there"),
        (partial(case, Scale, start="never"), "a fresh method is the identity where it says so and only there"),
        (partial(case, Scale, tasks=("vqa", "gqa")), "every trained parameter gets a gradient"),
    ],
)
def test_a_row_that_says_what_is_not_so_fails(row, words):
    with pytest.raises(ConformanceError, match=words):
        check(row(), "bart")
