"""A long soak: rounds of random faults on runs of the tiny model, unattended, until as many as asked for have struck.

    python -m benchmarks.chaos --faults 1000
    python -m benchmarks.chaos --faults 200 --shrink

Every round is a run of its own with a seed of its own. By default a spare takes over for a lost node; with `--shrink`
there is none, and the run goes on with fewer nodes until they come back. What the rounds have come to is kept in
`benchmarks/results/chaos.json`, for every wrongly blamed or missed fault with what happened around it; stopped and
started again, it goes on with the next round. `--fresh` begins anew.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks._measure import report

RESULTS = Path(__file__).parent / "results" / "chaos.json"
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("infra", "tests/distributed")]

from chaos import SHRINKING, STEADY, soak  # noqa: E402 - found by the line above
from parity import write_dataset  # noqa: E402

GROUNDS = {"steady": STEADY, "shrinking": SHRINKING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000, help="in all (default 1000)")
    parser.add_argument("--round", type=int, default=100, help="faults of one run (default 100)")
    parser.add_argument("--seed", type=int, default=1000, help="of the first round (default 1000)")
    parser.add_argument("--shrink", action="store_true", help="rounds without a spare")
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary one)")
    parser.add_argument("--fresh", action="store_true", help="forget the rounds that are done, of both kinds")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    options = parser.parse_args()
    ground = "shrinking" if options.shrink else "steady"
    rounds = [] if options.fresh or not RESULTS.exists() else json.loads(RESULTS.read_text())["rounds"]
    while (struck := sum(done["faults"] for done in _of(rounds, ground))) < options.faults:
        count = min(options.round, options.faults - struck)
        seed = options.seed + len(_of(rounds, ground))
        try:
            rounds.append({"ground": ground, **one_round(options, ground, seed, count)})
        except AssertionError as error:
            rounds.append({"ground": ground, "seed": seed, "faults": 0, "failed": str(error)})
            raise
        finally:
            RESULTS.write_text(
                json.dumps({name: totals(_of(rounds, name)) for name in GROUNDS} | {"rounds": rounds}, indent=1)
            )
    result = totals(_of(rounds, ground))
    lines = [f"{name:>20} {value}" for name, value in result.items()]
    report(options, [*lines, *mistakes(_of(rounds, ground))], {"benchmark": "chaos", "ground": ground, **result})


def one_round(options: argparse.Namespace, ground: str, seed: int, count: int) -> dict[str, Any]:
    """A run that `count` faults strike; what it has come to. An invariant that does not hold ends the whole."""
    folder = Path(tempfile.mkdtemp(prefix=f"goku-chaos-{seed}-", dir=options.folder))
    data = folder / "data"
    data.mkdir()
    write_dataset(data)
    began = time.monotonic()

    def progress(done: int) -> None:
        if not options.json and done % 10 == 0:
            print(f"{ground}, seed {seed}: {done} of {count} faults, {time.monotonic() - began:.0f} s", flush=True)

    result = asdict(soak(folder, data, seed=seed, faults=count, ground=GROUNDS[ground], progress=progress))
    shutil.rmtree(folder)  # kept only of a round that has failed
    return result


def totals(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """All rounds of a ground in one."""
    failed = [done["seed"] for done in rounds if "failed" in done]
    rounds = [done for done in rounds if "failed" not in done]
    kinds: Counter[str] = Counter()
    recovery_s: dict[str, list[float]] = {}
    for done in rounds:
        kinds.update(done["by_kind"])
        for cause, seconds in done["recovery_s"].items():
            recovery_s.setdefault(cause, []).extend(seconds)
    rightly, wrongly = sum(done["blamed_rightly"] for done in rounds), sum(len(done["wrongly"]) for done in rounds)
    return {
        "faults": sum(done["faults"] for done in rounds),
        "failed_rounds": failed,
        "incidents": sum(done["incidents"] for done in rounds),
        "blamed_rightly": round(rightly / max(1, rightly + wrongly), 4),
        "wrongly_blamed": wrongly,
        "missed": sum(len(done["missed"]) for done in rounds),
        "steps": sum(done["steps"] for done in rounds),
        "lost_steps": sum(done["lost_steps"] for done in rounds),
        "largest_difference": max((done["largest_difference"] for done in rounds), default=0.0),
        "changes_of_ranks": sum(len(done["worlds"]) - 1 for done in rounds),
        "wall_s": round(sum(done["wall_s"] for done in rounds), 1),
        "by_kind": dict(sorted(kinds.items())),
        "median_recovery_s": {cause: statistics.median(seconds) for cause, seconds in sorted(recovery_s.items())},
    }


def mistakes(rounds: list[dict[str, Any]]) -> list[str]:
    """For people: every fault that was blamed wrongly or missed, and what happened around it."""
    lines = []
    for done in rounds:
        for kind in ("wrongly", "missed"):
            for mistake in done.get(kind, ()):
                lines += [f"{kind}, seed {done['seed']}: {mistake['what']}", "  struck:"]
                lines += [f"    {fault}" for fault in mistake["faults"]]
                lines += ["  journal:", *(f"    {event}" for event in mistake["events"])]
    return lines


def _of(rounds: list[dict[str, Any]], ground: str) -> list[dict[str, Any]]:
    return [done for done in rounds if done["ground"] == ground]


if __name__ == "__main__":
    main()
