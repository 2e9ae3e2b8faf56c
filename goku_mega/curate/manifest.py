"""Scores to verdicts on all clips, as tables: what is kept, in which tier, and why the rest is not.

No file of pixels is opened and no model runs here, so a threshold is moved in seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as arrow
from numpy.typing import NDArray
from pyarrow import compute

from goku_mega.config.curation import CurateConfig, RawThresholds
from goku_mega.curate.pipeline import COLUMNS, VIDEO_STAGES
from goku_mega.curate.rules import NOT_SCORED, Reasons, duplicates, judge, raw_rules, tier_rules
from goku_mega.curate.scores import ScoreStore

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Keys = Mapping[str, str]
"""Settings of every stage that is on."""

DUPLICATE = "duplicate"
SAME_CONTENT = "same content as an earlier file"
TEXTS = {"caption": ("caption",), "tags": ("primary", "subclass")}


@dataclass(frozen=True)
class Verdicts:
    """Sources and clips with what became of them."""

    sources: arrow.Table
    """A row a file, by path: content key, facts, reason; without a reason it was cut into clips."""
    clips: arrow.Table
    """A row a clip, by key: frames, scores, tier, reasons, caption, tags."""
    by_tier: Mapping[str, Reasons]
    """Tier -> why every clip is not in it."""
    kept: Bools
    """[clips]; in any tier."""


def judge_all(
    store: ScoreStore, keys: Keys, config: CurateConfig, paths: Sequence[str], contents: Sequence[str | None]
) -> Verdicts:
    """Verdicts on the sources at these paths and on their clips.

    Args:
        contents: key of each path's content; None where it is not known.
    """
    sources = _sources(store, keys, config.thresholds.raw, paths, contents)
    clips, wanted = _clips(store, keys, sources)
    columns, is_image, missing = _columns(store, keys, clips)
    # After the look-up of scores: it is quick where the keys are those of the tables.
    clips = clips.filter(arrow.array(wanted))
    columns = {name: values[wanted] for name, values in columns.items()}
    is_image, missing = is_image[wanted], missing[wanted]
    thresholds = config.thresholds
    by_tier = {
        name: judge(columns, tier_rules(tier, thresholds), is_image=is_image, missing=missing)
        for name, tier in thresholds.tiers.items()
    }
    in_any = np.logical_or.reduce([reasons.passes for reasons in by_tier.values()])
    gone = _duplicates(store, keys, clips, in_any, columns.get("aesthetic", np.full(len(in_any), np.nan)))
    by_tier = {name: _with_duplicates(reasons, gone) for name, reasons in by_tier.items()}
    kept = in_any.copy()
    kept[list(gone)] = False
    for name, values in columns.items():
        if name not in clips.column_names:
            clips = clips.append_column(name, arrow.array(values, from_pandas=True))
    clips = _add_verdicts(clips, by_tier, kept, gone)
    return Verdicts(sources, _with_texts(store, keys, clips), by_tier, kept)


def _sources(
    store: ScoreStore, keys: Keys, raw: RawThresholds, paths: Sequence[str], contents: Sequence[str | None]
) -> arrow.Table:
    """The files with their facts, and why each is not cut into clips."""
    table = arrow.table(
        {"path": arrow.array(paths, arrow.string()), "source_key": arrow.array(contents, arrow.string())}
    )
    facts = store.table("probe", keys["probe"])
    place = compute.index_in(table["source_key"], facts["key"])
    for name in facts.column_names[1:]:
        table = table.append_column(name, facts[name].take(place))
    probed = _true(compute.is_valid(place))
    columns = {name: _floats(table[name]) for name in ("duration_s", "bitrate_bps", "frame_rate", "height", "width")}
    columns["short_side_px"] = np.minimum(columns.pop("height"), columns.pop("width"))
    is_image = _true(compute.equal(table["kind"], "image"))
    refused = judge(columns, raw_rules(raw), is_image=is_image, missing=~probed)
    reasons = np.array(refused.texts, dtype=object)[refused.codes]
    aside = _aside(store, keys, table)
    kinds = np.array([f"set aside in {row['stage']}: {row['kind']}" if row else "" for row in aside], dtype=object)
    reasons = np.where((kinds != "") & (~probed | (reasons == "")), kinds, reasons)
    cut = _true(compute.is_in(table["source_key"], value_set=store.table("clips", keys["clips"], ())["key"]))
    reasons[(reasons == "") & ~cut] = NOT_SCORED
    reasons[_again(table["source_key"])] = SAME_CONTENT
    table = table.append_column("reason", arrow.array(reasons, arrow.string()))
    details = [row["reason"] if row else "" for row in aside]
    return table.append_column("detail", arrow.array(details, arrow.string()))


def _aside(store: ScoreStore, keys: Keys, sources: arrow.Table) -> list[dict[str, Any] | None]:
    """The row of each source that was set aside, by its content or, where that could not be read, by its path."""
    rows = store.table("set_aside", "").to_pylist()
    current = {row["key"]: row for row in rows if keys.get(row["stage"], "") == row["settings"] and row["reason"]}
    if not current:
        return [None] * len(sources)
    both = zip(sources["source_key"].to_pylist(), sources["path"].to_pylist(), strict=True)
    return [current.get(key) or current.get(path) for key, path in both]


def _again(keys: arrow.ChunkedArray) -> Bools:
    """Whether a key was there before, [rows]."""
    first = compute.index_in(keys, keys.unique()).to_numpy(zero_copy_only=False)
    known = _true(compute.is_valid(keys))
    _, where = np.unique(first, return_index=True)
    again = np.ones(len(first), dtype=bool)
    again[where] = False
    return again & known


def _clips(store: ScoreStore, keys: Keys, sources: arrow.Table) -> tuple[arrow.Table, Bools]:
    """All clips that were ever cut with these settings, by key, and which are of a source that has no reason."""
    cut = store.table("clips", keys["clips"])
    parent = compute.list_parent_indices(cut["firsts"].combine_chunks())
    first, frames = (compute.list_flatten(cut[name]).combine_chunks() for name in ("firsts", "frames"))
    of_source = cut["key"].combine_chunks().take(parent)
    good = sources.filter(compute.equal(sources["reason"], ""))
    place = compute.index_in(cut["key"], good["source_key"])
    about = good.select(["path", "kind", "height", "width", "frame_rate"]).take(place.combine_chunks().take(parent))
    table = {
        "key": compute.binary_join_element_wise(of_source, _padded(first, 7), _padded(frames, 5), "-"),
        "source_key": of_source, **{name: about[name] for name in about.column_names}, "first_frame": first,
        "frames": frames, "similarity": compute.list_flatten(cut["similarity"]),
    }  # fmt: skip
    return arrow.table(table), _true(compute.is_valid(about["path"]))


def _padded(numbers: Any, width: int) -> Any:
    return compute.utf8_lpad(numbers.cast(arrow.string()), width, "0")


def _columns(store: ScoreStore, keys: Keys, clips: arrow.Table) -> tuple[dict[str, Floats], Bools, Bools]:
    """The rules' columns, which clips are images, and which have not all of their scores."""
    is_image = _true(compute.equal(clips["kind"], "image"))
    missing = np.zeros(len(clips), dtype=bool)
    height, width = _floats(clips["height"]), _floats(clips["width"])
    columns = {
        "short_side_px": np.minimum(height, width), "long_side_px": np.maximum(height, width),
        "similarity": _floats(clips["similarity"]),
    }  # fmt: skip
    for stage, (column, field) in COLUMNS.items():
        if stage in keys:
            columns[column] = _floats(_joined(store, keys, stage, field, clips["key"]))
            unscored = np.isnan(columns[column])
            missing |= unscored & ~is_image if stage in VIDEO_STAGES else unscored
    return columns, is_image, missing


