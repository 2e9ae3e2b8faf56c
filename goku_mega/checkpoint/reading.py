"""Fills any rank's boxes from a checkpoint whose every byte is read once, by one rank, and checked as it is read.

The unit is a block of a file, which has a checksum. A block is read by one of the ranks that need something of it,
into memory that the ranks of a host share; hosts that need it, too, get it over the network. Then every rank copies
what is its own. That goes in rounds of a bounded size, and the next round is read while this one is copied.
"""

import errno
import mmap
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from goku_mega.checkpoint.agree import Ranks, host_name
from goku_mega.checkpoint.index import BLOCK_BYTES, ITEM_BYTES, Index
from goku_mega.checkpoint.storage import Folder
from goku_mega.errors import DamagedCheckpoint
from goku_mega.parallel.shards import Shard

ROUND_BYTES = 64 * 2**20
"""What a host takes in at a time; two such buffers are in memory, so that one is filled while the other is emptied."""
READ_BYTES = 16 * 2**20
"""One call to the storage; several are under way at once."""
READERS = 4


def read_boxes(
    folder: Folder,
    index: Index,
    shards: Mapping[str, Shard],
    ranks: Ranks,
    *,
    node: str = "",
    files: Collection[str] | None = None,
) -> None:
    """Fill `shards`, by stored name, in place; other dtypes are converted. Every rank calls it with its own boxes.

    Args:
        folder: where this rank reads.
        node: tells nodes apart that have the same host name.
        files: those in `folder`; None: all, as in a folder that every rank sees.

    Raises:
        DamagedCheckpoint: on every rank, where a file is not what was written.
        OSError: on every rank, where the storage failed.
    """
    plan = _Plan.make(index, shards, ranks, node, files)
    buffers = _HostBuffers(plan, ranks)
    copier = _Copier(index, shards)
    with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint-read") as pool:
        reads = _begin(pool, folder, index, plan, 0, buffers)
        for number in range(len(plan.rounds)):
            fault = next((fault for read in reads if (fault := read.result()) is not None), None)
            _exchange(plan, number, buffers, ranks)  # also what is damaged: the others wait for it
            # Passed by a rank that has copied the round before: so its buffer may be filled again.
            if ranks.any(fault is not None):
                raise next(fault for fault in ranks.gather(fault) if fault is not None)
            if number + 1 < len(plan.rounds):
                reads = _begin(pool, folder, index, plan, number + 1, buffers)
            buffer = buffers.tensor(number)
            for run in plan.runs(number, plan.host):
                copier.copy(run, buffer)


@dataclass(frozen=True)
class _Run:
    """Blocks of a file that lie one after the other in a host's buffer."""

    file: int
    start: int
    """Byte of the file."""
    end: int
    at: int
    """Byte of the buffer."""


