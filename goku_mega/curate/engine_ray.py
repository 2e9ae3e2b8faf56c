"""The engine on Ray Data: the same workers, limits and events, on the cores of a cluster.

Every actor keeps one worker process, so a source that hangs or crashes takes neither the actor nor the job with it.
"""

import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from goku_mega.curate.engine import Event, Pool
from goku_mega.errors import ConfigError, MissingExtra, UserError


class _Actor:
    """One worker of the cluster: a batch of one task to the events that come of it."""

    def __init__(self, factory: str, arguments: tuple[Any, ...], time_limit_s: float) -> None:
        self._pool = Pool(factory, arguments, time_limit_s)
        self._pool.start(1)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        number, content = batch["number"][0], batch["task"][0]
        try:
            events = list(self._pool.run(iter([pickle.loads(content)])))
        except (ConfigError, MissingExtra) as error:
            return {"number": [number], "events": [pickle.dumps(error)]}
        return {"number": [number], "events": [pickle.dumps(events)]}


def run_ray(
    tasks: Sequence[Any], factory: str, arguments: tuple[Any, ...], *, workers: int, time_limit_s: float
) -> Iterator[Event]:
    """As `engine.run_local`, with `workers` actors of one core on the cluster that RAY_ADDRESS names, or here.

    Raises:
        ConfigError, MissingExtra: Ray is not installed, or a worker could not be made as it was asked for.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("Ray is not installed; pip install goku-mega[ray]") from error
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"number": number, "task": pickle.dumps(task)} for number, task in enumerate(tasks)]
        found = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor, batch_size=1, batch_format="numpy", num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            fn_constructor_args=(factory, arguments, time_limit_s),
        )  # fmt: skip
        for row in found.iter_rows():
            events = pickle.loads(row["events"])
            if isinstance(events, UserError):
                raise events
            yield from events
    finally:
        if started:
            ray.shutdown()
