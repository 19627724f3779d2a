"""Dropout, ReLU and attention for a CPU against torch's own, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.conformance.bench import Bench, make_batch
from tests.conformance.cases import CASES
from vlpet_lightning import cpu_kernels
from vlpet_lightning.cpu_kernels import CPUKernels, attention, dropout, relu, torch_kernels


def outcome(function, inputs, **settings):
    """Return output, gradients, and the random state afterwards."""
    torch.manual_seed(1)
    output = function(*inputs, **settings)
    generator = torch.Generator().manual_seed(2)
    gradients = torch.autograd.grad(output, inputs, torch.randn(output.shape, generator=generator).to(output.dtype))
    return [output.detach(), *gradients, torch.get_rng_state()]


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def saved_bytes(work):
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = work()
    assert kept is not None
    return sum(sizes.values())


@pytest.mark.parametrize("p", [0.1, 0.3, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(p, dtype):
    inputs = [torch.randn(5, 33, 17, dtype=dtype).transpose(0, 1).requires_grad_()]
    same(outcome(dropout, inputs, p=p), outcome(F.dropout, inputs, p=p))


@pytest.mark.parametrize("settings", [{"p": 0.0}, {"p": 1.0}, {"training": False}])
def test_dropout_of_nothing_or_everything(settings):
    inputs = [torch.randn(5, 7, requires_grad=True)]
    same(outcome(dropout, inputs, **settings), outcome(F.dropout, inputs, **settings))


def test_dropout_and_relu_keep_one_byte_per_element():
    x = torch.randn(50, 40, requires_grad=True)
    assert saved_bytes(lambda: dropout(x, 0.1)) == saved_bytes(lambda: relu(x)) == 2000
    assert saved_bytes(lambda: F.dropout(x, 0.1)) == 8000


def test_relu():
    inputs = [torch.tensor([-1.0, -0.0, 0.0, 2.0, torch.inf, -torch.inf, torch.nan], requires_grad=True)]
    found, expected = outcome(relu, inputs), outcome(F.relu, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_relu_passes_gradients_that_are_not_finite():
    found = []
    for function in (relu, F.relu):
        x = torch.tensor([-1.0, 2.0, -1.0, 2.0, -1.0], requires_grad=True)
        function(x).backward(torch.tensor([torch.inf, torch.inf, torch.nan, torch.nan, -1.0]))
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(*(grad.signbit() for grad in found))


MASKS = {
    "none": lambda size, queries, keys: None,
    "bool": lambda size, queries, keys: torch.arange(keys) < torch.tensor([keys, keys - 3, 1])[:, None, None, None],
    "row without keys": lambda size, queries, keys: (torch.arange(queries) > 0)[:, None].expand(queries, keys),
    "added": lambda size, queries, keys: torch.randn(1, 4, queries, keys),
}


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize(("queries", "keys", "scale"), [(9, 9, None), (5, 13, 1.0)])
def test_attention(queries, keys, scale, mask):
    inputs = [torch.randn(3, n, 4, 8).transpose(1, 2).requires_grad_() for n in (queries, keys, keys)]
    settings = {"attn_mask": MASKS[mask](3, queries, keys), "dropout_p": 0.2, "scale": scale}
    same(outcome(attention, inputs, **settings), outcome(F.scaled_dot_product_attention, inputs, **settings))


def test_attention_keeps_probabilities_once():
    inputs = [torch.randn(3, 4, 9, 8, requires_grad=True) for _ in range(3)]
    pairs = 3 * 4 * 9 * 9
    assert saved_bytes(lambda: attention(*inputs, dropout_p=0.2)) == 4 * sum(t.numel() for t in inputs) + 5 * pairs


@pytest.mark.parametrize(
    "settings", [{"dropout_p": 0.0}, {"is_causal": True}, {"attn_mask": torch.zeros(9, 9, requires_grad=True)}]
)
def test_other_attention_is_that_of_torch(settings, monkeypatch):
    monkeypatch.setattr(cpu_kernels._Attention, "apply", lambda *args: pytest.fail("not for these arguments"))
    inputs = [torch.randn(3, 4, 9, 8, requires_grad=True) for _ in range(3)]
    settings = {"dropout_p": 0.2} | settings
    same(outcome(attention, inputs, **settings), outcome(F.scaled_dot_product_attention, inputs, **settings))


@pytest.mark.parametrize(("dtype", "heads"), [(torch.float64, 4), (torch.float32, 1)])
def test_attention_in_float64_or_over_shared_keys_is_that_of_torch(dtype, heads):
    inputs = [torch.randn(3, h, 9, 8, dtype=dtype, requires_grad=True) for h in (4, heads, heads)]
    settings = {"dropout_p": 0.2}
    same(outcome(attention, inputs, **settings), outcome(F.scaled_dot_product_attention, inputs, **settings))


def test_a_mask_that_torch_refuses_is_refused():
    inputs = [torch.randn(3, 4, 9, 8, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(9, 9, dtype=torch.float64)
    for function in (attention, F.scaled_dot_product_attention):
        with pytest.raises(RuntimeError, match="attn_mask"):
            function(*inputs, attn_mask=mask, dropout_p=0.2)


@pytest.mark.parametrize("function", [dropout, relu])
def test_functions_change_their_input_on_request(function):
    given = torch.randn(40, requires_grad=True) * 1
    before = given.detach().clone()
    assert function(given, inplace=True) is given
    assert not torch.equal(given, before)


def gradients(model, batch, bf16=False):
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss(batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("case", ["vlpet-large", "full", "prompt-decoder", "ladder"])
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_step_has_the_gradients_of_torch(kind, case, bf16):
    model = Bench(next(c for c in CASES if c.name == case), kind).loud().train()
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.3)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    batch = make_batch(kind, "vqa", size=3)
    found = gradients(model, batch, bf16)
    with torch_kernels():
        expected = gradients(model, batch, bf16)
    assert list(found) == list(expected)
    same(found.values(), expected.values())


def test_they_are_used_in_training_unless_layers_are_compiled_or_checkpointed(monkeypatch):
    model = Bench(CASES[0], "bart").fresh()
    entered = []
    monkeypatch.setattr(CPUKernels, "__enter__", lambda mode: entered.append(mode))
    monkeypatch.setattr(CPUKernels, "__exit__", lambda mode, *args: None)
    batch = make_batch("bart", "vqa")
    model.eval().loss(batch)
    assert entered == []
    model.train().loss(batch)
    assert len(entered) == 1
    model.lm.activation_checkpointing_enable()
    model.loss(batch)
    model.lm.activation_checkpointing_disable()
    model.layers()[0]._compiled_call_impl = model.layers()[0]._call_impl
    model.loss(batch)
    assert len(entered) == 1
