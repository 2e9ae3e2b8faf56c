"""Video frames by number through NVIDIA DALI: on a GPU by its video engine (NVDEC), or on the CPU."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from goku_mega.errors import ConfigError, MediaError, MissingExtra
from goku_mega.media.indexed import IndexedVideo
from goku_mega.media.orientation import stored_size, upright
from goku_mega.media.video import Frames, one_line


class DaliVideo(IndexedVideo):
    """One open video file; its bytes are mapped, and decoded anew at every call.

    What DALI reads depends on its release and on the device: on the CPU, 2.1.0 is the last to read H.264 and
    HEVC; MPEG-4 and AV1 are read on a GPU only. A file with damaged pictures can end the whole process inside
    DALI (seen with 2.1.0): hand it files that were decoded before, such as standardised clips.
    """

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        """
        Args:
            device: "cpu", "cuda" or "cuda:N". Frames come back to the host.

        Raises:
            MediaError: as `PyAvVideo`.
            MissingExtra: DALI is not installed.
            ConfigError: there is no such device.
        """
        self._device_id = _device_id(device)
        self._device = device
        _dali()
        super().__init__(path)
        self._encoded = np.memmap(path, dtype=np.uint8, mode="r")

    def _decode(self, numbers: Sequence[int], size: tuple[int, int] | None) -> Frames:
        matrix = self._known.orientation
        fed = {"encoded": self._encoded, "numbers": np.array(numbers, dtype=np.int32)}
        if size is not None:
            fed["size"] = np.array(stored_size(size, matrix), dtype=np.float32)
        try:
            pipeline = _pipeline(self._device_id, scaled=size is not None)
            for name, value in fed.items():
                pipeline.feed_input(name, [value])
            (output,) = pipeline.run()
            stored = np.array(output.as_cpu()[0])
        except RuntimeError as error:
            _pipeline.cache_clear()  # a pipeline does not outlive its first failure
            raise self._failure(error) from error
        if len(stored) != len(numbers):
            raise MediaError(f"{self.path}: DALI decodes {len(stored)} of {len(numbers)} frames; use backend pyav")
        return upright(stored, matrix)

    def _failure(self, error: RuntimeError) -> MediaError:
        told = str(error).partition("encountered:")[2].strip().splitlines()
        reason = told[0] if told else one_line(error, self.path)
        return MediaError(
            f"{self.path}: DALI {_dali().__version__} cannot decode this {self._known.codec} video on {self._device} "
            f"({reason}); use backend pyav"
        )


def _device_id(device: str) -> int | None:
    """None stands for the CPU."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ConfigError(f"DALI cannot decode on device {device!r}; use cpu, cuda or cuda:N")
    if kind == "cpu":
        return None
    import torch

    if not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(f"DALI cannot decode on {device}: this machine has {torch.cuda.device_count()} GPUs; use cpu")
    return int(number or 0)


def _dali() -> Any:
    try:
        import nvidia.dali
    except ImportError as error:
        raise MissingExtra(f"decoder dali needs NVIDIA DALI ({error}); pip install goku-mega[dali]") from error
    return nvidia.dali


@functools.cache
def _pipeline(device_id: int | None, *, scaled: bool) -> Any:
    """One file and the numbers of frames in, frames [numbers, height, width, 3] out; shared by all videos."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        numbers = fn.external_source(name="numbers", dtype=types.INT32, ndim=1)
        frames = fn.decoders.video(encoded, device="cpu" if device_id is None else "mixed", frames=numbers)
        if scaled:
            size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
            frames = fn.resize(frames, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(frames)
    pipeline.build()
    return pipeline
