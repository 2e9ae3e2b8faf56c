"""The exception tree on one page.

GokuError
└── UserError            bad input: one clear line on stderr, exit code 2
    ├── ConfigError      a recipe, a flag or a dotted override
    ├── LayoutError      a parallel layout that does not fit the model or the processes
    ├── DataError        a corpus, a shard or an index
    ├── MediaError       one video or image file
    ├── CheckpointError  a checkpoint that is missing, damaged or of another model
    │   └── DamagedCheckpoint   its files are not what was written: an older one may be
    └── MissingExtra     an optional dependency that is not installed

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


class MissingExtra(UserError):
    """An optional dependency is not installed; the message carries the command that installs it."""
