"""Files that are whole or absent, and checked when they are read."""

import errno
import fcntl
import os
import re
import zipfile
from contextlib import contextmanager

import torch

from support.configurator import UserError, check

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
NO_PLACE |= {errno.ENOENT}  # as /proc says


@contextmanager
def writing(path):
    """Turns the system's refusal to write `path`, in the block, into a UserError."""
    try:
        yield
    except Exception as error:
        cause = error
        while cause is not None and getattr(cause, "errno", None) not in NO_ROOM | NO_PLACE:
            cause = cause.__cause__ or cause.__context__  # torch.save has a RuntimeError of its own for a full disk
        named = getattr(cause, "filename", None) or path  # the path, its temporary name or a folder above
        if cause is None or not (path.startswith(named) or named.startswith(path)):
            raise
        whole = "what was there is whole; " if os.path.exists(path) else ""
        mend = "make room and go on" if cause.errno in NO_ROOM else "choose a folder that you may write to"
        raise UserError(f"{path}: could not be written ({cause.strerror}); {whole}{mend}") from error


@contextmanager
def atomic_write(path, process=""):
    """
    Yields a binary file under a temporary name; synced and renamed to `path` when the block ends without an error. Its
    folder is made. Raises UserError where the system refuses to write it; `path` is then as it was. If several
    processes may write `path` at once, `process` tells their temporary files apart.
    """
    folder, temporary = os.path.dirname(path) or ".", f"{path}{process}.tmp"
    try:
        with writing(path):
            os.makedirs(folder, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)  # else a power cut may undo the renaming
            os.close(descriptor)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextmanager
def reading(path, mend):
    """Turns what goes wrong while the block reads `path` into a UserError that ends in `mend`."""
    check(os.path.isfile(path), f"{path}: no such file; {mend}")
    try:
        yield
    except (PermissionError, MemoryError) as error:
        raise UserError(f"{path}: could not be read ({type(error).__name__}: {error})") from error
    except Exception as error:  # damaged files raise all kinds
        what = f"{type(error).__name__}: {str(error).strip():.80}"
        raise UserError(f"{path}: damaged, or not written by this script ({what}); {mend}") from error


def is_hub_id(name):
    """Whether a name can be one of the Hugging Face hub, 'gpt2' or 'org/set', and is no path of this machine."""
    here = os.path.exists(name) or os.path.isdir(os.path.dirname(name))
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)) and not here


def load_torch(path, keys, mend):
    """
    The dict that torch.save wrote to `path`, which has `keys`. Nothing is unpickled, and every record is compared with
    its CRC-32, as torch.load does not do. Raises UserError, ending in `mend`, for any other file and for none.
    """
    with reading(path, mend):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged}")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise ValueError(f"a {type(loaded).__name__}, not a dict")
        missing = [key for key in keys if key not in loaded]
    check(not missing, f"{path}: not written by this script, it has no {', '.join(missing)}; {mend}")
    return loaded


def lock(file, path, who="a run", flag="out_dir"):
    """
    Keep `file` to this process for as long as it is open. Raises UserError where another process has it: `who` is
    writing to `path`, which `flag` may change.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: {who} is writing there now; wait for its end or choose another --{flag}") from None
    except OSError as error:
        raise UserError(f"{path}: no locks on its file system ({error.strerror}); choose another --{flag}") from error
