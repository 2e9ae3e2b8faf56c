"""What this machine has of what goku_mega can use: found or not, used or not, and what it would bring.

An optional part that is found is imported once, here and only when asked: one that is installed but does not start
would otherwise be found out by a run.
"""

import contextlib
import importlib
import io
import os
import platform
import warnings
from importlib import metadata, util
from typing import Any, NamedTuple

from goku_mega.config.nothing import NoConfig

PACKAGES = ("torch", "megatron-core", "transformers", "diffusers", "av", "pyarrow")


class Part(NamedTuple):
    """An optional part."""

    module: str
    """What is imported to see whether it works."""
    package: str
    """Distribution that knows the version."""
    use: str
    """Where it is used, or why it is not."""
    brings: str
    install: str


OPTIONAL = {
    "TransformerEngine": Part(
        "transformer_engine.pytorch", "transformer-engine",
        use="used by compute.engine=te",
        brings="linear layers in FP8 (delayed, current, blockwise, mxfp8) and cuDNN attention over packed samples",
        install="pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]>=2.9,<2.12'",
    ),
    "flash-attn 2": Part(
        "flash_attn", "flash-attn",
        use="not used by compute.engine=local, whose torch carries the same kernel; TransformerEngine may choose it",
        brings="another attention backend for compute.engine=te where cuDNN's cannot run",
        install="pip install --no-build-isolation flash-attn",
    ),
    "flash-attn 3": Part(
        "flash_attn_interface", "flash-attn-3",
        use="used by compute.attention=flash3; TransformerEngine may choose it",
        brings="attention kernels made for Hopper",
        install="build the hopper folder of github.com/Dao-AILab/flash-attention; PyPI has only a placeholder",
    ),
    "apex": Part(
        "amp_C", "apex",
        use="not used: torch's fused AdamW does the same",
        brings="a fused AdamW, which torch has too",
        install="in NVIDIA's PyTorch container; the apex on PyPI is another project",
    ),
    "apex gradient accumulation": Part(
        "fused_weight_gradient_mlp_cuda", "apex",
        use="not used: it adds into main_grad buffers, which FSDP2 does not have",
        brings="weight gradients added up inside their product",
        install="in NVIDIA's PyTorch container",
    ),
    "triton": Part(
        "triton", "triton",
        use="used by compute.fused=auto on a GPU, and to quantise for compute.fp8",
        brings="the work between the matrix products in one kernel each",
        install="comes with torch's CUDA builds",
    ),
    "DALI": Part(
        "nvidia.dali", "nvidia-dali-cuda130",
        use="used by open_video(backend='dali'); PyAV decodes by default",
        brings="decoding on GPUs",
        install="pip install goku-mega[dali]",
    ),
    "torchcodec": Part(
        "torchcodec.decoders", "torchcodec",
        use="used by open_video(backend='torchcodec'); PyAV decodes by default",
        brings="another decoder on the CPU, slower than PyAV",
        install="pip install goku-mega[torchcodec], and FFmpeg's libraries from the system",
    ),
    "PySceneDetect": Part(
        "scenedetect", "scenedetect-headless",
        use="used by `goku-mega curate`",
        brings="shot boundaries",
        install="pip install goku-mega[curate]",
    ),
    "RapidOCR": Part(
        "rapidocr", "rapidocr",
        use="used by `goku-mega curate`",
        brings="text in the picture, with its models",
        install="pip install goku-mega[curate]",
    ),
    "Ray": Part(
        "ray.data", "ray",
        use="used by `goku-mega curate engine=ray`",
        brings="curation on the cores of a Ray cluster",
        install="pip install goku-mega[ray]",
    ),
    "NVML": Part(
        "pynvml", "nvidia-ml-py",
        use="used by `goku-ops check-node` and the agents",
        brings="the health of GPUs without starting CUDA",
        install="pip install nvidia-ml-py",
    ),
}  # fmt: skip


def doctor(config: NoConfig) -> dict[str, Any]:
    """Versions and devices, and a line on every optional part."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version()}
    found |= {name: metadata.version(name) for name in PACKAGES}
    found["gpus"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    found["cores"] = os.cpu_count()
    found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    found |= {name: describe(part) for name, part in OPTIONAL.items()}
    found["cuDNN attention"] = _cudnn(torch)
    return found


def describe(part: Part) -> str:
    """One line: found in which version and used by what, or what is missing without it and where to get it."""
    if not _is_there(part.module):
        return f"not found; would bring {part.brings}; get it: {part.install}"
    reason = _why_it_does_not_start(part.module)
    if reason:
        return f"found {_version(part.package)}, but does not start: {reason}; get it: {part.install}"
    return f"found {_version(part.package)}, {part.use}"


def _is_there(module: str) -> bool:
    try:
        return util.find_spec(module.split(".")[0]) is not None and util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
    except Exception:  # its parent does not start, which is told by importing it
        return True


def _why_it_does_not_start(module: str) -> str:
    """The first line of what importing it raises; empty where it works."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # anything may go wrong in another's compiled code
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(version unknown)"


def _cudnn(torch: Any) -> str:
    version = torch.backends.cudnn.version()
    if version is None:
        return (
            "not found; would bring attention for compute.engine=te and compute.attention=cudnn; "
            "get it: comes with torch's CUDA builds"
        )
    return f"found {version}, used by compute.engine=te and compute.attention=cudnn"
