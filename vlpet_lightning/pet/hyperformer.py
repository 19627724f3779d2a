"""HyperFormer++ (Mahabadi et al., ACL 2021): adapters with weights generated from task, layer and position.

Source: src/adapters/adapter_hypernetwork.py of VL-Adapter, after rabeehk/hyperformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlpet_lightning.checks import choice, positive
from vlpet_lightning.pet.unit import INIT_STD, Place, Unit, zero

BLOCKS = {"ffn": "feed_forward", "attn": "self_attention", "cross": "cross_attention"}  # by the last part of a site
EMBEDDING = "task_embedding"  # name of the embeddings among the shared modules; both stacks use them


class Generator(nn.Module):
    """Generates the weight ``(outputs, inputs)`` and bias ``(outputs,)`` of a linear layer from an embedding.

    Args:
        embedding: Width of the embedding.
        outputs: Of the layer.
        inputs: Of the layer.
        std: Of the fresh generators' weights; their biases are 0.
    """

    def __init__(self, embedding: int, outputs: int, inputs: int, std: float) -> None:
        super().__init__()
        self.shape = (outputs, inputs)
        self.weight_generator = nn.Linear(embedding, outputs * inputs)
        self.bias_generator = nn.Linear(embedding, outputs)
        _draw(self, std)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight_generator(embedding).view(self.shape), self.bias_generator(embedding)


class TaskEmbedding(nn.Module):
    """One learned vector per task, initialised from N(0, 1).

    Args:
        tasks: Their names.
        width: Of a vector.
    """

    def __init__(self, tasks: Sequence[str], width: int) -> None:
        super().__init__()
        self.width = width
        # one parameter per task: those of other tasks get no gradient, so that the optimiser does not change them
        self.vectors = nn.ParameterDict({task: nn.Parameter(torch.randn(width)) for task in tasks})

    def forward(self, task: str) -> Tensor:
        if task not in self.vectors:
            raise ValueError(f"no embedding of task {task!r}: there are {', '.join(self.vectors)}")
        return self.vectors[task]


class HyperNet(nn.Module):
    """Generates the adapters of all positions of one stack.

    ``e = LN(W_2 relu(W_1 [task; layer]))``, and from ``e`` the adapter's weights.

    Args:
        width: ``d``.
        rank: Bottleneck of the adapters.
        layers: Layers of the stack.
        embedding: Width of the embeddings of task, layer and block.
        hidden: Width between ``W_1`` and ``W_2``.
        projected: Width of ``e``.
        generators: ``block``: generators for each kind of block; ``one``: the same for all, told the kind by an
            embedding.
        std: Of fresh linear layers.
    """

    def __init__(
        self,
        width: int,
        *,
        rank: int,
        layers: int,
        embedding: int,
        hidden: int,
        projected: int,
        generators: str,
        std: float,
    ) -> None:
        super().__init__()
        self.sizes = {"width": width, "rank": rank, "projected": projected}
        self.std = std
        self.layer_embedding = nn.Embedding(layers, embedding)
        self.block_embedding = nn.Embedding(len(BLOCKS), embedding) if generators == "one" else None
        parts = 2 if generators == "block" else 3
        self.project = nn.Sequential(nn.Linear(parts * embedding, hidden), nn.ReLU(), nn.Linear(hidden, projected))
        self.LayerNorm = nn.LayerNorm(projected, eps=1e-6)  # with this name the original's optimiser does not decay it
        self.down = nn.ModuleDict()
        self.up = nn.ModuleDict()
        _draw(self.project, std)
        if std == INIT_STD:  # BART's initialisation applies to embeddings as well
            for table in (self.layer_embedding, self.block_embedding):
                if table is not None:
                    nn.init.normal_(table.weight, std=std)

    def generators_of(self, block: str) -> str:
        """Return the name of a block's generators, which are built if they do not exist yet."""
        name = block if self.block_embedding is None else "all"
        if name not in self.down:
            width, rank, projected = self.sizes["width"], self.sizes["rank"], self.sizes["projected"]
            self.down[name] = Generator(projected, rank, width, self.std)
            self.up[name] = Generator(projected, width, rank, self.std)
        return name

    def forward(self, task: Tensor, layer: int, block: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weights and biases of the down and up projections at one position."""
        parts = [task, self.layer_embedding.weight[layer]]
        if self.block_embedding is not None:
            parts.append(self.block_embedding.weight[list(BLOCKS.values()).index(block)])
        embedding = self.LayerNorm(self.project(torch.cat(parts)))
        name = block if self.block_embedding is None else "all"
        return *self.down[name](embedding), *self.up[name](embedding)


class HyperFormer(Unit):
    """``h + W_u gelu(W_d h + b_d) + b_u`` with generated weights; its parameters are shared by the whole stack.

    Args:
        width: ``d``.
        rank: Bottleneck.
        tasks: Names of the tasks.
        embedding: Width of the embeddings of task, layer and block.
        hidden: Width of the projection's hidden layer.
        projected: Width of the embedding from which weights are generated.
        generators: ``block`` (``--unique_hyper_net``) or ``one`` (``--efficient_unique_hyper_net``); see
            :class:`HyperNet`.
        std: Of fresh linear layers: 0.02 inside BART, 0.01 inside T5.
    """

    needs_context = True
    may_skip_parameters = True

    def __init__(
        self,
        width: int,
        *,
        tasks: Sequence[str],
        rank: int = 96,
        embedding: int = 512,
        hidden: int = 128,
        projected: int = 8,
        generators: Literal["block", "one"] = "block",
        std: float = INIT_STD,
    ) -> None:
        super().__init__()
        if len(set(tasks)) != len(tasks) or not tasks:
            raise ValueError(f"tasks must be different names, at least one, got {list(tasks)}")
        for name, value in (("rank", rank), ("embedding", embedding), ("hidden", hidden), ("projected", projected)):
            positive(name, value)
        choice("generators", generators, ("block", "one"))
        self.tasks: tuple[str, ...] = tuple(tasks)
        self.settings = {
            "width": width,
            "rank": rank,
            "embedding": embedding,
            "hidden": hidden,
            "projected": projected,
            "generators": generators,
            "std": std,
        }
        self.place: Place | None = None
        self._shared: tuple[TaskEmbedding, HyperNet] | None = None  # a tuple: registered once, among the shared modules

    def join(self, place: Place, shared: nn.ModuleDict) -> None:
        kind = place.site.rpartition(".")[2]
        if kind not in BLOCKS:
            raise ValueError(
                f"HyperFormer has no place at site {place.site!r}: choose those ending in .attn, .cross, .ffn"
            )
        name = f"hypernet_{place.stack}"
        if EMBEDDING not in shared:
            shared[EMBEDDING] = TaskEmbedding(self.tasks, self.settings["embedding"])  # type: ignore[arg-type]
        if name not in shared:
            shared[name] = HyperNet(layers=place.layers, **self.settings)  # type: ignore[arg-type]
            shared[name].settings = dict(self.settings)  # type: ignore[assignment]
        if shared[name].settings != self.settings or set(shared[EMBEDDING].vectors) != set(self.tasks):  # type: ignore
            raise ValueError(f"HyperFormer units of the {place.stack} share one network: give them the same settings")
        self.place = place
        self._shared = (shared[EMBEDDING], shared[name])  # type: ignore[assignment]
        self._shared[1].generators_of(BLOCKS[kind])  # type: ignore[index]

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if self._shared is None or self.place is None or self.context is None:
            raise RuntimeError("HyperFormer was called outside of a model, or without a batch: call the whole model")
        task, net = self._shared
        block = BLOCKS[self.place.site.rpartition(".")[2]]
        down, down_bias, up, up_bias = net(task(self.context.task), self.place.layer, block)
        hidden = F.gelu(F.linear(h, down, down_bias), approximate="tanh")
        return h + F.linear(hidden, up, up_bias)

    def start_as_identity(self) -> None:
        """Make the shared network generate up projections of zero at every position of the stack."""
        if self._shared is None:
            raise RuntimeError("HyperFormer has no network outside of a model: build the whole model")
        zero(*self._shared[1].up.values())

    def extra_repr(self) -> str:
        said = [f"{name}={value}" for name, value in self.settings.items() if name != "std"]
        return f"{', '.join(said)}, tasks={list(self.tasks)}"


def _draw(module: nn.Module, std: float) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
