"""Moving average of the weights, sharded like the weights. Samples are drawn from it by default."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from goku_mega.parallel.shards import Shard


class ShardedEMA:
    """fp32 (or better) averages of this rank's boxes."""

    def __init__(self, shards: Mapping[str, Shard], decay: float) -> None:
        self.decay = decay
        self.source = [shard.tensor for shard in shards.values()]
        self.shards = {name: replace(shard, tensor=shard.tensor.clone()) for name, shard in shards.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the weights as they are now."""
        torch._foreach_copy_([shard.tensor for shard in self.shards.values()], self.source)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after `step` + 1 steps; the early average follows quickly."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([shard.tensor for shard in self.shards.values()], self.source, 1 - decay)
