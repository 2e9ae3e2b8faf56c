"""Curation and encoding as arrays on a real SLURM: whatever befalls a task, the bytes that one command would write."""

import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import CONTROL, Cluster
from small_corpus import overrides, settings, write_corpus

from goku_mega.config.data import CorpusConfig, EncodeConfig
from goku_mega.curate.curate import curate
from goku_mega.data import shapes
from goku_mega.data.encode import encode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SMALL = ["--exclusive", "--cpus-per-task=1", "--mem=0", "--gpus-per-node=0"]
"""What the scripts ask of a real cluster's nodes, for nodes that have none of it; each task has a node to itself."""
OUTPUTS = ("sources.parquet", "manifest.parquet", "captions.jsonl")
OURS = re.compile(r"goku_mega|multiprocessing")
LIMIT_S = 60.0
SAMPLES_PER_SHARD = 4


@dataclass(frozen=True)
class Jobs:
    """Submits jobs whose working folder is `folder`, where their logs are, and waits for them."""

    cluster: Cluster
    folder: Path

    def submit(self, script: str, options: Sequence[str], words: Sequence[str], **environment: str) -> str:
        """The job's number."""
        command = ["sbatch", "--parsable", f"--chdir={self.folder}", *SMALL, *options, str(ROOT / script), *words]
        return self.cluster.exec(CONTROL, command, env={**self.cluster.environment, **environment}).strip()

    def fields(self, job: str) -> dict[str, str]:
        """What SLURM says of a job, or of an array's task `JOB_TASK`."""
        answer = self.cluster.exec(CONTROL, ["scontrol", "--oneliner", "show", "job", job])
        return dict(word.split("=", 1) for word in answer.split() if "=" in word)

    def ended(self, job: str) -> str:
        """Its state and exit code once it has ended: COMPLETED 0:0."""

        def state() -> str:
            fields = self.fields(job)
            is_over = fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
            return f"{fields['JobState']} {fields['ExitCode']}" if is_over else ""

        return str(self.cluster.wait_for(state, LIMIT_S, f"the end of {job}"))

    def processes(self, job: str) -> list[int]:
        """Of a running task, the batch script's own and what it started, by their ids on the host."""
        return [
            pid for pid, words in self.cluster.processes(self.fields(job)["BatchHost"]).items() if OURS.search(words)
        ]

    def logs(self, pattern: str) -> str:
        return "".join(path.read_text() for path in sorted((self.folder / "out/slurm").glob(pattern)))


@pytest.fixture
def jobs(cluster, tmp_path) -> Jobs:
    (tmp_path / "out/slurm").mkdir(parents=True)
    return Jobs(cluster, tmp_path)


def kill(jobs: Jobs, job: str, sent: signal.Signals) -> None:
    for pid in jobs.processes(job):
        with suppress(ProcessLookupError):
            os.kill(pid, sent)


