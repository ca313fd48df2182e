"""make: the Python of the environment."""

import os
import shutil
import subprocess
import sys

import pytest
from test_train import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile, requirements of nothing, and Python 3.10, or what says that it is."""
    shutil.copy(f"{ROOT}/Makefile", tmp_path)
    for name in ("requirements.txt", "requirements-test.txt"):
        (tmp_path / name).touch()
    write_old_python(tmp_path / "python3.10")
    return tmp_path


def write_old_python(path):
    as_old = "import sys; sys.version_info = (3, 10, 4); exec(sys.argv[1])"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\ntest "$1" = -V && echo Python 3.10.4 || exec {sys.executable} -c "{as_old}" "$2"\n')
    path.chmod(0o755)


def write_this_python(folder):
    """This Python, whose environments have a pip that does nothing: to install the real one takes seconds."""
    (folder / "pip.py").touch()
    path = folder / "python"
    path.write_text(f'#!/bin/sh\ntest "$2" = venv && set -- "$@" --without-pip\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)


def make(folder, *arguments):
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    environment["PYTHONPATH"] = str(folder)
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_python_that_is_too_old_is_refused_before_an_environment_is_made(checkout):
    made = make(checkout, "PYTHON=./python3.10", ".venv/installed")
    assert made.returncode and "Python 3.10" in made.stderr and "make PYTHON=python3.12" in made.stderr
    assert not (checkout / ".venv").exists()


def test_an_environment_of_another_python_is_made_anew(checkout):
    write_old_python(checkout / ".venv/bin/python")
    write_this_python(checkout)
    made = make(checkout, "PYTHON=./python", ".venv/installed")
    assert made.returncode == 0, made.stderr
    version = subprocess.run([checkout / ".venv/bin/python", "-V"], capture_output=True, text=True).stdout
    assert version.split()[1] == ".".join(map(str, sys.version_info[:3]))
    assert "pip" not in make(checkout, "PYTHON=./python", ".venv/installed").stdout  # it is there
