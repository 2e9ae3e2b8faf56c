"""A command that is given nothing."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NoConfig:
    """A command without settings."""
