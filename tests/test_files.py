"""Files are whole or absent, and a system's refusal is one line that names the file."""

import errno
import os

import pytest
import torch

from support.configurator import UserError
from support.files import atomic_write, load_torch, reading


def write(path, content=b"new"):
    with atomic_write(path) as file:
        file.write(content)


@pytest.mark.parametrize(
    "path, reason",
    [("file/x", "Not a directory|File exists"), ("folder", "Is a directory"), ("a" * 300, "File name too long")],
)
def test_where_nothing_can_be_written_the_path_and_the_reason_are_named(tmp_path, monkeypatch, path, reason):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(UserError, match=f"{path}: could not be written .({reason}).; .*choose a folder"):
        write(path)
    assert sorted(os.listdir()) == ["file", "folder"] and (tmp_path / "file").read_bytes() == b"old"


def test_a_refusal_keeps_what_was_there_and_says_so(tmp_path):
    path = str(tmp_path / "x")
    write(path, b"old")
    refusal = "x: could not be written .Permission denied.; what was there is whole"
    with pytest.raises(UserError, match=refusal), atomic_write(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"old"


def test_another_file_s_refusal_is_not_blamed_on_the_one_that_is_written(tmp_path):
    with pytest.raises(PermissionError, match="/elsewhere"), atomic_write(str(tmp_path / "x")):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), MemoryError()])
def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="x: could not be read") as found, reading(str(path), "make it anew"):
        raise error
    assert "damaged" not in str(found.value)


def test_a_missing_or_foreign_file_ends_with_the_mend(tmp_path):
    path = tmp_path / "x [1].pt"
    with pytest.raises(UserError, match="no such file; make it anew"):
        load_torch(str(path), [], "make it anew")
    path.write_bytes(b"foreign")
    with pytest.raises(UserError, match="damaged, or not written by this script .*; make it anew"):
        load_torch(str(path), [], "make it anew")
    torch.save(dict(a=1), path)
    assert load_torch(str(path), ["a"], "") == dict(a=1)
    with pytest.raises(UserError, match="it has no b, c; make it anew"):
        load_torch(str(path), ["a", "b", "c"], "make it anew")
