"""The bytes of a rank's file in memory that its writer process sees, too: filled again at each save."""

import mmap
import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from goku_mega.checkpoint.save_plan import SavePlan
from goku_mega.checkpoint.torch_file import torch_head


class SharedImage:
    """Anonymous shared memory of `size` bytes. It has no name that a killed process could leave behind."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("goku-checkpoint")
        weakref.finalize(self, os.close, self.fd)
        self.size = size
        os.ftruncate(self.fd, size)
        # Populated now, so that no save pays for the first touch of a page.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self.memory = mmap.mmap(self.fd, size, flags=flags) if size else None

    def view(self, start: int, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose numbers lie in the image from byte `start`."""
        assert self.memory is not None
        count = torch.Size(sizes).numel()
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=start).view(tuple(sizes))

    def put(self, start: int, content: bytes) -> None:
        """Write bytes that stay for all saves."""
        assert self.memory is not None
        self.memory[start : start + len(content)] = content

    @property
    def content(self) -> memoryview:
        """The image itself, not a copy."""
        return memoryview(b"") if self.memory is None else memoryview(self.memory)


class Snapshot:
    """Copies the pieces of a plan from live tensors into a file's image, beside the training that goes on."""

    def __init__(self, plan: SavePlan, tensors: dict[str, Tensor]) -> None:
        """
        Args:
            tensors: this rank's boxes by stored name; their memory must stay where it is.
        """
        self.image = SharedImage(plan.file_bytes)
        self.sources: list[Tensor] = []
        self.targets: list[Tensor] = []
        for piece in plan.pieces:
            tensor = tensors[piece.box.name].detach()
            self.image.put(piece.head, torch_head(piece.box.dtype, piece.sizes))
            self.sources.append(tensor[piece.slices] if piece.slices else tensor)
            self.targets.append(self.image.view(piece.data, piece.sizes, tensor.dtype))
        self._gpu = next((_GpuCopy(self.image, source.device) for source in self.sources if source.is_cuda), None)

    def begin(self) -> None:
        """Say that the tensors are ready to be read: what runs before this on the current GPU stream is waited for."""
        if self._gpu is not None:
            self._gpu.begin()

    def copy(self) -> None:
        """Fill the image; returns when it is whole. Runs in a thread: torch copies without holding Python's lock."""
        if not self.sources:
            return
        if self._gpu is not None:
            self._gpu.copy(self.targets, self.sources)
        else:
            with torch.no_grad():
                torch._foreach_copy_(self.targets, self.sources)


class _GpuCopy:
    """Copies on a stream of its own into the image, whose pages are pinned for the GPU."""

    def __init__(self, image: SharedImage, device: torch.device) -> None:
        pages = image.view(0, (image.size,), torch.uint8)
        error = torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), image.size, 0)
        if int(error) != 0:
            raise MemoryError(f"{image.size} bytes of host memory cannot be pinned for the GPU (CUDA error {error})")
        self.stream = torch.cuda.Stream(device)

    def begin(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        with torch.no_grad(), torch.cuda.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        self.stream.synchronize()
