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


# knobs that are gone: what they were by default, and why
REMOVED = {
    "val_interval": (1, "a validation gradient that served several iterations gave worse values; use val_average"),
    "filter_lowest": (0.0, "the sign of an averaged direction did better (study/README.md); use filter_negative"),
}


def _known(key, types, where):
    if key in REMOVED:
        raise UserError(f"{where}: the knob '{key}' is gone: {REMOVED[key][1]}")
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


def check_shape(knobs, **choices):
    """
    Check the knobs of a step's shape, as bench.py and its budget have them. Raises UserError, naming the knob, for one
    of `choices` that has none of its values, for a number that is negative, or 0 where it counts, and for a width that
    the heads do not divide.
    """
    for key, allowed in choices.items():
        if getattr(knobs, key) not in allowed:
            raise UserError(f"--{key}={getattr(knobs, key)}: expected {' or '.join(allowed)}")
    for key, value in vars(knobs).items():
        if (type(value) is int and value < 1) or (type(value) is float and value < 0):
            raise UserError(f"--{key}={value}: must be positive")
    if knobs.n_embd % knobs.n_head:
        raise UserError(f"--n_embd={knobs.n_embd} is not divisible by --n_head={knobs.n_head}")


def check_training(knobs):
    """
    Check the knobs of train.py against each other, and fill in lr_decay_iters and the names in out_dir. Raises
    UserError, naming the knobs, at the first that do not fit.
    """

    def check(ok, message):
        if not ok:
            raise UserError(message)

    for key, value in vars(knobs).items():
        if type(value) in (int, float):
            check(value >= 0, f"--{key}={value}: must not be negative")
            may_be_zero = ("seed", "vocab_size", "warmup_iters", "lr_decay_iters", "val_windows")
            may_be_zero = type(value) is float or key in may_be_zero
            check(value > 0 or may_be_zero, f"--{key}={value}: must be positive")
        elif type(value) is str:
            check(value.isprintable(), f"--{key}={value!r}: has characters that cannot be printed")
        limits = {"seed": 2**63, "vocab_size": 2**16 + 1, "n_layer": 10_000}
        limit = limits.get(key, 1e30 if type(value) is float else 2**31)
        check(type(value) in (bool, str) or value < limit, f"--{key}={value}: must be below {limit:,}")
    tokens = knobs.batch_size * knobs.block_size
    check(tokens < 2**31, f"--batch_size={knobs.batch_size} windows of --block_size={knobs.block_size}: too many")
    check(bool(knobs.out_dir), "--out_dir=: give the run a folder")
    check(bool(knobs.data_dir), "--data_dir=: name the folder of the corpora; this one is --data_dir=.")
    check(bool(knobs.dataset), f"--dataset=: name a folder of --data_dir={knobs.data_dir}")
    for key in ("dropout", "drop_random", "beta1", "beta2"):
        check(getattr(knobs, key) < 1, f"--{key}={getattr(knobs, key)}: must be below 1")
    choices = dict(value_order=(1, 2), filter_pool=("scored", "all"), optimizer=("adamw", "sgd"))
    for key, allowed in choices.items():
        expected = f"expected {' or '.join(map(str, allowed))}"
        check(getattr(knobs, key) in allowed, f"--{key}={getattr(knobs, key)}: {expected}")
    kinds = knobs.value_direction.split(",")
    known = set(kinds) <= {"sgd", "adam", "sgd-wte", "adam-wte"} and len(set(kinds)) == len(kinds)
    expected = "expected sgd, adam, sgd-wte, adam-wte, or several, each once: sgd,adam"
    check(known, f"--value_direction={knobs.value_direction}: {expected}")
    sets = knobs.val_sets.split(",")
    check(all(sets) and len(set(sets)) == len(sets), f"--val_sets={knobs.val_sets}: expected names, each once: a,b")
    m, groups, windows = knobs.val_batch_size, knobs.val_groups, knobs.val_windows
    check(m % groups == 0, f"--val_groups={groups}: does not divide --val_batch_size={m}")
    check(not windows or windows >= m, f"--val_windows={windows}: fewer than --val_batch_size={m}")
    midpoint = "--value_order=2 takes its gradient at the midpoint of the step: no --val_average"
    check(knobs.value_order == 1 or not knobs.val_average, midpoint)
    masks = "--value_order=2 with --dropout needs --compile=False: two graphs may draw different masks"
    check(knobs.value_order == 1 or not (knobs.dropout and knobs.compile), masks)
    float16 = "float16 needs a loss scaler, which would scale the values too; " if knobs.dtype == "float16" else ""
    check(knobs.dtype in ("bfloat16", "float32"), f"--dtype={knobs.dtype}: {float16}expected bfloat16 or float32")
    heads = f"--n_embd={knobs.n_embd} is not divisible by --n_head={knobs.n_head}"
    check(knobs.n_embd % knobs.n_head == 0, heads)
    adam = "--value_direction=adam needs --optimizer=adamw, whose scaling it takes"
    check("adam" not in knobs.value_direction or knobs.optimizer == "adamw" or not knobs.score, adam)
    both = knobs.filter_negative and knobs.drop_random > 0
    check(not both, "--filter_negative and --drop_random are arms of their own: take one")
    source = "--filter_negative=True needs --filter_from=<out_dir of a scored run>"
    check(not knobs.filter_negative or knobs.filter_from, source)
    knobs.lr_decay_iters = knobs.lr_decay_iters or knobs.max_iters
    if knobs.decay_lr:
        check(
            knobs.min_lr <= knobs.learning_rate,
            f"--min_lr={knobs.min_lr} is above --learning_rate={knobs.learning_rate}",
        )
        late = f"--warmup_iters={knobs.warmup_iters} is not below --lr_decay_iters={knobs.lr_decay_iters}"
        check(knobs.warmup_iters < knobs.lr_decay_iters, late)
    arm = "filtered" if knobs.filter_negative else "random" if knobs.drop_random else "control"
    knobs.out_dir = knobs.out_dir.replace("{arm}", arm).replace("{seed}", str(knobs.seed))
    same = knobs.filter_from and os.path.abspath(knobs.filter_from) == os.path.abspath(knobs.out_dir)
    check(not same, f"--out_dir={knobs.out_dir} is also --filter_from; give this run a folder of its own")
