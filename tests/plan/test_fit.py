"""`goku-mega plan` and what `train` asks it."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from goku_mega.config.planning import PlanConfig
from goku_mega.config.training import DataConfig, FlowRun, LayoutConfig, RecomputeConfig
from goku_mega.errors import ConfigError, LayoutError
from goku_mega.model.sizes import SIZES
from goku_mega.parallel.layout import Layout, resolve
from goku_mega.plan.activations import Numerics, Pack
from goku_mega.plan.fit import Device, choose_recompute, decide_recompute, plan
from goku_mega.plan.memory import POLICIES, Job, rank_memory
from goku_mega.plan.workload import Kind, Workload, video_tokens

GB = 1e9
JOB = Job(shape=SIZES["8b"], layout=Layout(ulysses=8, dp_shard=8), pack=Pack(219_600, 256, 1), numerics=Numerics())


def test_a_plan_lists_layouts_that_fit_best_first():
    found = plan(PlanConfig(size="8b", gpus=64, gpu="H200", top=30))
    seconds = [row["step_s"] for row in found["best"]]
    assert len(seconds) == 30 and seconds == sorted(seconds)
    for row in found["best"]:
        assert row["tp"] * row["cp"] * row["pp"] * row["dp_replicate"] * row["dp_shard"] == 64
        assert row["cp"] == row["ulysses"] * row["ring"]
        assert row["peak_gb"] <= 141 and 0 < row["mfu"] < 0.6
    for row in found["memory_gb"]:
        parts = ("parameters", "gradients", "optimizer", "average", "activations", "buffers")
        assert row["peak"] == pytest.approx(sum(row[part] for part in parts), abs=0.05)
        assert row["activations_off"] > row["activations_selective"] > row["activations_full"]


def test_a_plan_says_what_is_too_large_and_what_would_do():
    found = plan(PlanConfig(size="8b", gpus=64, gpu="H100"))
    reason = next(row for row in found["too_large"] if (row["tp"], row["pp"], row["cp"]) == (1, 1, 1))
    assert reason["needs_gb"] > 80
    assert re.search(r"activations [\d.]+ .* with recompute full, of 80 GB; cp >= \d+ fits", reason["why"])
    needed = int(re.search(r"cp >= (\d+)", reason["why"])[1])
    assert all(row["cp"] >= needed for row in found["best"] if (row["tp"], row["pp"]) == (1, 1))
    assert any("heads per tensor-parallel rank do not divide over Ulysses" in row["why"] for row in found["refused"])


def test_a_model_that_no_layout_fits_gets_reasons_and_no_layouts():
    found = plan(PlanConfig(size="8b", gpus=1, gpu="H100"))
    assert found["best"] == [] and found["fitting_layouts"] == 0
    assert found["too_large"][0]["why"].endswith("no cp fits")


def test_policies_that_are_not_asked_for_are_not_used():
    found = plan(PlanConfig(size="8b", gpus=64, gpu="H200", policies=("full",)))
    assert found["best"] and all(row["recompute"].startswith("full") for row in found["best"])


def test_a_plan_of_a_thousand_gpus_is_there_at_once():
    began = time.process_time()
    plan(PlanConfig(size="8b", gpus=1024, gpu="H100", frames=(241, 97, 1), samples_per_step=2048))
    assert time.process_time() - began < 5  # 1.4 s seen


def test_the_longest_clip_of_the_paper_has_its_tokens():
    assert video_tokens(241, 720, 1280, SIZES["8b"]) == 219_600
    assert video_tokens(1, 480, 864, SIZES["8b"]) == 30 * 54


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu": "H300"}, "gpu 'H300' is not one of A100, .*H200"),
        ({"size": "9b"}, "size '9b' is not one of"),
        ({"max_tokens_per_rank": 1000}, "219600 tokens, above max_tokens_per_rank=1000"),
        ({"height": (720, 480)}, "height has 2 numbers but frames has 1"),
        ({"frames": (6,)}, "frames is 6; use 1 for an image"),
        ({"policies": ("some",)}, r"policies is \['some'\]"),
        ({"share": (0.0,)}, "share is"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        plan(PlanConfig(gpus=8, **settings))


def test_packs_are_what_the_batch_planner_makes():
    work = Workload((Kind(100, 10, 1.0), Kind(1000, 10, 1.0)), samples=8, max_tokens=2000)
    assert work.tokens == 8 * 550
    assert work.micro_batches(Layout()) == 3 and work.micro_batches(Layout(dp_shard=4)) == 1
    assert work.micro_batches(Layout(pp=2, chunks=2)) == 4  # the interleaved schedule takes them in pairs
    assert work.fullest_pack(Layout()).tokens == 2000
    assert work.fullest_pack(Layout(dp_shard=8)).tokens == 1000  # no more samples than ranks: one each
    assert work.fullest_pack(Layout(dp_shard=8, ulysses=3, tp=2)).tokens == 1002  # padded


def test_auto_recomputes_as_little_as_fits():
    peaks = {policy: rank_memory(JOB, RecomputeConfig(policy=policy)).peak for policy in POLICIES}
    assert choose_recompute(JOB, peaks["off"]).policy == "off"
    for policy, above in (("selective", "off"), ("full", "selective")):
        budget = (peaks[policy] + peaks[above]) / 2
        choice = choose_recompute(JOB, budget)
        assert choice.policy == policy and 1 <= choice.first < JOB.shape.layers
        assert rank_memory(JOB, choice).peak <= budget
        assert rank_memory(JOB, replace(choice, first=choice.first - 1)).peak > budget
        assert choose_recompute(JOB, peaks[policy]) == RecomputeConfig(policy=policy)
    assert choose_recompute(JOB, 1.0) == RecomputeConfig(policy="full")  # the smallest, which does not fit either


def a_run(**settings) -> FlowRun:  # type: ignore[no-untyped-def]
    data = DataConfig(path="data", samples_per_step=8, max_tokens_per_rank=219_600)
    return FlowRun(run_dir="run", size="8b", steps=1, data=data, **settings)


def decide(run: FlowRun, memory_gb: float) -> RecomputeConfig:
    shape = SIZES[run.size]
    layout = resolve(run.layout, 64, shape)
    return decide_recompute(run, shape, layout, [(219_600, 256)], Device("H200", memory_gb * GB, Numerics()))


def test_a_run_that_cannot_fit_is_refused_in_one_line_that_says_what_helps():
    run = a_run(layout=LayoutConfig(cp=8))
    assert decide(run, 200) == run.recompute
    with pytest.raises(LayoutError) as refusal:
        decide(run, 141)
    message = str(refusal.value)
    assert "\n" not in message
    assert re.match(r"layout tp=1 cp=8 .* cannot fit: a rank needs \d+\.\d GB \(activations \d+", message)
    assert "H200 has 141.0 GB" in message and "recompute.policy=selective" in message and "ignore_plan=true" in message
    with pytest.raises(LayoutError, match="more processes, or a larger cp, tp or pp"):
        decide(run, 5)


def test_ignore_plan_goes_on():
    run = a_run(layout=LayoutConfig(cp=8), ignore_plan=True)
    assert decide(run, 5) == run.recompute


def test_auto_takes_the_budget_of_the_recipe_or_the_devices():
    run = a_run(layout=LayoutConfig(cp=8), recompute=RecomputeConfig(policy="auto"))
    assert decide(run, 1000).policy == "off"
    assert decide(run, 141).policy == "selective"
    tight = replace(run, recompute=RecomputeConfig(policy="auto", memory_gb=60))
    assert decide(tight, 1000).policy == "full"


def train(dataset, run_dir, *overrides: str, ranks_of_host: str) -> subprocess.CompletedProcess[str]:  # type: ignore[no-untyped-def]
    command = [
        sys.executable, "-m", "goku_mega.cli", "train", f"run_dir={run_dir}", f"data.path={dataset}", "steps=1",
        "data.samples_per_step=2", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "LOCAL_WORLD_SIZE": ranks_of_host}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


@pytest.fixture
def dataset(tmp_path):
    import numpy as np

    from goku_mega.data.shards import NULL_TEXT, EncodedSample, write_index, write_shard

    rng = np.random.default_rng(0)
    samples = [
        EncodedSample(
            f"sample-{number}",
            rng.standard_normal((16, 1, 8, 8)).astype(np.float32),
            rng.standard_normal((2, 64)).astype(np.float32),
            {"caption": ""},
        )
        for number in range(4)
    ]
    write_index(tmp_path / "index.parquet", write_shard(tmp_path / "shards" / "00000.tar", samples))
    np.save(tmp_path / NULL_TEXT, rng.standard_normal((1, 64)).astype(np.float32))
    (tmp_path / "dataset.json").write_text('{"latent_channels": 16, "text_width": 64, "text": "none", "vae": "none"}')
    return tmp_path


@pytest.mark.slow
def test_train_refuses_what_this_host_cannot_hold_and_goes_on_when_told_to(dataset, tmp_path):
    refused = train(dataset, tmp_path / "run", ranks_of_host="100000")
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if "error:" in line]
    assert "cannot fit: a rank needs" in line and "a rank's share of this host" in line
    assert not (tmp_path / "run").exists()
    told = train(dataset, tmp_path / "run", "ignore_plan=true", ranks_of_host="100000")
    assert told.returncode == 0, told.stderr
    assert train(dataset, tmp_path / "other", ranks_of_host="1").returncode == 0
