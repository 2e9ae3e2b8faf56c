"""Checks that configurations make of themselves, once, at the door: one line that names the setting and what to do.

Configurations are frozen dataclasses with the units in the names. The parts of the program receive their own section
or single values, never a whole run.
"""

import re

from goku_mega.errors import ConfigError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_at_least(smallest: int, config: object, *names: str, section: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= smallest, f"{section}{name} is {value}; it must be {smallest} or more")


def require_side(name: str, pixels: int) -> None:
    """Height or width: the codec's stride of 8, and patches of two cells."""
    require(pixels >= 16 and pixels % 16 == 0, f"{name} is {pixels}; it must be a multiple of 16")


def require_clip_length(frames: int) -> None:
    """The codec's strides: one latent frame for the first frame, one for every four after it."""
    require(frames >= 1 and frames % 4 == 1, f"frames is {frames}; use 1 for an image, or 4n + 1: 5, 9, 13, ...")


def part_of(slice: str) -> tuple[int, int]:
    """(number, parts) of a task's share of the work, `0/8` to `7/8`."""
    match = re.fullmatch(r"(\d+)/(\d+)", slice)
    number, parts = map(int, match.groups()) if match else (0, 0)
    require(number < parts, f"slice is {slice!r}; write number/parts, the number from 0: 0/8 to 7/8")
    return number, parts
