"""The one error that data readers raise, so that a caller can tell bad data from a bug."""


class DatasetError(ValueError):
    """Data that cannot be used; the message names file and key or index, what was found, what is allowed."""