def journalled(output: Path, host: str = "*") -> list[tuple[str, str, str]]:
    """(stage, settings, key) of the scores that are in the journals of a host's commands, without a torn last line."""
    lines = [
        line
        for path in (output / "journal").glob(f"*-{host}-*.jsonl")
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return [(row["stage"], row["settings"], row["key"]) for row in map(json.loads, lines)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_curation_whose_task_was_killed_and_submitted_again_alone_gives_what_one_command_gives(jobs, tmp_path):
    videos, output = write_corpus(tmp_path / "raw"), tmp_path / "array"
    script, words = "launch/sbatch/curate.sbatch", overrides(videos, output)
    array = jobs.submit(script, ["--array=0-2"], words)
    early = jobs.submit(script, [f"--dependency=afterany:{array}"], ["filter", *words])

    victim = f"{array}_0"
    jobs.cluster.wait_for(lambda: jobs.fields(victim)["JobState"] == "RUNNING", LIMIT_S, "the first task")
    host = jobs.fields(victim)["BatchHost"]
    jobs.cluster.wait_for(
        lambda: "shots" in {stage for stage, _, _ in journalled(output, host)}, LIMIT_S, "its first scores"
    )
    kill(jobs, victim, signal.SIGKILL)
    assert jobs.ended(victim) == "FAILED 0:9"
    done = journalled(output, host)

    curate(settings(videos, tmp_path / "whole"))
    assert [jobs.ended(f"{array}_{number}") for number in (1, 2)] == ["COMPLETED 0:0"] * 2
    assert jobs.ended(early) == "COMPLETED 0:0"  # of what there is; it has also taken in the journals
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in OUTPUTS}
    assert {name: (output / name).read_bytes() for name in OUTPUTS} != whole

    again = jobs.submit(script, ["--array=0"], words, GOKU_PARTS="3")
    assert jobs.ended(f"{again}_0") == "COMPLETED 0:0"
    since = journalled(output)
    assert since and done and not set(since) & set(done)
    late = jobs.submit(script, [f"--dependency=afterany:{again}"], ["filter", *words])
    assert jobs.ended(late) == "COMPLETED 0:0"
    assert {name: (output / name).read_bytes() for name in OUTPUTS} == whole


def test_an_encoding_whose_task_was_requeued_gives_what_one_command_gives(jobs, tmp_path):
    corpus, output = tmp_path / "corpus", tmp_path / "array"
    shapes.write_corpus(
        CorpusConfig(output=str(corpus), videos=30, images=6, height=96, width=96, frames=17, workers=2)
    )
    words = [f"corpus={corpus}", f"output={output}", f"samples_per_shard={SAMPLES_PER_SHARD}", "workers=1"]
    array = jobs.submit("launch/sbatch/encode.sbatch", ["--array=0-2"], words)

    def made(number: int) -> bool:
        return (output / f"parts/{number:05d}.json").exists()

    victim = f"{array}_1"
    jobs.cluster.wait_for(lambda: made(1), LIMIT_S, "its first shard")
    kill(jobs, victim, signal.SIGSTOP)  # where it stands, until SLURM ends it
    assert not made(7)
    requeue = [sys.executable, "-c", f"from goku_infra import slurm; slurm.requeue({jobs.fields(victim)['JobId']!r})"]
    jobs.cluster.exec(CONTROL, requeue, timeout_s=300)

    encode(
        EncodeConfig(corpus=str(corpus), output=str(tmp_path / "whole"), samples_per_shard=SAMPLES_PER_SHARD, workers=1)
    )
    assert [jobs.ended(f"{array}_{number}") for number in range(3)] == ["COMPLETED 0:0"] * 3
    assert jobs.fields(victim)["Restarts"] == "1"
    assert contents(output) == contents(tmp_path / "whole")
    written = Counter(re.findall(r"shard (\d+\.tar) is written", jobs.logs("goku-encode-*.log")))
    assert set(written.values()) == {1} and len(written) >= 8  # the first may have been stopped before it was told of


@pytest.mark.parametrize("script", ["curate", "encode"])
def test_tasks_that_are_submitted_again_alone_keep_their_parts(jobs, tmp_path, script):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/goku-mega").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "bin/goku-mega").chmod(0o755)
    path = f"{tmp_path}/bin:{jobs.cluster.environment['PATH']}"
    first = jobs.submit(f"launch/sbatch/{script}.sbatch", ["--array=0-3"], ["output=some place"], PATH=path)
    again = jobs.submit(
        f"launch/sbatch/{script}.sbatch", ["--array=1,3"], ["output=some place"], PATH=path, GOKU_PARTS="4"
    )
    for job, numbers in ((first, range(4)), (again, (1, 3))):
        assert [jobs.ended(f"{job}_{number}") for number in numbers] == ["COMPLETED 0:0"] * len(numbers)
        called = re.findall(r"slice=\S+", jobs.logs(f"goku-{script}-{job}_*.log"))
        assert called == [f"slice={number}/4" for number in numbers]
