"""
nanoGPT's configurator, typed and strict: a dataclass gives the knobs, their types and their defaults;
config files (plain Python assignments) override them, and `--key=value` overrides those, left to right.

    python train.py config/baseline.py --batch_size=8 --compile=False
    python train.py --help
"""

import difflib
import inspect
import math
import os
from dataclasses import fields


class UserError(SystemExit):
    """A mistake of the user's: uncaught, it ends the script with its message, one line on stderr, and status 1."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))


def configure(knobs_class, argv):
    """
    Build `knobs_class` (a dataclass whose fields are bool, int, float or str, each with a default) from `argv`:
    paths of config files and `--key=value`, later ones winning. A `__post_init__` may check knobs against each other.

    Raises UserError, naming the knob, for an unknown name (with the nearest one), a value of another type, an argument
    that is neither, or a config file that is missing or does not run. `--help` prints the knobs and exits.
    """
    types = {field.name: field.type for field in fields(knobs_class)}
    values = {}
    for argument in argv:
        if argument in ("--help", "-h"):
            print(inspect.getsource(knobs_class))
            raise SystemExit(0)
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            if not equals:
                raise UserError(f"{argument}: write it as --{key}=value")
            values[key] = _parse(_known(key, types, "the command line"), types[key], text)
        else:
            for key, value in _run_config(argument).items():
                values[key] = _check(_known(key, types, argument), types[key], value, argument)
    return knobs_class(**values)


def _known(key, types, where):
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "--help lists the knobs"
        raise UserError(f"{where}: there is no knob '{key}'; {hint}")
    return key


def _parse(key, kind, text):
    """Read the text behind `--key=` as `kind`."""
    if kind is bool:
        if text not in ("True", "False"):
            raise UserError(f"--{key}={text}: write True or False")
        return text == "True"
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"--{key}={text}: expected {kind.__name__}") from None
    return _check(key, kind, value, "the command line")


def _check(key, kind, value, where):
    """An int will do for a float; nothing else stands in for another type, and no float may be nan or infinite."""
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{where}: {key} = {value!r}: expected {kind.__name__}")
    return value


def _run_config(path):
    """The names that a config file assigns; those that start with an underscore are its own."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such config file (knobs are written --key=value)")
    namespace = {}
    try:
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), namespace)
    except Exception as error:  # whatever a config raises is told with the file's name
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    return {key: value for key, value in namespace.items() if not key.startswith("_")}
