"""`goku-mega curate` and `goku-mega curate filter`: sources to scores, scores to verdicts, captions and a report."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from goku_mega.config.curation import CurateConfig
from goku_mega.curate.engine import Event, Found, SetAside, Teller
from goku_mega.curate.outputs import write_outputs
from goku_mega.curate.pipeline import AlikeScore, ClipsScore, Pipeline, Source
from goku_mega.curate.progress import Progress
from goku_mega.curate.scores import ScoreStore, schema_of
from goku_mega.curate.sources import CONTENT, ContentScore, find_sources, unhashed
from goku_mega.errors import DataError

logger = logging.getLogger(__name__)

SET_ASIDE = "set_aside"
MOST_FAILURES_IN_A_ROW = 20
"""As many sources without one success between them are not the sources' fault."""


@dataclass(frozen=True)
class SetAsideScore:
    """Why a source came to nothing."""

    kind: str
    """As in `engine.SetAside`."""
    stage: str
    settings: str
    """Of that stage; under others the source is tried again."""
    reason: str


@dataclass(frozen=True)
class Task:
    """A source with what is known of it."""

    source: Source
    known: Mapping[str, Mapping[str, Any]]


def curate(config: CurateConfig) -> dict[str, Any]:
    """Score what has no scores yet; then, unless this is one slice of several, write the verdicts.

    Raises:
        DataError: there are no sources, the output cannot be written, or everything fails.
        ConfigError, MissingExtra: a stage cannot be had as it was asked for.
    """
    began = time.monotonic()
    paths = find_sources(Path(config.videos), config.part)
    pipeline = Pipeline(config)
    with open_store(config) as store:
        done = _score(config, pipeline, store, paths)
    result: dict[str, Any] = {"output": config.output, "sources": len(paths), **done}
    if config.part[1] == 1:
        result |= filter_clips(config)
    return result | {"seconds": round(time.monotonic() - began, 1)}


def filter_clips(config: CurateConfig) -> dict[str, Any]:
    """Write verdicts, captions and report from the scores that there are; no stage runs.

    Raises:
        DataError: there are no sources or no scores.
    """
    paths = find_sources(Path(config.videos), (0, 1))
    with open_store(config) as store:
        table = store.table(CONTENT, "")
        contents = dict(zip(table["key"].to_pylist(), table["content"].to_pylist(), strict=True))
        return write_outputs(config, store, paths, [contents.get(path) for path in paths])


def open_store(config: CurateConfig) -> ScoreStore:
    """The scores of a configuration's output folder."""
    return ScoreStore(Path(config.output), {stage: schema_of(kind) for stage, kind in score_kinds().items()})


def score_kinds() -> dict[str, type]:
    """The dataclass of every stage's scores."""
    from goku_mega.curate.stages.aesthetic import AestheticScore
    from goku_mega.curate.stages.caption import CaptionScore
    from goku_mega.curate.stages.hashes import HashScore
    from goku_mega.curate.stages.hooks import HookScore
    from goku_mega.curate.stages.motion import MotionScore
    from goku_mega.curate.stages.ocr import OcrScore
    from goku_mega.curate.stages.probe import ProbeScore
    from goku_mega.curate.stages.shots import ShotsScore
    from goku_mega.curate.stages.similarity import SimilarityScore
    from goku_mega.curate.stages.standardise import StandardScore
    from goku_mega.curate.stages.tags import TagScore

    return {
        CONTENT: ContentScore, SET_ASIDE: SetAsideScore, "probe": ProbeScore, "standardise": StandardScore,
        "shots": ShotsScore, "similarity": SimilarityScore, "clips": ClipsScore, "hashes": HashScore,
        "alike": AlikeScore, "motion": MotionScore, "ocr": OcrScore, "aesthetic": AestheticScore, "nsfw": HookScore,
        "watermark": HookScore, "caption": CaptionScore, "tags": TagScore,
    }  # fmt: skip


class Worker:
    """A worker of the engine: a pipeline with its models, in a process of its own."""

    def __init__(self, config: CurateConfig) -> None:
        self.pipeline = Pipeline(config)

    def __call__(self, task: Task, teller: Teller) -> None:
        self.pipeline.process(task.source, task.known, teller)


