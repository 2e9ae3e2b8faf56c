"""Shards are plain WebDataset tars whose arrays are read at the offsets of the index."""

import contextlib
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
import torch
from pyarrow import parquet

from goku_mega.data import shard_store
from goku_mega.data.packing import patchify
from goku_mega.data.shards import NULL_TEXT, EncodedSample, ShardReader, load_index, write_index, write_shard
from goku_mega.errors import DataError
from goku_mega.model.sizes import model_shape
from goku_mega.plan.flops import training_flops


def make_samples(count: int) -> list[EncodedSample]:
    rng = np.random.default_rng(0)
    return [
        EncodedSample(
            f"k{number:03d}",
            rng.standard_normal((16, 1 + number % 3, 4, 6)).astype(np.float32),
            rng.standard_normal((1 + number % 4, 64)).astype(np.float32),
            {"caption": f"caption {number}"},
        )
        for number in range(count)
    ]


@pytest.fixture
def dataset(tmp_path) -> Path:
    samples = make_samples(20)
    rows = write_shard(tmp_path / "shards" / "00000.tar", samples[:12])
    rows += write_shard(tmp_path / "shards" / "00001.tar", samples[12:])
    write_index(tmp_path / "index.parquet", rows)
    np.save(tmp_path / NULL_TEXT, np.ones((1, 64), dtype=np.float32))
    (tmp_path / "dataset.json").write_text('{"latent_channels": 16, "text_width": 64}')
    return tmp_path


def test_every_sample_is_read_in_any_order(dataset):
    reader = ShardReader(load_index(dataset))
    samples = make_samples(20)
    for number in np.random.default_rng(1).permutation(20):
        read, written = reader.read(int(number)), samples[number]
        assert read.key == written.key
        assert torch.equal(read.latent, torch.from_numpy(written.latent))
        assert torch.equal(read.text, torch.from_numpy(written.text))


def test_a_shard_is_a_tar_in_webdataset_order(dataset):
    with tarfile.open(dataset / "shards" / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["k000.latent.npy", "k000.text.npy", "k000.json"]
        assert len(names) == 36
        assert all(member.mtime == 0 and member.uid == 0 for member in tar.getmembers())


def test_a_data_set_that_is_not_there_or_not_whole_is_refused_with_the_command(dataset, tmp_path):
    with pytest.raises(DataError, match=r"dataset\.json is missing; make the data set with `goku-mega encode"):
        load_index(tmp_path / "nowhere")
    reader = ShardReader(load_index(dataset))
    shard = dataset / "shards" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(DataError, match=r"00001\.tar cannot be read at byte"):
        reader.read(19)


def test_a_damaged_array_and_a_missing_shard_are_named(dataset):
    index = load_index(dataset)
    shard, row = dataset / index.rows[3].shard, index.rows[3]
    whole = shard.read_bytes()
    for damaged in (
        whole[: row.latent_offset] + b"?" + whole[row.latent_offset + 1 :],  # no array begins there
        whole.replace(b"(16, 1, 4, 6)", b"(16, 1, 4, 5)"),  # as many numbers as it has not
        whole[: row.latent_offset + 200] + b"?" + whole[row.latent_offset + 201 :],  # another number
    ):
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=r"00000\.tar cannot be read at byte .*; encode the data set again"):
            ShardReader(index).read(3)
    shard.unlink()
    with pytest.raises(DataError, match=r"00000\.tar is missing; put it back, or encode the data set again"):
        ShardReader(index).read(3)


def test_damage_is_told_without_the_checksums_that_older_versions_did_not_write(dataset):
    rows = [row._replace(checksum=None) for row in load_index(dataset).rows]
    table = arrow.Table.from_pylist([row._asdict() for row in rows]).drop_columns(["checksum"])
    parquet.write_table(table, dataset / "index.parquet")
    index = load_index(dataset)
    assert ShardReader(index).read(3).key == rows[3].key
    shard = dataset / rows[3].shard
    shard.write_bytes(shard.read_bytes().replace(b"(16, 1, 4, 6)", b"(16, 1, 4, 5)"))
    with pytest.raises(DataError, match=r"00000\.tar cannot be read at byte"):
        ShardReader(index).read(3)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_arrays_of_another_precision_are_read_as_fp32(tmp_path, dataset, dtype):
    samples = [sample._replace(latent=sample.latent.astype(dtype)) for sample in make_samples(4)]
    write_index(dataset / "index.parquet", write_shard(dataset / "shards" / "half.tar", samples))
    latent = ShardReader(load_index(dataset)).read(2).latent
    assert torch.equal(latent, torch.from_numpy(samples[2].latent.astype(np.float32)))


def test_a_data_set_is_known_by_its_place_and_its_content(dataset, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copies") / "copy"
    shutil.copytree(dataset, copy)
    assert load_index(dataset).identity == load_index(f"file://{dataset}").identity != load_index(copy).identity
    before = load_index(dataset).identity
    (dataset / "dataset.json").write_text('{"latent_channels": 16, "text_width": 64, "vae_key": "other"}')
    assert load_index(dataset).identity != before


def open_shards(dataset: Path) -> list[str]:
    """The shards of this data set that this process holds open; what others open and close does not count."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(descriptor))
    return [name for name in found if name.startswith(str(dataset)) and name.endswith(".tar")]


def test_more_shards_than_may_be_open_are_read_in_any_order(dataset, monkeypatch):
    monkeypatch.setattr(shard_store, "MAX_OPEN_SHARDS", 1)
    reader = ShardReader(load_index(dataset))
    for number in (0, 15, 3, 19, 0):
        assert torch.equal(reader.read(number).latent, torch.from_numpy(make_samples(20)[number].latent))
    assert len(open_shards(dataset)) == 1
    reader.close()
    assert open_shards(dataset) == []


@pytest.mark.parametrize("name", ["index.parquet", "dataset.json"])
def test_a_damaged_index_is_named(dataset, name):
    path = dataset / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match="has a damaged index"):
        load_index(dataset)


def test_the_same_samples_are_the_same_bytes_and_a_failed_write_leaves_none(tmp_path):
    for name in ("a", "b"):
        rows = write_shard(tmp_path / name / "00000.tar", make_samples(5))
        write_index(tmp_path / name / "index.parquet", rows)

    def broken():
        yield from make_samples(3)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "c" / "00000.tar", broken())
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()
    assert list((tmp_path / "c").iterdir()) == []


def test_tokens_and_flops_of_the_index_are_those_of_the_samples(dataset):
    index, shape = load_index(dataset), model_shape("tiny")
    counts = [len(patchify(torch.from_numpy(sample.latent), shape.patch)) for sample in make_samples(20)]
    assert index.tokens(shape).tolist() == counts
    assert index.flops(shape)[7] == training_flops(counts[7], 1 + 7 % 4, shape)
