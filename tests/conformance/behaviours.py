"""Required behaviours of every method; each raises AssertionError if a method lacks it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers.modeling_outputs import BaseModelOutput

from tests.conformance.bench import (
    DEAD,
    VOCABULARY,
    Bench,
    checkpoint_layers,
    gradients,
    loud,
    stock,
    through_a_file,
    trained,
)
from tests.recorded import WAITING
from vlpet_lightning import Batch
from vlpet_lightning.backbones import check_compilable
from vlpet_lightning.backbones.cached_decoder import beam_attention_in
from vlpet_lightning.beam_search import beam_search, search_rules
from vlpet_lightning.interop.export.pet_files import load_weights, save_pet
from vlpet_lightning.model import VLModel
from vlpet_lightning.parameters import count_parameters

LONGEST = 6  # number of decoded tokens
# disables the settings that end an answer or forbid or force a token
ENDLESS: dict[str, Any] = dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "eos_token_id"))
ENDLESS |= {"no_repeat_ngram_size": 0, "early_stopping": False}
UNITS = (".unit.", ".input_unit.")  # occur in the names of all parameters of units


def the_output_has_the_right_shape_and_type(bench: Bench) -> None:
    batch, shapes = bench.batch(), []
    model = bench.loud()
    for place in model.injected:
        if not hasattr(place.unit, "length"):  # a prompt lengthens its input
            place.unit.register_forward_hook(lambda unit, args, h: shapes.append((args[1].shape, h.shape, h.dtype)))
    logits = bench.logits(model, batch)
    assert logits.shape == (*batch.labels.shape, VOCABULARY)  # type: ignore[union-attr]
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert all(after == before and dtype == torch.float32 for before, after, dtype in shapes), shapes


def bf16_autocast_gives_finite_numbers_and_keeps_float32_parameters(bench: Bench) -> None:
    model, batch = bench.loud(), bench.batch()
    exact = model.loss(batch).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(batch), model.loss(batch)
        assert logits.dtype == bench.bare(batch).dtype
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.isfinite().all()
    torch.testing.assert_close(loss.detach(), exact, rtol=0.05, atol=0.05)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in trained(model).values() if p.grad is not None)


def a_fresh_method_is_the_identity_where_it_says_so_and_only_there(bench: Bench) -> None:
    model = bench.fresh()
    claims = all(place.unit.is_identity for place in model.injected)
    assert claims == (bench.case.start == "identity"), f"is_identity is {claims}, the row says {bench.case.start!r}"
    assert torch.equal(bench.logits(model), bench.logits(bench.bare)) == claims


def a_used_method_can_be_set_to_the_identity_or_says_that_it_cannot(bench: Bench) -> None:
    model, expected = bench.loud(), bench.logits(bench.bare)
    if bench.case.start == "never":
        with pytest.raises(ValueError, match="identity start"):
            model.start_as_identity()
        return
    model.start_as_identity()
    assert torch.equal(bench.logits(model), expected)


def disabled_it_is_the_backbone_and_enabled_the_method_again(bench: Bench) -> None:
    model, expected = bench.loud(), bench.logits(bench.bare)
    with_units = bench.logits(model)
    assert torch.allclose(with_units, expected) == (not model.unit_parameters())  # units change the output
    model.enabled = False
    assert torch.equal(bench.logits(model), expected)
    model.enabled = True
    assert torch.equal(bench.logits(model), with_units)


def every_trained_parameter_gets_a_gradient_and_nothing_else_does(bench: Bench) -> None:
    model = bench.loud().train()
    wanted, found, skipped = set(trained(model)), set(), False
    assert wanted == {name for names in model.trainable.values() for name in names}  # as matched by the rules
    for task in bench.case.tasks:
        got = gradients(model, bench.batch(task))
        assert set(got) <= wanted, f"frozen, but with a gradient: {sorted(set(got) - wanted)}"
        empty = {name for name, gradient in got.items() if not gradient.any()}
        assert empty <= {DEAD}, f"gradients of zero: {sorted(empty)}"
        skipped |= set(got) != wanted
        found |= set(got)
    assert found == wanted, f"never a gradient: {sorted(wanted - found)}"
    assert skipped == (len(bench.case.tasks) > 1)
    assert skipped == model.may_skip_parameters, f"may_skip_parameters is {model.may_skip_parameters}"


def three_steps_change_what_is_trained_and_nothing_else(bench: Bench) -> None:
    model = bench.loud().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        task = bench.case.tasks[step % len(bench.case.tasks)]
        optimizer.zero_grad(set_to_none=True)
        model.loss(bench.batch(task, seed=step)).backward()
        optimizer.step()
    own = {id(p): name for name, p in model.named_parameters()}  # one name per tied tensor
    state = model.state_dict(keep_vars=True)
    changed = {own.get(id(t), name) for name, t in state.items() if not torch.equal(t, before[name])}
    assert changed == set(trained(model)) - {DEAD}


def from_the_identity_every_part_can_still_learn(bench: Bench) -> None:
    if bench.case.start == "never":
        return
    model = bench.loud()
    model.start_as_identity()
    before = {name: p.detach().clone() for name, p in model.unit_parameters().items()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.0)
    for step in range(2):  # layers before a zero layer change once the zero layer has changed
        for task in bench.case.tasks:
            optimizer.zero_grad(set_to_none=True)
            model.loss(bench.batch(task, seed=step)).backward()
            optimizer.step()
    stuck = [name for name, p in model.unit_parameters().items() if torch.equal(p, before[name])]
    assert stuck == [], f"two steps from the identity did not move {stuck}"


def the_number_of_parameters_is_the_closed_formula(bench: Bench) -> None:
    model, visual = bench.model, bench.model.visual
    expected = bench.case.parameters(bench.sizes)
    counted = sum(p.numel() for p in trained(model).values()) - sum(p.numel() for p in visual.parameters())
    assert counted == expected
    report = count_parameters(model)
    assert report.trainable - report.groups["visual embedding"].trainable == expected
    assert report.total == sum(p.numel() for p in bench.bare.parameters()) + sum(
        p.numel() for p in model.unit_parameters().values()
    )
    groups = [count for name, count in report.groups.items() if name.split()[-1] in ("PET", "gates", "units", "PEFT")]
    assert sum(count.total for count in groups) == sum(p.numel() for p in model.unit_parameters().values())
    assert count_parameters(bench.on_the_meta_device()) == report


def no_key_of_the_backbone_moves(bench: Bench) -> None:
    pretrained = stock(bench.kind).state_dict()
    model = bench.fresh()
    keys = [key for key in model.lm.state_dict() if not any(unit in key for unit in UNITS)]
    assert keys == list(pretrained)
    result = model.lm.load_state_dict(pretrained, strict=False)
    assert result.unexpected_keys == []
    assert all(any(unit in key for unit in UNITS) for key in result.missing_keys)
    assert all(torch.equal(model.lm.state_dict()[key], tensor) for key, tensor in pretrained.items())


def a_checkpoint_gives_the_method_back_under_another_seed(bench: Bench) -> None:
    model, other = bench.loud(), bench.fresh(seed=1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    module, twin = bench.module(model), bench.module(other)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    drawn = {f"lm.{name}" for name in model.inserted.state}  # VeRA's projections are drawn and not trained
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in set(trained(model)) | drawn}
    loaded = through_a_file(checkpoint, weights_only=True)
    expected = [bench.logits(model, bench.batch(task)) for task in bench.case.tasks]
    before = [bench.logits(other, bench.batch(task)) for task in bench.case.tasks]
    assert not any(torch.allclose(a, b) for a, b in zip(expected, before, strict=True))
    twin.on_load_checkpoint(loaded)
    assert twin.load_state_dict(loaded["state_dict"], strict=False).unexpected_keys == []
    for task, logits in zip(bench.case.tasks, expected, strict=True):
        assert torch.equal(bench.logits(other, bench.batch(task)), logits)


def pet_files_give_the_method_back(bench: Bench) -> None:
    model = bench.loud()
    loud(trained(model))
    with TemporaryDirectory() as folder:
        if {"all", "language_model"} & set(bench.case.trainable):
            with pytest.raises(ValueError, match="this is not a PET export"):
                save_pet(model, folder, backbone="tiny")
            return
        save_pet(model, folder, backbone="tiny")
        twin = bench.fresh(seed=1).eval()
        assert not torch.equal(bench.logits(twin), bench.logits(model))
        load_weights(twin, folder)
    assert torch.equal(bench.logits(twin), bench.logits(model))


def copies_compute_the_same_and_share_nothing(bench: Bench) -> None:
    model, expected = bench.loud(), bench.logits(bench.model)
    assert torch.equal(bench.logits(model), expected)
    for how, twin in {"deepcopy": copy.deepcopy(model), "pickle": through_a_file(model, weights_only=False)}.items():
        assert torch.equal(bench.logits(twin), expected), how
        assert list(twin.unit_parameters()) == list(model.unit_parameters()), how
        own = {id(module) for module in twin.modules()}
        assert all(id(place.unit) in own for place in twin.injected), how
        shared = {t.data_ptr() for t in twin.state_dict().values()} & {
            t.data_ptr() for t in model.state_dict().values()
        }
        assert not shared, how
        with torch.no_grad():
            for parameter in trained(twin).values():
                parameter.add_(1)
        assert not torch.allclose(bench.logits(twin), expected), how
        assert torch.equal(bench.logits(model), expected), how
        other = bench.batch(bench.case.tasks[-1], seed=1)  # the context of one must not reach the other
        twin.encode(other)
        assert torch.equal(bench.logits(model), expected), how


def gradient_checkpointing_gives_the_same_gradients(bench: Bench) -> None:
    model, batch = bench.loud().train(), bench.batch()
    expected = gradients(model, batch)
    checkpoint_layers(model.lm)
    if bench.prompts_the_decoder:  # transformers drops the cache of a checkpointed layer, and with it the prompt
        with pytest.raises(ValueError, match="gradient checkpointing"):
            model.loss(batch)
        return
    ours = gradients(model, batch)
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def generation_with_a_cache_equals_generation_without(bench: Bench) -> None:
    model, batch = bench.loud(), bench.batch()
    beams = 3 if bench.sizes.tiny.biases else 1  # with T5's settings, the library's search gives other answers
    ours = model.generate(batch, num_beams=beams, max_length=LONGEST)
    if bench.has_side_network:  # the library's search cannot run it
        for number, rules in product((1, 3), ({}, ENDLESS)):
            _equals_search_without_cache(model, batch, number, rules)
        return
    # a decoder prompt is in the cache
    assert torch.equal(ours, _generate(model, batch, beams, use_cache=bench.prompts_the_decoder).sequences)
    model.lm.generation_config.update(**ENDLESS)  # settings that are not given are read from here
    for beams in (1, 3):
        answers = _generate(model, batch, beams, **ENDLESS)
        if bench.prompts_the_decoder:
            _equals_teacher_forcing(model, batch, answers)
            continue
        plain = _generate(model, batch, beams, use_cache=False, **ENDLESS)
        assert torch.equal(answers.sequences, plain.sequences), f"{beams} beams"
        torch.testing.assert_close(answers.scores, plain.scores, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _generate(model: VLModel, batch: Batch, beams: int, *, use_cache: bool = True, **changes: Any) -> Any:
    settings = model.backbone.generation(model.lm.config, beams, LONGEST)
    settings.update(use_cache=use_cache, return_dict_in_generate=True, output_scores=True, **changes)
    states = BaseModelOutput(last_hidden_state=model.encode(batch))
    prefix = model.decoder_prefix(len(batch) * beams) if use_cache else None
    return model.lm.generate(
        encoder_outputs=states,
        attention_mask=model.mask(batch),
        generation_config=settings,
        **({} if prefix is None else {"past_key_values": prefix}),
    )


@torch.no_grad()
def _equals_search_without_cache(model: VLModel, batch: Batch, beams: int, changes: Mapping[str, Any]) -> None:
    settings = model.backbone.generation(model.lm.config, beams, LONGEST)
    settings.update(**changes)
    rules = replace(search_rules(settings), end=-1 if changes else settings.eos_token_id)
    encoded = model.encode(batch), model.mask(batch)
    remaining = torch.arange(len(batch))

    def whole(sequences: Tensor, rows: Tensor | None, samples: Tensor | None) -> Tensor:
        nonlocal remaining
        remaining = remaining if samples is None else remaining[samples]
        owners = remaining.repeat_interleave(len(sequences) // len(remaining))
        states, mask = tree_map(lambda tensor: tensor[owners], encoded)
        return model.logits(model.network.decode(model.lm, states, mask, sequences)[:, -1])

    expected = beam_search(whole, len(batch), rules, batch.input_ids.device)
    step = model.network.step(model.lm, *encoded, None, model.logits)
    with beam_attention_in(model):
        assert torch.equal(beam_search(step, len(batch), rules, batch.input_ids.device), expected)


@torch.no_grad()
def _equals_teacher_forcing(model: VLModel, batch: Batch, answers: Any) -> None:
    """Check greedy answers token by token, and beams by their score."""
    if getattr(answers, "sequences_scores", None) is None:
        expected = answers.sequences[:, :1]
        for _ in range(LONGEST - 1):
            following = model.decode(batch, expected)[:, -1].argmax(dim=-1, keepdim=True)
            expected = torch.cat([expected, following], dim=1)
        assert torch.equal(answers.sequences, expected)
        return
    log_probabilities = model.decode(batch, answers.sequences[:, :-1]).log_softmax(dim=-1)
    chosen = log_probabilities.gather(-1, answers.sequences[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(answers.sequences_scores, chosen.mean(dim=1), rtol=1e-4, atol=1e-5)


def the_units_compile_to_one_graph(bench: Bench) -> None:
    model, batch = bench.loud(layers=1).train(), bench.batch()  # a second layer doubles the time and tests nothing more
    stacks = {model.backbone.sites[place.site].stack for place in model.injected} or {"encoder"}
    layers = model.backbone.layers(model.lm) | {"side network": model.layers()}  # all, because both run in turns
    compiled = [layer for stack in stacks for layer in layers[stack]]
    expected = gradients(model, batch)
    torch._dynamo.reset()
    gc.disable()  # compiling takes a fifth of the time without it
    try:
        counter = CompileCounterWithBackend("eager")
        for layer in compiled:  # a stack without units has the same graph for every method
            layer.compile(fullgraph=True, backend=counter)
        ours = gradients(model, batch)
    finally:
        gc.enable()
        torch._dynamo.reset()
    hooks = sum(len(layer._forward_pre_hooks) for layer in compiled)  # the input of a side layer is a graph of its own
    # the decoder runs twice if it has a prompt: over the prompt, and over the targets
    assert counter.frame_count == len(compiled) + hooks + (model.prompt("decoder") is not None)
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


class _Waits(TorchDispatchMode):
    """Records operations whose result's shape or Python value depends on the content of a tensor.

    On a GPU each of them waits until the device has finished.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(WAITING) or (
            name == "index" and any(t.dtype == torch.bool for t in args[1] if t is not None)
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def a_training_step_never_waits_for_the_device(bench: Bench) -> None:
    model, batch = bench.fresh().train(), bench.batch().to("cpu")
    with _Waits() as waits:
        model.loss(batch).backward()
    assert not waits.found


def _cannot_compile() -> str:
    try:
        check_compilable()
    except ValueError as error:
        return str(error)
    return ""


Behaviour = Callable[[Bench], None]
BEHAVIOURS: tuple[Behaviour, ...] = (
    the_output_has_the_right_shape_and_type,
    bf16_autocast_gives_finite_numbers_and_keeps_float32_parameters,
    a_fresh_method_is_the_identity_where_it_says_so_and_only_there,
    a_used_method_can_be_set_to_the_identity_or_says_that_it_cannot,
    disabled_it_is_the_backbone_and_enabled_the_method_again,
    every_trained_parameter_gets_a_gradient_and_nothing_else_does,
    three_steps_change_what_is_trained_and_nothing_else,
    from_the_identity_every_part_can_still_learn,
    the_number_of_parameters_is_the_closed_formula,
    no_key_of_the_backbone_moves,
    a_checkpoint_gives_the_method_back_under_another_seed,
    pet_files_give_the_method_back,
    copies_compute_the_same_and_share_nothing,
    gradient_checkpointing_gives_the_same_gradients,
    generation_with_a_cache_equals_generation_without,
    the_units_compile_to_one_graph,
    a_training_step_never_waits_for_the_device,
)
IMPOSSIBLE: dict[Behaviour, str] = {the_units_compile_to_one_graph: _cannot_compile()}  # here, with the reason


def words(behaviour: Behaviour) -> str:
    """Return the name of a behaviour as a sentence."""
    return behaviour.__name__.replace("_", " ")
