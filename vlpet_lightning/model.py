"""Frozen encoder-decoder language model over text and image features, with inserted PET units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.attention import attention_kernels
from vlpet_lightning.backbones import Backbone, VisualEmbedding
from vlpet_lightning.batch import Batch
from vlpet_lightning.beam_search import search_rules
from vlpet_lightning.compilation import uncompiled
from vlpet_lightning.cpu_kernels import cpu_kernels
from vlpet_lightning.cuda_graphs import TrainingGraphs
from vlpet_lightning.gates.recording import Gates, decode_with_gates
from vlpet_lightning.generation import graphs_of, search
from vlpet_lightning.generation_graphs import GenerationGraphs
from vlpet_lightning.losses import sample_factors, soft_capped, token_losses, vocabulary_logits
from vlpet_lightning.pet import (
    Context,
    Injected,
    Place,
    Placement,
    PromptSite,
    UnitLinear,
    check_placements,
    inject,
)
from vlpet_lightning.pet.extension import Extension, Inserted, insert_extension, tensors
from vlpet_lightning.pet.inject import build_side_networks, make_unit
from vlpet_lightning.pet.placement import linear_layers_at
from vlpet_lightning.pet.serialization import placements_to_plain, to_plain
from vlpet_lightning.pet.side_network import Network
from vlpet_lightning.tasks import task
from vlpet_lightning.trainable import check_rules, set_trainable


class VLModel(nn.Module):
    """Language model with joint encoder, losses and generation; a plain module, independent of any training framework.

    Args:
        backbone: Description of the language model's architecture.
        lm: The language model; modified in place (units are inserted, parameters frozen).
        feature_dim: Width ``D`` of the image features.
        grid: Side of the grid to which features are pooled; None disables pooling.
        placements: Units and their sites.
        trainable: Rules of :mod:`vlpet_lightning.trainable`.
        added_vocabulary: Number of token embedding rows that the pretrained model does not have.
        mask_padding: Pass the padding mask to the units (corrected protocol); otherwise units read padding like any
            other position, as in the original.
        projector: Factory of the visual projection, called with ``D`` and ``d``; a linear layer by default.
        extension: Modules of another library, inserted after the units.

    Attributes:
        recipe: These settings as plain data, saved with the weights to identify the model they belong to.
    """

    def __init__(
        self,
        backbone: Backbone,
        lm: Any,
        *,
        feature_dim: int = 2048,
        grid: int | None = 6,
        placements: Sequence[Placement] = (),
        trainable: Sequence[str] = ("visual_embedding",),
        added_vocabulary: int = 0,
        mask_padding: bool = False,
        projector: Callable[[int, int], nn.Module] | None = None,
        extension: Extension | None = None,
    ) -> None:
        super().__init__()
        check_placements(placements, backbone.sites, backbone.refused_sites)
        check_rules(trainable)
        self.backbone = backbone
        self.lm: Any = lm
        # generate() takes its defaults from here: replace the settings stored with the pretrained checkpoint
        lm.generation_config = backbone.generation(lm.config, num_beams=1, max_length=20)
        backbone.prepare(lm)
        self.visual: VisualEmbedding = backbone.visual_embedding(lm, feature_dim, grid, projector)
        self.mask_padding = mask_padding
        self.added_vocabulary = added_vocabulary
        tables = {backbone.token_embedding(lm), lm.get_output_embeddings().weight}  # one tensor if tied
        added = added_vocabulary * sum(table.shape[1] for table in tables)
        self.backbone_parameters = sum(p.numel() for p in lm.parameters()) - added
        self.shared = nn.ModuleDict()  # modules shared between units
        self.side: nn.Module = nn.ModuleDict()  # side network
        self._networks: dict[bool, Network] = {False: backbone, True: backbone}  # by `enabled`
        prompts = self._make_prompts(placements)
        side_networks = build_side_networks(backbone, lm, backbone.sites, placements)
        self.injected: list[Injected] = inject(backbone.site_layers(lm), backbone.sites, placements, self.shared)
        self.prompts = nn.ModuleDict()  # by stack
        self._place_prompts(prompts)
        for site, network in side_networks:
            self.side = self._networks[True] = network
            self.injected.append(Injected(site, 0, network))
        self.extension = extension
        self.inserted = Inserted()
        if extension is not None:
            layers = linear_layers_at(lm, backbone.site_layers(lm), backbone.sites, extension.at)
            self.inserted = insert_extension(lm, extension, layers)
        if backbone.token_embedding(lm).device.type == "meta":
            self.shared.to("meta")
        self._context_readers = [m for m in self.modules() if getattr(m, "needs_context", False)]
        self.limits_units = any(place.unit.positions != "all" for place in self.injected)
        self._enabled = True
        self.graphs: TrainingGraphs | None = None
        self.generation_graphs: GenerationGraphs | None = None
        self.backbone_checksums: dict[str, str] | None = None  # of the pretrained weights, if they are converted
        self.trainable = set_trainable(self, trainable)
        backbone.check_trained(self.trainable)
        for place in self.injected:
            place.unit.check_trained(self.trainable)
        self.recipe: dict[str, Any] = {
            "feature_dim": feature_dim,
            "grid": grid,
            "placements": placements_to_plain(placements),
            "trainable": list(trainable),
            "mask_padding": mask_padding,
            "projector": to_plain(projector),
            "peft": None if extension is None else extension.settings(),
            "start": "original",
        }

    def _make_prompts(self, placements: Sequence[Placement]) -> list[Injected]:
        """Create the prompt units; called before the language model is changed, because it can fail."""
        width = self.backbone.token_embedding(self.lm)
        made = []
        for placement in placements:
            for name in placement.at:
                if isinstance(self.backbone.sites[name], PromptSite):
                    unit = make_unit(placement, width.shape[1], width)
                    if not unit.adds_tokens:
                        raise ValueError(f"{type(unit).__name__} at site {name!r} adds no tokens: place a Prompt there")
                    made.append(Injected(name, 0, unit))
        return made

    def _place_prompts(self, made: Sequence[Injected]) -> None:
        for place in made:
            stack = self.backbone.sites[place.site].stack
            place.unit.join(Place(place.site, stack, 0, 1), self.shared)
            self.prompts[stack] = place.unit
            self.injected.append(place)

    def unit_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the units, of their shared modules and of the extension, by name."""
        units = {id(p) for place in self.injected for p in place.unit.parameters()}
        units |= {id(p) for p in self.shared.parameters()}
        inserted = {f"lm.{name}" for name in self.inserted.trained}
        return {name: p for name, p in self.named_parameters() if id(p) in units or name in inserted}

    def visual_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that map features to image tokens, without those of units and of the extension."""
        units = self.unit_parameters()
        visual = self.backbone.visual_parameters(self.lm, self.visual)
        return {name: parameter for name, parameter in visual.items() if name not in units}

    def own_state(self) -> dict[str, Tensor]:
        """Return every trained or newly initialised tensor by name; all others come with the pretrained model."""
        units = self.unit_parameters()
        state: dict[str, Tensor] = {
            name: p.detach()
            for name, p in self.named_parameters()
            if p.requires_grad or name in units or not name.startswith("lm.")
        }
        inserted = dict(tensors(self.lm)) if self.inserted.state else {}
        return state | {f"lm.{name}": inserted[name].detach() for name in self.inserted.state}

    @property
    def added_rows(self) -> Tensor | None:
        """Newly initialised ``(added vocabulary, d)`` rows of the token embedding; image tokens use the last ones.

        They are saved separately because :meth:`own_state` cannot name part of a tensor. None if no rows were added.
        """
        rows = self.added_vocabulary
        return self.backbone.token_embedding(self.lm).detach()[-rows:] if rows else None

    @torch.no_grad()
    def set_added_rows(self, rows: Tensor) -> None:
        """Set the added rows of the token embedding.

        Raises:
            ValueError: If their number or width does not match this model.
        """
        mine = self.added_rows
        if mine is None or mine.shape != rows.shape:
            raise ValueError(
                f"{tuple(rows.shape)} rows for the added vocabulary, this model has "
                f"{None if mine is None else tuple(mine.shape)}: give the backbone that they were made with"
            )
        mine.copy_(rows)

    @property
    def may_skip_parameters(self) -> bool:
        """Whether a step may leave trained parameters without a gradient (``find_unused_parameters`` of DDP)."""
        return any(place.unit.may_skip_parameters for place in self.injected)

    def check_tasks(self, names: Collection[str]) -> None:
        """Check that every unit supports every task of the data.

        Raises:
            ValueError: If a unit does not support a task; the message names the unit, its site and the missing tasks.
        """
        for place in self.injected:
            for module in place.unit.modules():
                known: tuple[str, ...] = getattr(module, "tasks", None) or tuple(names)
                missing = [name for name in names if name not in known]
                if missing:
                    raise ValueError(
                        f"{type(module).__name__} at site {place.site!r} has parts for {', '.join(known)} alone, "
                        f"the data has {', '.join(missing)} too: add them to the unit's tasks, or take them away there"
                    )

    @property
    def enabled(self) -> bool:
        """Whether units are applied; if False, the language model runs without them."""
        return self._enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self._enabled = on
        for module in self.lm.modules():
            if isinstance(module, UnitLinear):
                module.enabled = on
        if self.extension is not None:
            self.extension.enable(self.lm, on)

    def prompt(self, stack: str) -> Any:
        """Return the prompt unit of a stack, or None."""
        return self.prompts[stack] if self._enabled and stack in self.prompts else None

    @property
    def pad_token(self) -> int:
        """Padding token."""
        return self.lm.generation_config.pad_token_id

    @property
    def end_token(self) -> int:
        """Token that ends an answer."""
        return self.lm.generation_config.eos_token_id

    @property
    def network(self) -> Network:
        """Computation of the encoder's and decoder's states: the backbone's, or that of a side network."""
        return self._networks[self._enabled]

    def layers(self) -> list[nn.Module]:
        """Return the layers of encoder and decoder, and those of units."""
        layers = [layer for stack in self.backbone.layers(self.lm).values() for layer in stack]
        return layers + [layer for place in self.injected for layer in place.unit.compiled_layers()]

    def use_cuda_graphs(self) -> None:
        """Train with CUDA graphs; call it when the trained parameters are on the GPU, where they must stay."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.graphs = TrainingGraphs(self._decoder_states, trained, pad=self.pad_token, text=self.ignores_padding)

    def use_generation_graphs(self) -> None:
        """Generate with CUDA graphs where the model is in evaluation mode on a GPU."""
        self.generation_graphs = graphs_of(self)

    @property
    def ignores_padding(self) -> bool:
        """Whether all positions are computed independently of masked ones."""
        return self.mask_padding or not any(map(_may_read_padding, self.modules()))

    def start_from_backbone(self) -> None:
        """Initialise the units that start from the pretrained weights."""
        pretrained = len(self.backbone.token_embedding(self.lm)) - self.added_vocabulary
        for place in self.injected:
            place.unit.start_from_backbone(self.backbone, self.lm, pretrained)

    def start_as_identity(self) -> None:
        """Re-initialise the units so that the first forward computes the pretrained function."""
        for place in self.injected:
            place.unit.start_as_identity()
        self.recipe["start"] = "identity"

    def mask(self, batch: Batch) -> Tensor:
        """Compute the ``(B, S)`` bool encoder mask: prompt tokens, real text tokens, and unmasked image tokens.

        Raises:
            ValueError: If the batch's feature mask does not match the number of image tokens.
        """
        text = batch.input_ids != self.pad_token if batch.text_mask is None else batch.text_mask
        images = text.new_ones(len(text), self.visual.tokens(batch.features))
        if batch.feature_mask is not None:
            if batch.feature_mask.shape != images.shape:
                raise ValueError(
                    f"a mask over {tuple(batch.feature_mask.shape)} image tokens where the model makes "
                    f"{tuple(images.shape)}: masked features must not be pooled, set the model's grid to null"
                )
            images = batch.feature_mask
        return self.backbone.mask(self.lm, batch.input_ids, text, images, self._prompt_length())

    def encode(self, batch: Batch) -> Any:
        """Compute the encoder states ``(B, S, d)`` of ``[prompt, text, image tokens]``; a side network has its own."""
        mask = self.mask(batch)
        self.hand_context(self._context(batch, mask))
        visual = self.visual(batch.features, batch.boxes, self.backbone.token_embedding(self.lm))
        prompt = self.prompt(self.backbone.prompt_stack)
        return self.network.encode(self.lm, batch.input_ids, visual, mask, prompt)

    @overload
    def forward(self, batch: Batch, *, return_gates: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, batch: Batch, *, return_gates: Literal[True]) -> tuple[Tensor, Gates]: ...

    def forward(self, batch: Batch, *, return_gates: bool = False) -> Tensor | tuple[Tensor, Gates]:
        """Compute logits ``(B, L, vocabulary)`` of the batch's labels under teacher forcing.

        Args:
            batch: ``B`` samples with labels.
            return_gates: Return ``(logits, gates)``, with the factors of every gate and the kinds of the positions.

        Raises:
            ValueError: If the batch has no labels, or gates are wanted and there are none.
        """
        decoder_inputs = self.backbone.decoder_inputs(self.lm, self._labels(batch))
        return decode_with_gates(self, batch, decoder_inputs) if return_gates else self.decode(batch, decoder_inputs)

    def decode(self, batch: Batch, decoder_inputs: Tensor) -> Tensor:
        """Compute logits ``(B, L, vocabulary)`` for given decoder inputs ``(B, L)``."""
        return self.logits(self.decoder_states(batch, decoder_inputs))

    def decoder_states(self, batch: Batch, decoder_inputs: Tensor) -> Tensor:
        """Compute the decoder's last states ``(B, L, d)`` for given decoder inputs ``(B, L)``."""
        if self.graphs is not None and self.training and torch.is_grad_enabled():
            return self.graphs(batch, decoder_inputs)
        return self._decoder_states(batch, decoder_inputs)

    def _decoder_states(self, batch: Batch, decoder_inputs: Tensor) -> Tensor:
        self._check_checkpointing()
        mask = self.mask(batch)
        with attention_kernels(mask.shape[1], mask.device), self._kernels(mask.device):
            states = self.encode(batch)  # sets the batch's context, which the decoder's prompt may need
            prefix = self.decoder_prefix(len(decoder_inputs))
            return self.network.decode(self.lm, states, mask, decoder_inputs, prefix)

    def _kernels(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context that saves memory on a CPU, unless compilation or checkpointing do."""
        if device.type != "cpu" or not self.training or self.layers()[0]._compiled_call_impl is not None:
            return nullcontext()
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self.modules())
        return nullcontext() if checkpointed else cpu_kernels(device)

    def logits(self, states: Tensor) -> Tensor:
        """Compute logits ``(..., vocabulary)`` from decoder states ``(..., d)``."""
        head, bias, scale, softcap = self.backbone.vocabulary_projection(self.lm)
        states = states if scale == 1 else states * scale
        if type(head) is nn.Linear and head.bias is None:
            logits = vocabulary_logits(states, head.weight, bias)
        else:
            logits = head(states) if bias is None else head(states) + bias
        return logits if softcap is None else soft_capped(logits, softcap)

    def _prompt_length(self) -> int:
        """Return the number of learned prompt tokens in the sequence of :meth:`encode`."""
        prompt = self.prompt(self.backbone.prompt_stack)
        return 0 if prompt is None else prompt.length

    def _cached_prompt(self) -> Any:
        """Return the decoder's prompt unit if its keys and values are kept in a cache, or None."""
        return None if self.backbone.prompt_stack == "decoder" else self.prompt("decoder")

    def _check_checkpointing(self) -> None:
        if not self.training or self._cached_prompt() is None:
            return
        if any(getattr(layer, "gradient_checkpointing", False) for layer in self.backbone.layers(self.lm)["decoder"]):
            raise ValueError(
                "gradient checkpointing disables the cache, which holds the decoder's prompt: turn it off, or remove "
                "the unit at decoder.prompt"
            )

    def decoder_prefix(self, rows: int) -> Any:
        """Build the cache with the decoder's prompt for a batch of ``rows``; None if no prompt is kept in a cache."""
        prompt = self._cached_prompt()
        if prompt is None:
            return None
        return self.backbone.decoder_prefix(self.lm, prompt.tokens().expand(rows, -1, -1))

    def loss(self, batch: Batch) -> Tensor:
        """Compute the task's scalar loss over the batch."""
        total, count = self.loss_terms(batch)
        return total / count.clamp(min=1)

    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the loss as a sum and a count, so that ranks can divide by the count of the whole batch.

        A sample without any label is not counted (it is a rank's filler).

        Returns:
            Scalars ``(total, count)``: the sum of losses, and the number of samples (for token losses, of target
            tokens), which is 0 if no sample has a label.
        """
        labels = self._labels(batch)
        factors, count = sample_factors(labels, task(batch.task).loss, batch.weights)
        states = self.decoder_states(batch, self.backbone.decoder_inputs(self.lm, labels))
        targets = batch.targets()
        if factors is not None:
            factors = factors.repeat_interleave(labels.shape[1], output_size=labels.numel()).index_select(0, targets)
        states, labels = states.flatten(0, 1).index_select(0, targets), labels.flatten().index_select(0, targets)
        return self._token_losses(states, labels, factors), count

    def _token_losses(self, states: Tensor, labels: Tensor, factors: Tensor | None) -> Tensor:
        head, bias, scale, softcap = self.backbone.vocabulary_projection(self.lm)
        if type(head) is nn.Linear and head.bias is None:
            states = states if scale == 1 else states * scale
            return token_losses(states, head.weight, bias, labels, factors, softcap)
        losses = F.cross_entropy(self.logits(states).float(), labels, reduction="none")  # a unit or peft in the head
        return (losses if factors is None else losses * factors).sum()

    @torch.no_grad()
    def generate(self, batch: Batch, *, num_beams: int, max_length: int, answers: int = 1) -> Tensor:
        """Generate answers.

        Args:
            batch: ``B`` samples.
            num_beams: Number of beams; 1 is a greedy search.
            max_length: Maximum number of tokens, including the decoder's start token.
            answers: Number of answers per sample, at most ``num_beams``; best first.

        Returns:
            ``(B * answers, at most max_length)`` token ids, starting with the decoder's start token, right-padded.

        Raises:
            ValueError: If ``max_length`` is below 2.
        """
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, the start token and one more, got {max_length}")
        config = self.backbone.generation(self.lm.config, num_beams, max_length)
        with uncompiled(self.layers()):
            return search(self, batch, replace(search_rules(config), answers=answers))

    @torch.no_grad()
    def choose(self, batch: Batch, choices: Sequence[int]) -> Tensor:
        """Select the choice with the largest logit at the first answer token (src/multitask_model.py, NLVR).

        Returns:
            ``(B,)`` indices into ``choices``; ties go to the first.
        """
        return self.choice_logits(batch, choices).argmax(dim=1)

    @torch.no_grad()
    def choice_logits(self, batch: Batch, choices: Sequence[int]) -> Tensor:
        """Compute the ``(B, len(choices))`` logits of some tokens at the first answer token."""
        prefix = self.backbone.answer_prefix(self.lm.config)
        decoder_inputs = torch.tensor([prefix], device=batch.input_ids.device).expand(len(batch), -1)
        with uncompiled(self.layers()):
            logits = self.logits(self.decoder_states(batch, decoder_inputs)[:, -1])
        return logits[:, list(choices)]

    def _context(self, batch: Batch, mask: Tensor) -> Context:
        context = Context(batch.task, mask if self.mask_padding else None)
        if not self.limits_units:
            return context
        images = self.visual.tokens(batch.features)
        return replace(context, positions=self.backbone.unit_positions(self.lm, mask, images, self._prompt_length()))

    def hand_context(self, context: Context) -> None:
        """Give a batch's context to the units that read it."""
        for module in self._context_readers:
            module.context = context  # type: ignore[assignment]

    @staticmethod
    def _labels(batch: Batch) -> Tensor:
        if batch.labels is None:
            raise ValueError(f"a batch of task {batch.task!r} has no labels: they are required for logits and the loss")
        return batch.labels


def _may_read_padding(module: nn.Module) -> bool:
    """Whether a unit reads its context for more than the positions that it is limited to."""
    return getattr(module, "reads_context", getattr(module, "needs_context", False))
