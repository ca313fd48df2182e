"""Files that are whole or absent."""

import os
from contextlib import contextmanager


@contextmanager
def atomic_write(path):
    """
    Yields a binary file under a temporary name; synced and renamed to `path` when the block ends without an error.
    """
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