def _score(config: CurateConfig, pipeline: Pipeline, store: ScoreStore, paths: Sequence[str]) -> dict[str, int]:
    """Content of all files, then whatever is missing of all sources; how many were worked on and set aside."""
    notes = _Notes(pipeline.keys, store)
    known = {row.pop("key"): ContentScore(**row) for row in store.table(CONTENT, "").to_pylist()}
    new = unhashed(paths, known)
    for event in _run(config, "content", new, "goku_mega.curate.sources:make_hasher", ()):
        notes.take(event, key=event.task)
        if isinstance(event, Found):
            known[event.key] = ContentScore(**event.score)
        elif isinstance(event, SetAside):
            known.pop(event.task, None)  # what it was is not what it is
    sources: dict[str, Source] = {}
    for path in paths:
        if path in known:
            content = known[path].content
            sources.setdefault(content, Source(Path(path), content))
    tasks = list(_tasks(config, pipeline, store, sources.values(), notes))
    for event in _run(config, "curate", tasks, "goku_mega.curate.curate:Worker", (config,)):
        notes.take(event, key=event.task.source.key)
    return {"worked_on": len(tasks), "set_aside": notes.set_aside}


def _tasks(
    config: CurateConfig, pipeline: Pipeline, store: ScoreStore, sources: Iterable[Source], notes: "_Notes"
) -> Iterator[Task]:
    """The sources of which something is missing, with what is known of them."""
    for source in sources:
        if notes.is_aside(source.key) and not config.retry:
            continue
        known = {stage: store.of_source(stage, key, source.key) for stage, key in pipeline.keys.items()}
        if not pipeline.is_complete(source, known):
            yield Task(source, known)


def _run(
    config: CurateConfig, what: str, tasks: Sequence[Any], factory: str, arguments: tuple[Any, ...]
) -> Iterator[Event]:
    """The engine's events, shown as they come."""
    if not tasks:
        return
    if config.engine == "ray":
        from goku_mega.curate.engine_ray import run_ray as run
    else:
        from goku_mega.curate.engine import run_local as run
    workers = min(config.workers, len(tasks))
    with Progress(what, len(tasks), workers) as progress:
        for event in run(tasks, factory, arguments, workers=workers, time_limit_s=config.time_limit_s):
            progress.hear(event)
            yield event


class _Notes:
    """Events into the store."""

    def __init__(self, keys: Mapping[str, str], store: ScoreStore) -> None:
        self.keys, self.store = keys, store
        self.aside = {row.pop("key"): SetAsideScore(**row) for row in store.table(SET_ASIDE, "").to_pylist()}
        self.set_aside = 0
        self._failures = 0

    def is_aside(self, key: str) -> bool:
        """Whether a source was set aside by a stage that would do the same again."""
        row = self.aside.get(key)
        return row is not None and bool(row.reason) and row.settings == self.keys.get(row.stage, "")

    def take(self, event: Event, key: str) -> None:
        """
        Args:
            key: of the event's source.

        Raises:
            DataError: one source after the other fails, and not for its own sake.
        """
        if isinstance(event, Found):
            self.store.add(event.stage, self.keys.get(event.stage, ""), event.key, event.score)
        elif isinstance(event, SetAside):
            self._put_aside(event, key)
        else:
            self._failures = 0
            if key in self.aside and self.aside[key].reason:
                self.store.add(SET_ASIDE, "", key, asdict(SetAsideScore("", "", "", "")))

    def _put_aside(self, event: SetAside, key: str) -> None:
        row = SetAsideScore(event.kind, event.stage, self.keys.get(event.stage, ""), event.reason)
        self.store.add(SET_ASIDE, "", key, asdict(row))
        self.set_aside += 1
        logger.warning("set aside in stage %s: %s", event.stage, event.reason)
        self._failures += event.kind != "media"
        if self._failures == MOST_FAILURES_IN_A_ROW:
            raise DataError(
                f"{self._failures} sources in a row came to nothing, the last in stage {event.stage}: {event.reason}; "
                "mend what they have in common, and run the command again with retry=true"
            )
