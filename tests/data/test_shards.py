"""Shards are plain WebDataset tars whose arrays are read at the offsets of the index; the loader packs them ahead."""

import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from goku_mega.config import DataConfig, FlowRun
from goku_mega.data.loader import Loader
from goku_mega.data.shards import NULL_TEXT, EncodedSample, ShardReader, load_index, write_index, write_shard
from goku_mega.errors import DataError
from goku_mega.model.sizes import model_shape
from goku_mega.parallel.groups import single_process_groups

SHAPE = model_shape("tiny")


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


def make_run(dataset: Path, **data) -> FlowRun:
    return FlowRun(run_dir="unused", steps=12, data=DataConfig(path=str(dataset), samples_per_step=5, **data))


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


def test_the_loader_gives_the_same_step_however_it_got_there(dataset):
    groups = single_process_groups()
    run = make_run(dataset)
    with Loader(load_index(dataset), run, SHAPE, groups=groups, start_step=0, dtype=torch.float32) as loader:
        through = list(loader)
    with Loader(load_index(dataset), run, SHAPE, groups=groups, start_step=7, dtype=torch.float32) as loader:
        resumed = list(loader)
    assert [batch.step for batch in through] == list(range(12))
    assert [batch.step for batch in resumed] == list(range(7, 12))
    for early, late in zip(through[7:], resumed, strict=True):
        assert torch.equal(early.micro_batches[0].packed.patches, late.micro_batches[0].packed.patches)
        assert early.total_tokens == late.total_tokens == early.micro_batches[0].real_tokens


def test_an_error_in_the_loaders_thread_reaches_the_trainer(dataset):
    run = make_run(dataset, max_tokens_per_rank=5)
    with (
        pytest.raises(DataError, match="above data.max_tokens_per_rank=5"),
        Loader(load_index(dataset), run, SHAPE, groups=single_process_groups(), start_step=0, dtype=torch.float32) as it,
    ):
        list(it)


def test_leaving_the_loader_ends_its_thread(dataset):
    before = threading.active_count()
    run = make_run(dataset)
    with Loader(load_index(dataset), run, SHAPE, groups=single_process_groups(), start_step=0, dtype=torch.float32) as it:
        next(iter(it))
    assert threading.active_count() == before
