"""The configurator and the knobs: strict, typed, and never a traceback."""

import glob
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.configurator import UserError, configure, split_names
from train import Knobs, get_lr

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass
class Some:
    name: str = "a"
    size: int = 1
    rate: float = 0.5
    flag: bool = False


def test_later_wins_and_types_are_the_dataclass_s(tmp_path):
    config = tmp_path / "c.py"
    config.write_text("_half = 4\nsize = _half * 2  # arithmetic is welcome\nrate = 1\n")
    knobs = configure(Some, ["--size=3", str(config), "--flag=True", "--name=x=y"])
    assert knobs == Some(name="x=y", size=8, rate=1.0, flag=True) and type(knobs.rate) is float
    assert configure(Some, [str(config), "--size=3"]).size == 3


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--sise=3", "no knob 'sise'; did you mean 'size'"),
        ("--zzz=3", "no knob 'zzz'; --help lists"),
        ("--size=3.5", "--size=3.5: expected int"),
        ("--rate=fast", "--rate=fast: expected float"),
        ("--rate=nan", "expected float"),
        ("--rate=inf", "expected float"),
        ("--flag=yes", "--flag=yes: write True or False"),
        ("--flag", "write it as --flag=value"),
        ("size=3", "size=3: no such config file"),
        ("no/such.py", "no/such.py: no such config file"),
    ],
)
def test_command_line_mistakes(argument, message):
    with pytest.raises(UserError, match=message):
        configure(Some, [argument])


@pytest.mark.parametrize(
    "text, message",
    [
        ("sise = 3", "there is no knob 'sise'; did you mean 'size'"),
        ("from math import pi", "there is no knob 'pi'; --help lists the knobs, and a config's own names begin with _"),
        ("size = '3'", "size = '3': expected int"),
        ("size = True", "size = True: expected int"),
        ("flag = 1", "flag = 1: expected bool"),
        ("rate = 1e999", "expected float"),
        ("rate = 10**400", "expected float"),
        ("size = -(10**5000)", "size = inf: expected int"),
        ("flag = 10**5000", "flag = inf: expected bool"),
        ("size =", "SyntaxError"),
        ("size = 1 / 0", "ZeroDivisionError"),
    ],
)
def test_config_file_mistakes(tmp_path, text, message):
    config = tmp_path / "c.py"
    config.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        configure(Some, [str(config)])
    assert "c.py" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfsize = 3\n",
        b"import math\nfrom os.path import join\nsize = math.isqrt(9)\n",
        b"def three():\n    return 3\n\nclass Own:\n    pass\n\nsize = three()\n",
        "name, size = 'Stra\u00dfe', 3\n".encode(),
        "# coding: latin-1\nname, size = 'Stra\u00dfe', 3\n".encode("latin-1"),
        b"size = 3\r\n",
    ],
)
def test_a_config_is_python_with_its_byte_order_mark_its_encoding_and_its_imports(tmp_path, content):
    (tmp_path / "c.py").write_bytes(content)
    knobs = configure(Some, [str(tmp_path / "c.py")])
    assert knobs.size == 3 and knobs.name == ("Stra\u00dfe" if b"name" in content else "a")