@dataclass(frozen=True)
class _Plan:
    """Who reads which block when; the same on every rank."""

    index: Index
    rank: int
    hosts: tuple[int, ...]
    """Each rank's host, by its lowest rank."""
    first_block: NDArray[np.int64]
    """[files + 1], numbers of blocks from the first file to the last."""
    block_bytes: NDArray[np.int64]
    rounds: tuple[NDArray[np.int64], ...]
    """The blocks of each round, in the order of the files."""
    readers: NDArray[np.int64]
    """[blocks], the rank that reads it; -1 where nobody needs it."""
    needed: dict[int, NDArray[np.bool_]]
    """host -> [blocks], whether it needs the block."""

    @property
    def host(self) -> int:
        return self.hosts[self.rank]

    @classmethod
    def make(
        cls, index: Index, shards: Mapping[str, Shard], ranks: Ranks, node: str, files: Collection[str] | None
    ) -> "_Plan":
        first_block = np.concatenate([[0], np.cumsum([len(digests) for digests in index.digests])]).astype(np.int64)
        readable = np.array([files is None or name in files for name in index.files], dtype=bool)
        needs = np.packbits(_needed_blocks(index, first_block, shards))
        gathered = ranks.gather((f"{host_name()} {node}", needs, np.packbits(readable)))
        names = [name for name, _, _ in gathered]
        hosts = tuple(names.index(name) for name in names)
        blocks = int(first_block[-1])
        by_rank = np.stack([np.unpackbits(bits, count=blocks) for _, bits, _ in gathered]).astype(bool)
        file_of = np.repeat(np.arange(len(index.files)), np.diff(first_block))
        can_read = np.stack([np.unpackbits(bits, count=len(index.files)) for _, _, bits in gathered]).astype(bool)
        reading = _reading(by_rank, can_read[:, file_of])  # [ranks, blocks]
        if (by_rank.any(axis=0) & ~reading.any(axis=0)).any():
            block = int((by_rank.any(axis=0) & ~reading.any(axis=0)).argmax())
            raise DamagedCheckpoint(f"no node has {index.files[file_of[block]]} of the checkpoint")
        needed: dict[int, NDArray[np.bool_]] = {
            host: np.logical_or.reduce((by_rank | reading)[np.equal(hosts, host)]) for host in set(hosts)
        }
        numbers = np.arange(blocks) - np.repeat(first_block[:-1], np.diff(first_block))
        file_bytes = np.repeat(index.file_bytes, np.diff(first_block))
        block_bytes = np.minimum(BLOCK_BYTES, file_bytes - numbers * BLOCK_BYTES)
        wanted = np.flatnonzero(by_rank.any(axis=0))
        patterns, pattern = np.unique(reading[:, wanted], axis=1, return_inverse=True)
        rounds = _rounds(wanted, pattern, {host: block_bytes * needed[host] for host in needed})
        readers = _readers(rounds, dict(zip(wanted.tolist(), pattern.tolist(), strict=True)), patterns, block_bytes)
        return cls(index, ranks.rank, hosts, first_block, block_bytes, rounds, readers, needed)

    def runs(self, number: int, host: int, reader: int | None = None) -> Iterator[_Run]:
        """What a host gets in a round, in the order of its buffer; only what `reader` reads of it, if given."""
        blocks = self.rounds[number][self.needed[host][self.rounds[number]]]
        at = np.cumsum(self.block_bytes[blocks]) - self.block_bytes[blocks]
        if reader is not None:
            mine = self.readers[blocks] == reader
            blocks, at = blocks[mine], at[mine]
        files = np.searchsorted(self.first_block, blocks, side="right") - 1
        for _, group in groupby(range(len(blocks)), key=lambda i: (files[i], blocks[i] - i, at[i] - BLOCK_BYTES * i)):
            members = list(group)
            file, block = int(files[members[0]]), int(blocks[members[0]])
            start = (block - int(self.first_block[file])) * BLOCK_BYTES
            size = int(self.block_bytes[blocks[members]].sum())
            yield _Run(file, start, start + size, int(at[members[0]]))

    def buffer_bytes(self, host: int) -> int:
        """The most a host gets in a round."""
        return max((int((self.block_bytes * self.needed[host])[blocks].sum()) for blocks in self.rounds), default=0)


