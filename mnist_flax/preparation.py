"""Preparing a data set in TFDS's folder; `digits` and the MNIST family without TensorFlow."""

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from urllib.parse import urljoin

import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from mnist_flax import builders
from mnist_flax.errors import UserError


def prepare(
    name: str, builder: tfds.core.DatasetBuilder, manual_dir: Path | None
) -> tfds.core.DatasetBuilder:
    """Prepares a data set in `builder`'s data folder and returns a builder that reads it.

    Everything is written in a folder of this process's own and moved into place in one step, so
    that a failure leaves nothing half-written, and of two processes the later one's work is
    dropped. TFDS alone has neither: its folder's name is drawn from `random`, which two seeded
    processes share, and the second to finish fails. A process that is killed leaves its folder,
    incomplete.*, which may be deleted.

    Raises:
        UserError: no network, a wrong file, a folder that cannot be written, TensorFlow needed.
    """
    root, target = Path(builder.data_dir_root), Path(builder.data_dir)
    try:
        occupied = target.exists() and any(target.iterdir())
        if builders.is_prepared(builder):  # by another process, since `builder` was made
            made = builders.create(name, root)
            if made.info.splits:
                return made
    except OSError as error:
        raise UserError(
            f"{target} cannot be read ({builders.short(error)}): set TFDS_DATA_DIR to a folder "
            "that can"
        ) from error
    if occupied:
        raise UserError(f"{target} is not a prepared data set: delete this folder and run again")
    if manual_dir is not None:
        try:
            _check_gz_files(builder, manual_dir)
        except OSError as error:
            raise UserError(
                f"the manual folder {manual_dir} cannot be read ({builders.short(error)}): name "
                "another with --config.data.manual_dir or MNIST_FLAX_MANUAL_DIR"
            ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix="incomplete.", dir=root)
    except OSError as error:
        raise UserError(
            f"the data folder {root} cannot be written ({builders.short(error)}): "
            "set TFDS_DATA_DIR to a folder that can"
        ) from error
    print(f"preparing {builder.info.full_name} in {root}", file=sys.stderr, flush=True)
    try:
        with scratch as folder:
            _prepare_in(Path(folder), name, target, manual_dir)
    except OSError as error:
        if not builders.is_prepared(builder):  # by another process, which was first
            raise UserError(builders.explain(name, "prepare", error)) from error
    return builders.create(name, root)


def _prepare_in(scratch: Path, name: str, target: Path, manual_dir: Path | None) -> None:
    writer = builders.create(name, scratch)
    in_family = builders.is_mnist_family(name)
    if in_family and manual_dir is None:
        manual_dir = _download_gz_files(writer, scratch / "gz")
    # What other sets download is large, and worth keeping for the next try.
    keep = scratch if in_family or name == "digits" else scratch.parent
    _download_and_prepare(writer, keep / "downloads", manual_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(writer.data_dir, target)


def _download_and_prepare(
    builder: tfds.core.DatasetBuilder, downloads: Path, manual_dir: Path | None
) -> None:
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    try:
        # TFDS tries a dead connection ten times, waiting ever longer: over three minutes.
        with builders.quiet(), tfds.core.utils.temporary_assignment(downloader, "MAX_RETRIES", 0):
            builder.download_and_prepare(
                file_format="array_record", download_dir=downloads, download_config=config
            )
    except requests.RequestException as error:
        raise UserError(_not_downloaded(builder.name, builders.short(error))) from error
    except Exception as error:
        raise UserError(builders.explain(builder.name, "prepare", error)) from error


def _download_gz_files(builder: tfds.core.DatasetBuilder, folder: Path) -> Path:
    """Downloads the four files; not through TFDS, which waits for a silent server for ever."""
    folder.mkdir()
    for file in builders.GZ_NAMES:
        url, path = urljoin(builder.URL, file), folder / file
        try:
            with requests.get(url, timeout=10) as response:
                response.raise_for_status()
                path.write_bytes(response.content)
        except requests.RequestException as error:
            raise UserError(_not_downloaded(builder.name, builders.short(error))) from error
        if not_official := _not_official(builder, path):
            raise UserError(_not_downloaded(builder.name, f"what {url} sent {not_official}"))
    return folder


def _check_gz_files(builder: tfds.core.DatasetBuilder, folder: Path) -> None:
    """Raises UserError unless `folder` holds the four files with the checksums TFDS knows."""
    files = f"the manual folder must hold {', '.join(builders.GZ_NAMES)}"
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise UserError(f"the manual folder {folder} {what}: {files}")
    for file in builders.GZ_NAMES:
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path} is missing: {files}, as downloaded from {builder.URL}")
        if not_official := _not_official(builder, path):
            raise UserError(
                f"{path} {not_official}: download it again from {urljoin(builder.URL, file)}, or "
                "name another folder with --config.data.manual_dir or MNIST_FLAX_MANUAL_DIR"
            )


def _not_official(builder: tfds.core.DatasetBuilder, path: Path) -> str | None:
    """What is wrong with one of the four files, by the checksum TFDS knows; None if nothing."""
    expected = builder.url_infos[urljoin(builder.URL, path.name)].checksum
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == expected:
        return None
    return (
        f"is not the official file of {builder.name}, or not all of it (SHA-256 {expected} "
        f"expected, {found} found)"
    )


def _not_downloaded(name: str, reason: str) -> str:
    manual = (
        "put the four files in a folder and name it with --config.data.manual_dir=DIR or "
        f"MNIST_FLAX_MANUAL_DIR ({', '.join(builders.GZ_NAMES)}), "
        if name in builders.MNIST_FAMILY
        else ""
    )
    return (
        f"{name} is not prepared here and could not be downloaded ({reason}): "
        f"train on the embedded data with --config=<recipe>.py:digits, {manual}or set "
        "TFDS_DATA_DIR to a folder where TFDS has prepared it"
    )
