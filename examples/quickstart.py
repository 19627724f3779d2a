# %% [markdown]
# # Quick start
#
# Build a model, choose where its units go, count, train, save, predict, and look at the gates. Everything runs offline
# in about 20 seconds on one CPU core: the images are rendered, and the language model is small and has random weights.
# With a pretrained model, replace `backbone` by `"facebook/bart-base"`, and the rendered world by your data
# (docs/data.md); all other lines stay.

# %%
import io
import json
import logging
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import vlpet_lightning as vl
from data_modules import ImageTextDataModule
from data_modules.extraction.commands import extract_images
from data_modules.world.synthetic import synthetic
from vlpet_lightning.pet import VLPET, LargeGate, LoRA, ParallelAdapter, Placement

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
folder = Path("quickstart")

# %% [markdown]
# ## Data
# `data synthetic` renders colored shapes with the benchmark's annotation files, and `data extract images` computes
# their features, here with a small CLIP ResNet with random weights. Both commands are functions.

# %%
encoder = Path(vl.__file__).parents[1] / "experiments" / "clip" / "tiny_rn.json"
images = folder / "world" / "images" / "COCO"
features = folder / "world" / "features" / "COCO"
with redirect_stdout(io.StringIO()):
    synthetic(folder / "world", images=800)
    extract_images(source=images, out=features, model=str(encoder), pretrained=None, pool=None, device="cpu")
print(f"{len(list(images.iterdir()))} images")

# %% [markdown]
# ## Build and place
# A placement inserts a unit at some sites of every layer. A class is a unit with its default settings, and `with_`
# changes them. This is VL-PET-large: gated adapters in the encoder, and parallel adapters in the decoder. Rules select
# the trained parameters.

# %%
lines = (folder / "world" / "text" / "train.jsonl").read_text().splitlines()[:3000]
texts = [pair[key] for pair in map(json.loads, lines) for key in ("source", "target")]
backbone = vl.random_backbone(folder / "backbone", texts, width=64, layers=2, seed=1)

vlpet = [
    Placement(["encoder.attn", "encoder.ffn"], VLPET.with_(rank=16, heads=4, gate=LargeGate.with_(rank=16))),
    Placement("decoder.cross.value", ParallelAdapter.with_(rank=16)),
]
trainable = ["pet", "visual_embedding", "encoder.layer_norm"]
model = vl.build(backbone, vlpet, trainable, feature_dim=512, grid=None, dropout=0.0, lr=1e-2)

# %% [markdown]
# A site or setting that does not exist is an error that lists the valid ones.

# %%
try:
    Placement("encoder.attn", LargeGate.with_(rnk=16))
except ValueError as error:
    print(error)

# %% [markdown]
# ## Count
# `device="meta"` builds a model without loading weights, here to count what two methods train on BART-base.

# %%
print(vl.count_parameters(model))
print(vl.placement_report(model))

# %%
lora = Placement(["encoder.attn.query", "encoder.attn.value"], LoRA.with_(rank=8))
for name, units in (("VL-PET", vlpet), ("LoRA", lora)):
    report = vl.count_parameters(vl.build("facebook/bart-base", units, trainable, device="meta"))
    print(f"{name} on BART-base: {report.trainable:,} of {report.total:,} parameters ({report.percent:.2f} %)")

# %% [markdown]
# ## Train
# A model is a LightningModule that can also be trained in a plain loop. The data module yields batches; `vl.make_batch`
# makes one from questions, features and answers of your own.

# %%
data = ImageTextDataModule(str(folder / "world"), str(backbone), tasks=["vqa"], batch_size=32)
data.setup("fit")
data.setup("test")
batches = list(data.train_dataloader())
test = next(iter(data.test_dataloader()))


def accuracy() -> float:
    """Return the VQA accuracy on the test batch in percent."""
    scores = [
        truth["label"].get(answer, 0.0) for answer, truth in zip(model.answer(test), test.references, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


print(f"{len(batches)} training batches, accuracy before training {accuracy():.1f}")

# %%
import torch

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
losses = []
model.train()
for epoch in range(3):
    for batch in batches:
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"epoch {epoch + 1}: loss {sum(losses[-len(batches) :]) / len(batches):.2f}, accuracy {accuracy():.1f}")

# %% [markdown]
# The same with a `Trainer`, which adds the learning rate schedule, checkpoints, several devices, and the callbacks of
# this library.

# %%
from lightning.pytorch import Trainer

quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = Trainer(max_epochs=1, accelerator="cpu", limit_val_batches=0, **quiet)
trainer.fit(model, data)
print(f"{trainer.global_step} more steps: loss {trainer.callback_metrics['train/vqa/loss']:.2f}, ", end="")
print(f"accuracy {accuracy():.1f}")

# %% [markdown]
# The language model is frozen and has random weights, so that this model learns little more than which answers a
# question can have. `make demo` pretrains the language model on text first, and then answers from the image.

# %% [markdown]
# ## Save and load
# An export has the trained weights without the backbone. `vl.load_pet` rebuilds the model from it; `vl.load_run` loads
# a run of `fit` by its folder.

# %%
record = vl.save_pet(model, folder / "export")
again = vl.load_pet(folder / "export")
model.eval()
batch = batches[0]
print(f"weights: {record['weights']['bytes'] / 1e3:.0f} kB")
print(f"equal parameters: {vl.count_parameters(again) == vl.count_parameters(model)}")
print(f"equal logits: {torch.equal(again(batch), model(batch))}")

# %% [markdown]
# ## Predict
# `model.answer` answers a batch, with probabilities if several answers are asked for. A `Predictor` answers questions
# about image files: it encodes them as the training images were.

# %%
for text, answers in list(zip(test.texts, model.answer(test, top=2), strict=True))[:3]:
    print(text, "->", ", ".join(f"{answer.text} ({answer.probability:.2f})" for answer in answers))

predictor = vl.Predictor(folder / "export", store=features, device="cpu")
picture = images / f"{test.images[0][0]}.png"
question = test.texts[0]
print(f"from the file: {question} -> {predictor(picture, question)}")

# %% [markdown]
# ## Gates
# `return_gates` returns the factors of every gate beside the logits. The large gate has one factor per token and
# channel, so its mean over the channels shows how much of each token's update passes.

# %%
logits, gates = model(batch, return_gates=True)
for (site, layer), factors in gates.factors.items():
    print(f"{site}, layer {layer}: {tuple(factors.shape)}, mean {factors.mean():.3f}, std {factors.std():.3f}")

# %%
import matplotlib.pyplot as plt

row = 0
shown = ~gates.kinds["padding"][row]
words = [token for token in model.tokenizer.convert_ids_to_tokens(batch.input_ids[row]) if token != "<pad>"]
names = [*words, *(f"image {number}" for number in range(1, int(shown.sum()) - len(words) + 1))]
means = torch.stack([factors[row, shown].mean(dim=1) for factors in gates.factors.values()])

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=[1, 2], layout="constrained", dpi=72)
left.plot(losses)
left.set(title="training loss", xlabel="step")
heat = right.imshow(means, aspect="auto", cmap="viridis")
right.set_title(f"mean gate per token: {batch.texts[row]}")
right.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
right.set_yticks(range(len(means)), [f"{site} {layer}" for site, layer in gates.factors])
figure.colorbar(heat)
figure.savefig(folder / "quickstart.png")
