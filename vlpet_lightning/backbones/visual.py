"""Visual embedding: from pre-extracted features to tokens of the language model (src/modeling_bart.py)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Projector = Callable[[int, int], nn.Module]  # builds a projection from D to d
IMAGES = 2  # rows of the image order embedding; NLVR2 has two images per sample


def pool_grid(features: Tensor, grid: int | None) -> Tensor:
    """Max-pool a square grid of feature vectors to ``grid x grid``, without parameters.

    Args:
        features: ``(..., F, D)`` with a square number ``F``, in row-major order.
        grid: Side of the pooled grid; None keeps all vectors.

    Returns:
        ``(..., grid * grid, D)``; the input itself if it already has that size.

    Raises:
        ValueError: If ``F`` is not a square number or is smaller than the pooled grid.
    """
    tokens, width = features.shape[-2:]
    if grid is None or tokens == grid * grid:
        return features
    side = math.isqrt(tokens)
    if side * side != tokens or side < grid:
        raise ValueError(
            f"cannot pool {tokens} feature vectors to {grid}x{grid}: expected a square of at least {grid * grid}"
        )
    planes = features.reshape(-1, side, side, width).permute(0, 3, 1, 2)
    pooled = F.adaptive_max_pool2d(planes, grid).flatten(2).transpose(1, 2)
    return pooled.reshape(*features.shape[:-2], grid * grid, width)


class VisualEmbedding(nn.Module):
    """Compute ``LN(W_f f) + LN(W_p [box, area]) + image order + object order`` for each token.

    The object order embedding is not learned. It consists of the last rows of the token embedding in reverse order,
    which belong to the tokens added by the benchmark. With grid features all boxes are zero and the second term is
    constant.

    Args:
        feature_dim: Dimension ``D`` of the feature vectors.
        width: Hidden dimension ``d`` of the language model.
        grid: Side of the pooled grid, for ``grid * grid`` tokens per image; None keeps one token per feature vector.
        norm: Builds a norm for dimension ``d`` (LayerNorm for BART, RMS norm for T5).
        init_std: Standard deviation of the initial weights; None keeps torch's own initialisation (T5).
        projector: Builds the projection from ``D`` to ``d``, including its initialisation; None is a linear layer.
        order_scale: Factor on the object order embedding, for models that scale their token embeddings.

    Attributes:
        vectors: Number of feature vectors of an image after pooling; None without pooling.
    """

    def __init__(
        self,
        feature_dim: int,
        width: int,
        *,
        grid: int | None = 6,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: float | None = 0.02,
        projector: Projector | None = None,
        order_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.grid = grid
        self.vectors = None if grid is None else grid**2
        self.order_scale = order_scale
        projection = nn.Linear(feature_dim, width) if projector is None else projector(feature_dim, width)
        self.feature = nn.Sequential(projection, norm(width))
        self.box = nn.Sequential(nn.Linear(5, width), norm(width))
        self.image_order = nn.Embedding(IMAGES, width)
        if init_std is not None:
            for layer in (projection, self.box[0], self.image_order):
                if isinstance(layer, nn.Linear | nn.Embedding):
                    nn.init.normal_(layer.weight, std=init_std)
                if isinstance(layer, nn.Linear):
                    nn.init.zeros_(layer.bias)

    def tokens(self, features: Tensor) -> int:
        """Return ``V``, the number of visual tokens per sample."""
        images = 1 if features.dim() == 3 else features.shape[1]
        return images * (self.vectors or features.shape[-2])

    def forward(self, features: Tensor, boxes: Tensor | None, token_embedding: Tensor) -> Tensor:
        """Embed the images of a batch.

        Args:
            features: ``(B, F, D)`` or ``(B, N, F, D)``.
            boxes: As ``features`` with a last axis of 4, or None for zeros. Only the first ``grid * grid`` boxes of
                an image are used, as in the original.
            token_embedding: ``(vocabulary, d)`` weight of the language model's token embedding.

        Returns:
            ``(B, V, d)`` visual tokens, one image after the other.

        Raises:
            ValueError: If the shape of the features does not match the model.
        """
        if features.dim() == 3:
            features = features.unsqueeze(1)
            boxes = None if boxes is None else boxes.unsqueeze(1)
        if features.dim() != 4 or features.shape[-1] != self.feature_dim or features.shape[1] > IMAGES:
            raise ValueError(
                f"features have shape {tuple(features.shape)}: expected (B, F, {self.feature_dim}) or (B, N, F, "
                f"{self.feature_dim}) with N <= {IMAGES}; set the model's feature_dim to that of the feature store"
            )
        features = pool_grid(features.to(self.image_order.weight.dtype), self.grid)
        samples, images, tokens, _ = features.shape
        embedded = self.feature(features) + self.box(self._positions(features, boxes))
        embedded = embedded + self.image_order.weight[:images, None]
        order = token_embedding[-tokens:].flip(0)  # object i uses row vocabulary - 1 - i
        embedded = embedded + (order if self.order_scale == 1 else order * self.order_scale)
        return embedded.reshape(samples, images * tokens, -1)

    def _positions(self, features: Tensor, boxes: Tensor | None) -> Tensor:
        if boxes is None:
            return features.new_zeros(1, 1, 1, 5)  # broadcasts: the same constant vector for every token
        boxes = boxes[:, :, : features.shape[2]].to(features.dtype)
        area = (boxes[..., 3] - boxes[..., 2]) * (boxes[..., 1] - boxes[..., 0])  # the original's x1 x2 y1 y2
        return torch.cat([boxes, area.unsqueeze(-1)], dim=-1)
