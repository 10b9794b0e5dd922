"""The ways a command ends early on purpose; each knows its exit code. What others' errors say, in a line."""


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


def last_line(error: BaseException) -> str:
    """The last line of what an error says, at most 300 characters: of a traceback, the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
