"""What can be wrong with images."""


class DataError(ValueError):
    """A data set that can't be used as it is; the message says what is wrong and what to do."""


class DamagedRecordError(Exception):
    """One record can't be read.

    Attributes:
      path: the file, or the file and the row, that holds the record.
      reason: what went wrong.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"
