"""One source through all stages: what is known already is taken, what is missing is computed and handed out.

Cheap rules come first (paper 4.2): a source that table 3 refuses is opened by no later stage. Captions and tags, the
dearest stages, are made for the clips alone that everything else keeps.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from goku_mega.config.curation import CurateConfig
from goku_mega.curate.clip import Clip, Footage
from goku_mega.curate.rules import duplicates, judge, raw_reason, split_threshold, tier_rules
from goku_mega.curate.scores import Fields
from goku_mega.curate.stage_keys import stage_keys
from goku_mega.curate.stages.hashes import alike
from goku_mega.curate.stages.length import key_frame_numbers, windows
from goku_mega.curate.stages.probe import ProbeScore, probe
from goku_mega.curate.stages.shots import spans
from goku_mega.curate.stages.similarity import split_frames
from goku_mega.curate.stages.standardise import StandardScore, standardise

Known = Mapping[str, Mapping[str, Fields]]
"""Stage -> key -> score, of one source."""

STANDARD = "standard"
CLIP_STAGES = ("hashes", "motion", "ocr", "aesthetic", "nsfw", "watermark")
"""Stages that score every clip by itself, the cheapest first."""
VIDEO_STAGES = frozenset({"motion"})
COLUMNS = {
    "motion": ("motion_px", "mean_px"), "ocr": ("ocr", "coverage"), "aesthetic": ("aesthetic", "mean"),
    "nsfw": ("nsfw", "highest"), "watermark": ("watermark", "highest"),
}  # fmt: skip
"""Stage -> the rules' column, and the field of the score that goes into it."""


@dataclass(frozen=True)
class Source:
    """A file to curate."""

    path: Path
    key: str
    """Hash of its content."""


@dataclass(frozen=True)
class ClipsScore:
    """A source cut into clips."""

    firsts: tuple[int, ...]
    """First frame of each."""
    frames: tuple[int, ...]
    similarity: tuple[float, ...]
    """Lowest cosine of neighbouring samples inside each; 1 where there are no two."""


@dataclass(frozen=True)
class AlikeScore:
    """Pairs of alike clips of a source, by their numbers."""

    ones: tuple[int, ...]
    others: tuple[int, ...]


class Listener(Protocol):
    """Hears of the work on a source: what begins, and what was found."""

    def begins(self, stage: str) -> None:
        """Work on a stage begins."""

    def found(self, stage: str, key: str, score: Fields, seconds: float) -> None:
        """A stage's score, and how long it took."""


class Incomplete(Exception):
    """Something is missing, where it was only asked whether."""


class _Asking:
    """A listener that only wants to know whether anything begins."""

    def begins(self, stage: str) -> None:
        raise Incomplete

    def found(self, stage: str, key: str, score: Fields, seconds: float) -> None:
        raise AssertionError(f"{stage} was found without having begun")


class Pipeline:
    """The stages of a configuration, each loaded when it is first needed."""

    def __init__(self, config: CurateConfig) -> None:
        self.config = config
        self.keys = stage_keys(config)
        self._stages: dict[str, Any] = {}

    def is_complete(self, source: Source, known: Known) -> bool:
        """Whether nothing is left to compute of a source."""
        try:
            self.process(source, known, _Asking())
        except Incomplete:
            return False
        return True

    def process(self, source: Source, known: Known, listener: Listener) -> None:
        """Compute what is not known of a source; what is found goes to the listener at once.

        Raises:
            MediaError: the source cannot be decoded.
        """
        with _Work(self, source, known, listener) as work:
            work.run()

    def stage(self, name: str) -> Any:
        """A stage with its model."""
        if name not in self._stages:
            self._stages[name] = self._load(name)
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)  # workers are the parallelism
        return self._stages[name]

    def _load(self, name: str) -> Any:
        """Each with what it alone needs installed."""
        config = self.config
        match name:
            case "shots":
                from goku_mega.curate.stages.shots import Shots

                return Shots(config.shots)
            case "similarity":
                from goku_mega.curate.stages.similarity import Similarity

                return Similarity(config.split)
            case "hashes":
                from goku_mega.curate.stages.hashes import Hashes

                return Hashes()
            case "motion":
                from goku_mega.curate.stages.motion import Motion

                return Motion(config.motion)
            case "ocr":
                from goku_mega.curate.stages.ocr import Ocr

                return Ocr(config.ocr)
            case "aesthetic":
                from goku_mega.curate.stages.aesthetic import Aesthetic

                return Aesthetic(config.aesthetic)
            case "nsfw" | "watermark":
                from goku_mega.curate.stages.hooks import Hook

                return Hook(getattr(config, name))
            case "caption":
                from goku_mega.curate.stages.caption import Caption

                return Caption(config.caption)
            case "tags":
                from goku_mega.curate.stages.tags import Tags

                return Tags(config.tags)
        raise AssertionError(f"there is no stage {name}")


