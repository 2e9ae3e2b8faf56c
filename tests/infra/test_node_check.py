"""`goku-ops check-node`: what it measures is judged by its limits, and a node that is unfit says why in one line."""

import argparse
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from goku_infra.checks import gpu_health, health, host_health, node_check
from goku_infra.checks.compute_check import expected_product, wrong_elements
from goku_infra.checks.health import HealthFinding, answer_within
from goku_infra.checks.node_check import NodeWatch, check_disk, judge, read_limits
from goku_infra.checks.versions import versions
from goku_infra.errors import OpsError

INFRA = Path(node_check.__file__).parents[1]
H100 = "NVIDIA H100 80GB HBM3"


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    node_check.add_arguments(parser)
    return node_check.run(parser.parse_args(words))


def gpu(name: str, index: int, value: float, device: str = H100) -> dict:
    return {"name": name, "device": device, "index": index, "value": value, "unit": "GB/s"}


def test_the_quick_check_of_a_healthy_node_says_so_without_torch_in_2_s(tmp_path):
    code = (
        "import argparse, sys; from goku_infra.checks import node_check; parser = argparse.ArgumentParser();"
        "node_check.add_arguments(parser); code = node_check.run(parser.parse_args());"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "--quick"], capture_output=True, text=True, cwd=INFRA
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout.startswith("healthy: "), done.stdout + done.stderr
    # What it computes, for a busy machine has it wait as well.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_full_check_measures_and_is_one_json_object(tmp_path, capsys):
    assert run(str(tmp_path), "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_name = {check["name"]: check for check in report["checks"]}
    assert report["healthy"] and by_name["wrong_elements cpu"]["value"] == 0
    for name in ("matrix_product cpu", "memory_copy cpu", "loopback_all_reduce cpu", "disk_write", "disk_read"):
        assert by_name[name]["value"] > by_name[name]["limit"] > 0


def test_a_limit_from_a_file_makes_the_node_unfit_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(node_check, "_compute_checks", lambda limits: [])
    limits = tmp_path / "limits.json"
    limits.write_text('{"cpu": {"disk_write": 1e6}}')
    assert run(str(tmp_path), "--limits", str(limits)) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("disk_write: ") and line.endswith("at least 1e+06 is needed")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "limits.json"),
        ("[]", "limits.json"),
        ('{"cpu": {"disk_wirte": 1}}', "did you mean 'disk_write'"),
        ('{"cpu": {"matrix_product": "fast"}}', "fast"),
    ],
)
def test_limits_that_cannot_be_read_are_one_line(tmp_path, text, words):
    path = tmp_path / "limits.json"
    path.write_text(text)
    with pytest.raises(OpsError, match=words) as error:
        read_limits(path)
    assert "\n" not in str(error.value)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(OpsError, match="not a folder"):
        run(str(tmp_path / "none"))
    with pytest.raises(OpsError, match="belong together"):
        run(str(tmp_path), "--rank", "0")


def test_every_published_limit_of_a_gpu_names_its_source():
    for device, table in node_check.LIMITS.items():
        assert all(limit.source == node_check.OURS or "AzureHPC NHC" in limit.source for limit in table.values())
        assert device == "cpu" or all("AzureHPC NHC" in limit.source for limit in table.values())


def test_a_gpu_below_its_published_limit_is_named():
    checks = judge([gpu("host_to_device", 0, 55.0), gpu("device_to_host", 0, 51.0)], read_limits(None))
    assert [(check.ok, check.limit) for check in checks] == [(True, 52.0), (False, 52.0)]
    assert checks[1].text == f"device_to_host {H100} 0: 51 GB/s; at least 52 is needed"


def test_a_variant_of_a_model_has_the_models_limits():
    (check,) = judge([gpu("host_to_device", 0, 10.0, device="NVIDIA H200 NVL")], read_limits(None))
    assert check.limit == 48.0
    (check,) = judge([gpu("host_to_device", 0, 10.0, device="NVIDIA L4")], read_limits(None))
    assert check.ok and check.limit is None


def test_the_slow_gpu_of_a_node_is_found_by_its_neighbours_without_a_published_limit():
    values = [700.0, 705.0, 610.0, 702.0]
    checks = judge([gpu("matrix_product", index, value) for index, value in enumerate(values)], read_limits(None))
    assert [check.ok for check in checks] == [True, True, False, True]


