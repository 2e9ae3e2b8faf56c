"""What NVML answers becomes findings: replays of a recording, changed in one answer each, and a fake of the C library.

Names, constants, signatures and structures come from the real nvidia-ml-py, so a call that it does not have fails here.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from goku_infra.checks import gpu_health
from goku_infra.checks.gpu_health import GpuLimits, XidWatch, findings, sample, xid_finding
from goku_infra.checks.nvml_recording import Recorder, Replay
from goku_infra.errors import OpsError

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install nvidia-ml-py")

HEALTHY = Path(__file__).parent / "recorded" / "nvml_two_healthy_gpus.json"
GPU_IS_LOST = {"error": 15}


def gpus(tmp_path: Path, *changes: tuple[str, list, dict]):
    """The samples of the healthy recording with some answers changed: (call, arguments after the handle of GPU 1, new
    answer)."""
    recording = json.loads(HEALTHY.read_text())
    for name, arguments, answer in changes:
        entries = [
            call
            for call in recording["calls"]
            if call["call"] == name and call["arguments"] == [{"handle": 1}, *arguments]
        ]
        assert entries, name
        for entry in entries:
            entry.pop("answer")
            entry.update(answer)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(recording))
    return sample(Replay(path))


def rows(found):
    return [(row.name, row.severity) for row in found]


def test_the_recording_says_where_it_is_from():
    assert "NOT recorded from hardware" in json.loads(HEALTHY.read_text())["source"]


def test_healthy_gpus_have_no_findings_and_all_they_say_is_read(tmp_path):
    now = gpus(tmp_path)
    assert findings((), now, GpuLimits()) == findings(now, now, GpuLimits()) == []
    silent = {name for name, value in asdict(now[0]).items() if value is None} - {"recovery_action"}
    assert silent == set()
    assert len(now[1].nvlinks) == 18 and now[1].pids == (4102,)


def test_what_a_gpu_does_is_seen_and_what_it_does_not_tell_is_none(tmp_path):
    first, second = gpus(tmp_path, ("nvmlDeviceGetPowerUsage", [], {"error": pynvml.NVML_ERROR_NOT_SUPPORTED}))
    seen = {"index": 0, "busy": 0.97, "memory_bytes": 597557248, "power_w": 640.512, "temperature_c": 61}
    assert gpu_health.view(first) == seen
    assert gpu_health.view(second) == seen | {"index": 1, "power_w": None}


@pytest.mark.parametrize(
    ("call", "arguments", "answer", "expected", "words"),
    [
        ("nvmlDeviceGetTotalEccErrors", [1, 0], {"answer": 2}, ("gpu_ecc", "critical"), "2 uncorrectable"),
        ("nvmlDeviceGetTotalEccErrors", [0, 1], {"answer": 20_000_001}, ("gpu_ecc", "critical"), "20000001 corrected"),
        ("nvmlDeviceGetMemoryErrorCounter", [0, 0, 7], {"answer": 10_001}, ("gpu_ecc", "critical"), "on-chip"),
        ("nvmlDeviceGetMemoryErrorCounter", [1, 1, 7], {"answer": 1}, ("gpu_ecc", "critical"), "on-chip"),
        ("nvmlDeviceGetRemappedRows", [], {"answer": [0, 1, 1, 0]}, ("gpu_remap", "critical"), "reset"),
        ("nvmlDeviceGetRemappedRows", [], {"answer": [0, 8, 0, 1]}, ("gpu_remap", "critical"), "replaced"),
        ("nvmlDeviceGetRemappedRows", [], {"answer": [0, 513, 0, 0]}, ("gpu_ecc", "critical"), "513 rows"),
        ("nvmlDeviceGetCurrentClocksEventReasons", [], {"answer": 0x40}, ("gpu_slowdown", "warning"), "thermal"),
        ("nvmlDeviceGetCurrentClocksEventReasons", [], {"answer": 0x80}, ("gpu_slowdown", "warning"), "power brake"),
        ("nvmlDeviceGetTemperature", [0], {"answer": 92}, ("gpu_temperature", "warning"), "92 C"),
        ("nvmlDeviceGetCurrPcieLinkWidth", [], {"answer": 8}, ("gpu_pcie", "warning"), "8 of 16"),
        ("nvmlDeviceGetCurrPcieLinkGeneration", [], {"answer": 1}, ("gpu_pcie", "warning"), "generation 1 of 5"),
        ("nvmlDeviceGetNvLinkState", [7], {"answer": 0}, ("gpu_nvlink", "critical"), "NVLink 7 down"),
        ("nvmlDeviceGetTemperature", [0], GPU_IS_LOST, ("gpu_lost", "critical"), "is lost"),
        ("nvmlDeviceGetTemperature", [0], {"error": 999}, ("gpu_unknown", "warning"), "nvmlDeviceGetTemperature"),
        (
            "nvmlDeviceGetFieldValues",
            [[91, 230]],
            {"answer": [{"field": 91, "error": 0, "value": 18}, {"field": 230, "error": 0, "value": 2}]},
            ("gpu_recovery", "critical"),
            "a reboot of the node",
        ),
    ],
)
def test_each_fault_is_one_finding_that_names_the_gpu(tmp_path, call, arguments, answer, expected, words):
    found = findings((), gpus(tmp_path, (call, arguments, answer)), GpuLimits())
    assert rows(found) == [expected]
    assert found[0].text.startswith("GPU 1 (GPU-00000000-0000-0000-0000-000000000001)") and words in found[0].text


def test_a_gpu_that_gives_no_handle_is_lost(tmp_path):
    recording = json.loads(HEALTHY.read_text())
    for call in recording["calls"]:
        if call["call"] == "nvmlDeviceGetHandleByIndex" and call["arguments"] == [1]:
            del call["answer"]
            call.update(GPU_IS_LOST)
    path = tmp_path / "lost.json"
    path.write_text(json.dumps(recording))
    before, now = sample(Replay(HEALTHY)), sample(Replay(path))
    assert rows(findings((), now, GpuLimits())) == [("gpu_lost", "critical")]
    assert rows(findings(before, now, GpuLimits())) == [("gpu_lost", "critical")]
    assert rows(findings(before, now[:1], GpuLimits())) == [("gpu_lost", "critical")]


def test_what_a_gpu_does_not_support_is_no_finding(tmp_path):
    unsupported = {"error": pynvml.NVML_ERROR_NOT_SUPPORTED}
    now = gpus(
        tmp_path,
        ("nvmlDeviceGetRemappedRows", [], unsupported),
        ("nvmlDeviceGetTotalEccErrors", [1, 0], unsupported),
        (
            "nvmlDeviceGetFieldValues",
            [[91, 230]],
            {"answer": [{"field": n, "error": 3, "value": 7} for n in (91, 230)]},
        ),
    )
    assert findings((), now, GpuLimits()) == []
    assert (now[1].remap_pending, now[1].volatile_uncorrected, now[1].nvlinks) == (None, None, ())


def test_links_that_never_worked_are_no_finding_but_links_that_stopped_are(tmp_path):
    down = gpus(tmp_path, *(("nvmlDeviceGetNvLinkState", [link], {"answer": 0}) for link in range(18)))
    assert findings((), down, GpuLimits()) == []
    assert rows(findings(gpus(tmp_path), down, GpuLimits())) == [("gpu_nvlink", "critical")]


@pytest.mark.parametrize(
    ("counter", "count", "seconds", "expected"),
    [
        (2, 999, 10, []),
        (2, 1000, 10, [("gpu_nvlink", "critical")]),
        (3, 1000, 10, [("gpu_nvlink", "critical")]),
        (0, 1, 10, [("gpu_nvlink", "warning")]),
        (1, 1, 10, [("gpu_nvlink", "warning")]),
    ],
)
def test_nvlink_errors_count_by_their_growth(tmp_path, counter, count, seconds, expected):
    before = gpus(tmp_path)
    now = gpus(tmp_path, ("nvmlDeviceGetNvLinkErrorCounter", [3, counter], {"answer": count}))
    later = [replace(new, monotonic_s=old.monotonic_s + seconds) for old, new in zip(before, now, strict=True)]
    assert rows(findings(before, later, GpuLimits())) == expected
    assert findings(later, later, GpuLimits()) == []


@pytest.mark.parametrize(("replays", "seconds", "is_found"), [(8, 10, False), (9, 10, True), (16, 120, False)])
def test_pcie_replays_count_by_the_minute(tmp_path, replays, seconds, is_found):
    before = gpus(tmp_path)
    now = gpus(tmp_path, ("nvmlDeviceGetPcieReplayCounter", [], {"answer": replays}))
    later = [replace(new, monotonic_s=old.monotonic_s + seconds) for old, new in zip(before, now, strict=True)]
    assert rows(findings(before, later, GpuLimits())) == [("gpu_pcie", "warning")] * is_found


def test_an_idle_gpu_may_lower_its_pcie_generation(tmp_path):
    now = gpus(
        tmp_path,
        ("nvmlDeviceGetCurrPcieLinkGeneration", [], {"answer": 1}),
        ("nvmlDeviceGetCurrentClocksEventReasons", [], {"answer": pynvml.nvmlClocksEventReasonGpuIdle}),
    )
    assert findings((), now, GpuLimits()) == []


def test_a_process_left_on_a_gpu_is_found_before_a_start(tmp_path):
    found = findings((), gpus(tmp_path), GpuLimits(), must_be_free=True)
    assert rows(found) == [("gpu_busy", "critical")] * 2
    assert "process 4101" in found[0].text and "process 4102" in found[1].text


@pytest.mark.parametrize(("xid", "severity"), [(79, "critical"), (95, "critical"), (63, "warning"), (13, "warning")])
def test_the_severity_of_an_xid_is_the_tables(xid, severity):
    assert (xid_finding(3, xid).severity, xid_finding(3, xid).text) == (severity, f"GPU 3 reported Xid {xid}")


def test_the_replay_knows_only_what_the_library_has():
    replay = Replay(HEALTHY)
    with pytest.raises(AttributeError):
        _ = replay.nvmlDeviceGetHappiness
    with pytest.raises(TypeError):
        replay.nvmlDeviceGetTemperature()


def test_every_constant_of_the_tables_is_the_librarys():
    for name in (*gpu_health.SLOWDOWNS, *gpu_health.RECOVERY):
        assert isinstance(getattr(pynvml, name), int)


@pytest.mark.parametrize("text", ["", "[]", '{"source": "x"}'])
def test_a_file_that_is_no_recording_is_refused(tmp_path, text):
    path = tmp_path / "no.json"
    path.write_text(text)
    with pytest.raises(OpsError, match="no.json is no recording"):
        Replay(path)
    assert gpu_health.main(["--replay", str(path)]) == 2


def _unsupported(library, *arguments):
    return pynvml.NVML_ERROR_NOT_SUPPORTED


class FakeLibrary:
    """libnvidia-ml.so as pynvml sees it: functions that fill ctypes references and return a number. One sound GPU."""

    def __init__(self, events=()):
        self.gpu = pynvml.struct_c_nvmlDevice_t()
        self.events = list(events)

    def __getattr__(self, name):
        return getattr(type(self), f"do_{name}", _unsupported).__get__(self)

    def do_nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 1
        return 0

    def do_nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.contents = self.gpu
        return 0

    def do_nvmlDeviceGetUUID(self, handle, text, size):
        text.value = b"GPU-fake"
        return 0

    def do_nvmlDeviceGetTemperature(self, handle, sensor, temperature):
        temperature._obj.value = 55
        return 0

    def do_nvmlDeviceGetFieldValues(self, handle, count, values):
        for answer in values._obj:
            answer.value.uiVal = 1 if answer.fieldId == pynvml.NVML_FI_DEV_NVLINK_LINK_COUNT else 0
        return 0

    def do_nvmlDeviceGetNvLinkState(self, handle, link, state):
        state._obj.value = 1
        return 0

    def do_nvmlDeviceGetComputeRunningProcesses_v3(self, handle, count, processes):
        if processes is None:
            count._obj.value = 1
            return pynvml.NVML_ERROR_INSUFFICIENT_SIZE
        count._obj.value = 1
        processes[0].pid = 77
        return 0

    def do_nvmlEventSetCreate(self, events):
        return 0

    def do_nvmlEventSetFree(self, events):
        return 0

    def do_nvmlDeviceGetSupportedEventTypes(self, handle, types):
        types._obj.value = pynvml.nvmlEventTypeXidCriticalError
        return 0

    def do_nvmlDeviceRegisterEvents(self, handle, types, events):
        return 0

    def do_nvmlEventSetWait_v2(self, events, data, milliseconds):
        if not self.events:
            time.sleep(0.01)
            return pynvml.NVML_ERROR_TIMEOUT
        error, xid = self.events.pop(0)
        data._obj.device.contents = self.gpu
        data._obj.eventType = pynvml.nvmlEventTypeXidCriticalError
        data._obj.eventData = xid
        return error


@pytest.fixture
def library(monkeypatch):
    def install(fake):
        monkeypatch.setattr(pynvml, "nvmlLib", fake)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        return pynvml

    return install


def without_times(samples):
    return [replace(gpu, monotonic_s=0.0) for gpu in samples]


def test_a_recording_of_the_library_replays_to_the_same_samples(tmp_path, library):
    recorder = Recorder(library(FakeLibrary()), "a fake library")
    recorded = sample(recorder)
    assert (recorded[0].uuid, recorded[0].temperature_c, recorded[0].pids) == ("GPU-fake", 55, (77,))
    assert len(recorded[0].nvlinks) == 1 and recorded[0].errors == ()
    recorder.write(tmp_path / "recording.json")
    assert without_times(sample(Replay(tmp_path / "recording.json"))) == without_times(recorded)


def test_xids_are_collected_by_the_thread(library):
    nvml = library(FakeLibrary(events=[(0, 31), (pynvml.NVML_ERROR_TIMEOUT, 0), (0, 79)]))
    watch = XidWatch(nvml)
    found = []
    deadline = time.monotonic() + 10
    while len(found) < 2 and time.monotonic() < deadline:
        found += watch.take()
        time.sleep(0.01)
    watch.close()
    assert [(row.severity, row.text) for row in found] == [
        ("warning", "GPU 0 reported Xid 31"),
        ("critical", "GPU 0 reported Xid 79"),
    ]


def test_a_gpu_that_cannot_be_watched_leaves_the_others_watched(library, monkeypatch):
    nvml = library(FakeLibrary(events=[(0, 79)]))
    handle = nvml.nvmlDeviceGetHandleByIndex

    def fails_for_the_first(index):
        if index == 0:
            raise nvml.NVMLError(nvml.NVML_ERROR_UNKNOWN)
        return handle(0)

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", fails_for_the_first)
    monkeypatch.setattr(nvml, "nvmlDeviceGetCount", lambda: 2)
    watch = XidWatch(nvml)
    found, deadline = [], time.monotonic() + 10
    while not found and time.monotonic() < deadline:
        found = watch.take()
        time.sleep(0.01)
    watch.close()
    assert [row.text for row in found] == ["GPU 1 reported Xid 79"]


def test_a_lost_gpu_ends_the_watch_with_a_finding(library):
    watch = XidWatch(library(FakeLibrary(events=[(pynvml.NVML_ERROR_GPU_IS_LOST, 0)])))
    watch._thread.join(10)
    assert rows(watch.take()) == [("gpu_lost", "critical")]
