"""The exception tree on one page.

GokuError
├── UserError            bad input: one clear line on stderr, exit code 2
│   ├── ConfigError      a recipe, a flag or a dotted override
│   ├── LayoutError      a parallel layout that does not fit the model or the processes
│   ├── DataError        a corpus, a shard or an index
│   ├── MediaError       one video or image file
│   ├── CheckpointError  a checkpoint that is missing, damaged or of another model
│   │   ├── DamagedCheckpoint   its files are not what was written: an older one may be
│   │   └── OtherHistory        it was trained on steps that this run leaves out: an older one may not be
│   └── MissingExtra     an optional dependency that is not installed
└── RunFault             a run that must not go on as it is: exit code and a last line for its supervisor
    ├── UnusableStep     a loss or a gradient that is not finite, exit code 70
    └── CorruptState     numbers that no update has written, or that ranks disagree about, exit code 71

Everything else that escapes is a bug and keeps its traceback.
"""


class GokuError(Exception):
    """Base of every error this package raises on purpose."""


class UserError(GokuError):
    """The input is at fault. The message names the thing, what is wrong and what to do."""


class ConfigError(UserError):
    """A recipe, a flag or a dotted override is wrong."""


class LayoutError(UserError):
    """A parallel layout does not fit the model or the number of processes."""


class DataError(UserError):
    """A corpus, a shard or an index cannot be used."""


class MediaError(UserError):
    """A video or image file cannot be decoded or written."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or holds another model."""


class DamagedCheckpoint(CheckpointError):
    """The files of a checkpoint are not what was written; another checkpoint may still be whole."""


class OtherHistory(CheckpointError):
    """A checkpoint has seen positions of the data that this run leaves out; an older one may not have."""


class MissingExtra(UserError):
    """An optional dependency is not installed; the message carries the command that installs it."""


class RunFault(GokuError):
    """All ranks of a run have found together that it must not go on; its newest checkpoint is from before."""

    exit_code = 1
    report: dict[str, object]
    """For the supervisor: what it is, and where."""


class UnusableStep(RunFault):
    """The loss or the gradient of a step is not finite; nothing was changed by it."""

    exit_code = 70

    def __init__(self, step: int, data_step: int, loss: float, gradient_norm: float, ranks: list[int]) -> None:
        """
        Args:
            ranks: where the loss was not finite before it met the others'; empty: nowhere, or everywhere alike.
        """
        super().__init__(
            f"step {step} is unusable: its loss is {loss} and its gradient norm {gradient_norm}; to leave its data "
            f"out, resume with {data_step} in data.skip_steps"
        )
        self.report = {"fault": "nan_loss", "step": step, "data_step": data_step, "ranks": ranks}


class CorruptState(RunFault):
    """The tensors or the arithmetic of some ranks are not what they must be."""

    exit_code = 71

    def __init__(self, step: int, ranks: list[int], detail: str) -> None:
        super().__init__(f"corruption found in step {step} on {'rank' if len(ranks) == 1 else 'one of the ranks'} "
                         f"{', '.join(map(str, ranks))}: {detail}")  # fmt: skip
        self.report = {"fault": "corruption", "step": step, "ranks": ranks}
