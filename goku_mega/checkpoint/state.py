"""What a checkpoint holds, under names that no layout can change, in the terms of torch.distributed.checkpoint.

A tensor is stored as "model/<parameter>", "ema/<parameter>", "optimizer/exp_avg/<parameter>" or
"optimizer/exp_avg_sq/<parameter>", with its global shape; who held which box is only a detail of the files.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from goku_mega.parallel.shards import Shard

State = Mapping[str, Mapping[str, Shard]]
"""Part ("model", "ema", "exp_avg", "exp_avg_sq") -> parameter name -> this rank's box of it."""

STORED_UNDER = {
    "model": "model",
    "ema": "ema",
    "exp_avg": "optimizer/exp_avg",
    "exp_avg_sq": "optimizer/exp_avg_sq",
}
"""Where each part of a State is found in a checkpoint."""


def stored_shards(state: State, parts: Iterable[str]) -> dict[str, Shard]:
    """The boxes of `parts` by their name in a checkpoint."""
    return {f"{STORED_UNDER[part]}/{name}": shard for part in parts for name, shard in state[part].items()}


def belongs_to(stored_name: str, parts: Iterable[str]) -> bool:
    """Whether a name in a checkpoint is in one of `parts`."""
    return any(stored_name.startswith(f"{STORED_UNDER[part]}/") for part in parts)


def write_item(name: str, shard: Shard) -> WriteItem:
    """The order to write one box."""
    return WriteItem(
        index=MetadataIndex(name, shard.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(shard),
            properties=TensorProperties(dtype=shard.tensor.dtype),
            size=torch.Size(shard.global_shape),
        ),
    )


def _chunk(shard: Shard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(shard.offsets), sizes=shard.tensor.shape)


class ShardSavePlanner(DefaultSavePlanner):
    """Writes each box once: from its owner, and not at all where the box is empty."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        owned = {name: shard for name, shard in self.state_dict.items() if shard.owner and not shard.empty}
        self.plan = SavePlan([write_item(name, shard) for name, shard in owned.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor.detach()


class ShardLoadPlanner(DefaultLoadPlanner):
    """Reads this rank's boxes, whatever boxes they were written as."""

    def __init__(self, shards: Mapping[str, Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shards = shards

    def plan(self, metadata: Metadata) -> LoadPlan:
        """What to read from the files that `metadata` describes."""
        items: list[Any] = []
        for name, shard in self.shards.items():
            stored = metadata.state_dict_metadata[name]
            if isinstance(stored, TensorStorageMetadata) and not shard.empty:
                items += create_read_items_for_chunk_list(name, stored, [_chunk(shard)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.shards[index.fqn].tensor.detach()
