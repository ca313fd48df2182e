"""Files that are whole or absent, and checked when they are read."""

import fcntl
import os
import zipfile
from contextlib import contextmanager

import torch

from configurator import UserError


@contextmanager
def atomic_write(path):
    """
    Yields a binary file under a temporary name; synced and renamed to `path` when the block ends without an error.
    Raises UserError where the system cannot write it (no space, no permission); `path` is then as it was.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)  # else a power cut may undo the renaming
        os.close(folder)
    except Exception as error:
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__  # torch.save has a RuntimeError of its own for a full disk
        if cause is None:
            raise
        kept = "the file that was there is whole" if os.path.exists(path) else "nothing is there"
        raise UserError(f"{path}: could not be written ({cause.strerror}); {kept}; make room and go on") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_torch(path, keys, mend, device="cpu"):
    """
    The dict that torch.save wrote to `path`, which has `keys`. Nothing is unpickled, and every record is compared with
    its CRC-32, as torch.load does not do. Raises UserError, ending in `mend`, where the file is missing, damaged or
    something else.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; {mend}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged}")
        loaded = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(loaded, dict):
            raise ValueError(f"a {type(loaded).__name__}, not a dict")
        missing = [key for key in keys if key not in loaded]
    except Exception as error:  # damaged files raise all kinds
        what = f"{type(error).__name__}: {str(error).strip():.80}"
        raise UserError(f"{path}: damaged, or not written by this script ({what}); {mend}") from error
    if missing:
        raise UserError(f"{path}: not written by this script, it has no {', '.join(missing)}; {mend}")
    return loaded


def lock(file, path):
    """Keep `file` to this process for as long as it is open; raises UserError where another one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: a run is writing there now; wait for its end or choose another --out_dir") from None
