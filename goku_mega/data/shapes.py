"""The corpus of shapes: real, captioned clips and images of moving shapes whose truth is known exactly.

One object (three shapes, six colours, still or moving in four directions), and a harder level with
two objects in stated places on textured grounds. `data.shape_detector` reads the truth back.
"""

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goku_mega.config.data import CorpusConfig
from goku_mega.data.shape_drawing import distance, draw_ground, extent
from goku_mega.data.workers import end_with_parent
from goku_mega.errors import ConfigError, DataError
from goku_mega.media.write import write_image, write_video
from goku_mega.seeding import derive_seed

logger = logging.getLogger(__name__)

Frames = NDArray[np.uint8]

SHAPES = ("circle", "square", "triangle")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 44, 44),
    "green": (44, 170, 66),
    "blue": (54, 84, 228),
    "yellow": (236, 206, 44),
    "purple": (168, 60, 204),
    "cyan": (44, 202, 212),
}
MOTIONS = ("still", "left", "right", "up", "down")
DIRECTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = {None: "", "left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
FPS = 8

VARIED_SIZES = ((64, 96), (96, 64), (48, 80), (80, 48), (80, 80), (64, 64))
VARIED_FRAMES = (5, 9, 13)
MARGIN_PX = 2.0
BASE_SIDE_PX = 64
"""Radii and speeds are given for a picture of this shorter side and grow with it."""


@dataclass(frozen=True)
class ShapeObject:
    """What a caption states of one object; `position` only where there are two."""

    shape: str
    color: str
    motion: str
    position: str | None = None


@dataclass(frozen=True)
class Scene:
    """The truth of one clip or image."""

    objects: tuple[ShapeObject, ...]

    @property
    def level(self) -> str:
        return "one" if len(self.objects) == 1 else "two"

    def to_json(self) -> dict[str, Any]:
        return {"level": self.level, "objects": [asdict(item) for item in self.objects]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Scene":
        return cls(tuple(ShapeObject(**item) for item in data["objects"]))


def is_held_out(item: ShapeObject) -> bool:
    """15 of the 90 (shape, colour, motion) triples never occur in training; every pair of them does."""
    color = list(COLORS).index(item.color)
    return color < 5 and (color + 2 * SHAPES.index(item.shape)) % 5 == MOTIONS.index(item.motion)


def all_objects() -> list[ShapeObject]:
    """The 90 triples in a fixed order."""
    return [ShapeObject(*triple) for triple in product(SHAPES, COLORS, MOTIONS)]


def write_corpus(config: CorpusConfig) -> dict[str, Any]:
    """Write videos, images, captions and held-out prompts; the same bytes for the same config.

    Raises:
        ConfigError: sizes the encoder cannot take.
        DataError: the output folder holds another corpus, or cannot be written.
    """
    _check(config)
    folder = Path(config.output)
    if (folder / "captions.jsonl").exists():
        if _settings_of(folder) != _settings(config):
            raise DataError(f"{folder} holds a corpus made with other settings; remove it or give another output")
        logger.info("%s is complete already", folder)
        return {"output": str(folder), "videos": config.videos, "images": config.images}
    try:
        for name in ("videos", "images"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot make the folder ({error.strerror}); give another output") from error
    kinds = [("video", n) for n in range(config.videos)] + [("image", n) for n in range(config.images)]
    rows = list(_write_all(config, folder, kinds))
    _write_lines(folder / "prompts.jsonl", prompts(config.level))
    _write_text(folder / "corpus.json", json.dumps(_settings(config), indent=1))
    _write_lines(folder / "captions.jsonl", sorted(rows, key=lambda row: row["key"]))
    return {"output": str(folder), "videos": config.videos, "images": config.images}


def prompts(level: str) -> list[dict[str, Any]]:
    """Prompts for evaluation: every seen and held-out triple, and a fixed draw of scenes with two objects."""
    scenes: list[Scene] = []
    if level in ("one", "mixed"):
        scenes += [Scene((item,)) for item in all_objects()]
    if level in ("two", "mixed"):
        drawn = [_draw_two(True, np.random.default_rng(derive_seed("prompts", n))) for n in range(60)]
        scenes += dict.fromkeys(drawn)
    return [
        {
            "prompt": plain_caption(scene),
            "level": scene.level,
            "split": "held_out" if any(map(is_held_out, scene.objects)) else "seen",
            "truth": scene.to_json(),
        }
        for scene in scenes
    ]


def draw_scene(level: str, is_video: bool, rng: np.random.Generator) -> Scene:
    """A scene of the training distribution."""
    if level == "one":
        choices = [item for item in all_objects() if not (is_video and is_held_out(item))]
        item = choices[rng.integers(len(choices))]
        return Scene((item if is_video else replace(item, motion="still"),))
    scene = _draw_two(is_video, rng)
    while is_video and any(map(is_held_out, scene.objects)):
        scene = _draw_two(is_video, rng)
    return scene


def _draw_two(is_video: bool, rng: np.random.Generator) -> Scene:
    """Two objects of different colours side by side or one above the other, held-out triples included."""
    first, second = rng.choice(list(COLORS), 2, replace=False)
    sideways = bool(rng.integers(2))
    places = ("left", "right") if sideways else ("top", "bottom")
    # An object keeps its place when it moves across the line between the two.
    motions = ("still", "up", "down") if sideways else ("still", "left", "right")
    objects = []
    for color, place in zip((first, second), places, strict=True):
        motion = motions[rng.integers(3)] if is_video else "still"
        objects.append(ShapeObject(SHAPES[rng.integers(3)], str(color), motion, place))
    return Scene(tuple(objects))


def plain_caption(scene: Scene) -> str:
    """The plainest caption of a video, also the evaluation's prompt."""
    return " and ".join(_phrase(item, PLACES[item.position], is_video=True) for item in scene.objects)


def _phrase(item: ShapeObject, place: str, *, is_video: bool) -> str:
    motion = "standing still" if item.motion == "still" else f"moving {item.motion}"
    return " ".join(filter(None, (f"a {item.color} {item.shape}", place, motion if is_video else "")))


def caption(scene: Scene, seed: int, *, is_video: bool) -> str:
    """One of several wordings of the truth; an image's does not speak of motion."""
    rng = np.random.default_rng(seed)
    if len(scene.objects) == 2:
        wordings = _wordings_two(scene, is_video)
        return wordings[rng.integers(len(wordings))]
    item = scene.objects[0]
    thing = f"{item.color} {item.shape}"
    if not is_video:
        wordings = [f"a {thing}", f"an image of a {thing}", f"a single {thing} on a plain ground", f"one {thing}"]
    elif item.motion == "still":
        wordings = [
            plain_caption(scene), f"a {thing} that does not move", f"a still {thing} on a plain ground",
            f"one {thing} at rest", f"a video of a {thing} standing still",
        ]  # fmt: skip
    else:
        wordings = [
            plain_caption(scene), f"a {thing} moves {item.motion}", f"one {thing} drifting {item.motion}",
            f"a video of a {thing} moving {item.motion}", f"a {thing} going {item.motion} on a plain ground",
        ]  # fmt: skip
    # The plain wording is a third of all captions.
    return wordings[0] if rng.random() < 1 / 3 else wordings[1 + int(rng.integers(len(wordings) - 1))]


def _wordings_two(scene: Scene, is_video: bool) -> list[str]:
    """Places in the picture, or of one object from the other's; the first object is the left or upper one."""
    placed = " and ".join(_phrase(item, PLACES[item.position], is_video=is_video) for item in scene.objects)
    first, second = (_phrase(item, "", is_video=is_video) for item in scene.objects)
    before, after = ("left of", "right of") if scene.objects[0].position == "left" else ("above", "below")
    return [
        placed, f"{placed}, on a textured ground", f"two objects: {placed}",
        f"{first}, {before} {second}", f"{second}, {after} {first}",
    ]  # fmt: skip


def render_clip(scene: Scene, *, seed: int, frames: int, height: int, width: int) -> Frames:
    """Draw a scene: [frames, height, width, 3]. Size, place, speed and ground follow the seed."""
    rng = np.random.default_rng(seed)
    ground = draw_ground(rng, height, width, textured=len(scene.objects) == 2)  # [height, width, 3]
    clip = np.repeat(ground[None], frames, axis=0)
    y, x = np.mgrid[0:height, 0:width] + 0.5
    scale = min(height, width) / BASE_SIDE_PX
    for item in scene.objects:
        room = _room(item.position, height, width)
        radius = rng.uniform(*((10.0, 16.0) if len(scene.objects) == 1 else (8.0, 10.5))) * scale
        speed = rng.uniform(2.0, 3.4) * scale
        track = _track(item, radius, speed, frames, room, rng)  # [frames, 2]
        color = np.clip(np.array(COLORS[item.color]) + rng.uniform(-10, 10, 3), 0, 255)
        for frame, (cx, cy) in zip(clip, track, strict=True):
            cover = np.clip(0.5 - distance(item.shape, x - cx, y - cy, radius), 0, 1)[..., None]
            frame += cover * (color - frame)
    return np.clip(np.rint(clip), 0, 255).astype(np.uint8)


def _room(position: str | None, height: int, width: int) -> tuple[float, float, float, float]:
    """The part of the frame an object stays in: left, right, top, bottom, px."""
    left, right, top, bottom = 0.0, float(width), 0.0, float(height)
    if position == "left":
        right = width / 2
    elif position == "right":
        left = width / 2
    elif position == "top":
        bottom = height / 2
    elif position == "bottom":
        top = height / 2
    return left + MARGIN_PX, right - MARGIN_PX, top + MARGIN_PX, bottom - MARGIN_PX


def _track(
    item: ShapeObject,
    radius: float,
    speed: float,
    frames: int,
    room: tuple[float, float, float, float],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """The centre (x, y) in every frame, so that the object never leaves its room: [frames, 2].

    Args:
        speed: px a frame; less where the room is too short for it.
    """
    side, up, down = extent(item.shape, radius)
    low = np.array([room[0] + side, room[2] + up])
    high = np.maximum(low, np.array([room[1] - side, room[3] - down]))
    direction = np.array(DIRECTIONS[item.motion], dtype=float)
    space = float(np.abs(direction) @ (high - low))
    steps = max(1, frames - 1)
    travel = direction * min(speed * steps, space)
    first = low + np.maximum(0, -travel)
    start = rng.uniform(first, np.maximum(high - np.maximum(0, travel), first))
    return start + np.linspace(0, 1, frames)[:, None] * (travel if frames > 1 else 0)


def _write_all(config: CorpusConfig, folder: Path, kinds: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    tasks = [(config, folder, kind, number) for kind, number in kinds]
    if config.workers == 1:
        yield from map(_write_one, tasks)
        return
    with ProcessPoolExecutor(config.workers, mp_context=get_context("forkserver"), initializer=end_with_parent) as pool:
        yield from pool.map(_write_one, tasks, chunksize=32)


def _write_one(task: tuple[CorpusConfig, Path, str, int]) -> dict[str, Any]:
    """Write one clip or image; its row of captions.jsonl."""
    config, folder, kind, number = task
    is_video = kind == "video"
    key = f"{kind}-{number:06d}"
    rng = np.random.default_rng(derive_seed(config.seed, "clip", key))
    level = ("one", "two")[int(rng.integers(2))] if config.level == "mixed" else config.level
    scene = draw_scene(level, is_video, rng)
    height, width, frames = config.height, config.width, config.frames
    if rng.random() < config.varied_fraction:
        height, width = VARIED_SIZES[rng.integers(len(VARIED_SIZES))]
        frames = VARIED_FRAMES[rng.integers(len(VARIED_FRAMES))]
    seed = derive_seed(config.seed, "render", key)
    clip = render_clip(scene, seed=seed, frames=frames if is_video else 1, height=height, width=width)
    file = f"videos/{number:06d}.mp4" if is_video else f"images/{number:06d}.png"
    if is_video:
        write_video(folder / file, clip, FPS)
    else:
        write_image(folder / file, clip[0])
    words = caption(scene, derive_seed(config.seed, "caption", key), is_video=is_video)
    return {"key": key, "file": file, "caption": words, "kind": kind, "truth": scene.to_json()}


def _check(config: CorpusConfig) -> None:
    for name in ("height", "width"):
        if getattr(config, name) % 16 or getattr(config, name) < 48:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be a multiple of 16, 48 or more")
    if config.frames % 4 != 1 or config.frames < 5:
        raise ConfigError(f"frames is {config.frames}; it must be 4n + 1, 5 or more")
    if config.videos + config.images < 1:
        raise ConfigError("videos and images are both 0; ask for at least one")


def _settings(config: CorpusConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in ("output", "workers")}


def _settings_of(folder: Path) -> Any:
    try:
        return json.loads((folder / "corpus.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}/corpus.json cannot be read ({error}); remove the folder or give another") from error


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    _write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
