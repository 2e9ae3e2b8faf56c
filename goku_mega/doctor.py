"""What this machine has of what goku_mega can use, found without starting any of it."""

import os
import platform
from importlib import metadata, util
from typing import Any

from goku_mega.config import NoConfig

PACKAGES = ("torch", "megatron-core", "transformers", "diffusers", "av", "pyarrow")
OPTIONAL = {
    "transformer_engine": "FP8 on GPUs: pip install goku-mega[gpu]",
    "flash_attn": "other attention kernels: pip install goku-mega[gpu]",
    "nvidia.dali": "decoding on GPUs: pip install goku-mega[dali]",
    "amp_C": "NVIDIA apex, used when it is there; it comes with NVIDIA's PyTorch container",
}


def doctor(config: NoConfig) -> dict[str, Any]:
    """Versions, devices, and for each missing optional part what it is for and the command that installs it."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version()}
    found |= {name: metadata.version(name) for name in PACKAGES}
    found["gpus"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    found["cores"] = os.cpu_count()
    found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    for module, remedy in OPTIONAL.items():
        found[module] = "installed" if _importable(module) else f"not installed ({remedy})"
    return found


def _importable(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
