"""Process groups and meshes of a Layout, and what megatron-core needs to run without CUDA.

The model receives the groups as arguments and never asks for them; megatron-core's global
`parallel_state` is not initialised.
"""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
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
    """`tp` and `cp` for the layers, in megatron-core's own container."""
    fsdp_mesh: DeviceMesh
    """(replicate, shard x cp), or (shard x cp) of a single replica. Context-parallel ranks share the
    shard axis, so that their gradients meet."""
    shard: dist.ProcessGroup
    """The ranks that together hold one copy of this rank's tensor-parallel part."""
    is_first_replica: bool
    data: dist.ProcessGroup
    """Every rank with this rank's tensor-parallel part: each saw other tokens."""
    dp_rank: int
    cp_rank: int
    tp_rank: int

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.model.tp

    @property
    def cp(self) -> dist.ProcessGroup:
        return self.model.cp


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
    dims = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
    mesh = init_device_mesh(device.type, dims, mesh_dim_names=("pp", "replicate", "shard", "cp", "tp"))
    shard_cp = mesh["shard", "cp"]._flatten("shard_cp")
    data = mesh["replicate", "shard", "cp"]._flatten("data")
    groups = ProcessGroupCollection()
    groups.tp = mesh.get_group("tp")
    groups.cp = mesh.get_group("cp")
    return Groups(
        layout=layout,
        device=device,
        model=groups,
        fsdp_mesh=mesh["replicate", "shard_cp"] if layout.dp_replicate > 1 else shard_cp,
        shard=shard_cp.get_group(),
        is_first_replica=mesh.get_local_rank("replicate") == 0,
        data=data.get_group(),
        dp_rank=mesh.get_local_rank("replicate") * layout.dp_shard + mesh.get_local_rank("shard"),
        cp_rank=mesh.get_local_rank("cp"),
        tp_rank=mesh.get_local_rank("tp"),
    )


def single_process_groups(device: torch.device | None = None) -> Groups:
    """The groups of a program of one process: sampling, evaluation, tests of a block."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    support_megatron_on_host()
    return build_groups(Layout(), device or torch.device("cpu"))


@functools.cache
def support_megatron_on_host() -> None:
    """Let megatron-core's tensor-parallel layers run where there is no CUDA.

    They allocate their communication buffers on `torch.cuda.current_device()`, and take the
    sequence-parallel ones from a global buffer that `initialize_model_parallel` would have made.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
