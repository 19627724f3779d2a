"""``data extract images`` and ``data extract video``: a user's own files into feature stores with open_clip."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from data_modules.extraction.extraction import STATISTICS, Extraction, Source, encode
from data_modules.extraction.media import (
    Images,
    Media,
    SpacedFrames,
    UnusableFiles,
    Videos,
    find_files,
    other_suffixes,
    several_frames,
)
from data_modules.extraction.processes import devices_for, encode_in_processes
from data_modules.store.extras import need
from data_modules.store.resumable import AGAIN, STATE, ResumableStore, check_space, columns, only_writer, writing
from data_modules.store.store import META
from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.vision.choice import AnyEncoder, make_encoder
from vlpet_lightning.vision.encoders import HF, EncoderSettings, Features, Precision, Resize, evenly

UNREADABLE = "unreadable.txt"
ARCHITECTURE = "architecture.json"
SHOWN = 5


def extract_images(
    *,
    source: Path,
    out: Path,
    model: str = "RN101",
    pretrained: str | None = "openai",
    features: Features = "grid",
    pool: int | None = 6,
    each_folder: bool = False,
    resize: Resize = "squash",
    precision: Precision = "float32",
    rows: str = "float16",
    shard_rows: int = 1024,
    batch_size: int = 64,
    workers: int | None = None,
    processes: int | None = None,
    device: str = "auto",
    strict: bool = False,
    exif_orientation: bool = True,
    seed: int = 0,
    image_size: list[int] | None = None,
    tiling: list[int] | None = None,
) -> None:
    """Extract image features into a feature store.

    The defaults reproduce the benchmark's features: CLIP RN101, 224 by 224 pixels, the 7x7 grid before attention
    pooling, max-pooled to 6x6 as the original's encoder does in every forward. An interrupted extraction is resumed,
    and a complete store is left unchanged. Unreadable images are skipped and listed, and files with other suffixes are
    counted. Images of more than 8 bits are scaled by their own value range, transparent images are composited over
    white, and only the first frame of a multi-frame image is read.

    Args:
        source: Folder of images, searched recursively; an image's id is its file name without the suffix.
        out: Output folder of the store.
        model: Name of an open_clip model, a JSON file with an architecture, or hf:NAME, a decoder-only model of Hugging
            Face whose own tower and image processor make the features that VLCausal reads.
        pretrained: Tag or file of the weights; null for random weights. Not used with hf:NAME.
        features: grid for the vectors of all grid positions, embedding for the one vector of the whole image,
            projector_input for the inputs of the projector of hf:NAME.
        pool: Side of the stored grid; null stores the encoder's own grid.
        each_folder: Make one store per subfolder of SOURCE, below OUT.
        resize: How an image is made square; squash keeps the whole image.
        precision: float32, or bf16, which is faster on a GPU and has three significant digits.
        rows: Row encoding: float16; uint8, half the size, with the error given in docs/data.md; zstd or lz4, lossless
            compression.
        shard_rows: Images per shard, fewer if they would exceed 256 MB; at most one shard per encoding process is lost
            when the command is killed.
        batch_size: Number of images encoded at once.
        workers: Decoding processes per encoding process; by default all cores with a GPU, 0 without.
        processes: Number of encoding processes; by default one per GPU, or one without a GPU.
        device: Device of the encoder; auto uses all GPUs if there are any.
        strict: Fail if an image cannot be read, before the store is marked complete.
        exif_orientation: Apply the images' EXIF orientation. Use false for the benchmark's own images: the published
            features were made from the stored pixels.
        seed: Seed of random weights.
        image_size: "[HEIGHT,WIDTH]" in pixels to which hf:NAME resizes images, for models that take any size
            (Qwen2.5-VL); it must be the image_size of VLCausal.
        tiling: "[ROWS,COLUMNS]" of tiles into which hf:NAME divides images, for models that can (SmolVLM,
            LLaVA-OneVision); it must be the tiling of VLCausal. By default an image is one view.

    Raises:
        FileNotFoundError: If there is no image, or the weights are not available.
        UnusableFiles: If an id is duplicated, no image can be read, or one cannot and ``strict`` is set.
        FeatureStoreError: If OUT is a store of other images or another extractor, or the disk is full.
        ValueError: If there is no such model or weights, its grid cannot be pooled to this size, or the image size or
            tiling does not apply to the model.
    """
    if model.startswith(HF):  # its weights and features follow from its name
        if features not in ("grid", "projector_input") or pool not in (6, None) or resize != "squash":
            raise ValueError(f"--model {model} uses its own image processor: omit --features, --pool and --resize")
        pretrained, features, pool = None, "projector_input", None
    sizes = {"image_size": image_size, "tiling": tiling}
    settings = EncoderSettings(model, pretrained, features, pool, resize, precision, seed, sizes)
    media = Images(exif_orientation)
    sources = _sources(source, out, media, each_folder)
    devices = devices_for(device, processes)
    job = Extraction(settings, media, sources, rows, shard_rows, batch_size, _workers(workers, devices))
    _run(job, devices, strict)


def extract_video(
    *,
    source: Path,
    out: Path,
    model: str = "ViT-B-32",
    pretrained: str | None = "openai",
    features: Features = "embedding",
    seconds_per_frame: float = 1.5,
    frames: int | None = None,
    resize: Resize = "squash",
    precision: Precision = "float32",
    rows: str = "float16",
    shard_rows: int = 128,
    batch_size: int = 64,
    workers: int | None = None,
    processes: int | None = None,
    device: str = "auto",
    strict: bool = False,
    seed: int = 0,
    image_size: list[int] | None = None,
    tiling: list[int] | None = None,
) -> None:
    """Extract one feature vector per video frame, at a regular rate, into a feature store.

    The defaults follow VALUE's features: the image embedding of CLIP ViT-B/32 every 1.5 seconds, 64 rows per video.
    Shorter videos are padded with zeros, longer ones are max-pooled over time, and each video's number of frames is
    kept. For models of Hugging Face, evenly spaced frames are stored as images. An interrupted extraction is resumed.
    Videos that cannot be read to their end are skipped and listed.

    Args:
        source: Folder of videos, searched recursively; a video's id is its file name without the suffix.
        out: Output folder of the store.
        model: Name of an open_clip model, a JSON file with an architecture, or hf:NAME, a decoder-only model of Hugging
            Face, which reads a clip as several images.
        pretrained: Tag or file of the weights; null for random weights. Not used with hf:NAME.
        features: embedding for the vector of the whole frame, grid for the maximum over its grid positions,
            projector_input for the inputs of the projector of hf:NAME.
        seconds_per_frame: Sampling interval; the frames shown at 0, 1, 2 ... times this many seconds are encoded.
        frames: Vectors per video in the store, 64 by default. With hf:NAME, the number of evenly spaced frames whose
            features are stored, 8 by default.
        resize: How a frame is made square; squash keeps the whole frame.
        precision: float32, or bf16, which is faster on a GPU and has three significant digits.
        rows: Row encoding: float16; uint8, half the size, with the error given in docs/data.md; zstd or lz4, lossless
            compression.
        shard_rows: Videos per shard; at most one shard per encoding process is lost when the command is killed.
        batch_size: Number of frames encoded at once.
        workers: Decoding processes per encoding process; by default all cores with a GPU, 0 without.
        processes: Number of encoding processes; by default one per GPU, or one without a GPU.
        device: Device of the encoder; auto uses all GPUs if there are any.
        strict: Fail if a video cannot be read, before the store is marked complete.
        seed: Seed of random weights.
        image_size: "[HEIGHT,WIDTH]" in pixels to which hf:NAME resizes frames, as in ``data extract images``.
        tiling: "[ROWS,COLUMNS]" of tiles into which hf:NAME divides frames.

    Raises:
        FileNotFoundError: If there is no video, or the weights are not available.
        UnusableFiles: If an id is duplicated, no video can be read, or one cannot and ``strict`` is set.
        FeatureStoreError: If OUT is a store of other videos or another extractor, or the disk is full.
        ValueError: If there is no such model or weights, or a number is not positive.
        ModuleNotFoundError: If PyAV is not installed.
    """
    need("av")
    if not (0 < seconds_per_frame < math.inf and (frames is None or frames > 0)):
        raise ValueError(f"seconds_per_frame and frames must be positive, got {seconds_per_frame} and {frames}")
    if model.startswith(HF):  # its weights and features follow from its name
        if features not in ("embedding", "projector_input") or resize != "squash":
            raise ValueError(f"--model {model} uses its own image processor: omit --features and --resize")
        sizes = {"image_size": image_size, "tiling": tiling}
        settings = EncoderSettings(model, None, "projector_input", None, resize, precision, seed, sizes)
        media: Videos = SpacedFrames(seconds_per_frame, 8 if frames is None else frames)
    else:
        given = [name for name, value in (("image_size", image_size), ("tiling", tiling)) if value is not None]
        if given:
            raise ValueError(f"--{given[0]} is for models of Hugging Face (--model {HF}NAME): omit it with {model}")
        settings = EncoderSettings(model, pretrained, features, 1, resize, precision, seed)
        media = Videos(seconds_per_frame, 64 if frames is None else frames)
    devices = devices_for(device, processes)
    sources = _sources(source, out, media, False)
    job = Extraction(settings, media, sources, rows, shard_rows, batch_size, _workers(workers, devices))
    _run(job, devices, strict)


def _sources(source: Path, out: Path, media: Media, each_folder: bool) -> list[Source]:
    sources = _found(source, out, media, each_folder)
    console = Console()
    others = other_suffixes(source, media)
    if others:
        count, named = others.total(), ", ".join(f"{suffix} ({n:,})" for suffix, n in others.most_common(SHOWN))
        more = f" and {len(others) - SHOWN} more suffixes" if len(others) > SHOWN else ""
        console.print(
            f"{count:,} file{'s' if count > 1 else ''} with another suffix left out: {named}{more}", soft_wrap=True
        )
    frames = several_frames(path for one in sources for path in one.files.values()) if isinstance(media, Images) else []
    if frames:
        named = ", ".join(path.name for path in frames[:SHOWN]) + (" ..." if len(frames) > SHOWN else "")
        console.print(f"the first of several frames is read of {_counted(len(frames), media)}: {named}", soft_wrap=True)
    return sources


def _found(source: Path, out: Path, media: Media, each_folder: bool) -> list[Source]:
    if not each_folder:
        return [Source(out, source, find_files(source, media))]
    if not source.is_dir():
        raise FileNotFoundError(f"no folder {source}: give --source the folder that holds the folders of {media.noun}")
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    if not folders:
        raise FileNotFoundError(f"no folder in {source}: leave --each_folder away where the images lie in it directly")
    return [Source(out / folder.name, folder, find_files(folder, media)) for folder in folders]


def _workers(workers: int | None, devices: Sequence[str]) -> int:
    if workers is not None:
        return workers
    return (os.cpu_count() or 1) // len(devices) if devices[0].startswith("cuda") else 0


def _run(job: Extraction, devices: Sequence[str], strict: bool) -> None:
    for name, least in (("shard_rows", 1), ("batch_size", 1), ("workers", 0)):
        if getattr(job, name) < least:
            raise ValueError(f"{name} must be {least} or more, got {getattr(job, name)}")
    encoder = make_encoder(job.settings, devices[0] if len(devices) == 1 else "cpu")
    stores = job.stores(encoder)  # all stores are checked before anything is written
    fresh = [not store.complete for store in stores]
    with only_writer(stores):
        while any(store.todo for store in stores):
            _fill(job, encoder, stores, devices)
            stores = job.stores(encoder)  # reread from disk; a file may have been repaired in the meantime
        _close(job, stores, fresh, strict)


def _close(job: Extraction, stores: Sequence[ResumableStore], fresh: Sequence[bool], strict: bool) -> None:
    """Complete and report stores; skip those without a readable file or, if ``strict``, with an unreadable one."""
    console = Console()
    problems = []
    for store, source, new in zip(stores, job.sources, fresh, strict=True):
        _list_unreadable(store)
        lost, count = len(store.skipped), len(source.files)
        if lost == count or (strict and lost):
            problems.append(_problem(store, job.media))
            continue
        store.close()
        _keep_architecture(job, store)
        size = f"{_counted(count - lost, job.media)}, {store.tokens} tokens of {store.dim}"
        console.print(f"{'written' if new else 'up to date'}: {store.path} ({size})", soft_wrap=True)
        if lost:
            console.print(_table(store, job.media))
            console.print(f"all of them: {store.path / UNREADABLE}", soft_wrap=True)
    if problems:
        raise UnusableFiles("\n".join(problems))


def _keep_architecture(job: Extraction, store: ResumableStore) -> None:
    """Copy the architecture of an encoder that open_clip does not know by name, so that `ask` can rebuild it."""
    path = store.path / ARCHITECTURE
    if job.settings.model.endswith(".json") and not path.is_file():
        with writing(path), atomic_write(path) as file:
            file.write(Path(job.settings.model).read_bytes())


def _fill(job: Extraction, encoder: AnyEncoder, stores: Sequence[ResumableStore], devices: Sequence[str]) -> None:
    """Write all unfinished parts without completing any store."""
    for store in stores:
        check_space(store.path, sum(s.bytes_to_write for s in stores))
    if encoder.needs_calibration:
        _calibrate(job, encoder, stores)
    for store in stores:
        store.begin()
    todo = [(place, number) for place, store in enumerate(stores) for number in store.todo]
    total = sum(part.rows for store in stores for part in store.parts)
    before = total - sum(stores[place].parts[number].rows for place, number in todo)
    with Progress(*columns()) as progress:
        bar = progress.add_task(f"extracting {job.media.noun}", total=total, completed=before)
        if len(devices) == 1:
            encode(job, encoder, stores, todo, lambda files: progress.advance(bar, files))
        else:
            encode_in_processes(
                job, todo, devices[: len(todo)], lambda files: progress.update(bar, completed=before + files)
            )


def _calibrate(job: Extraction, encoder: AnyEncoder, stores: Sequence[ResumableStore]) -> None:
    """Save batch norm statistics for random weights beside each store, the same for all stores and attempts."""
    begun = [s.path / STATISTICS for s in stores if (s.path / META).exists() or (s.path / STATE).exists()]
    saved = next((path for path in begun if path.is_file()), None)
    if saved is not None:
        encoder.load_calibration(saved)
    else:
        paths = [path for source in job.sources for path in source.files.values()]
        pictures = [_first_picture(job.media, encoder, path) for path in evenly(paths)]
        encoder.calibrate([picture for picture in pictures if picture is not None])
    for store in stores:
        path = store.path / STATISTICS
        if path not in begun or not path.is_file():
            with writing(path):
                store.path.mkdir(parents=True, exist_ok=True)
                encoder.save_calibration(path)


def _first_picture(media: Media, encoder: AnyEncoder, path: Path) -> Tensor | None:
    try:
        return encoder.pixels(next(media.pictures(path)))
    except Exception:  # reported when this file is extracted
        return None


def _list_unreadable(store: ResumableStore) -> None:
    path = store.path / UNREADABLE
    if not store.skipped:
        path.unlink(missing_ok=True)
        return
    with writing(path), atomic_write(path) as file:
        file.write("".join(f"{entry['file']}\t{entry['reason']}\n" for entry in store.skipped).encode())


def _problem(store: ResumableStore, media: Media) -> str:
    lost, count = len(store.skipped), sum(part.rows for part in store.parts)
    some = "; ".join(f"{entry['file']}: {entry['reason']}" for entry in store.skipped[:SHOWN])
    more = f"; all of them: {store.path / UNREADABLE}" if lost > SHOWN else ""
    cure = "fetch them again" + (", or leave --strict away to go without them" if lost < count else "")
    return f"{lost:,} of {count:,} {media.noun} cannot be read ({some}{more}): {cure}, {AGAIN}"


def _counted(count: int, media: Media) -> str:
    return f"{count:,} {media.noun if count != 1 else media.noun.removesuffix('s')}"


def _table(store: ResumableStore, media: Media) -> Table:
    count = len(store.skipped)
    they_are = "it is" if count == 1 else "they are"
    title = f"{_counted(count, media)} cannot be read: {they_are} not in {store.path.name}"
    table = Table("file", "reason", title=title)
    for entry in store.skipped[:SHOWN]:
        table.add_row(entry["file"], entry["reason"])
    if count > SHOWN:
        table.add_row("...", f"{count - SHOWN:,} more")
    return table
