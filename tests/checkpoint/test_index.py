import dataclasses
import math
import time

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_mega.checkpoint.index import (
    BLOCK_BYTES,
    ITEM_BYTES,
    Chunks,
    Index,
    StoredTensor,
    block_digests,
    digest_file,
)
from goku_mega.errors import CheckpointError

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets, sizes."""
MAX_DIMS = 5
QUICK = settings(max_examples=60, deadline=None)


@st.composite
def partitions(draw, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that cover `shape` exactly once, cut one by one, so that they need not lie on a grid."""
    boxes: list[Box] = [((0,) * len(shape), shape)] if math.prod(shape) else []
    for _ in range(draw(st.integers(0, 8))):
        cuttable = [box for box in boxes if any(length > 1 for length in box[1])]
        if not cuttable:
            break
        offsets, sizes = draw(st.sampled_from(cuttable))
        dim = draw(st.sampled_from([dim for dim, length in enumerate(sizes) if length > 1]))
        cut = draw(st.integers(1, sizes[dim] - 1))
        boxes.remove((offsets, sizes))
        boxes.append((offsets, _with(sizes, dim, cut)))
        boxes.append((_with(offsets, dim, offsets[dim] + cut), _with(sizes, dim, sizes[dim] - cut)))
    return boxes


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


@st.composite
def written(draw) -> tuple[list[StoredTensor], list[tuple[int, Box]]]:
    """Tensors of 0 to 5 dims and their boxes, with the number of the tensor."""
    names = sorted(draw(st.sets(st.text(st.characters(codec="utf-8"), max_size=6), min_size=1, max_size=4)))
    shapes = draw(
        st.lists(st.lists(st.integers(0, 9), max_size=MAX_DIMS).map(tuple), min_size=len(names), max_size=len(names))
    )
    dtypes = draw(st.lists(st.sampled_from(sorted(ITEM_BYTES)), min_size=len(names), max_size=len(names)))
    tensors = [StoredTensor(*fields) for fields in zip(names, dtypes, shapes, strict=True)]
    return tensors, [(number, box) for number, shape in enumerate(shapes) for box in draw(partitions(shape))]


def make_index(tensors: list[StoredTensor], boxes: list[tuple[int, Box]], files: int = 2) -> Index:
    """Chunks dealt out over `files`, one behind the other."""
    ends = [0] * files
    rows = []
    for row, (number, (offsets, sizes)) in enumerate(boxes):
        file, head = row % files, ends[row % files]
        data = head + 300
        ends[file] = data + max(0, math.prod(sizes)) * ITEM_BYTES[tensors[number].dtype]
        unused = MAX_DIMS - len(offsets)
        rows.append((number, file, head, data, (*offsets, *[0] * unused), (*sizes, *[1] * unused)))
    chunks = Chunks(
        tensor=np.array([row[0] for row in rows], dtype=np.int32),
        file=np.array([row[1] for row in rows], dtype=np.int32),
        head=np.array([row[2] for row in rows], dtype=np.int64),
        data=np.array([row[3] for row in rows], dtype=np.int64),
        offsets=np.array([row[4] for row in rows], dtype=np.int64).reshape(-1, MAX_DIMS),
        sizes=np.array([row[5] for row in rows], dtype=np.int64).reshape(-1, MAX_DIMS),
    ).sorted()
    digests = tuple(block_digests(bytes(end)) for end in ends)
    names = tuple(f"__{file}_0.distcp" for file in range(files))
    return Index(tuple(tensors), names, chunks, np.array(ends, dtype=np.int64), digests)