def test_one_wrong_element_is_a_finding():
    (check,) = judge([{"name": "wrong_elements", "device": H100, "index": 3, "value": 1, "unit": ""}], {})
    assert not check.ok and "3: 1 elements" in check.text


def test_the_exact_product_is_right_and_depends_on_row_and_column():
    assert [wrong_elements(size, "cpu", "float32") for size in (8, 64, 200)] == [0, 0, 0]
    table = expected_product(8)
    assert len({tuple(row) for row in table}) > 4 and len({tuple(column) for column in zip(*table, strict=True)}) > 4


@pytest.mark.parametrize("place", [(0, 0), (63, 63), (17, 40)])
def test_one_flipped_bit_in_the_product_is_counted(monkeypatch, place):
    import torch

    product = torch.Tensor.__matmul__

    def flipped(left, right):
        result = product(left, right)
        result.view(torch.int32)[place] ^= 1
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", flipped)
    assert wrong_elements(64, "cpu", "float32") == 1


def test_a_disk_that_fails_or_gives_back_other_bytes_is_found(tmp_path, monkeypatch):
    assert [check.name for check in check_disk(tmp_path, 1 << 20, {})] == ["disk_content", "disk_write", "disk_read"]
    (check,) = check_disk(Path("/proc"), 1 << 20, {})
    assert not check.ok and "/proc" in check.text
    with monkeypatch.context() as patch:
        patch.setattr(node_check.Path, "unlink", lambda path, missing_ok=False: Path("/proc/none").rmdir())
        assert "/proc" in check_disk(Path("/proc"), 1 << 20, {})[0].text  # the unlink, which fails too, hides nothing
    # The page cache gives back what was written, so the file is changed between the two.
    monkeypatch.setattr(node_check.os, "fsync", lambda file: node_check.os.pwrite(file, b"x", 4096))
    assert not check_disk(tmp_path, 1 << 20, {})[0].ok
    assert list(tmp_path.iterdir()) == []


def test_a_watch_compares_with_the_time_before_and_keeps_what_happened_once(tmp_path, monkeypatch):
    now = host_health.sample([tmp_path], None, host_health.Limits())
    xid = "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."
    samples = iter(
        [
            (now, ()),
            (now, (xid,)),
            (now, ()),
        ]
    )
    seen = []

    def sample(folders, previous, limits):
        seen.append(previous)
        state, lines = next(samples)
        return host_health.Sample(**{**vars(state), "kernel_lines": lines, "kernel_number": len(seen)})

    monkeypatch.setattr(host_health, "sample", sample)
    watch = NodeWatch(tmp_path)
    texts = [[row.text for row in watch.findings()] for _ in range(3)]
    assert texts == [[], [f"kernel: {xid}"], [f"kernel: {xid}"]]
    assert [previous and previous.kernel_number for previous in seen] == [None, 1, 2]


class DriverError(Exception):
    pass


@pytest.fixture
def sample_gpus(monkeypatch):
    """Make the node have GPUs whose driver does as it is told."""

    def install(sample):
        monkeypatch.setattr(node_check, "GPU_ANSWER_S", 1.0)
        monkeypatch.setattr(node_check, "GPU_FIRST_ANSWER_S", 1.0)
        monkeypatch.setattr(health, "_unanswered", {})  # of the drivers of other tests
        monkeypatch.setattr(gpu_health, "open_nvml", lambda: argparse.Namespace(NVMLError=DriverError))
        monkeypatch.setattr(gpu_health, "XidWatch", lambda nvml: argparse.Namespace(take=list))
        monkeypatch.setattr(gpu_health, "sample", sample)

    return install