def standard_path(output: Path, source_key: str, settings: str) -> Path:
    """Where the standardised file of a source is, by its content and the settings it was made with."""
    return output / STANDARD / source_key[:2] / f"{source_key}-{settings}.mp4"


def clip_key(source_key: str, first: int, frames: int) -> str:
    """Keys of a source's clips are in the order of the clips."""
    return f"{source_key}-{first:07d}-{frames:05d}"


class _Work(contextlib.AbstractContextManager["_Work"]):
    """The work on one source, in the order of the stages."""

    def __init__(self, pipeline: Pipeline, source: Source, known: Known, listener: Listener) -> None:
        self.pipeline, self.config = pipeline, pipeline.config
        self.source, self.known, self.listener = source, known, listener
        self.footage = Footage(source.path)
        self.computed: dict[tuple[str, str], Fields] = {}
        self.write_standard: Callable[[], StandardScore] | None = None

    def __exit__(self, *error: object) -> None:
        self.footage.close()

    def run(self) -> None:
        facts = ProbeScore(**self.get("probe", self.source.key, lambda: probe(self.source.path)))
        if raw_reason(asdict(facts), self.config.thresholds.raw):
            return
        cut = self.clips(facts)
        rate = facts.frame_rate or 1.0
        per_second = self.config.key_frames.per_second
        clips = [
            Clip(
                clip_key(self.source.key, first, frames), self.footage, first, frames, rate,
                key_frame_numbers(first, frames, rate, per_second),
            )
            for first, frames in zip(cut.firsts, cut.frames, strict=True)
        ]  # fmt: skip
        kept = self.kept(facts, cut, clips, [self.clip_scores(clip) for clip in clips])
        for clip in (clip for clip, is_kept in zip(clips, kept, strict=True) if is_kept):
            if "caption" in self.pipeline.keys:
                self.get("caption", clip.key, functools.partial(self.caption, clip))
            if "tags" in self.pipeline.keys:
                self.get("tags", clip.key, functools.partial(self.score, "tags", clip))

    def score(self, stage: str, *what: Any) -> Any:
        return self.stage(stage).score(*what)

    def caption(self, clip: Clip) -> Any:
        return self.stage("caption").score(clip, self.source.path)

    def clips(self, facts: ProbeScore) -> ClipsScore:
        """Standardise the source, find its shots, part them where the picture changes, cut them to length."""
        key = self.source.key
        if facts.kind == "image":
            return ClipsScore(**self.get("clips", key, lambda: ClipsScore((0,), (1,), (1.0,))))
        target = standard_path(Path(self.config.output), key, self.pipeline.keys["standardise"])
        self.write_standard = functools.partial(standardise, self.source.path, target, facts, self.config.standardise)
        standard = StandardScore(**self.get("standardise", key, self.write_standard))
        if not standard.as_it_is:
            self.footage = Footage(target)
        rate = standard.frame_rate
        cuts = self.get("shots", key, lambda: self.score("shots", self.footage, rate))["cuts"]
        shots = spans(cuts, standard.frames)
        scores = {
            shot: self.get(
                "similarity", clip_key(key, *shot),
                functools.partial(self.score, "similarity", self.footage, *shot, rate),
            )
            for shot in shots
        }  # fmt: skip
        return ClipsScore(**self.get("clips", key, lambda: self.cut(facts, standard, scores)))

    def cut(self, facts: ProbeScore, standard: StandardScore, shots: Mapping[tuple[int, int], Fields]) -> ClipsScore:
        """Shots parted and cut to length, with the lowest cosine that is left inside each clip."""
        config = self.config
        threshold = split_threshold(standard.height, standard.width, config.split.at, config.thresholds)
        found = []
        for (first, frames), score in shots.items():
            samples, cosines = score["sample_frames"], score["cosines"]
            for part in split_frames(first, frames, samples, cosines, threshold):
                for start, length in windows(
                    *part, standard.frame_rate, max_s=config.length.max_s, min_s=config.length.min_s
                ):
                    inside = [
                        cosine
                        for cosine, before, after in zip(cosines, samples, samples[1:], strict=False)
                        if start <= before and after < start + length
                    ]
                    found.append((start, length, min(inside, default=1.0)))
        firsts, lengths, lowest = zip(*found, strict=True) if found else ((), (), ())
        return ClipsScore(firsts, lengths, lowest)

    def clip_scores(self, clip: Clip) -> dict[str, float]:
        """The rules' columns of one clip; its decoded key frames are let go of after it."""
        columns = {}
        for stage in CLIP_STAGES:
            if stage in self.pipeline.keys and not (clip.is_image and stage in VIDEO_STAGES):
                score = self.get(stage, clip.key, functools.partial(self.score, stage, clip))
                if stage in COLUMNS:
                    column, field = COLUMNS[stage]
                    columns[column] = score[field]
        clip.__dict__.pop("key_frames", None)
        return columns

    def kept(
        self, facts: ProbeScore, cut: ClipsScore, clips: Sequence[Clip], scores: Sequence[Mapping[str, float]]
    ) -> list[bool]:
        """Which clips are in any tier, and give way to no alike one."""
        columns = {
            column: np.array([score.get(column, np.nan) for score in scores], dtype=np.float64)
            for column, _ in COLUMNS.values()
        }
        count = len(clips)
        columns["similarity"] = np.array(cut.similarity, dtype=np.float64)
        columns["short_side_px"] = np.full(count, min(facts.height, facts.width), dtype=np.float64)
        columns["long_side_px"] = np.full(count, max(facts.height, facts.width), dtype=np.float64)
        thresholds = self.config.thresholds
        is_image, missing = np.full(count, facts.kind == "image"), np.zeros(count, dtype=bool)
        passes = [
            judge(columns, tier_rules(tier, thresholds), is_image=is_image, missing=missing).passes
            for tier in thresholds.tiers.values()
        ]
        kept = np.logical_or.reduce(passes)
        pairs = self.get("alike", self.source.key, lambda: self.alike(clips))
        ones, others = (np.array(pairs[name], dtype=np.int64) for name in ("ones", "others"))
        for number in duplicates(kept, ones, others, columns["aesthetic"]):
            kept[number] = False
        return [bool(is_kept) for is_kept in kept]

    def alike(self, clips: Sequence[Clip]) -> AlikeScore:
        hashes = [self.get("hashes", clip.key, lambda: None)["hashes"] for clip in clips]
        pairs = alike(hashes, self.config.dedup)
        return AlikeScore(tuple(one for one, _ in pairs), tuple(other for _, other in pairs))

    def stage(self, name: str) -> Any:
        """A stage that is about to look at the source; a standardised file that was removed is made again."""
        if self.write_standard is not None and not self.footage.path.exists():
            self.write_standard()
        return self.pipeline.stage(name)

    def get(self, stage: str, key: str, compute: Callable[[], Any]) -> Fields:
        """A score that is known, or else is computed and told of."""
        known = self.known.get(stage, {}).get(key) or self.computed.get((stage, key))
        if known is not None:
            return known
        self.listener.begins(stage)
        began = time.monotonic()
        score = self.computed[stage, key] = asdict(compute())
        self.listener.found(stage, key, score, time.monotonic() - began)
        return score
