"""A hook of the tests that hangs, dies or fails over the pictures it was told to; see `HookConfig.scorer`."""

import os
import signal
import time

import numpy as np


def _is_still(frames: np.ndarray) -> bool:
    """The pictures of small_corpus' still.mp4: nothing moves from one key frame to the next."""
    return len(frames) > 1 and int(np.abs(frames[0].astype(int) - frames[1]).max()) < 12


def harmless(frames: np.ndarray) -> list[float]:
    return [float(frame.mean()) / 2550 for frame in frames]


def hangs(frames: np.ndarray) -> list[float]:
    if _is_still(frames):
        time.sleep(3600)
    return harmless(frames)


def dies(frames: np.ndarray) -> list[float]:
    if _is_still(frames):
        os.kill(os.getpid(), signal.SIGKILL)
    return harmless(frames)


def fails(frames: np.ndarray) -> list[float]:
    if _is_still(frames):
        raise RuntimeError("no memory left")
    return harmless(frames)


def always_fails(frames: np.ndarray) -> list[float]:
    raise RuntimeError("no such driver")
