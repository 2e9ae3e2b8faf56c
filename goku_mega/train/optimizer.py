"""The optimizer on this rank's shards, its learning-rate schedule, and clipping by the global norm.

It sees plain local tensors, so its state has the same boxes as the parameters and saves under the
same layout-free names.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from goku_mega.config.training import OptimizerConfig
from goku_mega.parallel.groups import Groups
from goku_mega.parallel.parallelize import ParallelModel
from goku_mega.parallel.shards import Shard
from goku_mega.train.muon import ShardedMuon


class ShardedOptimizer:
    """torch's fused AdamW over the local tensors of the shards; with `muon`, the blocks' matrices go by Muon.

    Vectors are not decayed.
    """

    def __init__(self, model: ParallelModel, groups: Groups, config: OptimizerConfig, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps
        self.shards = model.shards
        by_muon = [
            name
            for name, shard in model.shards.items()
            if config.name == "muon" and name.startswith("blocks.") and len(shard.global_shape) == 2
        ]
        self.muon = ShardedMuon(model, groups, by_muon)
        self.parameters = {
            name: nn.Parameter(shard.tensor) for name, shard in model.shards.items() if name not in self.muon.shards
        }
        matrices = [p for name, p in self.parameters.items() if len(self.shards[name].global_shape) > 1]
        vectors = [p for name, p in self.parameters.items() if len(self.shards[name].global_shape) <= 1]
        self.adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        # torch makes its state at the first step; a resumed run has to fill it before.
        for parameter in self.parameters.values():
            self.adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def moments(self) -> dict[str, dict[str, Shard]]:
        """The boxes of `exp_avg` and, of what AdamW updates, `exp_avg_sq`, by parameter name."""
        exp_avg, exp_avg_sq = (
            {
                name: replace(self.shards[name], tensor=self.adamw.state[parameter][moment])
                for name, parameter in self.parameters.items()
            }
            for moment in ("exp_avg", "exp_avg_sq")
        )
        return {"exp_avg": exp_avg | self.muon.moments(), "exp_avg_sq": exp_avg_sq}

    def resume_at(self, step: int) -> None:
        """Say how many steps the loaded moments have seen."""
        for state in self.adamw.state.values():
            state["step"].fill_(step)

    def step(self, step: int, gradients: Mapping[str, Tensor], gradient_norm: Tensor) -> float:
        """Clip, then update the parameters in place; the learning rate used.

        Args:
            step: steps taken before this one.
            gradients: this rank's boxes, by parameter name; scaled in place where they are clipped.
            gradient_norm: the global norm.
        """
        rate = learning_rate(self.config, step, self.total_steps)
        limit = self.config.clip_grad_norm
        if limit > 0:
            scale = (limit / (gradient_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(list(gradients.values()), scale.to(next(iter(gradients.values()))))
        for name, parameter in self.parameters.items():
            parameter.grad = gradients.get(name)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad()  # else this step's gradients would live through the next step's backward
        self.muon.step(gradients, rate, self.config.weight_decay)
        return rate


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of a step: a linear rise over the warm-up, then constant or a half cosine to the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    floor = config.final_rate_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
