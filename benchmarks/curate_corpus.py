"""Verdicts on a made corpus: `python -m benchmarks.curate_corpus [--json] [--keep FOLDER]`.

More than 200 real files, each breaking one rule of tables 3 and 4 or standing on either side of a bound, are curated;
every verdict, in every tier, is held against the one that the file was made for. It takes a quarter of an hour.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks._measure import device_name, report
from goku_mega.config.curation import CurateConfig
from goku_mega.curate.curate import curate

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "curate"), str(TESTS / "media")]

from corpus_verdicts import differences  # noqa: E402
from made_corpus import make_corpus, whole_corpus  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument(
        "--keep", type=Path, help="folder for the corpus and what comes of it; used again if it is there"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        made = whole_corpus()
        make_corpus(folder / "raw", made)
        began = time.monotonic()
        curate(CurateConfig(videos=str(folder / "raw"), output=str(folder / "output")))
        seconds = time.monotonic() - began
        wrong = differences(folder / "output", folder / "raw", made)
    families = Counter(source.name.split("-")[0] for source in made)
    result = {
        "name": "curate_corpus", "value": len(made) - len(wrong), "unit": "sources with the verdict they must get",
        "baseline": len(made), "ratio": round(1 - len(wrong) / len(made), 4), "device": device_name(),
        "seconds": round(seconds, 1), "families": dict(families), "differences": wrong,
    }  # fmt: skip
    report(options, [*wrong, f"{len(made) - len(wrong)} of {len(made)} as they must be"], result)


if __name__ == "__main__":
    main()
