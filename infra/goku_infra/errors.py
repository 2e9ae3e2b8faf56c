"""What goes wrong for an operator to see: one line, exit code 2."""


class OpsError(Exception):
    """Bad input or an unusable state; the message names the thing, what was wrong and what to do."""
