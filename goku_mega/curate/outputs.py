"""What curation leaves for others: manifest and sources as Parquet, captions for `goku-mega encode`, a report.

The same bytes for the same scores and settings; every file appears whole.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
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
from goku_mega.curate.scores import ScoreStore
from goku_mega.curate.stage_keys import stage_keys
from goku_mega.curate.stages.tags import read_classes
from goku_mega.data.shards import write_whole

MANIFEST = "manifest.parquet"
SOURCES = "sources.parquet"
CAPTIONS = "captions.jsonl"


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
    rows = _caption_rows(clips, store, keys, config)
    write_whole(output / CAPTIONS, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return _counts(verdicts)


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
            weights=parse_weights(about.weights, classes),
            max_repeat=about.max_repeat, size=about.size, seed=about.seed,
        )  # fmt: skip
    return clips.append_column("repeat", arrow.array(repeats))


def _caption_rows(
    clips: arrow.Table, store: ScoreStore, keys: Mapping[str, str], config: CurateConfig
) -> Iterator[dict[str, Any]]:
    """What `goku-mega encode` reads: the kept clips that have a caption, as ranges of their files."""
    clips = clips.filter(compute.and_(compute.not_equal(clips["tier"], ""), compute.greater(clips["repeat"], 0)))
    if "caption" in keys:
        clips = clips.filter(compute.is_valid(clips["caption"]))
    standard = store.table("standardise", keys["standardise"])
    as_it_is = standard["as_it_is"].take(compute.index_in(clips["source_key"], standard["key"])).to_pylist()
    names = [name for name in ("caption", "motion_px") if name in clips.column_names]
    wanted = ["key", "source_key", "path", "kind", "first_frame", "frames", "tier", "repeat", *names]
    for row, is_source in zip(clips.select(wanted).to_pylist(), as_it_is, strict=True):
        caption = row.get("caption", "")
        if config.caption.motion_text and row.get("motion_px") is not None:
            caption = with_motion(caption, row["motion_px"])
        made = standard_path(Path(), row["source_key"], keys["standardise"])
        file = str(made) if is_source is False else str(Path(row["path"]).resolve())
        about = {"key": row["key"], "file": file, "caption": caption, "tier": row["tier"], "repeat": row["repeat"]}
        span = {} if row["kind"] == "image" else {"first_frame": row["first_frame"], "frames": row["frames"]}
        yield about | span


def _write_table(path: Path, table: arrow.Table) -> None:
    buffer = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata(None), buffer)
    write_whole(path, buffer.getvalue())


def _counts(verdicts: Verdicts) -> dict[str, Any]:
    """Counts of sources and clips by reason, and of clips by tier."""
    reasons = [*_by_reason("source", verdicts.sources["reason"]), *_by_reason("clip", verdicts.clips["reason"])]
    tiers = {f"in_{name}": int(reason.passes.sum()) for name, reason in verdicts.by_tier.items()}
    return {"clips": len(verdicts.clips), "kept": int(verdicts.kept.sum()), **tiers, "reasons": reasons}


def _by_reason(what: str, column: arrow.ChunkedArray) -> list[dict[str, Any]]:
    counted = compute.value_counts(column.cast(arrow.string())).to_pylist()
    rows = sorted(((row["counts"], row["values"]) for row in counted if row["values"]), reverse=True)
    return [{"what": what, "refused": count, "reason": reason} for count, reason in rows]