def _reading(by_rank: NDArray[np.bool_], can_read: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[ranks, blocks], who may read a block: of those that need it those that can, or else one that can."""
    reading = by_rank & can_read
    for block in np.flatnonzero(by_rank.any(axis=0) & ~reading.any(axis=0) & can_read.any(axis=0)).tolist():
        able = np.flatnonzero(can_read[:, block])
        reading[able[block % len(able)], block] = True
    return reading


def _needed_blocks(index: Index, first_block: NDArray[np.int64], shards: Mapping[str, Shard]) -> NDArray[np.bool_]:
    """[blocks], whether this rank needs a byte of it."""
    change = np.zeros(int(first_block[-1]) + 1, dtype=np.int64)
    for name, shard in shards.items():
        rows = [] if shard.empty else _rows(index, name, shard)
        if rows:
            first, last = _stretch(index, rows, shard)
            files = first_block[index.chunks.file[rows]]
            np.add.at(change, files + first // BLOCK_BYTES, 1)
            np.add.at(change, files + last // BLOCK_BYTES + 1, -1)
    return np.cumsum(change)[:-1] > 0


def _stretch(index: Index, rows: Sequence[int], shard: Shard) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first and the last byte in the file of what chunks hold of a box, each [rows]."""
    dims = len(shard.global_shape)
    begins, sizes = index.chunks.offsets[rows, :dims], index.chunks.sizes[rows, :dims]
    low, lengths = np.array(shard.offsets, dtype=np.int64), np.array(shard.tensor.shape, dtype=np.int64)
    item = index.chunk_bytes[rows] // sizes.prod(axis=1)
    strides = np.ones_like(sizes)
    strides[:, :-1] = np.cumprod(sizes[:, :0:-1], axis=1)[:, ::-1]
    first = ((np.maximum(begins, low) - begins) * strides).sum(axis=1)
    last = ((np.minimum(begins + sizes, low + lengths) - 1 - begins) * strides).sum(axis=1)
    data = index.chunks.data[rows]
    return data + first * item, data + (last + 1) * item - 1


def _rows(index: Index, name: str, shard: Shard) -> list[int]:
    """The chunks that hold some of a box."""
    rows = index.chunks_of(name)
    dims = len(shard.global_shape)
    begins, sizes = index.chunks.offsets[rows, :dims], index.chunks.sizes[rows, :dims]
    low, lengths = np.array(shard.offsets, dtype=np.int64), np.array(shard.tensor.shape, dtype=np.int64)
    inside = (begins < low + lengths) & (begins + sizes > low)
    return (rows.start + np.flatnonzero(inside.all(axis=1))).tolist()


def _rounds(
    wanted: NDArray[np.int64], pattern: NDArray[np.int64], bytes_of: dict[int, NDArray[np.int64]]
) -> tuple[NDArray[np.int64], ...]:
    """Blocks in rounds of about ROUND_BYTES a host. Hosts that need different blocks read theirs at the same time."""
    if not len(wanted):
        return ()
    counts = np.bincount(pattern)
    order = np.argsort(pattern, kind="stable")
    place = np.empty(len(wanted))
    place[order] = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    order = np.argsort(place, kind="stable")
    taken = np.max([np.cumsum(sizes[wanted[order]]) - 1 for sizes in bytes_of.values()], axis=0)
    number = np.maximum.accumulate(taken // ROUND_BYTES)
    return tuple(np.sort(wanted[order][number == one]) for one in np.unique(number))


def _readers(
    rounds: Sequence[NDArray[np.int64]], pattern: Mapping[int, int], patterns: NDArray[np.bool_],
    block_bytes: NDArray[np.int64],
) -> NDArray[np.int64]:  # fmt: skip
    """Of the ranks that need a block, the one that reads it: neighbours together, and in a round all alike."""
    readers = np.full(len(block_bytes), -1, dtype=np.int64)
    for blocks in rounds:
        load = np.zeros(len(patterns), dtype=np.int64)
        kinds = np.array([pattern[block] for block in blocks.tolist()])
        members = {kind: np.flatnonzero(patterns[:, kind]) for kind in set(kinds.tolist())}
        for kind in sorted(members, key=lambda kind: (len(members[kind]), kind)):
            alike = blocks[kinds == kind]
            for part in np.array_split(alike, min(len(members[kind]), len(alike))):
                reader = members[kind][np.argmin(load[members[kind]])]
                readers[part] = reader
                load[reader] += block_bytes[part].sum()
    return readers


class _HostBuffers:
    """Two buffers that the ranks of a host share."""

    def __init__(self, plan: _Plan, ranks: Ranks) -> None:
        self.size = -(-plan.buffer_bytes(plan.host) // mmap.PAGESIZE) * mmap.PAGESIZE
        is_first = plan.host == ranks.rank
        memory = os.memfd_create("goku-checkpoint-read") if is_first and self.size else -1
        try:
            if memory >= 0:
                os.ftruncate(memory, 2 * self.size)
            places = ranks.gather(f"/proc/{os.getpid()}/fd/{memory}")
            if self.size and not is_first:
                memory = os.open(places[plan.host], os.O_RDWR)
            ranks.gather(None)  # the first one's descriptor may be closed
            self.memory = mmap.mmap(memory, 2 * self.size) if self.size else None
        finally:
            if memory >= 0:
                os.close(memory)

    def view(self, number: int) -> memoryview:
        """The buffer of a round."""
        if self.memory is None:
            return memoryview(b"")
        start = number % 2 * self.size
        return memoryview(self.memory)[start : start + self.size]

    def tensor(self, number: int) -> Tensor:
        """The buffer of a round as bytes [size]."""
        return torch.frombuffer(self.view(number), dtype=torch.uint8)


def _begin(
    pool: ThreadPoolExecutor, folder: Folder, index: Index, plan: _Plan, number: int, buffers: _HostBuffers
) -> list[Future[Exception | None]]:
    """Begin to read this rank's blocks of a round."""
    if number >= len(plan.rounds):
        return []
    view = buffers.view(number)
    reads = []
    for run in plan.runs(number, plan.host, reader=plan.rank):
        for start in range(run.start, run.end, READ_BYTES):
            end = min(start + READ_BYTES, run.end)
            at = run.at + start - run.start
            reads.append(pool.submit(_read, folder, index, run.file, start, view[at : at + end - start]))
    return reads


def _read(folder: Folder, index: Index, file: int, start: int, buffer: memoryview) -> Exception | None:
    """Read whole blocks of a file and compare their checksums; what is wrong, or None."""
    name = index.files[file]
    try:
        folder.read_into(name, start, buffer)
    except (FileNotFoundError, EOFError) as error:
        return DamagedCheckpoint(f"{folder}/{name} is missing or too short ({error})")
    except OSError as error:
        return DamagedCheckpoint(f"{folder}/{name}: {error}") if error.errno == errno.EIO else error
    for offset in range(0, len(buffer), BLOCK_BYTES):
        block = (start + offset) // BLOCK_BYTES
        if xxhash.xxh3_64_intdigest(buffer[offset : offset + BLOCK_BYTES]) != int(index.digests[file][block]):
            return DamagedCheckpoint(
                f"{folder}/{name} is damaged: the {BLOCK_BYTES} bytes from {start + offset} do not match their checksum"
            )
    return None


def _exchange(plan: _Plan, number: int, buffers: _HostBuffers, ranks: Ranks) -> None:
    """Send what this rank has read to the other hosts that need it, and take in what theirs have read."""
    hosts = sorted(set(plan.hosts))
    if len(hosts) == 1:
        return
    memory = buffers.tensor(number)
    work = []
    for host in hosts:
        local = [rank for rank, on in enumerate(plan.hosts) if on == host]
        for count, (reader, block) in enumerate(_from_elsewhere(plan, number, host)):
            receiver = local[count % len(local)]
            if ranks.rank in (reader, receiver):
                at = _position(plan, number, plan.host, block)
                part = memory[at : at + int(plan.block_bytes[block])]
                if ranks.rank == reader:
                    work.append(dist.P2POp(dist.isend, part, group=ranks.group, group_peer=receiver, tag=block))
                else:
                    work.append(dist.P2POp(dist.irecv, part, group=ranks.group, group_peer=reader, tag=block))
    for operation in dist.batch_isend_irecv(work) if work else []:
        operation.wait()


def _from_elsewhere(plan: _Plan, number: int, host: int) -> list[tuple[int, int]]:
    """(reader, block) of the blocks of a round that a host needs and another one reads."""
    blocks = plan.rounds[number][plan.needed[host][plan.rounds[number]]]
    return [(int(plan.readers[b]), int(b)) for b in blocks if plan.hosts[plan.readers[b]] != host]


def _position(plan: _Plan, number: int, host: int, block: int) -> int:
    """Byte of a host's buffer where a block of the round lies."""
    before = plan.rounds[number][: np.searchsorted(plan.rounds[number], block)]
    return int(plan.block_bytes[before[plan.needed[host][before]]].sum())


class _Copier:
    """Copies this rank's part of what is in a buffer into its boxes."""

    def __init__(self, index: Index, shards: Mapping[str, Shard]) -> None:
        self.index = index
        wanted = [(row, name) for name, shard in shards.items() if not shard.empty for row in _rows(index, name, shard)]
        files = index.chunks.file
        self.by_file: dict[int, tuple[NDArray[np.int64], NDArray[np.int64], list[tuple[int, Shard]]]] = {}
        wanted.sort(key=lambda pair: (int(files[pair[0]]), int(index.chunks.data[pair[0]])))
        for file, group in groupby(wanted, key=lambda pair: int(files[pair[0]])):
            chunks = [(row, shards[name]) for row, name in group]
            rows = [row for row, _ in chunks]
            starts = index.chunks.data[rows]
            self.by_file[file] = starts, starts + index.chunk_bytes[rows], chunks

    @torch.no_grad()
    def copy(self, run: _Run, buffer: Tensor) -> None:
        """Take what this rank needs of a run.

        Args:
            buffer: bytes, [size].
        """
        if run.file not in self.by_file:
            return
        starts, ends, chunks = self.by_file[run.file]
        for position in range(np.searchsorted(ends, run.start, side="right"), np.searchsorted(starts, run.end)):
            row, shard = chunks[position]
            tensor = self.index.tensors[self.index.chunks.tensor[row]]
            item = ITEM_BYTES[tensor.dtype]
            data, end = int(starts[position]), int(ends[position])
            first, last = max(data, run.start), min(end, run.end)
            at = run.at + first - run.start
            numbers = buffer[at : at + last - first].view(getattr(torch, tensor.dtype))
            dims = len(tensor.shape)
            corner = self.index.chunks.offsets[row, :dims].tolist()
            sizes = self.index.chunks.sizes[row, :dims].tolist()
            _put(numbers, corner, sizes, (first - data) // item, shard)


def _put(numbers: Tensor, corner: Sequence[int], sizes: Sequence[int], first: int, shard: Shard) -> None:
    """Copy consecutive numbers of a chunk, from its number `first` on, as far as they are in a shard's box."""
    for begin, lengths, start in _boxes(sizes, first, first + numbers.numel()):
        low = [max(c + b, o) for c, b, o in zip(corner, begin, shard.offsets, strict=True)]
        high = [
            min(c + b + n, o + m)
            for c, b, n, o, m in zip(corner, begin, lengths, shard.offsets, shard.tensor.shape, strict=True)
        ]
        if all(a < b for a, b in zip(low, high, strict=True)):
            count = int(np.prod(lengths, dtype=np.int64))
            box = numbers[start - first : start - first + count].view(tuple(lengths))
            source = tuple(slice(a - c - b, z - c - b) for a, z, c, b in zip(low, high, corner, begin, strict=True))
            target = tuple(slice(a - o, z - o) for a, z, o in zip(low, high, shard.offsets, strict=True))
            shard.tensor.detach()[target].copy_(box[source])


def _boxes(sizes: Sequence[int], first: int, last: int) -> Iterator[tuple[list[int], list[int], int]]:
    """The numbers from `first` to `last` of a row-major box, cut into boxes: corner, lengths, and first number."""
    if first >= last:
        return
    if not sizes:
        yield [], [], first
        return
    row = int(np.prod(sizes[1:], dtype=np.int64))
    top, bottom = -(-first // row), last // row
    if top > bottom:  # all within one row
        yield from _inside(sizes, bottom, first, last)
        return
    if first < top * row:
        yield from _inside(sizes, top - 1, first, top * row)
    if top < bottom:
        yield [top, *[0] * (len(sizes) - 1)], [bottom - top, *sizes[1:]], top * row
    if bottom * row < last:
        yield from _inside(sizes, bottom, bottom * row, last)


def _inside(sizes: Sequence[int], number: int, first: int, last: int) -> Iterator[tuple[list[int], list[int], int]]:
    """As `_boxes`, of numbers that are all in one row."""
    row = int(np.prod(sizes[1:], dtype=np.int64))
    for corner, lengths, start in _boxes(sizes[1:], first - number * row, last - number * row):
        yield [number, *corner], [1, *lengths], start + number * row