@QUICK
@given(written())
def test_what_was_written_is_read(case) -> None:
    index = make_index(*case)
    data = index.to_bytes()
    read = Index.from_bytes(data)
    assert read == index
    assert read.to_bytes() == data
    for column in dataclasses.fields(Chunks):
        stored, back = getattr(index.chunks, column.name), getattr(read.chunks, column.name)
        assert back.dtype == stored.dtype and back.shape == stored.shape
    for tensor in index.tensors:
        rows = read.chunks_of(tensor.name)
        assert (read.chunks.tensor[rows] == read.by_name[tensor.name]).all()
        assert read.chunk_bytes[rows].sum() == math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def test_places_behind_two_and_four_gigabytes_and_many_chunks() -> None:
    count = 70_000  # more than a two-byte number counts
    starts = np.arange(count, dtype=np.int64) * 2**16
    chunks = Chunks(
        tensor=np.zeros(count, dtype=np.int32),
        file=np.zeros(count, dtype=np.int32),
        head=starts,
        data=starts + 512,
        offsets=np.arange(count, dtype=np.int64)[:, None],
        sizes=np.ones((count, 1), dtype=np.int64),
    )
    end = int(starts[-1]) + 512 + 4
    digests = np.arange(-(-end // BLOCK_BYTES), dtype=np.uint64) + np.uint64(2**64 - 2000)
    tensors = (StoredTensor("w", "float32", (count,)),)
    index = Index(tensors, ("a",), chunks, np.array([end]), (digests,))
    assert Index.from_bytes(index.to_bytes()) == index
    index.check_complete()


@QUICK
@given(written(), st.data())
def test_no_flipped_byte_goes_unseen(case, data) -> None:
    index = make_index(*case)
    whole = index.to_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    _damaged_is_seen(index, whole, place, data.draw(st.integers(1, 255)))


def test_no_flipped_bit_goes_unseen_anywhere() -> None:
    tensors = [
        StoredTensor("a\n", "float32", (4, 10)),
        StoredTensor("b", "bfloat16", ()),
        StoredTensor("c", "bool", (0,)),
    ]
    index = make_index(tensors, [(0, ((0, 0), (4, 7))), (0, ((0, 7), (4, 3))), (1, ((), ()))])
    whole = index.to_bytes()
    for place in range(len(whole)):
        # 41 makes a tab of a space, which JSON takes for the same.
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 41):
            _damaged_is_seen(index, whole, place, flip)


def _damaged_is_seen(index: Index, whole: bytes, place: int, flip: int) -> None:
    damaged = bytearray(whole)
    damaged[place] ^= flip
    try:
        read = Index.from_bytes(bytes(damaged))
    except CheckpointError:
        return
    assert read != index, f"byte {place} of {whole!r}"


@QUICK
@given(written(), st.data())
def test_no_cut_or_longer_file_goes_unseen(case, data) -> None:
    whole = make_index(*case).to_bytes()
    end = data.draw(st.integers(0, len(whole) - 1))
    for damaged in (whole[:end], whole + b"\0"):
        with pytest.raises(CheckpointError, match="the index of the checkpoint is damaged: ."):
            Index.from_bytes(damaged)


@QUICK
@given(written())
def test_any_partition_is_complete(case) -> None:
    make_index(*case).check_complete()


@QUICK
@given(written(), st.data())
def test_a_chunk_that_is_missing_or_there_twice_is_named(case, data) -> None:
    tensors, boxes = case
    if not boxes:
        return
    row = data.draw(st.integers(0, len(boxes) - 1))
    name = tensors[boxes[row][0]].name
    for changed in (boxes[:row] + boxes[row + 1 :], [*boxes, boxes[row]]):
        _refused(tensors, changed, name)


@QUICK
@given(written(), st.data())
def test_a_chunk_that_is_shifted_or_of_another_size_is_named(case, data) -> None:
    tensors, boxes = case
    movable = [row for row, (_, (offsets, _)) in enumerate(boxes) if offsets]
    if not movable:
        return
    row = data.draw(st.sampled_from(movable))
    number, (offsets, sizes) = boxes[row]
    dim = data.draw(st.integers(0, len(offsets) - 1))
    by = data.draw(st.integers(-3, 3).filter(bool))
    shifted = (_with(offsets, dim, offsets[dim] + by), sizes)
    resized = (offsets, _with(sizes, dim, sizes[dim] + by))
    for box in (shifted, resized):
        _refused(tensors, [*boxes[:row], (number, box), *boxes[row + 1 :]], tensors[number].name)


@QUICK
@given(st.lists(st.integers(1, 6), min_size=1, max_size=MAX_DIMS).map(tuple), st.data())
def test_a_chunk_swapped_for_another_of_its_size_is_named(shape, data) -> None:
    """The number of elements is right, and every box is inside; only one lies where another lies, too."""
    boxes = data.draw(partitions(shape))
    row = data.draw(st.integers(0, len(boxes) - 1))
    offsets, sizes = boxes[row]
    places = [range(length - size + 1) for length, size in zip(shape, sizes, strict=True)]
    other = tuple(data.draw(st.sampled_from(place)) for place in places)
    if other == offsets:
        return
    changed = [*boxes[:row], (other, sizes), *boxes[row + 1 :]]
    _refused([StoredTensor("w", "int8", shape)], [(0, box) for box in changed], "w")


@QUICK
@given(st.lists(st.integers(1, 6), min_size=2, max_size=MAX_DIMS).map(tuple), st.data())
def test_boxes_with_the_right_number_of_elements_and_the_right_edges_are_not_enough(shape, data) -> None:
    """All boxes at random: they are refused exactly if some element is not covered once, counted one by one."""
    count = data.draw(st.integers(1, 4))
    boxes, covered = [], np.zeros(shape, dtype=np.int64)
    for _ in range(count):
        starts = tuple(data.draw(st.integers(0, length - 1)) for length in shape)
        sizes = tuple(data.draw(st.integers(1, length - start)) for length, start in zip(shape, starts, strict=True))
        boxes.append((0, (starts, sizes)))
        covered[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))] += 1
    tensors = [StoredTensor("w", "int8", shape)]
    if (covered == 1).all():
        make_index(tensors, boxes).check_complete()
    else:
        _refused(tensors, boxes, "w")


