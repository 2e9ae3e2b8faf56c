"""The bytes that, put before a tensor's raw numbers, make both together a file that `torch.load` reads.

torch's own checkpoint tools read each chunk of a checkpoint with `torch.load(..., weights_only=True)` from the middle
of a data file. torch's older format, without a zip archive, ends in the raw numbers, so a head is all it takes, and our
own readers go past it straight to the numbers. Nothing here needs torch.

The format is what `torch.save(..., _use_new_zipfile_serialization=False)` writes: a magic number, a version, the
machine, the tensor with its storage left out, the list of storages, all pickled, and then each storage as its length
and its numbers.
"""

import math
import pickle
import struct
from functools import lru_cache
from typing import Any

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_MACHINE = {"protocol_version": _VERSION, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
_STORAGE_KEY = "0"
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
_PROTOCOL = 2


@lru_cache(maxsize=4096)
def torch_head(dtype: str, sizes: tuple[int, ...]) -> bytes:
    """What stands before the little-endian, row-major numbers of a contiguous CPU tensor of `sizes`.

    Args:
        dtype: torch's name of it without "torch.".

    Raises:
        ValueError: torch's older format has no storage of this dtype.
    """
    if dtype not in _STORAGES:
        raise ValueError(f"torch's older file format has no {dtype}; it has {', '.join(_STORAGES)}")
    numel = math.prod(sizes)
    before = b"".join(pickle.dumps(value, _PROTOCOL) for value in (_MAGIC, _VERSION, _MACHINE))
    after = pickle.dumps([_STORAGE_KEY], _PROTOCOL) + struct.pack("<q", numel)
    return before + _tensor_pickle(_STORAGES[dtype], numel, sizes) + after


def _tensor_pickle(storage: str, numel: int, sizes: tuple[int, ...]) -> bytes:
    """`torch._utils._rebuild_tensor_v2(storage, 0, sizes, strides, False, OrderedDict())`, with the storage by name."""
    strides = tuple(math.prod(max(length, 1) for length in sizes[dim + 1 :]) for dim in range(len(sizes)))
    named_storage = (
        pickle.MARK + _value("storage") + _global("torch", storage) + _value(_STORAGE_KEY) + _value("cpu")
        + _value(numel) + _value(None) + pickle.TUPLE + pickle.BINPERSID
    )  # fmt: skip
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = named_storage + _value(0) + _value(sizes) + _value(strides) + _value(False) + hooks
    rebuild = _global("torch._utils", "_rebuild_tensor_v2")
    call = rebuild + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE
    return pickle.PROTO + bytes([_PROTOCOL]) + call + pickle.STOP


def _value(value: Any) -> bytes:
    """The opcodes that push a plain value: its own pickle without the protocol in front and the stop behind."""
    return pickle.dumps(value, _PROTOCOL)[2:-1]


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
