"""The error that every reader and writer of checkpoints raises, and how errors are told."""


class CheckpointError(ValueError):
    """A checkpoint that can't be read, used or written; the message says why and what to do."""


def told(error: Exception) -> str:
    """What a command line says of an error: of a file that can't be opened, its name and why."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
