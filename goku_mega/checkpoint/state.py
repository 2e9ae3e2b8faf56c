"""What a checkpoint holds, under names that no layout can change.

A tensor is stored as "model/<parameter>", "ema/<parameter>", "optimizer/exp_avg/<parameter>" or
"optimizer/exp_avg_sq/<parameter>", with its global shape; who held which box is only a detail of the files.
"""

from collections.abc import Iterable, Mapping

from goku_mega.checkpoint.save_plan import Box
from goku_mega.parallel.shards import Shard

State = Mapping[str, Mapping[str, Shard]]
"""Part ("model", "ema", "exp_avg", "exp_avg_sq") -> parameter name -> this rank's box of it."""

STORED_UNDER = {
    "model": "model",
    "ema": "ema",
    "exp_avg": "optimizer/exp_avg",
    "exp_avg_sq": "optimizer/exp_avg_sq",
}
"""Where each part of a State is found in a checkpoint; any other is another tensor of the optimizer's."""


def stored_under(part: str) -> str:
    """Where a part of a State is found in a checkpoint."""
    return STORED_UNDER.get(part, f"optimizer/{part}")


def stored_shards(state: State, parts: Iterable[str]) -> dict[str, Shard]:
    """The boxes of `parts` by their name in a checkpoint."""
    return {f"{stored_under(part)}/{name}": shard for part in parts for name, shard in state[part].items()}


def belongs_to(stored_name: str, parts: Iterable[str]) -> bool:
    """Whether a name in a checkpoint is in one of `parts`."""
    return any(stored_name.startswith(f"{stored_under(part)}/") for part in parts)


def box_of(name: str, shard: Shard) -> Box:
    """What a stored tensor's box is, without its memory."""
    dtype = str(shard.tensor.dtype).removeprefix("torch.")
    return Box(name, dtype, shard.global_shape, shard.offsets, tuple(shard.tensor.shape), shard.copies)
