"""``data download``: download and verify the published features and annotations of VL-Adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from data_modules.convert.hub import HubSource
from data_modules.convert.manifest import DATASETS, NAME, REPOSITORY, chosen, crc_of
from data_modules.store.extras import need
from data_modules.store.store import FeatureStoreError
from vlpet_lightning.checksums import checksum

SHOWN = 20
AGAIN = "Give the same command again: it resumes where it stopped"


def snapshot(**arguments: Any) -> None:
    """Download a snapshot from the Hugging Face Hub, resuming incomplete files."""
    from huggingface_hub import snapshot_download

    snapshot_download(**arguments)


def download(*, out: Path, datasets: str | None = None, revision: str = "main", repository: str = REPOSITORY) -> None:
    """Download the published features and annotations, and verify them; resumes an interrupted download.

    Args:
        out: Folder to write, in the published layout; the --source of `data convert hub`.
        datasets: Comma-separated names out of COCO, GQA, VG, nlvr; all by default (49 GB).
        revision: Branch, tag or commit.
        repository: Dataset repository on the hub.

    Raises:
        FeatureStoreError: If the download fails, or files do not match the manifest; the message lists the files.
        ValueError: If a data set is unknown.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    need("pyarrow")
    names = chosen(datasets, DATASETS)
    patterns = [NAME, "README.md", "annotations/*", *(f"features/{name}/*" for name in names)]
    try:
        snapshot(
            repo_id=repository, repo_type="dataset", revision=revision, local_dir=str(out), allow_patterns=patterns
        )
    except Exception as error:  # anything that the hub's client and the network raise
        reason = " ".join(str(error).split())[:300]
        raise FeatureStoreError(
            f"the download of {repository} ({revision}) stopped: {type(error).__name__}: {reason}. {AGAIN}"
        ) from error
    found = dict(problems(out, names))
    if found:
        lines = "\n".join(f"  {out / name} {problem}" for name, problem in list(found.items())[:SHOWN])
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise FeatureStoreError(f"{len(found)} files are damaged or missing:\n{lines}{more}\nRemove them. {AGAIN}")
    Console().print(
        f"complete: {out}\nNext: python -m vlpet_lightning data convert hub --source {out} --out ROOT", soft_wrap=True
    )


def problems(out: Path, datasets: list[str]) -> Iterator[tuple[str, str]]:
    """Compare a download with its manifest, and with the checksums from the hub.

    Annotations must match size and CRC-32 in the manifest. Feature shards must be readable and have the manifest's
    number of rows. For large files, the SHA-256 that the hub's client stores next to the download must match, too.

    Yields:
        Name of a file, and its problem.
    """
    try:
        source = HubSource(str(out))
    except FeatureStoreError as error:
        yield "features", f"cannot be used: {error}"
        return
    manifest = source.manifest
    if manifest is None:
        yield NAME, "is missing"
        return
    shards = [name for dataset in datasets for name in manifest.shards_of(dataset)]
    for name in track([*sorted(manifest.files), *shards], description="checking", transient=True):
        if name not in source.files:
            yield name, "is missing"
            continue
        problem = (
            manifest.problem(name, source.files[name], crc_of(source.blocks(name))) if name in manifest.files else None
        )
        if name in manifest.shards:
            try:
                source.part(name, None)
            except FeatureStoreError as error:
                problem = str(error).removeprefix(f"{source.path(name)} ")
        wanted = _sha256(out, name)
        if problem is None and wanted is not None and checksum(out / name) != wanted:
            problem = f"has another SHA-256 than the hub says, {wanted}"
        if problem is not None:
            yield name, problem


def _sha256(out: Path, name: str) -> str | None:
    """Read the SHA-256 of a large file from the hub client's metadata: commit, ETag (the SHA-256), time."""
    note = out / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    lines = note.read_text().splitlines() if note.is_file() else []
    etag = lines[1].strip() if len(lines) > 1 else ""
    return etag if len(etag) == 2 * hashlib.sha256().digest_size else None
