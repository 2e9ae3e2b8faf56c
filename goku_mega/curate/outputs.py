"""What curation leaves for others: manifest and sources as Parquet, captions for `goku-mega encode`, a report.

The same bytes for the same scores and settings; every file appears whole.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from pyarrow import compute, parquet

from goku_mega.config.curation import CurateConfig
from goku_mega.curate.balance import balance, parse_weights
from goku_mega.curate.manifest import Verdicts, judge_all
from goku_mega.curate.motion_text import with_motion
from goku_mega.curate.pipeline import standard_path
from goku_mega.curate.report import ReportData, write_report
from goku_mega.curate.rules import Reasons
from goku_mega.curate.scores import ScoreStore
from goku_mega.curate.stage_keys import stage_keys
from goku_mega.curate.stages.tags import OTHER, read_classes
from goku_mega.data.whole_files import write_whole

MANIFEST = "manifest.parquet"
SOURCES = "sources.parquet"
CAPTIONS = "captions.jsonl"
REPORT = "report"
BOUNDS = {
    "similarity": ("similarity_min",), "motion_px": ("motion_min_px", "motion_max_px"), "ocr": ("ocr_max",),
    "aesthetic": ("aesthetic_min",),
}  # fmt: skip
"""Score -> its thresholds in a tier."""


def write_outputs(
    config: CurateConfig, store: ScoreStore, paths: Sequence[str], contents: Sequence[str | None]
) -> dict[str, Any]:
    """Judge everything and write it down; counts for the operator."""
    keys = stage_keys(config)
    verdicts = judge_all(store, keys, config, paths, contents)
    output = Path(config.output)
    clips = _with_repeats(verdicts, config)
    _write_table(output / SOURCES, verdicts.sources)
    _write_table(output / MANIFEST, clips)
    lines = _caption_lines(clips, verdicts.sources, store, keys, config)
    write_whole(output / CAPTIONS, lines)
    write_report(output / REPORT, _report(verdicts, clips, config))
    return {"captions": lines.count(b"\n"), **_counts(verdicts)}


def _with_repeats(verdicts: Verdicts, config: CurateConfig) -> arrow.Table:
    """The manifest with how often each clip is taken: kept ones once, or balanced where they have tags."""
    clips = verdicts.clips
    repeats = verdicts.kept.astype(np.int64)
    if "primary" in clips.column_names:
        tagged = verdicts.kept & compute.is_valid(clips["primary"]).to_numpy(zero_copy_only=False)
        rows = clips.filter(arrow.array(tagged))
        about = config.balance
        classes = read_classes(Path(config.tags.classes) if config.tags.classes else None)
        repeats = np.zeros(len(clips), dtype=np.int64)
        repeats[tagged] = balance(
            *(rows[name].to_pylist() for name in ("key", "primary", "subclass")),
            weights=parse_weights(about.weights, (*classes, OTHER)),
            max_repeat=about.max_repeat, size=about.size, seed=about.seed,
        )  # fmt: skip
    return clips.append_column("repeat", arrow.array(repeats))


def _caption_lines(
    clips: arrow.Table, sources: arrow.Table, store: ScoreStore, keys: Mapping[str, str], config: CurateConfig
) -> bytes:
    """What `goku-mega encode` reads, a line of JSON a clip: the kept clips that have a caption, as ranges of files."""
    clips = clips.filter(compute.and_(compute.not_equal(clips["tier"], ""), compute.greater(clips["repeat"], 0)))
    if "caption" in keys:
        clips = clips.filter(compute.is_valid(clips["caption"]))
    if not len(clips):
        return b""
    file = clips["source_key"].combine_chunks().dictionary_encode()
    files = arrow.array(_files(file.dictionary, sources, store, keys)).take(file.indices)
    captions = _captions(clips, config)
    # All at once, then apart again: a line break is never inside of JSON's texts.
    captions_json = arrow.array(json.dumps(captions, separators=("\n", ":"))[1:-1].split("\n"))
    first, frames, repeat = (_text(clips[name]) for name in ("first_frame", "frames", "repeat"))
    span = _joined(', "first_frame": ', first, ', "frames": ', frames)
    span = compute.if_else(compute.equal(clips["kind"].combine_chunks(), "image"), "", span)
    lines = _joined(
        '{"key": "', clips["key"].combine_chunks(), '", "file": ', files, ', "caption": ', captions_json,
        ', "tier": "', _text(clips["tier"]), '", "repeat": ', repeat, span, "}\n",
    )  # fmt: skip
    return b"".join(_bytes_of(chunk) for chunk in arrow.chunked_array([lines]).chunks)


def _joined(*parts: Any) -> Any:
    """Texts, and columns of texts, one behind the other, row by row."""
    large = [arrow.scalar(part, arrow.large_string()) if isinstance(part, str) else part.cast(arrow.large_string())
             for part in parts]  # fmt: skip
    return compute.binary_join_element_wise(*large, arrow.scalar("", arrow.large_string()))


def _text(column: arrow.ChunkedArray) -> arrow.Array:
    return column.cast(arrow.string()).combine_chunks()


def _bytes_of(lines: arrow.Array) -> bytes:
    """The texts of an array are one after the other in its memory."""
    ends = np.frombuffer(lines.buffers()[1], dtype=np.int64)[lines.offset : lines.offset + len(lines) + 1]
    return memoryview(lines.buffers()[2])[ends[0] : ends[-1]].tobytes()


def _files(of: arrow.Array, sources: arrow.Table, store: ScoreStore, keys: Mapping[str, str]) -> list[str]:
    """The file with the frames of each source, as JSON: the source, or the standardised one in the output."""
    standard = store.table("standardise", keys["standardise"], ("as_it_is",))
    as_it_is = standard["as_it_is"].take(compute.index_in(of, standard["key"])).to_pylist()  # null: an image
    paths = sources["path"].take(compute.index_in(of, sources["source_key"])).to_pylist()
    settings = keys["standardise"]
    return [
        json.dumps(str(standard_path(Path(), key, settings)) if is_source is False else os.path.abspath(path))
        for key, path, is_source in zip(of.to_pylist(), paths, as_it_is, strict=True)
    ]


def _captions(clips: arrow.Table, config: CurateConfig) -> list[str]:
    """Captions with their motion scores."""
    captions = clips["caption"].to_pylist() if "caption" in clips.column_names else [""] * len(clips)
    if not config.caption.motion_text or "motion_px" not in clips.column_names:
        return captions
    motions = clips["motion_px"].to_pylist()
    return [
        caption if motion is None else with_motion(caption, motion)
        for caption, motion in zip(captions, motions, strict=True)
    ]


def _write_table(path: Path, table: arrow.Table) -> None:
    buffer = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata(None), buffer)
    write_whole(path, buffer.getvalue())


def _report(verdicts: Verdicts, clips: arrow.Table, config: CurateConfig) -> ReportData:
    scores = [*BOUNDS, "nsfw", "watermark"]
    tiers = config.thresholds.tiers
    marks = {
        score: [(name, getattr(tier, bound)) for name, tier in tiers.items() for bound in bounds]
        for score, bounds in BOUNDS.items()
    }
    before, after = _classes(clips) if "primary" in clips.column_names else ({}, {})
    return ReportData(
        funnel={name: _funnel(verdicts, reasons) for name, reasons in verdicts.by_tier.items()},
        scores={
            name: clips[name].cast(arrow.float64()).to_numpy(zero_copy_only=False)
            for name in scores
            if name in clips.column_names
        },
        thresholds=marks | {"nsfw": [("all", config.thresholds.nsfw_max)],
                            "watermark": [("all", config.thresholds.watermark_max)]},
        classes_before=before, classes_after=after,
    )  # fmt: skip


def _funnel(verdicts: Verdicts, reasons: Reasons) -> list[tuple[str, int]]:
    """What is left after each rule that took any: first of sources, then of the clips that they were cut into."""
    left = len(verdicts.sources)
    steps = [("sources", left)]
    for row in _by_reason("source", verdicts.sources["reason"]):
        left -= row["refused"]
        steps.append((row["reason"], left))
    left = len(reasons.codes)
    steps.append(("clips", left))
    counts = np.bincount(reasons.codes, minlength=len(reasons.texts))
    for text, count in list(zip(reasons.texts, counts.tolist(), strict=True))[1:]:
        if count:
            left -= count
            steps.append((text, left))
    return steps


def _classes(clips: arrow.Table) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
    """Clips of each class that are kept, and how many there are when each counts as often as it is taken."""
    kept = clips.filter(compute.and_(compute.not_equal(clips["tier"], ""), compute.is_valid(clips["primary"])))
    table = kept.select(["primary", "subclass", "repeat"]).group_by(["primary", "subclass"])
    rows = table.aggregate([("repeat", "sum"), ("repeat", "count")]).to_pylist()
    before = {(row["primary"], row["subclass"]): row["repeat_count"] for row in rows}
    return before, {(row["primary"], row["subclass"]): row["repeat_sum"] for row in rows}


def _counts(verdicts: Verdicts) -> dict[str, Any]:
    """Counts of sources and clips by reason, and of clips by tier."""
    reasons = [*_by_reason("source", verdicts.sources["reason"]), *_by_reason("clip", verdicts.clips["reason"])]
    tiers = {f"in_{name}": int(reason.passes.sum()) for name, reason in verdicts.by_tier.items()}
    return {"clips": len(verdicts.clips), "kept": int(verdicts.kept.sum()), **tiers, "reasons": reasons}


def _by_reason(what: str, column: arrow.ChunkedArray) -> list[dict[str, Any]]:
    counts: dict[str, int] = {}
    for row in compute.value_counts(column).to_pylist():
        if row["values"]:
            counts[row["values"]] = counts.get(row["values"], 0) + row["counts"]
    return [
        {"what": what, "refused": count, "reason": reason}
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
