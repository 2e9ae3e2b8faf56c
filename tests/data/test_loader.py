"""The loader: every rank gets its part of the same step, ahead of time, however the run got there."""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_store import reads_meet, upload

from goku_mega.config.training import AuditConfig, DataConfig, FlowRun
from goku_mega.data import insisting, shard_store
from goku_mega.data.loader import Loader, StepBatch
from goku_mega.data.packing import TrainingBatch
from goku_mega.data.shards import DATASET, INDEX, NULL_TEXT, EncodedSample, load_index, write_index, write_shard
from goku_mega.errors import DataError
from goku_mega.model.sizes import model_shape
from goku_mega.parallel.groups import Groups, single_process_groups
from goku_mega.parallel.layout import Layout

SHAPE = model_shape("tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Twenty samples of several shapes in two shards."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    samples = [
        EncodedSample(
            f"k{number:03d}",
            rng.standard_normal((16, 1 + number % 3, 4, 6)).astype(np.float32),
            rng.standard_normal((1 + number % 4, 64)).astype(np.float32),
            {"caption": f"caption {number}"},
        )
        for number in range(20)
    ]
    rows = write_shard(folder / "shards" / "00000.tar", samples[:12])
    rows += write_shard(folder / "shards" / "00001.tar", samples[12:])
    write_index(folder / INDEX, rows)
    np.save(folder / NULL_TEXT, np.ones((1, 64), dtype=np.float32))
    (folder / DATASET).write_text('{"latent_channels": 16, "text_width": 64}')
    return folder


def groups_of(layout: Layout, *, dp_rank: int = 0, cp_rank: int = 0) -> Groups:
    """What the loader needs to know of a rank; nothing is exchanged, so no process group is made."""
    return replace(single_process_groups(), layout=layout, dp_rank=dp_rank, cp_rank=cp_rank)


def loader(dataset: Path | str, *, start_step: int = 0, groups: Groups | None = None, **data) -> Loader:
    run = FlowRun(run_dir="unused", steps=12, data=DataConfig(path=str(dataset), samples_per_step=5, **data))
    return Loader(
        load_index(dataset), run, SHAPE, groups=groups or single_process_groups(), start_step=start_step,
        dtype=torch.float32,
    )  # fmt: skip


def samples_of(packs: list[TrainingBatch]) -> list[bytes]:
    """The noisy patches of every real sample of the packs."""
    found = []
    for pack in packs:
        lengths = pack.packed.self_segments.q_lengths
        parts = zip(pack.packed.patches.split(lengths), pack.loss_weight.split(lengths), strict=True)
        found += [patches.numpy().tobytes() for patches, weight in parts if weight.any()]
    return found


@pytest.mark.parametrize("cap", [18, 24, 1000])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_ranks_of_any_number_together_have_the_samples_of_one(dataset, ranks, cap):
    alone = loader(dataset)
    of_ranks = [
        loader(dataset, groups=groups_of(Layout(dp_shard=ranks), dp_rank=rank), max_tokens_per_rank=cap)
        for rank in range(ranks)
    ]
    for step in (0, 5, 11):
        whole, parts = alone.load(step), [each.load(step) for each in of_ranks]
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert {(part.total_tokens, part.samples, part.flops) for part in parts} == {whole[2:5]}
        together = [sample for part in parts for sample in samples_of(part.micro_batches)]
        assert sorted(together) == sorted(samples_of(whole.micro_batches))
        assert sum(pack.real_tokens for part in parts for pack in part.micro_batches) == whole.total_tokens


def test_context_parallel_ranks_hold_one_pack_between_them(dataset):
    layout = Layout(tp=2, ulysses=2)
    parts = [loader(dataset, groups=groups_of(layout, cp_rank=rank)).load(3).micro_batches[0] for rank in range(2)]
    whole = loader(dataset).load(3).micro_batches[0]
    assert all(part.padded_tokens % 4 == 0 and part.real_tokens == whole.real_tokens for part in parts)
    joined = torch.cat([part.packed.patches for part in parts])
    assert torch.equal(joined[: whole.real_tokens], whole.packed.patches)
    assert torch.cat([part.loss_weight for part in parts]).sum() == whole.real_tokens


def test_an_interleaved_pipeline_gets_its_micro_batches_in_groups(dataset):
    """Every stage and every data-parallel rank as many; those without a sample are padding that weighs nothing."""
    layout = Layout(pp=4, chunks=2, layers=(1,) * 8, dp_shard=2)
    parts = [loader(dataset, groups=groups_of(layout, dp_rank=rank)).load(3) for rank in range(2)]
    assert [len(part.micro_batches) for part in parts] == [4, 4]
    packs = [pack for part in parts for pack in part.micro_batches]
    empty = [pack for pack in packs if pack.real_tokens == 0]
    assert empty and all(not pack.loss_weight.any() for pack in empty)
    whole = loader(dataset).load(3)
    assert sorted(samples_of(packs)) == sorted(samples_of(whole.micro_batches))


def test_the_loader_gives_the_same_step_however_it_got_there(dataset):
    with loader(dataset) as steps:
        through = list(steps)
    with loader(dataset, start_step=7) as steps:
        resumed = list(steps)
    assert [batch.step for batch in through] == list(range(12))
    assert [batch.step for batch in resumed] == list(range(7, 12))
    for early, late in zip(through[7:], resumed, strict=True):
        assert_equal(early, late)


def assert_equal(one: StepBatch, other: StepBatch) -> None:
    assert one.total_tokens == other.total_tokens == one.micro_batches[0].real_tokens
    for name in ("patches", "timesteps", "text"):
        assert torch.equal(getattr(one.micro_batches[0].packed, name), getattr(other.micro_batches[0].packed, name))
    assert torch.equal(one.micro_batches[0].velocity, other.micro_batches[0].velocity)


def test_a_step_that_is_left_out_is_the_next_ones(dataset):
    """With its noise and times: what comes after a step left out is what came after it before."""
    whole, without = loader(dataset), loader(dataset, skip_steps=(2, 3))
    for step, position in ((0, 0), (1, 1), (2, 4), (5, 7)):
        batch = without.load(step)
        assert (batch.step, batch.data_step) == (step, position)
        assert_equal(batch, whole.load(position))


def test_in_audited_steps_a_rank_has_a_pack_of_the_next_ones(dataset):
    run_dp, layout = 3, Layout(dp_shard=3)
    parts = [loader(dataset, groups=groups_of(layout, dp_rank=rank)) for rank in range(run_dp)]
    for part in parts:
        part.run = replace(part.run, audit=AuditConfig(every_steps=4))
    batches = [part.load(7) for part in parts]
    for rank, batch in enumerate(batches):
        (again,), first = batch.to_audit, batches[(rank + 1) % run_dp].micro_batches[0]
        assert torch.equal(again.packed.patches, first.packed.patches)
        assert torch.equal(again.velocity, first.velocity)
    assert [len(part.load(step).to_audit) for part in parts[:1] for step in range(8)] == [0, 0, 0, 1, 0, 0, 0, 1]


@pytest.fixture(scope="module")
def url(dataset) -> str:
    """The same data set in a store."""
    return upload(dataset, "faulty://loader/data")


@pytest.mark.parametrize("settings", [
    {"read_threads": 1}, {"read_threads": 8, "prefetch_steps": 5}, {"prefetch_steps": 0},
    {"cache_gb": 5e-5}, {"cache_gb": 1.0, "read_threads": 3},
])  # fmt: skip
def test_the_steps_are_the_same_bits_from_any_storage(dataset, url, tmp_path, settings):
    """With and without a cache, which may be smaller than the data set, and whatever the store does wrong."""
    if "cache_gb" in settings:
        settings = {**settings, "cache_folder": str(tmp_path)}

    def every_fifth_fails(path: str, number: int) -> None:
        if number % 5 == 0:
            raise TimeoutError

    with loader(dataset) as steps:
        expected = list(steps)
    with reads_meet(every_fifth_fails), loader(url, **settings) as steps:
        found = list(steps)
    for one, other in zip(expected, found, strict=True):
        assert_equal(one, other)
    assert steps.counts.failures > 0
    assert steps.counts.cache_hits > 0 or settings.get("cache_gb") != 1.0


def test_a_cache_that_holds_the_data_set_saves_the_store_every_read(url, tmp_path):
    settings = {"cache_folder": str(tmp_path), "prefetch_steps": 1}
    with loader(url, **settings) as steps:
        list(steps)
    with reads_meet(lambda path, number: None) as reads, loader(url, **settings) as steps:
        list(steps)
    assert not [path for path in reads if path.endswith(".tar")]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_more_is_read_ahead_than_the_settings_say(url, prefetch, monkeypatch):
    monkeypatch.setattr(shard_store, "JOINED_GAP_BYTES", -1)  # a request for every sample
    plans = loader(url)
    sizes = [plans.load(step).samples for step in range(12)]
    with reads_meet(lambda path, number: None) as reads, loader(url, prefetch_steps=prefetch) as steps:
        batches, allowed = iter(steps), 0
        reads.clear()  # of the index
        for step in range(4):
            next(batches)
            # One is packed and waits for its place.
            allowed = sum(sizes[: step + 2 + 2 * prefetch])
            settled = -1
            while settled != len(reads):
                settled = len(reads)
                time.sleep(0.05)
        shards = [path for path in reads if path.endswith(".tar")]
        assert sum(sizes[:4]) < len(shards) <= allowed


def test_leaving_a_loader_whose_store_hangs_does_not_wait_for_it(url):
    over = threading.Event()

    def hang(path: str, number: int) -> None:
        if path.endswith(".tar"):
            over.wait(60)

    with reads_meet(hang):
        began = time.monotonic()
        with loader(url):
            pass
        assert time.monotonic() - began < 30
        over.set()


def test_a_store_that_stays_away_ends_the_run_with_one_line(url, monkeypatch):
    monkeypatch.setattr(insisting, "FIRST_PAUSE_S", 0.001)

    def away(path: str, number: int) -> None:
        if path.endswith(".tar"):
            raise ConnectionResetError("the store is away")

    with (
        reads_meet(away),
        pytest.raises(DataError, match=r"\.tar cannot be read at byte .*the store is away\), 3 times over"),
        loader(url, read_retries=2) as steps,
    ):
        list(steps)


def test_an_epoch_has_every_sample_once(dataset):
    steps = loader(dataset)
    assert sum(steps.load(step).samples for step in range(steps.planner.batches_per_epoch)) == 20


def test_a_sample_that_is_to_be_repeated_comes_as_often_in_an_epoch_each_time_with_other_noise(tmp_path, dataset):
    shutil.copytree(dataset, tmp_path / "data")
    rows = [row._replace(repeat=3) if row.key == "k007" else row for row in load_index(dataset).rows]
    write_index(tmp_path / "data" / INDEX, rows)
    steps = loader(tmp_path / "data")
    batches = [steps.load(step) for step in range(steps.planner.batches_per_epoch)]
    assert sum(batch.samples for batch in batches) == 22
    noisy = [sample for batch in batches for sample in samples_of(batch.micro_batches)]
    assert len(noisy) == len(set(noisy)) == 22
    clean = {bytes(steps.reader.read(number).latent.numpy()) for number in range(22)}
    assert len(clean) == 20


def test_an_error_in_the_loaders_thread_reaches_the_trainer(dataset):
    with (
        pytest.raises(DataError, match="above data.max_tokens_per_rank=5"),
        loader(dataset, max_tokens_per_rank=5) as it,
    ):
        list(it)


def test_leaving_the_loader_ends_its_thread(dataset):
    before = threading.active_count()
    with loader(dataset, prefetch_steps=1) as steps:
        next(iter(steps))
    assert threading.active_count() == before


def test_leaving_the_loader_by_an_error_ends_its_thread_too(dataset):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), loader(dataset) as steps:
        for _ in steps:
            1 / 0  # noqa: B018
    assert threading.active_count() == before
