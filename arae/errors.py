"""The ways a command ends early on purpose; each knows its exit code."""


class AraeError(Exception):
    """An end with one clear line: what, where, how to mend. `exit_code` is what the command returns."""

    exit_code = 1


class InputError(AraeError):
    """Bad input: a recipe, a file, an image, a flag."""

    exit_code = 2


class Busy(InputError):  # noqa: N818 -- it is a state, not a fault
    """Another command is at work on the run."""


class Stopped(AraeError):  # noqa: N818 -- it is a state, not a fault
    """Stopped with a good state on disk: the same command goes on from it."""

    exit_code = 75


class DiskFull(Stopped):
    """One worker's disk is full and a good state is kept; the other workers do not know."""


class NotFinite(AraeError, ValueError):  # noqa: N818 -- it says what the images are
    """Images or gradients hold NaN or infinity: what is measured by them would be no number, or a wrong one."""
