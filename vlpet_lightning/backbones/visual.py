"""From pre-extracted feature vectors to tokens of the language model (src/modeling_bart.py)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Projector = Callable[[int, int], nn.Module]  # makes a projection from D to d
IMAGES = 2  # rows of the image order embedding; NLVR2 shows two images


def pool_grid(features: Tensor, grid: int | None) -> Tensor:
    """Max-pool a square grid of feature vectors to ``grid x grid``; has no parameters.

    Args:
        features: ``(..., F, D)`` with ``F`` a square number, row by row.
        grid: Side of the pooled grid; None keeps all vectors.

    Returns:
        ``(..., grid * grid, D)``; the input itself where it has that size already.

    Raises:
        ValueError: If ``F`` is not a square, or smaller than the pooled grid.
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
    """``LN(W_f f) + LN(W_p [box, area]) + image order + object order``, token by token.

    The object order embedding is not learnt: it is the last rows of the token embedding, read backwards, which belong
    to vocabulary that the benchmark adds. With grid features all boxes are zero and the second term is a constant.

    Args:
        feature_dim: ``D``.
        width: ``d``.
        grid: Side of the pooled grid: an image gives ``grid * grid`` tokens; None keeps one token a feature vector.
        norm: Makes a norm from ``d`` (LayerNorm for BART, RMS norm for T5).
        init_std: Standard deviation of the initial weights; None keeps torch's own initialisation (T5).
        projector: Makes another projection than a linear layer from ``D`` and ``d``; it initialises itself.
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
    ) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.grid = grid
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
        """``V``: tokens that a sample of such features gives."""
        images = 1 if features.dim() == 3 else features.shape[1]
        return images * (features.shape[-2] if self.grid is None else self.grid**2)

    def forward(self, features: Tensor, boxes: Tensor | None, token_embedding: Tensor) -> Tensor:
        """Embed the images of a batch.

        Args:
            features: ``(B, F, D)`` or ``(B, N, F, D)``.
            boxes: The same with a last axis of 4, or None for zeros. Only the first ``grid * grid`` of an image are
                read, as in the original.
            token_embedding: ``(vocabulary, d)`` weight of the language model's token embedding.

        Returns:
            ``(B, V, d)``, image after image.

        Raises:
            ValueError: If the features' width or number is not what the model was built for.
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
        embedded = embedded + token_embedding[-tokens:].flip(0)  # object i reads row vocabulary - 1 - i
        return embedded.reshape(samples, images * tokens, -1)

    def _positions(self, features: Tensor, boxes: Tensor | None) -> Tensor:
        if boxes is None:
            return features.new_zeros(1, 1, 1, 5)  # broadcasts: the same constant vector for every token
        boxes = boxes[:, :, : features.shape[2]].to(features.dtype)
        area = (boxes[..., 3] - boxes[..., 2]) * (boxes[..., 1] - boxes[..., 0])  # the original's x1 x2 y1 y2
        return torch.cat([boxes, area.unsqueeze(-1)], dim=-1)
