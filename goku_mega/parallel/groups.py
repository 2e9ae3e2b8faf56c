"""Process groups and meshes of a Layout, and what megatron-core needs to run without CUDA.

The model receives the groups as arguments and never asks for them; megatron-core's global
`parallel_state` is not initialised.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from goku_mega import environment
from goku_mega.parallel.layout import Layout


@dataclass(frozen=True)
class Groups:
    """One rank's place in the layout and the groups it talks to."""

    layout: Layout
    device: torch.device
    model: ProcessGroupCollection
    """`tp`, `cp` and `pp` for the layers and schedules, in megatron-core's own container."""
    ulysses: dist.ProcessGroup
    """The context-parallel ranks that exchange heads for tokens."""
    ring: dist.ProcessGroup
    """The context-parallel ranks that pass keys and values on."""
    fsdp_mesh: DeviceMesh
    """(replicate, shard x cp), or (shard x cp) of a single replica. Context-parallel ranks share the
    shard axis, so that their gradients meet."""
    shard: dist.ProcessGroup
    """The ranks that together hold one copy of this rank's tensor-parallel part."""
    replica: int
    """Which copy of the sharded model this rank has a part of."""
    data: dist.ProcessGroup
    """Every rank with this rank's tensor-parallel part: each saw other tokens."""
    dp_rank: int
    cp_rank: int
    tp_rank: int
    pp_rank: int

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.model.tp

    @property
    def cp(self) -> dist.ProcessGroup:
        return self.model.cp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.model.pp


def initialise_distributed(threads_per_rank: int) -> torch.device:
    """Join the job's process group (a group of one without a launcher); this rank's device.

    GPU jobs get gloo beside NCCL: checkpoints exchange small host objects over it.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", environment.local_rank())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        torch.set_num_threads(threads_per_rank)
        backend = "gloo"
    if not dist.is_initialized():
        if environment.launched_by_torchrun():
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    support_megatron_on_host()
    return device


def build_groups(layout: Layout, device: torch.device) -> Groups:
    """The groups of every axis; every rank of the job calls this."""
    dims = {
        "pp": layout.pp, "replicate": layout.dp_replicate, "shard": layout.dp_shard,
        "ring": layout.ring, "ulysses": layout.ulysses, "tp": layout.tp,
    }  # fmt: skip
    mesh = init_device_mesh(device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))
    cp = mesh["ring", "ulysses"]._flatten("cp")
    shard_cp = mesh["shard", "ring", "ulysses"]._flatten("shard_cp")
    data = mesh["replicate", "shard", "ring", "ulysses"]._flatten("data")
    groups = ProcessGroupCollection()
    groups.tp = mesh.get_group("tp")
    groups.cp = cp.get_group()
    groups.pp = mesh.get_group("pp")
    # The schedules ask for these by name; they serve tied embeddings and megatron-core's own optimizer.
    groups.embd = groups.pos_embd = groups.dp_cp = None
    return Groups(
        layout=layout,
        device=device,
        model=groups,
        ulysses=mesh.get_group("ulysses"),
        ring=mesh.get_group("ring"),
        fsdp_mesh=mesh["replicate", "shard_cp"] if layout.dp_replicate > 1 else shard_cp,
        shard=shard_cp.get_group(),
        replica=mesh.get_local_rank("replicate"),
        data=data.get_group(),
        dp_rank=mesh.get_local_rank("replicate") * layout.dp_shard + mesh.get_local_rank("shard"),
        cp_rank=cp.get_local_rank(),
        tp_rank=mesh.get_local_rank("tp"),
        pp_rank=mesh.get_local_rank("pp"),
    )


def single_process_groups(device: torch.device | None = None) -> Groups:
    """The groups of a program of one process: sampling, evaluation, tests of a block."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    support_megatron_on_host()
    return build_groups(Layout(), device or torch.device("cpu"))


@functools.cache
def support_megatron_on_host() -> None:
    """Let megatron-core's tensor-parallel layers and pipeline schedules run where there is no CUDA.

    They allocate their communication buffers on `torch.cuda.current_device()`, and take the
    sequence-parallel ones from a global buffer that `initialize_model_parallel` would have made. The
    schedules count tokens on "cuda", by that name.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
        schedules.torch = _TorchWithoutCuda()
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


class _TorchWithoutCuda:
    """`torch` to one module of megatron-core: its zeros "on cuda" lie in host memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: str, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)
