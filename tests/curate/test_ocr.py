"""Text is found, and its box is the ink's, whatever lies behind it; where there is no text, nothing is found."""

from pathlib import Path

import numpy as np
import pytest
from clips import pictures_as_clip, write_and_open
from made_media import Texture, still
from PIL import Image, ImageDraw, ImageFont

from goku_mega.config.curation import OcrConfig
from goku_mega.curate.stages.ink import Box, ink_box
from goku_mega.curate.stages.ocr import Ocr, bounding_box

SIZE = (480, 854)
WORDS = "BREAKING NEWS"


@pytest.fixture(scope="module")
def ocr() -> Ocr:
    return Ocr(OcrConfig())


def lettered(ground: np.ndarray, font_px: int, place: tuple[int, int] = (90, 200)) -> tuple[np.ndarray, Box]:
    """White words on a ground, and the box of their ink."""
    mask = Image.new("L", ground.shape[1::-1])
    ImageDraw.Draw(mask).text(place, WORDS, fill=255, font=ImageFont.load_default(size=font_px))
    ink = np.asarray(mask) > 127
    picture = Image.fromarray(ground)
    picture.paste((250, 250, 250), mask=mask)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return np.asarray(picture), Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def plain(level: int) -> np.ndarray:
    return np.full((*SIZE, 3), level, np.uint8)


@pytest.mark.parametrize("font_px", [24, 40, 64])
@pytest.mark.parametrize("ground", ["plain", "textured"])
def test_coverage_is_the_inks_in_compressed_footage(ocr: Ocr, ground: str, font_px: int, tmp_path: Path) -> None:
    behind = plain(70) if ground == "plain" else Texture(seed=3, finest_px=20, contrast=20).at(SIZE)
    picture, box = lettered(behind, font_px)
    clip = write_and_open(tmp_path / "text.mp4", still(3, picture), key_frames=(0, 2))
    share = box.area / (SIZE[0] * SIZE[1])
    score = ocr.score(clip)
    assert score.coverage == max(score.per_frame) and len(score.per_frame) == 2
    assert abs(score.coverage - share) <= 0.06 * share


def test_the_largest_text_of_any_key_frame_counts(ocr: Ocr, tmp_path: Path) -> None:
    small, _ = lettered(plain(60), 24)
    large, box = lettered(small, 56, (90, 320))
    score = ocr.score(pictures_as_clip(tmp_path, np.stack([plain(60), small, large])))
    assert score.per_frame[0] == 0 < score.per_frame[1] < score.per_frame[2] == score.coverage
    assert abs(score.coverage * SIZE[0] * SIZE[1] - box.area) <= 0.06 * box.area


def test_a_score_is_the_same_bit_for_bit_beside_other_frames(ocr: Ocr, tmp_path: Path) -> None:
    frames = np.stack([lettered(Texture(seed=seed, contrast=20).at(SIZE), 40)[0] for seed in range(2)])
    together = ocr.score(pictures_as_clip(tmp_path, frames)).per_frame
    assert list(together) == [ocr.score(pictures_as_clip(tmp_path, frame[None])).coverage for frame in frames]


@pytest.mark.parametrize("seed", range(2))
def test_a_picture_without_letters_has_no_text(ocr: Ocr, seed: int, tmp_path: Path) -> None:
    score = ocr.score(pictures_as_clip(tmp_path, Texture(seed=seed).at(SIZE)[None]))
    assert score.coverage < 0.004


@pytest.mark.parametrize("grown", [(0, 0), (3, 3), (9, 6), (-3, -2)])
def test_a_box_about_the_ink_is_drawn_in_to_it(grown: tuple[int, int]) -> None:
    picture, box = lettered(Texture(seed=1, contrast=15).at(SIZE), 40)
    rough = Box(box.left - grown[0], box.top - grown[1], box.right + grown[0], box.bottom + grown[1])
    assert np.abs(np.subtract(ink_box(picture, rough), box)).max() <= 1


def test_a_box_without_a_colour_of_its_own_stays_as_it_is() -> None:
    box = Box(100, 100, 300, 150)
    assert ink_box(plain(90), box) == box
    assert ink_box(Texture(seed=2).at(SIZE), box).area <= 1.5 * box.area


def test_boxes_are_straight_and_inside_the_frame() -> None:
    corners = np.array([[-4.0, 10.2], [50.0, 3.0], [60.5, 40.0], [2.0, 48.9]])
    assert bounding_box(corners, (45, 60)) == Box(0, 3, 60, 45)
