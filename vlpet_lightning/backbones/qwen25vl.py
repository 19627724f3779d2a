"""Qwen2.5-VL: a tower with windowed attention, a merger of 2 x 2 patches and a Qwen2 decoder with 3-D positions."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlpet_lightning.backbones.causal import CausalBackbone, sites_of
from vlpet_lightning.backbones.image_processor import resized
from vlpet_lightning.pet.placement import AnySite


class Unmerged(nn.Module):
    """Stand-in for the merger that leaves the patches of a token as they are, side by side.

    Args:
        patches: Number of patches of a token.
    """

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patches = patches

    def forward(self, states: Tensor) -> Tensor:
        """Map ``(n * patches, D)`` states to ``(n, patches * D)``."""
        return states.reshape(len(states) // self.patches, -1)


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
    sites: ClassVar[dict[str, AnySite]] = sites_of(
        ("mlp.0", "mlp.2"), ("attn.qkv", "attn.proj"), ("mlp.gate_proj", "mlp.down_proj"), flat=True
    )
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
    image_mark = "<|vision_start|><|image_pad|><|vision_end|>"
    text_path = "model.language_model"
    projector_path = "model.visual.merger"
    tower_path = "model.visual"
    tower_layers_path = "blocks"
    image_settings = ("image_size",)
    image_size: tuple[int, int] | None = None

    def with_image_size(self, height: int, width: int) -> Qwen25VL:
        """Return this description for images of a size in pixels."""
        found = copy.copy(self)
        found.image_size = (height, width)
        return found

    @property
    def processing(self) -> dict[str, Any]:
        return {"do_resize": False}  # the processor keeps the shape of images, which differs between them

    def pixels(self, config: Any, processor: Any, image: Image) -> Tensor:
        """Return the ``(F, P)`` patches of an image that is resized to :attr:`image_size`, without keeping its shape.

        The image is resized with Pillow, as by ``fetch_image`` of qwen_vl_utils with ``resized_height`` and
        ``resized_width``.

        Raises:
            ValueError: If the image processor divides images in another way than the model.
        """
        rows, columns = self.grid(config)
        height, width = self._size()
        whole = resized(image, height, width, processor)
        found = processor(images=[whole], return_tensors="pt", **self.processing)
        merge = config.vision_config.spatial_merge_size
        patches = found["image_grid_thw"][0].tolist()
        if patches != [1, rows * merge, columns * merge] or processor.merge_size != merge:
            raise ValueError(
                f"the image processor divides {height} x {width} pixels into {patches[1]} x {patches[2]} patches, "
                f"merged by {processor.merge_size}, the model into {rows * merge} x {columns * merge}, merged by "
                f"{merge}: set patch_size and merge_size in preprocessor_config.json to those of config.json"
            )
        return found["pixel_values"].float()

    def pixel_shape(self, config: Any) -> tuple[int, ...]:
        tower = config.vision_config
        return self.vectors(config), tower.in_channels * tower.temporal_patch_size * tower.patch_size**2

    def tower_output(self, lm: Any, pixels: Tensor) -> Tensor:
        """Return the states before the merger; the library itself undoes the order of its attention windows.

        Args:
            lm: The model.
            pixels: ``(B, F, P)`` patches.
        """
        merge = lm.config.vision_config.spatial_merge_size
        grid = torch.tensor([[1, *(side * merge for side in self.grid(lm.config))]], device=pixels.device)
        visual = lm.model.visual
        merger, visual.merger = visual.merger, Unmerged(merge**2)
        try:
            found = visual(pixels.flatten(0, 1), grid_thw=grid.expand(len(pixels), -1)).pooler_output
        finally:
            visual.merger = merger
        return found.reshape(*pixels.shape[:2], -1)

    def _size(self) -> tuple[int, int]:
        if self.image_size is None:
            raise ValueError(f"a {self.kind} model takes images of any size: set image_size, [height, width] in pixels")
        return self.image_size

    def grid(self, config: Any) -> tuple[int, int]:
        """Return the number of image tokens in a column and in a row of an image.

        Raises:
            ValueError: If the size of the images is not set, or not a multiple of an image token's side.
        """
        side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        height, width = self._size()
        if min(height, width) < side or height % side or width % side:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be divided into tokens of {side} x {side}: resize them to "
                f"multiples of {side}"
            )
        return height // side, width // side

    def image_tokens(self, config: Any) -> int:
        rows, columns = self.grid(config)
        return rows * columns

    def view_vectors(self, config: Any) -> int:
        return self.image_tokens(config) * config.vision_config.spatial_merge_size**2

    def tower_attentions(self, config: Any) -> list[int]:
        """Most layers attend within windows, which are smaller at the edges of an image."""
        tower, vectors = config.vision_config, self.vectors(config)
        window = tower.window_size // tower.patch_size
        whole = [side * tower.spatial_merge_size for side in self.grid(config)]
        rows, columns = ([min(window, side - start) for start in range(0, side, window)] for side in whole)
        within = sum((height * width) ** 2 for height, width in product(rows, columns))
        pairs = [vectors**2 if layer in tower.fullatt_block_indexes else within for layer in range(tower.depth)]
        return [tower.hidden_size * number for number in pairs]

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
