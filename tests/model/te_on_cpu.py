"""TransformerEngine's real classes where there is no GPU: what its wheel of Python sources holds can be built, not run.

The compiled extension is replaced by a mock, and the few questions to CUDA are answered as a Hopper GPU would.
`pretend` belongs into a process of its own (`launch.run_ranks`), first thing.
"""

import contextlib
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

VERSION = "2.11.0"
# Imported by TransformerEngine for ONNX export and fused kernels that are never reached here.
UNUSED = ("onnx", "onnxscript", "triton", "triton.language", "triton.language.core", "triton.language.standard")


def is_installed() -> bool:
    """Whether TransformerEngine is really there, so that nothing has to be pretended."""
    return importlib.util.find_spec("transformer_engine") is not None


def fetch(folder: Path) -> Path | None:
    """The unpacked wheel (0.7 MB, no dependencies) below `folder`; None where no package index can be reached."""
    sources = folder / f"transformer-engine-{VERSION}"
    if not sources.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                   "--dest", str(folder), f"transformer-engine=={VERSION}"]  # fmt: skip
        if subprocess.run(command, capture_output=True, timeout=120).returncode:
            return None
        unpacked = folder / f"unpacked-{os.getpid()}"
        zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(unpacked)
        with contextlib.suppress(OSError):  # another test process was first
            unpacked.rename(sources)
    return sources


def pretend(sources: Path) -> ModuleType:
    """Make `import transformer_engine.pytorch` work in this process, for whatever imports megatron-core from now on."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("megatron", "goku_mega")]:
        del sys.modules[name]  # they have looked for it already
    import torch
    import torch._dynamo
    import torch._inductor.utils  # asks for Triton while it is not yet mocked

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # do not look for the compiled libraries
    sys.path.insert(0, str(sources))
    sys.modules["transformer_engine_torch"] = MagicMock(name="transformer_engine_torch")
    _answer_as_hopper(torch)
    with _mocked(UNUSED):
        common = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None
        te = importlib.import_module("transformer_engine.pytorch")
    _answer_te_as_hopper(te)
    return te


def _answer_as_hopper(torch: ModuleType) -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.Stream = MagicMock(name="Stream")
    torch.version.cuda = "13.0"


def _answer_te_as_hopper(te: ModuleType) -> None:
    for name, module in list(sys.modules.items()):
        if not name.startswith("transformer_engine.pytorch"):
            continue
        for question, answer in (("get_cudnn_version", (9, 19, 0)), ("get_device_compute_capability", (9, 0))):
            if hasattr(module, question):
                setattr(module, question, lambda answer=answer: answer)


@contextlib.contextmanager
def _mocked(names: tuple[str, ...]) -> Iterator[None]:
    missing = [name for name in names if name not in sys.modules]
    for name in missing:
        sys.modules[name] = MagicMock(name=name, __version__="3.6.0")
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def emulate(te: ModuleType) -> None:
    """Let TransformerEngine's layers compute on one tensor-parallel rank: real signatures around torch's products.

    What is called is bound to the real `forward` first, and the demands its source makes of packed samples are
    checked, so a wrong keyword, type or shape fails here as it would there.
    """
    te.Linear.forward = _bound_to(te.Linear.forward, _linear)
    te.DotProductAttention.forward = _bound_to(te.DotProductAttention.forward, _attention)


def _bound_to(real: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(real)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return stand_in(**bound.arguments)

    return forward


def _linear(self: Any, inp: Any, is_first_microbatch: bool | None, **_: Any) -> Any:
    import torch.nn.functional as F
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    assert is_first_microbatch is None, "a cached FP8 weight is never renewed outside of megatron-core's schedules"
    if FP8GlobalStateManager.is_fp8_enabled():
        assert inp.shape[0] % 16 == 0 and all(side % 16 == 0 for side in self.weight.shape)
    out = F.linear(inp, self.weight, self.bias if self.apply_bias else None)
    return (out, self.bias) if self.return_bias else out


def _attention(
    self: Any, query_layer: Any, key_layer: Any, value_layer: Any, qkv_format: str, attn_mask_type: str,
    cu_seqlens_q: Any, cu_seqlens_kv: Any, cu_seqlens_q_padded: Any, max_seqlen_q: int, **_: Any,
) -> Any:  # fmt: skip
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    assert (qkv_format, attn_mask_type) == ("thd", "padding") and cu_seqlens_q.dtype == torch.int32
    assert key_layer.shape[1] == self.num_gqa_groups_per_partition
    assert key_layer.shape[2] == self.hidden_size_per_attention_head_k
    parts = 1 if self.cp_group is None else dist.get_world_size(self.cp_group)
    lengths = cu_seqlens_q.diff()
    assert max_seqlen_q == lengths.max() and torch.equal(cu_seqlens_q, cu_seqlens_kv)
    chunks = [(key_layer, value_layer)]
    if parts > 1:
        assert self.cp_comm_type == "p2p" and cu_seqlens_q_padded is not None
        assert (lengths % (2 * parts) == 0).all()
        chunks = [tuple(torch.empty_like(x) for x in (key_layer, value_layer)) for _ in range(parts)]
        for place, mine in enumerate((key_layer, value_layer)):
            dist.all_gather([chunk[place] for chunk in chunks], mine.contiguous(), group=self.cp_group)
    local = (lengths // parts).tolist()
    keys, values = (
        zip(*(chunk[place].split(local) for chunk in chunks), strict=True) for place in range(2)
    )  # [sample][chunk]
    outputs = [
        F.scaled_dot_product_attention(
            q.transpose(0, 1),
            torch.cat(k).transpose(0, 1),
            torch.cat(v).transpose(0, 1),
            scale=self.unfused_attention.softmax_scale,
        ).transpose(0, 1)
        for q, k, v in zip(query_layer.split(local), keys, values, strict=True)
    ]
    return torch.cat(outputs).flatten(1)