def _joined(store: ScoreStore, keys: Keys, stage: str, field: str, of: arrow.ChunkedArray) -> arrow.ChunkedArray:
    """A field of a stage's scores for these keys; null where there is none."""
    table = store.table(stage, keys[stage], (field,))
    if table["key"].equals(of):  # as after every complete run; a look-up of each key takes ten times longer
        return table[field]
    return table[field].take(compute.index_in(of, table["key"]))


def _duplicates(store: ScoreStore, keys: Keys, clips: arrow.Table, kept: Bools, aesthetic: Floats) -> dict[int, int]:
    """Kept clips that give way, each with the alike clip that stays."""
    table = store.table("alike", keys["alike"])
    table = table.filter(compute.greater(compute.list_value_length(table["ones"]), 0))
    if not len(table) or not len(clips):
        return {}
    starts = compute.index_in(table["key"], clips["source_key"])  # the first clip of each source
    table = table.filter(compute.is_valid(starts))
    starts = starts.drop_null().to_numpy(zero_copy_only=False).astype(np.int64)
    parent = compute.list_parent_indices(table["ones"].combine_chunks()).to_numpy(zero_copy_only=False)
    ones, others = (
        compute.list_flatten(table[name]).to_numpy(zero_copy_only=False) + starts[parent] for name in ("ones", "others")
    )
    return duplicates(kept, ones, others, aesthetic)


def _with_duplicates(reasons: Reasons, gone: Mapping[int, int]) -> Reasons:
    codes = reasons.codes.copy()
    places = np.fromiter(gone, dtype=np.int64, count=len(gone))
    codes[places[reasons.passes[places]]] = len(reasons.texts)
    return replace(reasons, codes=codes, texts=(*reasons.texts, DUPLICATE))


def _add_verdicts(
    clips: arrow.Table, by_tier: Mapping[str, Reasons], kept: Bools, gone: Mapping[int, int]
) -> arrow.Table:
    tier = np.zeros(len(clips), dtype=np.int64)
    for number, reasons in enumerate(by_tier.values(), start=1):
        tier[reasons.passes] = number
    lowest = next(iter(by_tier.values()))
    clips = clips.append_column("tier", _words(tier, ("", *by_tier)))
    clips = clips.append_column("reason", _words(np.where(kept, 0, lowest.codes), lowest.texts))
    for name, reasons in by_tier.items():
        clips = clips.append_column(f"reason_{name}", _words(reasons.codes, reasons.texts))
    places = np.full(len(clips), -1, dtype=np.int64)
    places[list(gone.keys())] = list(gone.values())
    staying = arrow.array(places, mask=places < 0)
    return clips.append_column("duplicate_of", clips["key"].take(staying))


def _with_texts(store: ScoreStore, keys: Keys, clips: arrow.Table) -> arrow.Table:
    """The clips with their captions and classes."""
    for stage, fields in TEXTS.items():
        if stage in keys:
            for field in fields:
                clips = clips.append_column(field, _joined(store, keys, stage, field, clips["key"]))
    return clips


def _words(codes: NDArray[Any], texts: Sequence[str]) -> arrow.Array:
    """Few texts for many rows."""
    return arrow.DictionaryArray.from_arrays(arrow.array(codes.astype(np.int16)), arrow.array(texts, arrow.string()))


def _floats(column: Any) -> Floats:
    """Null is NaN."""
    values: Floats = column.cast(arrow.float64()).to_numpy(zero_copy_only=False)
    return values


def _true(column: Any) -> Bools:
    """Null is false."""
    values: Bools = compute.fill_null(column, False).to_numpy(zero_copy_only=False).astype(bool)
    return values