def test_a_config_is_read_and_its_names_are_printed_in_any_locale(tmp_path):
    (tmp_path / "c.py").write_text("name = 'Stra\u00dfe'\n", encoding="utf-8")
    script = "import test_configurator as t, sys; print(t.configure(t.Some, sys.argv[1:]).name)"
    environment = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    environment["PYTHONPATH"] = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    command = [sys.executable, "-c", script, str(tmp_path / "c.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == r"Stra\xdfe"


@pytest.mark.parametrize(
    "text", ["import math as size", "def flag():\n    return True", "from math import sqrt as rate"]
)
def test_a_module_or_a_function_is_no_knob_s_value(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match="c.py: (size|flag|rate) = .*: expected (int|bool|float)"):
        configure(Some, [str(tmp_path / "c.py")])


def test_help_prints_the_knobs(capsys):
    with pytest.raises(SystemExit) as end:
        configure(Some, ["--help"])
    assert end.value.code == 0 and "size: int = 1" in capsys.readouterr().out


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(), st.builds("--{}={}".format, st.sampled_from(list(vars(Knobs()))), st.text()))))
def test_any_command_line_gives_knobs_or_a_message(argv):
    try:
        assert isinstance(configure(Knobs, argv), Knobs)
    except UserError as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(dtype="float16"), "float16 needs a loss scaler"),
        (dict(n_embd=100, n_head=12), "--n_embd=100 is not divisible by --n_head=12"),
        (dict(filter_negative=True), "--filter_negative=True needs --filter_from"),
        (dict(filter_negative=True, filter_from="x", drop_random=0.5), "take one"),
        (dict(drop_random=1.0), "--drop_random=1.0"),
        (dict(filter_pool="some"), "expected scored or all"),
        (dict(score=True, value_direction="adam", optimizer="sgd"), "needs --optimizer=adamw"),
        (dict(max_iters=100, warmup_iters=100), "--warmup_iters=100"),
        (dict(learning_rate=1e-5), "--min_lr=6e-05 is above"),
        (dict(out_dir=""), "--out_dir=: give the name of a folder"),
        (dict(dataset=" "), "--dataset= : give the name of a folder"),
        (dict(data_dir="\t"), "--data_dir='.t': has characters that cannot be printed"),
        (dict(val_sets="a,,b"), "--val_sets=a,,b: expected names, each once"),
        (dict(val_sets=r"a\,b,a\,b"), "expected names, each once"),
        (dict(batch_size=2**20, block_size=2**11), "windows of --block_size=2048: too many"),
        (dict(seed=2**63), "--seed=9223372036854775808: must be at least 0 and below 9,223,372,036,854,775,808"),
        (dict(dropout=1), "--dropout=1: must be at least 0 and below 1"),
        (dict(batch_size=0), "--batch_size=0: must be at least 1"),
        (dict(learning_rate=-1.0), "--learning_rate=-1.0: must be at least 0"),
        (dict(filter_from="out/a", out_dir="out/a"), "give this run a folder of its own"),
    ],
)
def test_knobs_are_checked_against_each_other(values, message):
    with pytest.raises(UserError, match=message):
        Knobs(**values)


@pytest.mark.parametrize("flag, advice", [("val_interval=4", "val_average"), ("filter_lowest=0.1", "filter_negative")])
def test_a_knob_that_is_gone_says_so(flag, advice):
    with pytest.raises(UserError, match=f"the knob '{flag.split('=')[0]}' is gone: .*use {advice}"):
        configure(Knobs, [f"--{flag}"])


@pytest.mark.parametrize(
    "text, names",
    [
        ("all", ["all"]),
        ("a,b", ["a", "b"]),
        (r"Books\, fiction,all", ["Books, fiction", "all"]),
        (r"\,,a\b,\\,", [",", r"a\b", "\\,"]),
    ],
)
def test_a_backslash_keeps_a_comma_in_a_name(text, names):
    assert split_names(text) == names


def test_the_arms_have_folders_of_their_own():
    arms = dict(control={}, filtered=dict(filter_negative=True), random=dict(drop_random=0.2))
    for arm, values in arms.items():
        assert Knobs(out_dir="out/{arm}-{seed}", filter_from="out/base", seed=3, **values).out_dir == f"out/{arm}-3"


@pytest.mark.parametrize("path", sorted(glob.glob(f"{ROOT}/config/*.py")))
def test_every_config_is_valid(path):
    configure(Knobs, [path])


def test_the_two_runs_of_a_pair_differ_in_what_they_must():
    names = "baseline", "demo_baseline", "baseline_best"
    for baseline, filtered in ((name, name.replace("baseline", "filtered")) for name in names):
        a, b = (vars(configure(Knobs, [f"{ROOT}/config/{name}.py"])) for name in (baseline, filtered))
        differ = {key for key in a if a[key] != b[key]}
        allowed = {
            "out_dir",
            "score",
            "filter_from",
            "max_iters",
            "lr_decay_iters",
            "val_batch_size",
            "value_direction",
            "val_average",
        }
        assert differ <= allowed
        control, treatment = b, vars(configure(Knobs, [f"{ROOT}/config/{filtered}.py", "--filter_negative=True"]))
        assert {key for key in control if control[key] != treatment[key]} == {"out_dir", "filter_negative"}


def test_learning_rate():
    knobs = Knobs(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    assert get_lr(0, knobs) == pytest.approx(1 / 11) and get_lr(10, knobs) == 1.0
    assert get_lr(60, knobs) == pytest.approx(0.55) and get_lr(110, knobs) == pytest.approx(0.1)
    assert get_lr(1000, knobs) == pytest.approx(0.1)
    assert get_lr(1000, Knobs(decay_lr=False, learning_rate=0.3)) == 0.3
