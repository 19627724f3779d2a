"""Qwen2.5-VL: a tower with windowed attention, a merger of 2 x 2 patches and a Qwen2 decoder with 3-D positions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlpet_lightning.backbones.causal import CausalBackbone, with_projector
from vlpet_lightning.pet.placement import AnySite


class Qwen25VL(CausalBackbone):
    """Qwen2.5-VL with images of one size.

    Stored features are the tower's states before the merger, ``(F, D)`` for the ``F`` patches of an image, so that the
    merger can be trained like the projectors of other models. For the 3B model they take 2.5 times the space of the
    merged output. The library's ``last_hidden_state`` has them in the order of its attention windows. In the store they
    have the order of the library's image processor: the patches of an image token follow one another, and tokens are
    in row-major order. The merger flattens images, so that units at ``projector`` get ``(tokens, width)``.

    Attributes:
        image_size: Height and width of all images in pixels.
    """

    kind = "qwen2_5_vl"
    sites: ClassVar[dict[str, AnySite]] = with_projector("mlp.0", "mlp.2")
    config_class = Qwen2_5_VLConfig
    model_class = Qwen2_5_VLForConditionalGeneration
    known: ClassVar[dict[str, dict[str, Any]]] = {  # sizes; all others are the library's defaults
        "Qwen/Qwen2.5-VL-3B-Instruct": {
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
            },
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 2048,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "window_size": 112,
            },
            "tie_word_embeddings": True,
        },
    }
    text_template = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    image_template = "<|vision_start|>{tokens}<|vision_end|>"
    text_path = "model.language_model"
    projector_path = "model.visual.merger"
    tower_path = "model.visual"
    image_size: tuple[int, int] | None = None

    def with_image_size(self, height: int, width: int) -> Qwen25VL:
        """Return this description for images of a size in pixels."""
        found = copy.copy(self)
        found.image_size = (height, width)
        return found

    def with_sizes(self, settings: Mapping[str, Any]) -> CausalBackbone:
        size = settings.get("image_size")
        if size is not None and len(size) != 2:
            raise ValueError(f"image_size must be [height, width], got {list(size)}")
        return self if size is None else self.with_image_size(*size)

    def grid(self, config: Any) -> tuple[int, int]:
        """Return the number of image tokens in a column and in a row of an image.

        Raises:
            ValueError: If the size of the images is not set, or not a multiple of an image token's side.
        """
        if self.image_size is None:
            raise ValueError(f"a {self.kind} model takes images of any size: set image_size, [height, width] in pixels")
        side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        height, width = self.image_size
        if min(height, width) < side or height % side or width % side:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be divided into tokens of {side} x {side}: resize them to "
                f"multiples of {side}"
            )
        return height // side, width // side

    def image_tokens(self, config: Any) -> int:
        rows, columns = self.grid(config)
        return rows * columns

    def vectors(self, config: Any) -> int:
        return self.image_tokens(config) * config.vision_config.spatial_merge_size**2

    def positions(self, lm: Any, mask: Tensor, images: int, prompt: int) -> tuple[Tensor, Tensor]:
        """Return ``(B, 3, S)`` positions in time and in the rows and columns of images.

        An image token is at its row and column after the text before its image, and positions resume after the longer
        side of an image (``get_rope_index`` of the library).
        """
        rows, columns = self.grid(lm.config)
        steps = mask.long()  # from each token to the next
        offsets = steps.new_zeros(3, mask.shape[1])
        cells = torch.cartesian_prod(*(torch.arange(side, device=mask.device) for side in (rows, columns))).T
        for tokens in self.image_slices(lm.config, images, prompt):
            offsets[1:, tokens] = cells
            steps[:, tokens] = 0
            steps[:, tokens.stop - 1] = max(rows, columns)
        return (steps.cumsum(dim=1) - steps)[:, None] + offsets, steps.sum(dim=1)
