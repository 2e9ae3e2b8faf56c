"""Layout: the degrees of parallelism of one run, fitted to a number of processes. No torch here.

Ranks count tensor parallel fastest, then context parallel, FSDP shards, replicas and pipeline
stages, so that the chattiest groups sit on neighbouring GPUs.
"""

from dataclasses import dataclass

from goku_mega.config import LayoutConfig
from goku_mega.errors import LayoutError
from goku_mega.model.sizes import ModelShape


@dataclass(frozen=True)
class Layout:
    """Degrees whose product is the number of processes."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Data-parallel ranks: each sees samples of its own."""
        return self.dp_replicate * self.dp_shard

    @property
    def token_multiple(self) -> int:
        """A pack's tokens are padded to a multiple of this, so that cp and tp split them evenly."""
        return self.tp * self.cp

    def __str__(self) -> str:
        return (
            f"tp={self.tp} cp={self.cp} pp={self.pp} dp_replicate={self.dp_replicate} dp_shard={self.dp_shard}"
            f"{' sp' if self.sequence_parallel else ''}"
        )


def resolve(config: LayoutConfig, world_size: int) -> Layout:
    """Fit the degrees asked for to `world_size` processes.

    Raises:
        LayoutError: the degrees do not multiply to the number of processes.
    """
    fixed = config.tp * config.cp * config.pp * config.dp_replicate
    asked = f"tp={config.tp} x cp={config.cp} x pp={config.pp} x dp_replicate={config.dp_replicate}"
    dp_shard = config.dp_shard
    if dp_shard == -1:
        if world_size % fixed:
            raise LayoutError(
                f"layout {asked} = {fixed} does not divide {world_size} processes; "
                f"start a multiple of {fixed} processes or lower a degree"
            )
        dp_shard = world_size // fixed
    if fixed * dp_shard != world_size:
        raise LayoutError(
            f"layout {asked} x dp_shard={dp_shard} = {fixed * dp_shard} but {world_size} processes were started; "
            f"start {fixed * dp_shard}, or set layout.dp_shard=-1 to use what is there"
        )
    return Layout(
        tp=config.tp,
        cp=config.cp,
        pp=config.pp,
        dp_replicate=config.dp_replicate,
        dp_shard=dp_shard,
        sequence_parallel=config.sequence_parallel and config.tp > 1,
    )


def check_fits(layout: Layout, shape: ModelShape) -> None:
    """Refuse a layout that the model's heads, widths or this version cannot be split by.

    Raises:
        LayoutError: names the degree, the number it does not divide, and the degrees that do.
    """
    if layout.pp > 1:
        raise LayoutError(f"layout.pp={layout.pp}: pipeline stages are not supported yet; set layout.pp=1")
    if shape.heads % layout.tp:
        raise LayoutError(f"{shape.heads} heads do not divide over tp={layout.tp}; use tp in {_divisors(shape.heads)}")
    heads = shape.heads // layout.tp
    if heads % layout.cp:
        raise LayoutError(
            f"{heads} heads per tensor-parallel rank do not divide over cp={layout.cp} (Ulysses); "
            f"use cp in {_divisors(heads)}"
        )
    if shape.ffn_hidden_size % layout.tp:
        raise LayoutError(f"FFN width {shape.ffn_hidden_size} does not divide over tp={layout.tp}; use another tp")


def _divisors(number: int) -> str:
    return "{" + ", ".join(str(d) for d in range(1, number + 1) if number % d == 0) + "}"
