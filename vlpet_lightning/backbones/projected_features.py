"""Image tokens of a model that projects stored features itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class ProjectedFeatures(nn.Module):
    """Image tokens from stored features: the model's own projector, which belongs to the language model.

    Args:
        projector: Projects ``(n, F, D)`` features to tokens; its parameters are those of the language model.
        per_image: Number of tokens of an image.
        feature_dim: Dimension ``D`` of the stored feature vectors.
        vectors: Number ``F`` of feature vectors of an image.
    """

    def __init__(
        self, projector: Callable[[Tensor], Tensor], *, per_image: int, feature_dim: int, vectors: int
    ) -> None:
        super().__init__()
        self._projector = (projector,)  # not a submodule: its parameters have their names in the language model
        self.per_image = per_image
        self.feature_dim = feature_dim
        self.vectors = vectors

    @property
    def input_shape(self) -> tuple[int, int]:
        """Shape ``(F, D)`` of an image's input in a batch."""
        return self.vectors, self.feature_dim

    def tokens(self, features: Tensor) -> int:
        """Return ``V``, the number of image tokens per sample."""
        return self.per_image * (1 if features.dim() == 3 else features.shape[1])

    def forward(self, features: Tensor, boxes: Tensor | None, token_embedding: Tensor) -> Tensor:
        """Project the features of a batch.

        Args:
            features: ``(B, F, D)`` or ``(B, N, F, D)``.
            boxes: Not used.
            token_embedding: Determines the type.

        Returns:
            ``(B, V, d)`` image tokens, one image after the other.

        Raises:
            ValueError: If the shape of the features is not that of the vision tower's output.
        """
        if features.shape[-2:] != (self.vectors, self.feature_dim):
            raise ValueError(
                f"features have shape {tuple(features.shape)}, the projector reads {self.vectors} vectors of dimension "
                f"{self.feature_dim} per image: extract them with this model's own tower"
            )
        flat = features.to(token_embedding.dtype).reshape(-1, self.vectors, self.feature_dim)
        return self._projector[0](flat).reshape(len(features), -1, token_embedding.shape[1])
