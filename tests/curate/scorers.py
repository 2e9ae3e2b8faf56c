"""Scorers of a user, for the tests of hooks."""

import numpy as np

NUMBER = 3


def brightness(frames):
    return frames.mean((1, 2, 3)) / 255


def one_for_all(frames):
    return 0.5


def too_high(frames):
    return [1.5] * len(frames)


def not_a_number(frames):
    return np.full(len(frames), np.nan)


def words(frames):
    return ["good"] * len(frames)
