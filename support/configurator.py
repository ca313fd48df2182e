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
import re
import runpy
import sys
from dataclasses import fields


class UserError(SystemExit):
    """A mistake of the user's: uncaught, it ends the script with its message, one line on stderr, and status 1."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))


def check(ok, message):
    """Raise UserError with this message unless `ok`."""
    if not ok:
        raise UserError(message)


def configure(knobs_class, argv):
    """
    Build `knobs_class` (a dataclass whose fields are bool, int, float or str, each with a default) from `argv`:
    paths of config files and `--key=value`, later ones winning. A `__post_init__` may check knobs against each other.

    Raises UserError, naming the knob, for an unknown name (with the nearest one), a value of another type, an argument
    that is neither, or a config file that is missing or does not run. `--help` prints the knobs and exits.
    """
    if hasattr(sys.stdout, "reconfigure"):  # names of domains may have characters that a terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    types = {field.name: field.type for field in fields(knobs_class)}
    values = {}
    for argument in argv:
        if argument in ("--help", "-h"):
            print(inspect.getsource(knobs_class))
            raise SystemExit(0)
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            check(equals, f"{argument}: write it as --{key}=value")
            values[key] = _parse(_known(key, types, "the command line"), types[key], text)
        else:
            for key, value in _run_config(argument, types).items():
                values[key] = _check(_known(key, types, argument), types[key], value, argument)
    return knobs_class(**values)


# knobs that are gone: what they were by default, and why
REMOVED = {
    "val_interval": (1, "a validation gradient that served several iterations gave worse values; use val_average"),
    "filter_lowest": (0.0, "the sign of an averaged direction did better (study/README.md); use filter_negative"),
}


def _known(key, types, where):
    if key in REMOVED:
        raise UserError(f"{where}: the knob '{key}' is gone: {REMOVED[key][1]}")
    near = difflib.get_close_matches(key, types, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "--help lists the knobs, and a config's own names begin with _"
    check(key in types, f"{where}: there is no knob '{key}'; {hint}")
    return key


def _parse(key, kind, text):
    """Read the text behind `--key=` as `kind`."""
    if kind is bool:
        check(text in ("True", "False"), f"--{key}={text}: write True or False")
        return text == "True"
    try:
        return _check(key, kind, kind(text), "the command line")
    except ValueError:
        raise UserError(f"--{key}={text}: expected {kind.__name__}") from None


def _check(key, kind, value, where):
    """An int will do for a float; nothing else stands in for another type, and no float may be nan or infinite."""
    if type(value) is int and (kind is float or abs(value) >= 2**1000):
        value = float(value) if abs(value) < 2**1000 else math.inf
    fits = type(value) is kind and (kind is not float or math.isfinite(value))
    check(fits, f"{where}: {key} = {value!r}: expected {kind.__name__}")
    return value


def _run_config(path, types):
    """The names that a config file assigns; those that start with an underscore, modules and functions are its own."""
    check(os.path.isfile(path), f"{path}: no such config file (knobs are written --key=value)")
    try:
        namespace = runpy.run_path(path)
    except Exception as error:  # whatever a config raises is told with the file's name
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    own = {key for key, value in namespace.items() if callable(value) or inspect.ismodule(value)} - set(types)
    return {key: value for key, value in namespace.items() if not key.startswith("_") and key not in own}


def split_names(text):
    r"""The names in 'a,b'. A comma in a name has a backslash before it: 'Books\, fiction,all'."""
    return [name.replace("\\,", ",") for name in re.split(r"(?<!\\),", text)]


# a number is at least the first and below the second; one that is not here is at least 1, a float at least 0
RANGES = dict(seed=(0, 2**63), vocab_size=(0, 2**16 + 1), n_layer=(1, 10_000))
RANGES |= dict.fromkeys(("warmup_iters", "lr_decay_iters", "val_windows"), (0, 2**31))
RANGES |= dict.fromkeys(("dropout", "drop_random", "beta1", "beta2"), (0, 1))
CHOICES = dict(value_order=(1, 2), filter_pool=("scored", "all"), optimizer=("adamw", "sgd"))
DIRECTIONS = ("sgd", "adam", "sgd-wte", "adam-wte")


def check_each(knobs, **choices):
    """
    Raises UserError, naming the knob, for a number out of its range, a text that does not print, one of `choices` that
    has none of its values, and a width that the heads do not divide.
    """
    for key, value in vars(knobs).items():
        if type(value) in (int, float):
            low, high = RANGES.get(key, (1, 2**31) if type(value) is int else (0, 1e30))
            check(low <= value < high, f"--{key}={value}: must be at least {low} and below {high:,}")
        check(str(value).isprintable(), f"--{key}={value!r}: has characters that cannot be printed")
        allowed = choices.get(key, [value])
        check(value in allowed, f"--{key}={value}: expected {' or '.join(map(str, allowed))}")
    heads = f"--n_embd={knobs.n_embd} is not divisible by --n_head={knobs.n_head}"
    check(knobs.n_embd % knobs.n_head == 0, heads)


def check_training(knobs):
    """
    Check the knobs of train.py against each other, and fill in lr_decay_iters and the names in out_dir. Raises
    UserError, naming the knobs, at the first that do not fit.
    """
    arm = "filtered" if knobs.filter_negative else "random" if knobs.drop_random else "control"
    knobs.out_dir = knobs.out_dir.replace("{arm}", arm).replace("{seed}", str(knobs.seed))
    knobs.lr_decay_iters = knobs.lr_decay_iters or knobs.max_iters
    said = {key: f"--{key}={value}" for key, value in vars(knobs).items()}
    check_each(knobs, **CHOICES)
    for key in ("out_dir", "data_dir", "dataset"):
        check(getattr(knobs, key).strip(), f"{said[key]}: give the name of a folder; '.' is this one")
    too_many = knobs.batch_size * knobs.block_size >= 2**31
    check(not too_many, f"{said['batch_size']} windows of {said['block_size']}: too many")
    float16 = "float16 needs a loss scaler, which would scale the values too; " if knobs.dtype == "float16" else ""
    check(knobs.dtype in ("bfloat16", "float32"), f"{said['dtype']}: {float16}expected bfloat16 or float32")

    kinds, sets, m = knobs.value_direction.split(","), split_names(knobs.val_sets), knobs.val_batch_size
    known = set(kinds) <= set(DIRECTIONS) and len(set(kinds)) == len(kinds)
    check(known, f"{said['value_direction']}: expected {', '.join(DIRECTIONS)}, or several, each once: sgd,adam")
    unscaled = knobs.score and "adam" in knobs.value_direction and knobs.optimizer == "sgd"
    check(not unscaled, f"{said['value_direction']}: needs --optimizer=adamw, whose scaling it takes")
    check(all(sets) and len(set(sets)) == len(sets), f"{said['val_sets']}: expected names, each once: a,b")
    check(m % knobs.val_groups == 0, f"{said['val_groups']}: does not divide {said['val_batch_size']}")
    check(not 0 < knobs.val_windows < m, f"{said['val_windows']}: fewer than {said['val_batch_size']}")
    second = knobs.value_order == 2
    check(not (second and knobs.val_average), "--value_order=2 is for one step's midpoint: no --val_average")
    masks = "--value_order=2 with --dropout needs --compile=False: two graphs may draw different masks"
    check(not (second and knobs.dropout and knobs.compile), masks)

    arms = knobs.filter_negative and knobs.drop_random
    check(not arms, f"{said['filter_negative']} and {said['drop_random']} are arms of their own: take one")
    check(knobs.filter_from or not knobs.filter_negative, "--filter_negative=True needs --filter_from=<a scored run>")
    same = knobs.filter_from and os.path.realpath(knobs.filter_from) == os.path.realpath(knobs.out_dir)
    check(not same, f"{said['out_dir']} is also --filter_from; give this run a folder of its own")
    if knobs.decay_lr:
        check(knobs.min_lr <= knobs.learning_rate, f"{said['min_lr']} is above {said['learning_rate']}")
        late = knobs.warmup_iters >= knobs.lr_decay_iters
        check(not late, f"{said['warmup_iters']} is not below {said['lr_decay_iters']}")
