"""What must be alike on all nodes of a run, found without importing it."""

import platform
import re
import zlib
from importlib import metadata, util
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of what runs on this node, by name; `none` for what it does not have."""
    return {
        "python": platform.python_version(),
        "torch": _installed("torch"),
        "megatron-core": _installed("megatron-core"),
        "goku_mega": _source_checksum("goku_mega"),
        "goku_infra": _source_checksum("goku_infra"),
        "kernel": platform.release(),
        "NVIDIA driver": _driver(),
    }


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _source_checksum(package: str) -> str:
    """Of all its Python files: a checkout that somebody has edited on one node shows."""
    spec = util.find_spec(package)
    if spec is None or spec.origin is None:
        return "none"
    checksum = 0
    folder = Path(spec.origin).parent
    for path in sorted(folder.rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.relative_to(folder)).encode(), checksum))
    return f"{checksum:08x}"


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "none"
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else text.splitlines()[0]
