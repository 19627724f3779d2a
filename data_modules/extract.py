"""``data extract``: turn folders of images into feature stores through open_clip."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data_modules.feature_writer import FeatureWriter
from data_modules.features import META, FeatureStore, FeatureStoreError
from vlpet_lightning.backbones.visual import pool_grid

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SHOWN = 5
CALIBRATION = 256  # images
Transform = Callable[[Image.Image], Tensor]


class UnusableImages(ValueError):
    """Images that cannot be extracted; names the files and the cure."""


def find_images(folder: Path) -> dict[str, Path]:
    """The images in a folder and below, by id: the file's name without its suffix.

    Raises:
        FileNotFoundError: If there is no such folder, or no image in it.
        UnusableImages: If two files have the same id, or one is no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give --images the folder that the images lie in")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise FileNotFoundError(f"no image in {folder}: looked for {', '.join(SUFFIXES)}")
    found: dict[str, Path] = {}
    for path in paths:
        earlier = found.setdefault(path.stem, path)
        if earlier is not path:
            raise UnusableImages(f"{earlier} and {path} have the same image id {path.stem!r}: rename or remove one")
    broken = [
        str(path) for path in track(paths, description=f"checking {folder.name}", transient=True) if not _opens(path)
    ]
    if broken:
        some = ", ".join(broken[:SHOWN]) + (", ..." if len(broken) > SHOWN else "")
        raise UnusableImages(
            f"{len(broken)} of {len(paths)} files are no images: {some}. Fetch them again or remove them"
        )
    return found


