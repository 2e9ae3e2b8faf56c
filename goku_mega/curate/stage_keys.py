"""Which settings a score depends on: a short hash for every stage, of its own settings and of those before it.

A changed model or setting changes the hash of its stage and of the stages that read what it made, and of no other.
"""

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from goku_mega.config.curation import CurateConfig

VERSIONS = {
    "probe": 1, "standardise": 1, "shots": 1, "similarity": 1, "clips": 1, "hashes": 1, "alike": 1, "aesthetic": 1,
    "ocr": 1, "motion": 1, "nsfw": 1, "watermark": 1, "caption": 1, "tags": 1,
}  # fmt: skip
"""Raised where a stage's code gives other scores than before."""

AFTER = {
    "standardise": ("probe",),
    "shots": ("standardise",),
    "similarity": ("standardise",),
    "clips": ("shots", "similarity"),
    "hashes": ("standardise",),
    "alike": ("clips", "hashes"),
    "aesthetic": ("standardise",),
    "ocr": ("standardise",),
    "motion": ("standardise",),
    "nsfw": ("standardise",),
    "watermark": ("standardise",),
    "caption": ("standardise",),
    "tags": ("standardise",),
}
"""What each stage reads. Clips are known by their frames, so what cut them is in their key, not in the settings'."""

WHERE_NOT_WHAT = {"device", "server", "api_key_file", "request_timeout_s"}
"""Settings that say where something is computed, not what."""

MODELS = {
    "embedder",
    "clip",
    "head",
    "weights",
    "scorer",
    "key_frame_model",
    "clip_model",
    "merge_model",
    "model",
    "classes",
}
"""Settings that name files, whose content counts."""


END_BYTES = 2**20


def stage_keys(config: CurateConfig) -> dict[str, str]:
    """The hash of every stage that the configuration switches on, by the stage's name."""
    own = _own_settings(config)
    keys: dict[str, str] = {}

    def key(stage: str) -> str:
        if stage not in keys:
            before = [key(earlier) for earlier in AFTER.get(stage, ())]
            text = json.dumps([stage, VERSIONS[stage], own.get(stage, {}), before], sort_keys=True)
            keys[stage] = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        return keys[stage]

    return {stage: key(stage) for stage in VERSIONS if _is_on(stage, config)}


def _is_on(stage: str, config: CurateConfig) -> bool:
    on = {
        "aesthetic": bool(config.aesthetic.clip),
        "ocr": config.ocr.enabled,
        "nsfw": bool(config.nsfw.scorer),
        "watermark": bool(config.watermark.scorer),
        "caption": config.caption.source != "none",
        "tags": bool(config.tags.model),
    }
    return on.get(stage, True)


def _own_settings(config: CurateConfig) -> dict[str, dict[str, Any]]:
    thresholds, key_frames = config.thresholds, asdict(config.key_frames)
    split = asdict(config.split)
    where_split = split.pop("at")
    sizes = [(tier.short_side_min_px, tier.long_side_min_px, tier.similarity_min) for tier in thresholds.tiers.values()]
    settings: dict[str, dict[str, Any]] = {
        "standardise": asdict(config.standardise),
        "shots": asdict(config.shots),
        "similarity": split,
        "clips": {
            "at": where_split, "tiers": sizes, "tolerance": thresholds.long_side_tolerance, **asdict(config.length),
        },
        "hashes": key_frames,
        "alike": asdict(config.dedup),
        "motion": asdict(config.motion),
    }  # fmt: skip
    for stage in ("aesthetic", "ocr", "nsfw", "watermark"):
        settings[stage] = asdict(getattr(config, stage)) | {"key_frames": key_frames}
    caption = asdict(config.caption)
    caption.pop("motion_text")
    settings["caption"] = caption | {"key_frames": key_frames}
    settings["tags"] = asdict(config.tags)
    return {stage: _what(values) for stage, values in settings.items()}


def _what(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name not in WHERE_NOT_WHAT}
    return {name: model_key(value) if name in MODELS else value for name, value in kept.items()}


@functools.cache
def model_key(name: str) -> str:
    """A name that is no file or folder here, else a hash that tells whether its content has changed."""
    path = Path(name.removeprefix("classifier:").partition("#")[0])
    if not name or not path.exists():
        return name
    digest = xxhash.xxh3_64(name.partition("#")[2].encode())
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}".encode())
            digest.update(_ends_of(file))
    return digest.hexdigest()


def _ends_of(path: Path) -> bytes:
    """First and last bytes: weights of many gigabytes are not read whole to be told from others."""
    with path.open("rb") as file:
        first = file.read(END_BYTES)
        file.seek(max(len(first), path.stat().st_size - END_BYTES))
        return first + file.read()
