import io
import math
import pickle
import pickletools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from goku_mega.checkpoint.index import ITEM_BYTES, Chunks, Index, StoredTensor, block_digests
from goku_mega.checkpoint.torch_file import torch_head
from goku_mega.checkpoint.torch_metadata import torch_metadata

MAX_DIMS = 5
SHAPES = ((), (1,), (7,), (5, 6), (1, 3, 4), (2, 3, 2, 5), (3, 2, 2, 3, 4))


def random_tensor(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Tensor:
    """Random bits of any meaning, so that only a bitwise copy is the same; of a bool 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    top = 2 if kind is torch.bool else 256
    raw = torch.randint(0, top, (math.prod(shape) * kind.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(kind).reshape(shape)


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_folder(folder: Path, tensors: dict[str, Tensor], files: int = 3) -> Index:
    """A checkpoint of `tensors`, in boxes cut along the first and the last dim, dealt out over `files`."""
    content = [bytearray() for _ in range(files)]
    names = sorted(tensors)
    rows = []
    for number, name in enumerate(names):
        for box in boxes_of(tuple(tensors[name].shape)):
            chunk = tensors[name][tuple(slice(start, end) for start, end in box)]
            file = content[len(rows) % files]
            file += bytes(-len(file) % 64)
            head = len(file)
            file += torch_head(str(chunk.dtype).removeprefix("torch."), tuple(chunk.shape))
            data = len(file)
            file += raw_bytes(chunk)
            unused = MAX_DIMS - len(box)
            offsets = [start for start, _ in box] + [0] * unused
            sizes = [end - start for start, end in box] + [1] * unused
            rows.append((number, len(rows) % files, head, data, offsets, sizes))
    columns = [np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)]
    chunks = Chunks(columns[0].astype(np.int32), columns[1].astype(np.int32), *columns[2:]).sorted()
    index = Index(
        tuple(
            StoredTensor(name, str(tensors[name].dtype).removeprefix("torch."), tuple(tensors[name].shape))
            for name in names
        ),
        tuple(f"__{file}_0.distcp" for file in range(files)),
        chunks,
        np.array([len(file) for file in content]),
        tuple(block_digests(file) for file in content),
    )
    for name, file in zip(index.files, content, strict=True):
        (folder / name).write_bytes(file)
    (folder / ".metadata").write_bytes(torch_metadata(index))
    return index


def boxes_of(shape: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    boxes: list[tuple[tuple[int, int], ...]] = [tuple((0, length) for length in shape)]
    for dim in {0, len(shape) - 1} if shape else ():
        cut = (shape[dim] + 1) // 2
        parts = [(0, cut), (cut, shape[dim])] if cut < shape[dim] else [(0, shape[dim])]
        boxes = [(*box[:dim], part, *box[dim + 1 :]) for box in boxes for part in parts]
    return boxes


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    cases = [(shape, dtype) for shape in SHAPES for dtype in ("float32", "bfloat16")]
    cases += [((4, 3), dtype) for dtype in ITEM_BYTES]
    return {
        f"model/{dtype}.{'x'.join(map(str, shape))}.größe": random_tensor(shape, dtype, seed)
        for seed, (shape, dtype) in enumerate(cases)
    }


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_a_head_and_numbers_are_a_file_that_torch_reads(dtype: str) -> None:
    for shape in (*SHAPES, (0,), (4, 0, 2), (70_000,)):
        tensor = random_tensor(shape, dtype)
        read = torch.load(io.BytesIO(torch_head(dtype, shape) + raw_bytes(tensor)), weights_only=True)
        assert (read.dtype, read.shape, read.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert raw_bytes(read) == raw_bytes(tensor)


def test_our_head_says_what_torchs_own_says() -> None:
    """The same program of the pickle machine up to where it keeps values, and the same storage length behind."""
    for shape in SHAPES:
        reference = io.BytesIO()
        tensor = random_tensor(shape, "bfloat16")
        torch.save(tensor, reference, _use_new_zipfile_serialization=False)
        ours = io.BytesIO(torch_head("bfloat16", shape) + raw_bytes(tensor))
        reference.seek(0)
        for _ in range(3):  # magic number, version, machine
            assert pickle.load(ours) == pickle.load(reference)
        parts = [[value for _, value, _ in pickletools.genops(file)] for file in (ours, reference)]
        meant = [[value for value in part if value is not None] for part in parts]
        globals_and_lengths = [[value for value in part if isinstance(value, str)] for part in meant]
        # torch makes up the storage's key
        assert [text for text in globals_and_lengths[0] if text != "0"] == [
            text for text in globals_and_lengths[1] if not text.isdigit()
        ]
        assert len(pickle.load(ours)) == len(pickle.load(reference)) == 1
        assert ours.read() == reference.read()


def test_torch_reads_a_chunk_in_the_middle_of_a_file(tmp_path: Path) -> None:
    first, second = random_tensor((3, 4), "float64"), random_tensor((5,), "int16", 1)
    pieces = [torch_head("float64", (3, 4)) + raw_bytes(first), torch_head("int16", (5,)) + raw_bytes(second)]
    file = tmp_path / "file"
    file.write_bytes(b"before" + pieces[0] + b"between" + pieces[1] + b"behind")
    with file.open("rb") as stream:
        for start, tensor in ((6, first), (6 + len(pieces[0]) + 7, second)):
            stream.seek(start)
            assert raw_bytes(torch.load(stream, weights_only=True)) == raw_bytes(tensor)


def test_a_dtype_without_a_storage_is_refused() -> None:
    with pytest.raises(ValueError, match="no float8_e4m3fn"):
        torch_head("float8_e4m3fn", (3,))


def test_the_pickle_is_the_metadata(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    index = write_folder(tmp_path, tensors)
    read = pickle.loads(torch_metadata(index))
    assert read == expected_metadata(index)
    # Equal is not enough: torch asks for these, and a Size is equal to a tuple.
    for stored in read.state_dict_metadata.values():
        assert type(stored.size) is torch.Size and type(stored.properties.dtype) is torch.dtype
        assert all(type(chunk.offsets) is type(chunk.sizes) is torch.Size for chunk in stored.chunks)
    assert all(type(key.offset) is torch.Size for key in read.storage_data)
    assert pickle.loads(pickle.dumps(read)) == read


def expected_metadata(index: Index) -> Metadata:
    state: dict[str, TensorStorageMetadata] = {
        tensor.name: TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, tensor.dtype)), torch.Size(tensor.shape), []
        )
        for tensor in index.tensors
    }
    storage = {}
    for row in range(len(index.chunks)):
        tensor = index.tensors[index.chunks.tensor[row]]
        dims = len(tensor.shape)
        offsets, sizes = (torch.Size(box[row, :dims].tolist()) for box in (index.chunks.offsets, index.chunks.sizes))
        state[tensor.name].chunks.append(ChunkStorageMetadata(offsets, sizes))
        head, data = int(index.chunks.head[row]), int(index.chunks.data[row])
        length = data + math.prod(sizes) * ITEM_BYTES[tensor.dtype] - head
        storage[MetadataIndex(tensor.name, offsets)] = _StorageInfo(index.files[index.chunks.file[row]], head, length)
    return Metadata(state, None, storage)


def test_numbers_of_more_than_four_bytes() -> None:
    """A tensor longer than 2**31, in a file longer than 2**32."""
    offsets = np.array([[0], [2**33]])
    chunks = Chunks(
        np.zeros(2, dtype=np.int32),
        np.array([1, 0], dtype=np.int32),
        np.array([2**40, 0]),
        np.array([2**40 + 320, 320]),
        offsets,
        np.array([[2**33], [5]]),
    )
    tensors = (StoredTensor("long", "uint8", (2**33 + 5,)),)
    index = Index(tensors, ("a", "b"), chunks, np.array([325, 2**40 + 320 + 2**33]), ())
    assert pickle.loads(torch_metadata(index)) == expected_metadata(index)


def test_a_checkpoint_without_tensors_and_a_tensor_without_elements() -> None:
    empty = np.zeros(0, dtype=np.int64)
    none = Chunks(empty.astype(np.int32), empty.astype(np.int32), empty, empty, *[empty.reshape(0, 1)] * 2)
    for tensors in ((), (StoredTensor("empty", "float32", (0,)),)):
        index = Index(tensors, (), none, empty, ())
        assert pickle.loads(torch_metadata(index)) == expected_metadata(index)


def test_torchs_converter_reads_the_folder(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_folder(tmp_path, tensors)
    dcp_to_torch_save(tmp_path, tmp_path / "one_file.pt")
    read = torch.load(tmp_path / "one_file.pt", weights_only=True)
    assert read.keys() == tensors.keys()
    assert [name for name in tensors if raw_bytes(read[name]) != raw_bytes(tensors[name])] == []


def test_torchs_load_fills_a_state_dict(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_folder(tmp_path, tensors)
    state = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert [name for name in tensors if raw_bytes(state[name]) != raw_bytes(tensors[name])] == []


def test_half_a_million_chunks_in_seconds() -> None:
    count, tensors = 500_000, 500
    rows = np.arange(count, dtype=np.int64)
    number = rows * tensors // count
    chunks = Chunks(
        number.astype(np.int32),
        (rows % 1000).astype(np.int32),
        rows * 2**20,
        rows * 2**20 + 320,
        np.stack([rows % 1000, rows * 0], axis=1),
        np.broadcast_to([1, 16], (count, 2)),
    )
    stored = tuple(StoredTensor(f"{tensor:03}", "float32", (1000, 16)) for tensor in range(tensors))
    index = Index(stored, tuple(f"__{file}_0.distcp" for file in range(1000)), chunks, np.full(1000, 2**60), ())
    start = time.process_time()
    data = torch_metadata(index)
    assert time.process_time() - start < 5
    read = pickle.loads(data)
    assert len(read.storage_data) == count
    assert read.storage_data[MetadataIndex("499", (999, 0))] == _StorageInfo(
        "__999_0.distcp", (count - 1) * 2**20, 320 + 64
    )
