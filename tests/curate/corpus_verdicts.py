"""What became of a made corpus, held against what must have become of it."""

from collections.abc import Iterable
from pathlib import Path

from made_corpus import TIERS, Made
from pyarrow import parquet


def differences(output: Path, folder: Path, made: Iterable[Made]) -> list[str]:
    """A line for every source with another verdict than it must have, in any tier."""
    sources = {row["path"]: row for row in parquet.read_table(output / "sources.parquet").to_pylist()}
    clips: dict[str, list[dict]] = {}
    for row in parquet.read_table(output / "manifest.parquet").to_pylist():
        clips.setdefault(row["path"], []).append(row)
    found = []
    for source in made:
        path = str(folder / source.name)
        found += [f"{source.name}: {line}" for line in _of_source(sources[path], clips.get(path, []), source)]
    return found


def _of_source(row: dict, clips: list[dict], source: Made) -> list[str]:
    if source.refused or row["reason"]:
        good = bool(source.refused) and row["reason"].startswith(source.refused)
        return [] if good else [f"reason {row['reason']!r}, must begin with {source.refused!r}"]
    tiers = tuple(clip["tier"] for clip in clips)
    lines = [] if tiers == source.tiers else [f"tiers {tiers}, must be {source.tiers}: {[_scores(c) for c in clips]}"]
    spans = tuple((clip["first_frame"], clip["frames"]) for clip in clips)
    if source.spans and spans != source.spans:
        lines.append(f"frames {spans}, must be {source.spans}")
    for clip in clips:  # nested: a clip is in its tier and in all below
        passed = [name for name in TIERS if not clip[f"reason_{name}"]]
        if passed != list(TIERS[: len(passed)]) or (passed[-1] if passed else "") != clip["tier"]:
            lines.append(f"in {passed}, though its tier is {clip['tier']!r}")
    return lines


def _scores(clip: dict) -> dict:
    names = ("reason", "similarity", "motion_px", "ocr", "aesthetic")
    return {name: clip[name] for name in names if clip.get(name) is not None}
