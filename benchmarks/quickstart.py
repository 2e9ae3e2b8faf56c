"""Runs the quickstart from nothing and records its figures: `python -m benchmarks.quickstart [--json]`.

Wall time of every stage after the install, peak memory of all its processes together, the scores of
the trained model beside the untrained one, and the sheet of what it drew.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks._measure import arguments, device_name, report

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "quickstart.json"
SHEET = RESULTS.with_name("quickstart_sheet.png")
LIMIT_MINUTES = 15
"""What the quickstart may take on two cores."""
STAGE = re.compile(r"^== (\d/\d [\w ]+)")


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    # Already installed by the environment this runs in, unless its set-up has changed: not part of the figures.
    subprocess.run(["bash", "-c", "source launch/setup.sh"], cwd=ROOT, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        stages, seconds, peak = run_quickstart(out, echo=not options.json)
        RESULTS.parent.mkdir(exist_ok=True)
        shutil.copyfile(out / "sheet.png", SHEET)
        evaluation = json.loads((out / "evaluation.json").read_text())
        metrics = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    result = {
        "name": "quickstart",
        "value": round(seconds / 60, 2),
        "unit": "minutes after the install",
        "baseline": LIMIT_MINUTES,
        "ratio": round(seconds / 60 / LIMIT_MINUTES, 3),
        "peak_memory_gib": round(peak / 2**30, 2),
        "stage_seconds": stages,
        "scores": evaluation["scores"],
        "steps": len(metrics),
        "final_loss": metrics[-1]["loss"],
        "device": device_name(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    report(options, [evaluation["table"], f"{seconds / 60:.1f} minutes, {peak / 2**30:.1f} GiB at most"], result)


def run_quickstart(out: Path, *, echo: bool) -> tuple[dict[str, float], float, int]:
    """Seconds of each stage, seconds of all, and the peak memory of the process tree in bytes."""
    began = time.monotonic()
    process = subprocess.Popen(
        ["bash", "launch/quickstart.sh", str(out)], cwd=ROOT, text=True, stdout=sys.stderr, stderr=subprocess.PIPE
    )
    peak: list[int] = [0]
    watcher = threading.Thread(target=watch_memory, args=(process.pid, peak), daemon=True)
    watcher.start()
    starts: list[tuple[str, float]] = []
    assert process.stderr is not None
    for line in process.stderr:
        if echo:
            sys.stderr.write(line)
        if match := STAGE.match(line):
            starts.append((match[1], time.monotonic()))
    if process.wait():
        raise SystemExit(f"the quickstart failed with exit code {process.returncode}")
    end = time.monotonic()
    stops = [start for _, start in starts[1:]] + [end]
    stages = {name: round(stop - start, 1) for (name, start), stop in zip(starts, stops, strict=True)}
    return stages, end - began, peak[0]


def watch_memory(pid: int, peak: list[int]) -> None:
    """Keep the largest sum of the proportional memory of a process and its descendants."""
    while psutil.pid_exists(pid):
        total = 0
        for process in _tree(pid):
            try:
                # Shared pages are counted once, divided over those who share them.
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        peak[0] = max(peak[0], total)
        time.sleep(1)


def _tree(pid: int) -> list[Any]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
