"""Methods of Hugging Face peft."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.interop.export.exported import loud, module_of
from tests.runs import Batches, make_batch, quiet_trainer
from vlpet_lightning import load_pet, save_pet
from vlpet_lightning.cli import module_from_config
from vlpet_lightning.interop.hf.hf_peft import HFPeft
from vlpet_lightning.parameters import count_parameters
from vlpet_lightning.pet import LoRA, Placement

pytest.importorskip("peft")

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
TARGETS = {"bart": ["q_proj", "v_proj"], "t5": ["q", "v"]}
METHODS = {
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "vera": ("VeraConfig", {"r": 8}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "loha": ("LoHaConfig", {"r": 2}),
}
CASES = [(kind, method) for kind in TARGETS for method in METHODS]


def settings(kind, method, **changes):
    name, arguments = METHODS[method]
    return {"class_path": f"peft.{name}", "init_args": {"target_modules": TARGETS[kind], **arguments, **changes}}


@pytest.fixture
def make(tiny_backbone, tiny_t5):
    """Build a module with only a method of peft."""

    def made(kind, method="dora", **changes):
        backbone = {"bart": tiny_backbone, "t5": tiny_t5}[kind]
        arguments = {"placements": [], "trainable": ["pet", "visual_embedding"], "peft": settings(kind, method)}
        return module_of(kind, backbone, **(arguments | changes))

    return made


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_method_is_trained_counted_switched_and_generates(make, kind, method):
    module = make(kind, method)
    model, batch = module.model.eval(), make_batch("vqa", 3, 0)
    names = set(model.unit_parameters())
    assert names
    assert all(name.startswith("lm.") for name in names)
    assert {name for name, p in model.lm.named_parameters(prefix="lm") if p.requires_grad} == names
    report = count_parameters(model)
    assert report.groups["PEFT"].trainable == sum(p.numel() for p in model.unit_parameters().values())

    loud(model)
    model.enabled = False
    off = model(batch)
    bare = make(kind, peft=None, trainable=["visual_embedding"]).model.eval()
    bare.visual.load_state_dict(model.visual.state_dict())
    bare.set_added_rows(model.added_rows)
    torch.testing.assert_close(off, bare(batch), rtol=0, atol=0)
    model.enabled = True
    on = model(batch)
    assert (on - off).abs().max() > 1e-3
    assert {name for name, p in model.lm.named_parameters(prefix="lm") if p.requires_grad} == names
    assert model.generate(batch, num_beams=2, max_length=6).shape[0] == 3

    with torch.autocast("cpu", torch.bfloat16):
        half = model.loss(batch)
    torch.testing.assert_close(half, model.loss(batch), rtol=0.02, atol=0.02)
    model.loss(batch).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(batch), on)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("method", ["dora", "vera"])
def test_gradient_checkpointing_gives_the_same_gradients(make, kind, method):
    module = make(kind, method, dropout=0.0)
    model, batch = module.model.train(), make_batch("vqa", 3, 0)
    loud(model)
    found = []
    for on in (False, True):
        if on:
            (getattr(model.lm, "activation_checkpointing_enable", None) or model.lm.gradient_checkpointing_enable)()
        model.zero_grad()
        model.loss(batch).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_an_export_loads_under_another_seed(make, tmp_path, kind, method):
    module = make(kind, method)
    loud(module.model)
    save_pet(module, tmp_path)
    torch.manual_seed(7)
    batch = make_batch("vqa", 3, 0)
    assert torch.equal(load_pet(tmp_path)(batch), module.model.eval()(batch))


@pytest.mark.parametrize("kind", TARGETS)
def test_a_run_is_checkpointed_and_goes_on_as_if_undisturbed(make, tmp_path, kind):
    batches = Batches([make_batch("vqa", 4, seed) for seed in range(2)])
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole = make(kind, build=False)
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[keep], enable_checkpointing=True).fit(whole, batches)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert not any("base_layer" in name for name in saved["state_dict"])
    again = make(kind, build=False)
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(again, batches, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert all(torch.equal(tensor, again.own_state()[name]) for name, tensor in whole.own_state().items())
    other = make(kind, peft=settings(kind, "dora", r=2))
    with pytest.raises(ValueError, match=r"another method: .*peft: .*'r': 4.* there, .*'r': 2.* here"):
        other.on_load_checkpoint(saved)
    with pytest.raises(ValueError, match=r"peft: .*LoraConfig.* there, .*VeraConfig.* here"):
        make(kind, "vera").on_load_checkpoint(saved)
    with pytest.raises(ValueError, match=r"peft: .*LoraConfig.* there, None here"):
        make(kind, peft=None, trainable=["visual_embedding"]).on_load_checkpoint(saved)


SITES = [f"{part}.{name}" for part in ("encoder.attn", "decoder.attn", "decoder.cross") for name in ("query", "value")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", TARGETS)
def test_sites_are_the_layers_that_target_modules_would_match(make, kind, method, tmp_path):
    by_name = make(kind, method)
    name, arguments = METHODS[method]
    by_site = make(kind, peft={"class_path": f"peft.{name}", "at": SITES, "init_args": arguments})
    assert set(by_site.model.unit_parameters()) == set(by_name.model.unit_parameters())
    loud(by_site.model)
    save_pet(by_site, tmp_path)
    batch = make_batch("vqa", 3, 0)
    assert torch.equal(load_pet(tmp_path)(batch), by_site.model.eval()(batch))


def test_a_site_is_one_stack(make):
    peft = {"class_path": "peft.LoraConfig", "at": ["decoder.cross.value"], "init_args": {"r": 4}}
    names = set(make("bart", peft=peft).model.unit_parameters())
    assert len(names) == 4
    assert all(".decoder.layers." in name and ".encoder_attn.v_proj." in name for name in names)


def test_peft_stands_beside_our_units(make):
    lora = [Placement(["encoder.attn.key"], LoRA)]
    model = make("bart", placements=lora).model
    assert any("k_proj.unit" in name for name in model.unit_parameters())
    assert any("q_proj.lora_A" in name for name in model.unit_parameters())


def test_a_config_object_of_peft_is_written_down(make):
    import peft

    config = peft.LoraConfig(target_modules=["v_proj", "q_proj"], r=4, use_dora=True)
    assert HFPeft(config).settings() == settings("bart", "dora")


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"class_path": "os.system"}, "'os.system' is not a method of peft: choose from peft"),
        ({"class_path": "peft.PeftModel"}, r"'peft\.PeftModel' is not a method of peft"),
        ({"class_path": "peft.LoraConfig", "init_args": {"rnk": 3}}, r"peft\.LoraConfig has no setting 'rnk'"),
        ({"class_path": "peft.PromptTuningConfig", "init_args": {"num_virtual_tokens": 3}}, "does not act in layers"),
        ({"class_path": "peft.AdaLoraConfig", "init_args": {"total_step": 9}}, "reallocates ranks in every step"),
        ({"init_args": {}}, "peft must be {class_path"),
        (settings("bart", "dora") | {"at": ["encoder.attn.query"]}, "by at and by target_modules: omit one of them"),
        (
            {"class_path": "peft.LoraConfig", "at": ["encoder.attn.qery"]},
            "site 'encoder.attn.qery' does not exist",
        ),
        ({"class_path": "peft.LoraConfig", "at": ["encoder.attn"]}, "site 'encoder.attn' is not a single linear layer"),
        ({"class_path": "peft.LoraConfig", "at": ["decoder.cross.memory"]}, "'decoder.cross.memory' is not a single"),
    ],
)
def test_what_is_no_method_is_refused_before_anything_is_built(make, peft, message):
    with pytest.raises(ValueError, match=message):
        make("bart", peft=peft, build=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft": settings("bart", "dora", init_lora_weights="pissa")}, "changes .* tensors of the language model"),
        ({"placements": [Placement(["encoder.attn.query"], LoRA)]}, r"and a unit both at 'model\.encoder.*q_proj'"),
        ({"peft": settings("bart", "dora", target_modules=["nothing"])}, "nothing"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make("bart", **changes)


def test_without_peft_the_error_names_the_extra(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'vlpet-lightning\[peft\]'"):
        make("bart", build=False)


@pytest.mark.parametrize(("backbone", "attentions"), [("VLBart", 18), ("VLT5", 36)])
@pytest.mark.parametrize("name", ["hf_dora", "hf_vera"])
def test_shipped_configs_count(name, backbone, attentions, tmp_path):
    known = {"VLBart": "facebook/bart-base", "VLT5": "t5-base"}[backbone]
    (tmp_path / "model.yaml").write_text(f"model: {{class_path: vlpet_lightning.{backbone}}}\n")
    overlays = [EXPERIMENTS / "image_text.yaml", tmp_path / "model.yaml", EXPERIMENTS / "pet" / f"{name}.yaml"]
    words = [word for path in overlays for word in ("--config", str(path))]
    module = module_from_config([*words, "--model.backbone", known])
    with torch.device("meta"):
        report = count_parameters(module.build(pretrained=False))
    expected = {
        # queries and values: 2 x 768 x 128 of LoRA and 768 magnitudes each
        "hf_dora": 2 * attentions * (2 * 768 * 128 + 768),
        # 256 scales of A's rows and 768 of B's each; A and B themselves are random and frozen
        "hf_vera": 2 * attentions * (256 + 768),
    }
    assert report.groups["PEFT"].trainable == expected[name]
