"""Muon on this rank's shards: every update of a matrix is nearly orthogonal (K. Jordan, 2024; arXiv 2502.16982).

The momentum has the boxes of the weights. Orthogonalising needs whole matrices: the ranks that
together hold one copy of the weights lay their boxes together, divide the matrices among
themselves, and each takes its boxes of the results, so every layout sees the same matrices.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from goku_mega.parallel.groups import Groups
from goku_mega.parallel.parallelize import ParallelModel
from goku_mega.parallel.shards import Shard

MOMENTUM = 0.95
UPDATE_RMS = 0.2
"""Size of an update's numbers at rate 1: about AdamW's, so that one rate serves both (arXiv 2502.16982 section 2.2)."""
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
"""Jordan's odd polynomial, applied five times, takes singular values from 0.003 to 1 into about [0.7, 1.2]."""
BUCKET_NUMBERS = 2**26
"""Numbers of whole matrices that are laid together at a time."""


class ShardedMuon:
    """Momentum and updates of the matrices `names` of a model."""

    def __init__(self, model: ParallelModel, groups: Groups, names: Sequence[str]) -> None:
        self.shards = {name: model.shards[name] for name in names}
        self.momentum = {name: torch.zeros_like(shard.tensor) for name, shard in self.shards.items()}
        self.buckets = _buckets({name: math.prod(shard.global_shape) for name, shard in self.shards.items()})
        self.holders = [group for group in (groups.shard, groups.tp) if group.size() > 1]
        """Groups over which the boxes of one copy of the weights are spread."""
        self.rank = dist.get_rank(groups.shard) * groups.layout.tp + groups.tp_rank
        self.ranks = groups.shard.size() * groups.layout.tp
        # Of a matrix that every tensor-parallel rank has a copy of, the first rank's counts.
        self.counted = {name for name in names if name in model.split_over_tp or groups.tp_rank == 0}

    def moments(self) -> dict[str, Shard]:
        """The boxes of the momentum, by parameter name."""
        return {name: replace(shard, tensor=self.momentum[name]) for name, shard in self.shards.items()}

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, weight_decay: float) -> None:
        """Update the parameters in place. Every rank calls it, with its boxes of the gradients by name."""
        for bucket in self.buckets:
            sizes = [math.prod(self.shards[name].global_shape) for name in bucket]
            like = self.shards[bucket[0]].tensor
            flat = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
            whole = {
                name: part.view(self.shards[name].global_shape)
                for name, part in zip(bucket, flat.split(sizes), strict=True)
            }
            for name in bucket:
                if name in gradients:
                    momentum = self.momentum[name].lerp_(gradients[name], 1 - MOMENTUM)
                    if name in self.counted:
                        self.shards[name].take(whole[name]).copy_(gradients[name].lerp(momentum, MOMENTUM))
            self._lay_together(flat)
            share = bucket[self.rank :: self.ranks]
            for name in set(bucket).difference(share):
                whole[name].zero_()
            for _, names in groupby(share, key=lambda name: whole[name].shape):
                equal = [whole[name] for name in names]
                for matrix, update in zip(equal, orthogonalised(torch.stack(equal)), strict=True):
                    matrix.copy_(update)
            self._lay_together(flat)
            for name, matrix in whole.items():
                shard = self.shards[name]
                shard.tensor.mul_(1 - learning_rate * weight_decay)
                scale = UPDATE_RMS * math.sqrt(max(shard.global_shape))
                shard.tensor.sub_(shard.take(matrix), alpha=learning_rate * scale)

    def _lay_together(self, flat: Tensor) -> None:
        """Fill in what the other ranks have; each number is zero on all ranks but one, so the sum is exact."""
        for group in self.holders:
            dist.all_reduce(flat, group=group)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices with their singular values brought near 1, by Newton-Schulz iterations; zeros stay zeros.

    Args:
        matrices: [matrices, rows, columns] in fp32 or better.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _buckets(numbers: Mapping[str, int]) -> list[list[str]]:
    """Names in buckets of at most BUCKET_NUMBERS, or of one; from large to small, so that ranks get even shares."""
    buckets: list[list[str]] = []
    filled = BUCKET_NUMBERS
    for name in sorted(numbers, key=lambda name: (-numbers[name], name.split(".")[2:], name)):
        if filled + numbers[name] > BUCKET_NUMBERS:
            buckets.append([])
            filled = 0
        buckets[-1].append(name)
        filled += numbers[name]
    return buckets
