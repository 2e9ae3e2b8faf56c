"""Layout: the degrees of parallelism of one run, fitted to a number of processes. No torch here.

Ranks count tensor parallel fastest, then context parallel, FSDP shards, replicas and pipeline
stages, so that the chattiest groups sit on neighbouring GPUs.
"""

import math
from dataclasses import dataclass

from goku_mega.config.training import LayoutConfig
from goku_mega.errors import LayoutError
from goku_mega.model.sizes import ModelShape


@dataclass(frozen=True)
class Layout:
    """Degrees whose product is the number of processes."""

    tp: int = 1
    ulysses: int = 1
    """Context parallel by heads: inside attention a rank holds all tokens of its ring chunk and some heads."""
    ring: int = 1
    """Context parallel by tokens: keys and values travel from rank to rank."""
    pp: int = 1
    chunks: int = 1
    """Model chunks of a pipeline stage."""
    layers: tuple[int, ...] = ()
    """Blocks of each chunk in the model's order, pp x chunks numbers; empty: one chunk with all of them."""
    dp_replicate: int = 1
    dp_shard: int = 1
    sequence_parallel: bool = False
    cpu_offload: bool = False

    @property
    def cp(self) -> int:
        """Context-parallel ranks: those of a Ulysses group are neighbours, ring chunk after ring chunk."""
        return self.ulysses * self.ring

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

    @property
    def micro_batch_multiple(self) -> int:
        """The interleaved pipeline schedule takes a step's micro-batches in groups of this many."""
        return self.pp if self.chunks > 1 else 1

    def __str__(self) -> str:
        cp = f"cp={self.cp}" + (f" (ulysses {self.ulysses} x ring {self.ring})" if self.ring > 1 else "")
        pp = f"pp={self.pp}" + (f" ({self.chunks} chunks a stage)" if self.chunks > 1 else "")
        return (
            f"tp={self.tp} {cp} {pp} dp_replicate={self.dp_replicate} dp_shard={self.dp_shard}"
            f"{' sp' if self.sequence_parallel else ''}{' offload' if self.cpu_offload else ''}"
        )


def resolve(config: LayoutConfig, world_size: int, shape: ModelShape) -> Layout:
    """Fit the degrees asked for to `world_size` processes and to a model.

    Raises:
        LayoutError: the degrees do not multiply to the number of processes, or do not divide the model; the
            message names the degree, the number it does not divide, and the degrees that do.
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
    if shape.heads % config.tp:
        raise LayoutError(f"{shape.heads} heads do not divide over tp={config.tp}; use tp in {_divisors(shape.heads)}")
    if shape.ffn_hidden_size % config.tp:
        raise LayoutError(f"FFN width {shape.ffn_hidden_size} does not divide over tp={config.tp}; use another tp")
    ring = context_ring(config, shape)
    return Layout(
        tp=config.tp,
        ulysses=config.cp // ring,
        ring=ring,
        pp=config.pp,
        chunks=config.pp_chunks,
        layers=pipeline_layers(config, shape),
        dp_replicate=config.dp_replicate,
        dp_shard=dp_shard,
        sequence_parallel=config.sequence_parallel and config.tp > 1,
        cpu_offload=config.cpu_offload,
    )


def context_ring(config: LayoutConfig, shape: ModelShape) -> int:
    """The ring degree inside cp: as asked, or the smallest that leaves a Ulysses degree dividing the heads.

    Raises:
        LayoutError: the ring does not divide cp, or the Ulysses degree does not divide the heads.
    """
    heads = shape.heads // config.tp
    ring = config.cp // math.gcd(heads, config.cp) if config.cp_ring == -1 else config.cp_ring
    if config.cp % ring:
        raise LayoutError(
            f"layout.cp_ring={ring} does not divide cp={config.cp}; use cp_ring in {_divisors(config.cp)}"
        )
    if heads % (config.cp // ring):
        raise LayoutError(
            f"{heads} heads per tensor-parallel rank do not divide over Ulysses {config.cp // ring} "
            f"(cp={config.cp} / cp_ring={ring}); use cp_ring=-1, or Ulysses in {_divisors(heads)}"
        )
    return ring


def pipeline_layers(config: LayoutConfig, shape: ModelShape) -> tuple[int, ...]:
    """Blocks of each chunk in the model's order: as asked, or as even as can be, the longer ones in the middle.

    The first and the last chunk have the embeddings and the final layer to do besides.

    Raises:
        LayoutError: there are fewer blocks than chunks, or those asked for do not add up.
    """
    count = config.pp * config.pp_chunks
    if config.pp == 1 and config.pp_chunks > 1:
        raise LayoutError(f"layout.pp_chunks={config.pp_chunks} needs pipeline stages; set layout.pp above 1")
    if config.pp_layers:
        if sum(config.pp_layers) != shape.layers:
            raise LayoutError(
                f"layout.pp_layers {list(config.pp_layers)} add up to {sum(config.pp_layers)}, "
                f"the model has {shape.layers} layers"
            )
        return config.pp_layers
    if count > shape.layers:
        raise LayoutError(
            f"pp={config.pp} x pp_chunks={config.pp_chunks} = {count} chunks for {shape.layers} layers; lower one"
        )
    base, longer = divmod(shape.layers, count)
    first_longer = (count - longer) // 2
    return tuple(base + (first_longer <= number < first_longer + longer) for number in range(count))


def divisors(number: int) -> list[int]:
    """Every degree that splits `number` evenly, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _divisors(number: int) -> str:
    """`divisors`, as the messages show them."""
    return "{" + ", ".join(map(str, divisors(number))) + "}"