def _refused(tensors: list[StoredTensor], boxes: list[tuple[int, Box]], name: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_index(tensors, boxes).check_complete()
    assert f" {name} " in str(caught.value)


def test_the_first_incomplete_tensor_is_named() -> None:
    tensors = [StoredTensor(name, "int8", (2,)) for name in ("a", "b", "c")]
    _refused(tensors, [(0, ((0,), (2,))), (1, ((0,), (1,)))], "b")


def test_a_tensor_without_dims_has_one_element() -> None:
    tensors = [StoredTensor("w", "float32", ())]
    make_index(tensors, [(0, ((), ()))]).check_complete()
    _refused(tensors, [], "w")
    _refused(tensors, [(0, ((), ()))] * 2, "w")


def test_a_million_chunks_are_checked_and_stored_in_seconds_and_few_bytes() -> None:
    count = 1_000_000
    rows = np.arange(count, dtype=np.int64)
    chunks = Chunks(
        tensor=(rows // 1000).astype(np.int32),
        file=(rows % 1000).astype(np.int32),
        head=rows // 1000 * 2**20,
        data=rows // 1000 * 2**20 + 320,
        offsets=np.stack([rows % 1000 * 4, rows * 0], axis=1),
        sizes=np.broadcast_to([4, 3000], (count, 2)),
    )
    tensors = tuple(StoredTensor(f"{number:04}", "float32", (4000, 3000)) for number in range(1000))
    file_bytes = np.full(1000, 1000 * 2**20)
    index = Index(tensors, ("f",) * 1000, chunks, file_bytes, (np.zeros(250, dtype=np.uint64),) * 1000)
    start = time.process_time()
    index.check_complete()
    data = index.to_bytes()
    Index.from_bytes(data)
    assert time.process_time() - start < 10
    assert len(data) < 20 * count


def test_digests_are_of_blocks_and_a_files_checksum_is_of_its_digests() -> None:
    content = np.arange(BLOCK_BYTES // 4 + 3, dtype="<u4").tobytes()
    digests = block_digests(content)
    assert digests.tolist() == [
        xxhash.xxh3_64_intdigest(content[:BLOCK_BYTES]),
        xxhash.xxh3_64_intdigest(content[BLOCK_BYTES:]),
    ]
    assert digest_file(digests) == xxhash.xxh3_128_hexdigest(digests.tobytes())
    assert len(block_digests(b"")) == 0
