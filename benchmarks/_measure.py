"""How every benchmark here measures: both sides in one run, taking turns, medians, one JSON line last."""

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def alternate(sides: dict[str, Callable[[], Any]], *, repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each call: every side once a round, in turn, so that a drifting machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(warm_up + repeats):
        for name, call in sides.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_number >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], side: str, baseline: str) -> float:
    """Median over the rounds of side / baseline in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[side], seconds[baseline], strict=True))


def median_ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


def report(options: argparse.Namespace, lines: list[str], result: dict[str, Any]) -> None:
    """The table for people unless --json, then the JSON line, with the day."""
    if not options.json:
        print("\n".join(lines))
    print(json.dumps({**result, "date": datetime.date.today().isoformat()}))