def test_a_driver_that_hangs_is_a_finding_and_is_asked_again_when_it_has_answered(tmp_path, sample_gpus):
    calls, stop = [], threading.Event()

    def hang(nvml):
        calls.append(1)
        stop.wait(60)
        return []

    sample_gpus(hang)
    watch = NodeWatch(tmp_path)
    assert [[row.name for row in watch.findings()] for _ in range(2)] == [["gpu_driver"]] * 2
    assert len(calls) == 1
    assert run(str(tmp_path), "--quick") == 1
    stop.set()
    deadline = time.monotonic() + 30
    while watch.findings():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_first_answer_of_a_driver_may_be_slow(tmp_path, sample_gpus, monkeypatch):
    sample_gpus(lambda nvml: time.sleep(0.1) or [])
    monkeypatch.setattr(node_check, "GPU_ANSWER_S", 0.01)
    monkeypatch.setattr(node_check, "GPU_FIRST_ANSWER_S", 30.0)
    watch = NodeWatch(tmp_path)
    assert watch.findings() == []
    assert [row.name for row in watch.findings()] == ["gpu_driver"]


def test_a_driver_that_watches_for_nothing_is_still_sampled(tmp_path, sample_gpus, monkeypatch):
    def refuse(nvml):
        raise DriverError("Not Supported")

    sample_gpus(lambda nvml: [])
    monkeypatch.setattr(gpu_health, "XidWatch", refuse)
    assert NodeWatch(tmp_path).findings() == []


def test_a_driver_that_fails_is_a_finding_with_its_words(tmp_path, sample_gpus):
    def fail(nvml):
        raise DriverError("Driver Not Loaded")

    sample_gpus(fail)
    assert [row.text for row in NodeWatch(tmp_path).findings()] == ["the GPUs' driver fails: Driver Not Loaded"]


def test_a_watch_compares_gpus_with_the_time_before(tmp_path, sample_gpus):
    links = iter([True, False])
    sample_gpus(lambda nvml: [gpu_health.GpuSample(0, 1.0, uuid="u", nvlinks=(nvlink(next(links)),))])
    watch = NodeWatch(tmp_path)
    assert watch.findings() == []
    assert [row.text for row in watch.findings()] == ["GPU 0 (u) has NVLink 0 down"]
    assert [gpu["index"] for gpu in watch.gpus] == [0]


def nvlink(active: bool) -> gpu_health.NvLink:
    return gpu_health.NvLink(active, replays=0, recoveries=0, crc_errors=0)


def test_what_takes_too_long_or_fails_has_no_answer():
    assert answer_within(5, lambda: 3, "three") == 3
    assert answer_within(0.01, lambda: time.sleep(0.5), "sleep") is None
    assert answer_within(5, lambda: Path("/none/none").read_text(), "none") is None
    with pytest.raises(ZeroDivisionError):
        answer_within(5, lambda: 1 // 0, "zero")


def test_a_warning_leaves_the_node_fit_and_is_noted(tmp_path, monkeypatch, capsys):
    warning = HealthFinding("gpu_slowdown", "warning", "GPU 0 runs slower")
    monkeypatch.setattr(host_health, "findings", lambda *arguments: [warning])
    assert run(str(tmp_path), "--quick") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "note: GPU 0 runs slower"


def test_versions_name_what_must_be_alike():
    found = versions()
    assert found["python"] == sys.version.split()[0] and len(found["goku_infra"]) == 8
    assert found == versions()


@pytest.mark.slow
def test_nodes_that_check_each_other_name_the_bad_one():
    """Two nodes: this process leads as node 0, and node 1 sends wrong numbers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        store = f"127.0.0.1:{probe.getsockname()[1]}"
    other = [
        sys.executable,
        "-m",
        "goku_infra.checks.collective_check",
        "--store",
        store,
        "--world",
        "2",
        "--rank",
        "1",
    ]
    process = subprocess.Popen([*other, "--inject", "corrupt"], cwd=INFRA, stdout=subprocess.DEVNULL)
    checks = list(node_check.check_group(store, 2, 0, "cpu"))
    assert process.wait(30) == 1
    assert [check.text for check in checks if not check.ok] == ["node 1 makes an all-reduce wrong or fail"]


@pytest.mark.slow
def test_a_taken_port_is_the_reason_that_is_given():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        store = f"127.0.0.1:{taken.getsockname()[1]}"
        words = ["--store", store, "--world", "1", "--coordinate", "--timeout", "2"]
        command = [sys.executable, "-m", "goku_infra.checks.collective_check", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=INFRA)
    assert done.returncode == 2 and "cannot host the store" in done.stderr.splitlines()[-1]
