"""`goku-mega encode --verify`: every byte of a data set against what was written, and its index against its shards."""

import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from goku_mega.data.shards import IndexRow, load_index
from goku_mega.data.whole_files import xxh3_of
from goku_mega.errors import DataError

SHARD_LIST = "shards.json"
"""Name, bytes and xxh3_128 of every shard."""
READERS = 4

logger = logging.getLogger(__name__)


def verify_dataset(folder: Path) -> dict[str, Any]:
    """Read every byte of a data set; how much was read.

    Raises:
        DataError: it is not complete, was written without checksums, or files of it are damaged: all are named.
    """
    index = load_index(folder)
    if "xxh3_128" not in index.dataset:
        raise DataError(f"{folder} was written without checksums, by an older version; encode it again to have them")
    damaged = _damaged_lists(folder, index.dataset)
    if damaged:
        raise _damage(folder, damaged, "put them back from a copy, or remove the folder and encode again")
    listed = json.loads((folder / SHARD_LIST).read_text())
    by_shard: dict[str, list[IndexRow]] = {entry["name"]: [] for entry in listed}
    stray = [row.shard for row in index.rows if row.shard not in by_shard]
    for row in index.rows:
        by_shard.get(row.shard, []).append(row)
    damaged = {shard: "it is in the index and not among the shards" for shard in stray}
    damaged |= {path: "it does not belong to the data set" for path in _others(folder, set(by_shard))}
    with ThreadPoolExecutor(READERS) as pool:
        findings = pool.map(lambda entry: _finding(folder, entry, by_shard[entry["name"]]), listed)
        damaged |= {entry["name"]: finding for entry, finding in zip(listed, findings, strict=True) if finding}
    if damaged:
        raise _damage(folder, damaged, "remove these files, and run encode with the same corpus: it makes them again")
    _check_counts(folder, index.dataset, index.rows)
    return {
        "output": str(folder),
        "shards": len(listed),
        "samples": len(index.rows),
        "bytes": sum(entry["bytes"] for entry in listed),
        "damaged": 0,
    }


def remade_otherwise(folder: Path, parts: list[dict[str, Any]]) -> list[str]:
    """Shards that were made again for a complete data set, and are not what its list says."""
    listed = {entry["name"]: entry for entry in json.loads((folder / SHARD_LIST).read_text())}
    return [part["shard"]["name"] for part in parts if part["shard"] != listed.get(part["shard"]["name"])]


def _damage(folder: Path, damaged: dict[str, str], remedy: str) -> DataError:
    for name, finding in damaged.items():
        logger.error("%s: %s", folder / name, finding)
    files = "; ".join(f"{name}: {finding}" for name, finding in damaged.items())
    return DataError(f"{folder} has {len(damaged)} damaged file(s): {files}; {remedy}")


def _damaged_lists(folder: Path, dataset: dict[str, Any]) -> dict[str, str]:
    damaged = {}
    for name, digest in dataset["xxh3_128"].items():
        try:
            if xxhash.xxh3_128_hexdigest((folder / name).read_bytes()) != digest:
                damaged[name] = "its checksum is not the one that was written"
        except OSError as error:
            damaged[name] = str(error.strerror)
    return damaged


def _others(folder: Path, known: set[str]) -> list[str]:
    names = (str(path.relative_to(folder)) for path in sorted(folder.glob("shards/*.tar")))
    return [name for name in names if name not in known]


def _check_counts(folder: Path, dataset: dict[str, Any], rows: tuple[IndexRow, ...]) -> None:
    twice = [key for key, count in Counter(row.key for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"{folder} has {len(twice)} samples twice, {twice[0]} among them; encode the corpus again")
    if dataset["samples"] != len(rows):
        raise DataError(f"{folder} has {len(rows)} samples, not {dataset['samples']}; encode the corpus again")


def _finding(folder: Path, entry: dict[str, Any], rows: list[IndexRow]) -> str | None:
    """What is wrong with a shard."""
    path = folder / entry["name"]
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"it has {size} bytes of {entry['bytes']}"
        if xxh3_of(path) != entry["xxh3_128"]:
            return "its checksum is not the one that was written"
        return next(_contradictions(path, rows), None)
    except OSError as error:
        return str(error.strerror or error)
    except tarfile.TarError as error:
        return f"it is no tar ({error})"


def _contradictions(path: Path, rows: list[IndexRow]) -> Iterator[str]:
    """Where the index says something else than the shard's own members."""
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar.getmembers()}
        expected = {f"{row.key}.{suffix}" for row in rows for suffix in ("latent.npy", "text.npy", "json")}
        for name in sorted(expected ^ members.keys()):
            yield f"{name} is {'in the index and not in it' if name in expected else 'in it and not in the index'}"
        for row in rows:
            arrays = (
                ("latent.npy", row.latent_offset, row.latent_bytes, (row.channels, row.t, row.h, row.w)),
                ("text.npy", row.text_offset, row.text_bytes, (row.text_tokens, None)),
            )
            for suffix, offset, size, shape in arrays:
                member = members[f"{row.key}.{suffix}"]
                if (member.offset_data, member.size) != (offset, size):
                    yield f"{member.name} is at byte {member.offset_data}, the index says {offset}"
                if any(found != said for found, said in zip(_shape(tar, member), shape, strict=True) if said):
                    yield f"{member.name} has another shape than the index says"


def _shape(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[int, ...]:
    file = tar.extractfile(member)
    assert file is not None
    head = io.BytesIO(file.read(min(member.size, 4096)))
    np.lib.format.read_magic(head)
    shape: tuple[int, ...] = np.lib.format.read_array_header_1_0(head)[0]
    return shape