def _opens(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()  # checksums, where the format has them: decoding alone does not look at a PNG's
            return True
    except (UnidentifiedImageError, OSError, SyntaxError):  # a SyntaxError is Pillow's for a broken PNG
        return False


class _Images(Dataset):
    def __init__(self, paths: Sequence[Path], transform: Transform) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return self.transform(image.convert("RGB"))
        except (OSError, SyntaxError) as error:  # Pillow's errors for data that ends early
            raise UnusableImages(f"{path} cannot be read ({error}): fetch it again or remove it") from error


def load_encoder(model: str, pretrained: str | None, seed: int) -> nn.Module:
    """An open_clip model in evaluation mode.

    Args:
        model: A name that open_clip knows, or a JSON file with an architecture.
        pretrained: A tag or a file of weights; None draws random ones.
        seed: Of random weights.

    Raises:
        ValueError: If there is no such model, or it has no such weights.
        FileNotFoundError: If the weights are not at hand.
    """
    name = model
    if model.endswith(".json"):
        if not Path(model).is_file():
            raise FileNotFoundError(f"no model config {model}: give a JSON file, or a name that open_clip knows")
        open_clip.add_model_config(Path(model))
        name = Path(model).stem
    if name not in open_clip.list_models():
        raise ValueError(f"unknown open_clip model {model!r}: choose from {', '.join(open_clip.list_models())}")
    if pretrained is not None and not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            known = ", ".join(tags) or "no tags"
            raise ValueError(
                f"{name} has no weights {pretrained!r}: give a file, one of {known}, or null for random weights"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return open_clip.create_model(name, pretrained=pretrained).eval()
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"the weights {pretrained!r} of {name} cannot be fetched ({error}): give --pretrained a file of "
                "weights, or run where the hub can be reached"
            ) from error


class Extractor:
    """An image encoder with its preprocessing.

    Args:
        model: A name that open_clip knows, or a JSON file with an architecture.
        pretrained: A tag or a file of weights; None draws random ones.
        pool: Side of the grid that features are max-pooled to; None keeps the encoder's.
        resize: How an image becomes a square.
        device: Where to encode.
        seed: Of random weights.

    Raises:
        ValueError: If there is no such model or weights, or its grid cannot be pooled so.
        FileNotFoundError: If the weights are not at hand.
    """

    def __init__(
        self, model: str, pretrained: str | None, *, pool: int | None, resize: str, device: str, seed: int
    ) -> None:
        encoder = load_encoder(model, pretrained, seed)
        settings = open_clip.get_model_preprocess_cfg(encoder)
        size, mean, std = settings["size"], tuple(settings["mean"]), tuple(settings["std"])
        self.encoder = encoder.to(device)
        self.device = device
        self.pool = pool
        self.transform: Transform = open_clip.image_transform(
            size, is_train=False, mean=mean, std=std, resize_mode=resize, interpolation="bicubic"
        )
        is_file = model.endswith(".json")
        self.record = {
            "library": f"open_clip {open_clip.__version__}",
            "model": Path(model).stem if is_file else model,
            "config_sha256": hashlib.sha256(Path(model).read_bytes()).hexdigest() if is_file else None,
            "pretrained": Path(pretrained).name if pretrained and Path(pretrained).is_file() else pretrained,
            "seed": seed if pretrained is None else None,
            "pool": pool,
            "image_size": list(size) if isinstance(size, tuple) else size,
            "mean": list(mean),
            "std": list(std),
            "resize": resize,
            "interpolation": "bicubic",
        }
        height, width = size if isinstance(size, tuple) else (size, size)
        self.tokens, self.dim = self(torch.zeros(1, 3, height, width)).shape[1:]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """The last grid of features: a ResNet's before its attention pooling, a ViT's patch tokens.

        Args:
            images: ``(B, 3, H, W)``, normalised.

        Returns:
            ``(B, tokens, dim)`` float32 on the CPU, row by row.
        """
        output: Any = self.encoder.forward_intermediates(  # type: ignore[operator]
            image=images.to(self.device), image_indices=1, intermediates_only=True, normalize_intermediates=True
        )
        grid = output["image_intermediates"][-1].flatten(2).transpose(1, 2)
        return pool_grid(grid, self.pool).float().cpu()

    def calibrate(self, images: Sequence[Path]) -> None:
        """Give random weights the statistics of some images, where the encoder has batch norms.

        Without them the features of an untrained ResNet are so small that float16 hardly tells them apart.
        """
        norms = [module for module in self.encoder.modules() if isinstance(module, nn.BatchNorm2d)]
        if self.record["pretrained"] is not None or not norms:
            return
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average over batches
            norm.train()
        chosen = [images[int(place)] for place in torch.linspace(0, len(images) - 1, CALIBRATION)]
        for batch in DataLoader(_Images(chosen, self.transform), batch_size=CALIBRATION // 4):
            self(batch)
        self.encoder.eval()

    def is_done(self, out: Path, ids: Sequence[str]) -> bool:
        """Whether a store is there already.

        Raises:
            FeatureStoreError: If it holds other images, or was made in another way.
        """
        if not (out / META).exists():
            return False
        store = FeatureStore(out)
        if store.meta["extractor"] == self.record and sorted(store.ids) == sorted(ids):
            return True
        raise FeatureStoreError(
            f"{out} is a complete store of {len(store)} images, made with {store.meta['extractor']}: choose another "
            "--out, or remove it to make it again"
        )

    def write(self, out: Path, images: dict[str, Path], *, batch_size: int, workers: int) -> None:
        """Encode images into a new store."""
        ids = list(images)
        loader = DataLoader(_Images(list(images.values()), self.transform), batch_size=batch_size, num_workers=workers)
        with FeatureWriter(out, tokens=self.tokens, dim=self.dim, extractor=self.record) as writer:
            for number, batch in enumerate(track(loader, description=f"extracting {out.name}")):
                start = number * batch_size
                writer.add(ids[start : start + len(batch)], self(batch).numpy())


def extract(
    *,
    images: Path,
    out: Path,
    model: str = "RN101",
    pretrained: str | None = "openai",
    pool: int | None = 6,
    each_folder: bool = False,
    resize: Literal["squash", "shortest", "longest"] = "squash",
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Extract grid features of images into a feature store.

    The defaults make the benchmark's features: CLIP RN101, 224 by 224 pixels, the 7x7 grid before attention pooling,
    max-pooled to 6x6 as the original's encoder does in every forward. A store that is there already is left as it is.

    Args:
        images: Folder with images; an image's id is its file name without the suffix.
        out: Folder of the store to write.
        model: Name of an open_clip model, or a JSON file with an architecture.
        pretrained: Tag or file of its weights; null for random ones.
        pool: Side of the grid that is stored; null stores the encoder's own.
        each_folder: Make a store for each folder in IMAGES, below OUT.
        resize: How an image becomes a square; squash keeps all of it.
        batch_size: Images encoded at once.
        workers: Processes that decode images; 0 decodes in this one.
        device: Where to encode; auto takes a GPU where there is one.
        seed: Of random weights.

    Raises:
        FileNotFoundError: If there is no image, or weights are not at hand.
        UnusableImages: If an id comes twice, or a file is no image.
        FeatureStoreError: If OUT is a store of other images or another extractor.
        ValueError: If there is no such model or weights, or its grid cannot be pooled so.
    """
    found = _stores(images, out, each_folder)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    extractor = Extractor(model, pretrained, pool=pool, resize=resize, device=where, seed=seed)
    done = {store: extractor.is_done(store, list(table)) for store, table in found.items()}  # all before writing any
    if not all(done.values()):
        extractor.calibrate([path for table in found.values() for path in table.values()])
    console = Console()
    for store, table in found.items():
        if not done[store]:
            extractor.write(store, table, batch_size=batch_size, workers=workers)
        state = "up to date" if done[store] else "written"
        size = f"{len(table):,} images, {extractor.tokens} tokens of {extractor.dim}"
        console.print(f"{state}: {store} ({size})", soft_wrap=True)


def _stores(images: Path, out: Path, each_folder: bool) -> dict[Path, dict[str, Path]]:
    if not each_folder:
        return {out: find_images(images)}
    folders = sorted(path for path in images.iterdir() if path.is_dir()) if images.is_dir() else []
    if not folders:
        raise FileNotFoundError(f"no folder in {images}: leave --each_folder away where the images lie in it directly")
    return {out / folder.name: find_images(folder) for folder in folders}
