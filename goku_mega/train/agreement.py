"""What all ranks agree on before a step changes anything: its figures, whether it may be taken, and what comes then.

Nothing of it costs a message of its own: it travels with the gradients' norm and with the loss.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from goku_infra.heartbeat import Stop
from goku_mega.parallel.groups import Groups
from goku_mega.parallel.parallelize import ParallelModel, gradient_norm


class Agreed(NamedTuple):
    """The same on every rank of the job."""

    loss: float
    gradient_norm: float
    norm: Tensor
    """The gradients' norm where the optimizer needs it, fp64 scalar."""
    usable: bool
    """Whether loss and gradients are finite on every rank."""
    stop: Stop
    """What a rank was asked for."""
    corrupt: bool
    """Whether the audit of a rank has found something."""


def agree(model: ParallelModel, groups: Groups, loss: Tensor, *, stop: Stop, suspicion: Tensor | None) -> Agreed:
    """Reduce the figures of a step over the ranks; every rank calls it once its gradients are whole.

    The votes of the ranks of a replica meet on the way of the norm, those of the replicas on the way of the loss.

    Args:
        loss: this rank's part, fp64 scalar.
        stop: what this rank is asked for.
        suspicion: how many faults this rank's audit has found, scalar; None without an audit.
    """
    asked = torch.tensor([stop == "save", stop == "now"], dtype=torch.float64, device=groups.device)
    found = torch.zeros_like(loss) if suspicion is None else suspicion.to(loss)
    votes = torch.cat((asked, torch.stack((found, (~loss.isfinite()).to(loss)))))
    norm, votes = gradient_norm(model, groups, votes)
    numbers = torch.cat((loss[None], votes))
    for group in (groups.data, groups.pp):
        dist.all_reduce(numbers, group=group)
    whole_loss, save, now, corrupt, *unusable, whole_norm = torch.cat((numbers, norm[None])).tolist()
    agreed: Stop = "now" if now else "save" if save else ""
    return Agreed(whole_loss, whole_norm, norm, not any(unusable), agreed, corrupt > 0)


def origins_of_unusable(loss: Tensor) -> list[int]:
    """The ranks whose own part of the loss is not finite; every rank calls it, after a step that none can use.

    Empty if only gradients are not finite, which have met each other's by then, or if all ranks are alike: then it is
    the fault of none of them.

    Args:
        loss: this rank's part, as it was given to `agree`.
    """
    is_finite: list[bool] = [True] * dist.get_world_size()
    dist.all_gather_object(is_finite, bool(loss.isfinite()))
    ranks = [rank for rank, finite in enumerate(is_finite) if not finite]
    return ranks if len(ranks) < len(is_finite) or len(ranks) == 1 else []
