"""The real scripts on a small corpus: the whole path, interruption, and what a user may get wrong."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import TIMES
from torch.utils._python_dispatch import TorchDispatchMode

import prepare_owt
import report
import train
from model import GPT
from support.configurator import UserError
from support.corpus import Tokens, checksum_of
from support.values import load_values, read_log
from support.windows import training_order

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = (
    "--dataset=tiny --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --eval_iters=3 --eval_interval=4 "
    "--max_iters=8 --warmup_iters=2 --checkpoint_interval=3 --log_interval=2 --learning_rate=1e-2 "
    "--device=cpu --dtype=float32 --compile=False"
)


def call(main, arguments):
    """Run a script's main in this process, with `arguments` as its command line."""
    argv, sys.argv = sys.argv, ["script.py", *arguments.split()]
    try:
        return main()
    finally:
        sys.argv = argv


def metrics(out_dir):
    """metrics.jsonl without the timings."""
    with open(os.path.join(out_dir, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text of this Python's library in two domains, as jsonl, prepared with the byte tokenizer: the folder of data/."""
    folder = tmp_path_factory.mktemp("corpus")
    with open(folder / "tiny.jsonl", "w", encoding="utf-8") as file:
        for i, text in enumerate(inspect.getsource(textwrap).split("\n\n")):
            file.write(json.dumps({"text": text, "domain": ("even", "odd")[i % 2]}) + "\n")
    arguments = f"--source={folder}/tiny.jsonl --tokenizer=bytes --domain_field=domain --data_dir={folder}/data"
    call(prepare_owt.main, f"{arguments} --val_fraction=0.2 --test_fraction=0.2")
    return folder


@pytest.fixture
def home(corpus, tmp_path, monkeypatch):
    """A fresh working folder with a copy of the corpus in data/."""
    shutil.copytree(corpus / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def baseline(corpus, tmp_path_factory):
    """A scored run, made once."""
    out_dir = str(tmp_path_factory.mktemp("runs") / "baseline")
    call(train.main, f"{TINY} --data_dir={corpus}/data --score=True --val_batch_size=4 --out_dir={out_dir}")
    return out_dir


@pytest.mark.parametrize(
    "flags, meaning, advice", [("", True, True), ("--value_order=2", True, False), ("--val_average=4", False, False)]
)
def test_a_scored_run_ends_with_what_its_share_of_negatives_tells(home, capsys, flags, meaning, advice):
    call(train.main, f"{TINY} --score=True --val_batch_size=4 {flags}")
    out = capsys.readouterr().out
    assert "% of them negative" in out
    assert ("how noisy the direction was" in out, "--val_average=32" in out) == (meaning, advice)


def test_a_scored_run_leaves_what_the_design_promises(baseline):
    assert sorted(os.listdir(baseline)) == ["ckpt.pt", "config.json", "dot_prod", "metrics.jsonl", "values.npz"]
    log = read_log(baseline)
    assert log["iter"].tolist() == list(range(8)) and log["sample_id"].shape == (8, 4)
    assert sorted(os.listdir(f"{baseline}/dot_prod")) == [f"dot_prod_log_iter_{n}.pt" for n in (3, 6, 8)]
    sample_id, value, visits = load_values(baseline)
    assert visits.sum() == 32 and len(sample_id) == 32 and value.sum() == pytest.approx(log["value"].sum())
    lines = metrics(baseline)
    assert [line["iter"] for line in lines if "test_loss" in line] == [0, 4, 8]
    reports = [line for line in lines if "loss" in line]
    assert [line["iter"] for line in reports] == [0, 2, 4, 6, 7]
    for line in reports:
        assert line["value_sum"] == pytest.approx(log["value"][line["iter"]].sum(), rel=1e-4)
        assert 0 <= line["negative"] <= 1
    drop = [line["realised"] for line in reports]
    assert np.corrcoef(drop, [line["predicted"] for line in reports])[0, 1] > 0.5
    with open(f"{baseline}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    assert config["knobs"]["val_batch_size"] == 4 and config["versions"]["torch"] == torch.__version__


def test_a_scored_run_trains_as_an_unscored_one(home):
    """With SGD: AdamW would blow up the rounding of gradients that are zero, such as those of the keys' biases."""
    flags = f"{TINY} --optimizer=sgd --weight_decay=0"
    call(train.main, f"{flags} --out_dir=out/plain")
    call(train.main, f"{flags} --out_dir=out/scored --score=True")
    plain, scored = (torch.load(f"out/{run}/ckpt.pt", weights_only=True)["model"] for run in ("plain", "scored"))
    for key, value in plain.items():
        torch.testing.assert_close(scored[key], value, rtol=1e-4, atol=1e-7)


def test_accumulation_gives_the_values_of_the_whole_batch(home, baseline):
    call(
        train.main,
        f"{TINY} --score=True --val_batch_size=4 --out_dir=out/a --batch_size=1 --gradient_accumulation_steps=4",
    )
    ours, theirs = read_log("out/a"), read_log(baseline)
    assert np.array_equal(ours["sample_id"], theirs["sample_id"])
    np.testing.assert_allclose(ours["value"], theirs["value"], rtol=2e-3, atol=1e-7)


@pytest.fixture(scope="module")
def with_negatives(baseline):
    """The scored run with a quarter of its values made negative: so short a run has none of its own."""
    folder = baseline + "_negative"
    shutil.copytree(baseline, folder)
    sample_id, value, visits = load_values(baseline)
    np.savez(f"{folder}/values.npz", sample_id=sample_id, value=np.where(sample_id % 4 == 0, -1.0, 1.0), visits=visits)
    return folder


def test_control_filtered_and_random_arms(home, with_negatives, capsys):
    sample_id, value, _ = load_values(with_negatives)
    assert 0 < (value < 0).sum() < 32
    arm = f"{TINY} --filter_from={with_negatives} --score=True"
    for flag in ("", "--filter_negative=True", "--drop_random=0.25"):
        call(train.main, f"{arm} --out_dir=out/{{arm}} {flag}")
    printed = capsys.readouterr().out
    assert f"32 scored, {(value < 0).sum()} negative" in printed and "touch 100.0% of the draws" in printed
    drawn = {name: set(read_log(f"out/{name}")["sample_id"].ravel()) for name in ("control", "filtered", "random")}
    assert drawn["control"] == set(sample_id)
    assert drawn["filtered"] == set(sample_id[value >= 0]) and drawn["random"] < drawn["control"]

    capsys.readouterr()
    call(train.main, f"{arm} --out_dir=out/all --filter_negative=True --filter_pool=all --max_iters=12")
    assert "most draws are unscored windows" in capsys.readouterr().out
    seen = set(read_log("out/all")["sample_id"].ravel())
    assert not seen & set(sample_id[value < 0]) and seen - set(sample_id)

    call(report.main, f"{with_negatives} out/control out/filtered --out=out/report")
    assert "report.png" in os.listdir("out/report")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_batch_is_trained_with_dropout_and_nothing_else_has_it(home, monkeypatch, dropout):
    """Of every forward pass: whether the model is in train mode, and whether it is the batch's."""
    forward, validate, evaluate, seen, doing = GPT.forward, train.validation_gradient, train.evaluate, [], []

    def watched(model, *args):
        seen.append((model.training, not doing))
        return forward(model, *args)

    def within(function):
        def run(*args):
            doing.append(function)
            result = function(*args)
            doing.pop()
            return result

        return run

    monkeypatch.setattr(GPT, "forward", watched)
    monkeypatch.setattr(train, "validation_gradient", within(validate))
    monkeypatch.setattr(train, "evaluate", within(evaluate))
    call(train.main, f"{TINY} --score=True --dropout={dropout} --val_batch_size=2 --out_dir=out/x")
    assert {batch for _, batch in seen} == {True, False}
    assert all(training == (batch and dropout > 0) for training, batch in seen)


def test_the_adam_direction_and_dropout_and_bfloat16(home):
    flags = "--score=True --value_direction=adam --dropout=0.1 --dtype=bfloat16 --val_batch_size=9"
    call(train.main, f"{TINY} {flags} --out_dir=out/x")
    assert np.isfinite(load_values("out/x")[1]).all() and metrics("out/x")[-2]["loss"] < metrics("out/x")[1]["loss"]


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_values_add_up_to_the_step_s_own_prediction(home, clip):
    """Plain SGD without decay: sum_i lr * clip / B * <grad l_i, G> is -<G, theta' - theta>, whatever B is cut into."""
    for cut in ("--batch_size=6", "--batch_size=2 --gradient_accumulation_steps=3"):
        flags = f"{TINY} --score=True --val_batch_size=3 --optimizer=sgd --weight_decay=0 --grad_clip={clip} {cut}"
        shutil.rmtree("out", ignore_errors=True)
        call(train.main, f"{flags} --out_dir=out/x")
        lines = [line for line in metrics("out/x") if "loss" in line]
        assert len(lines) == 5
        for line in lines:
            assert line["value_sum"] == pytest.approx(line["predicted"], rel=1e-3)
            assert clip == 0 or line["grad_norm"] > clip


def test_the_test_loss_does_not_depend_on_how_the_batch_is_cut(home):
    losses = []
    for cut in ("--batch_size=4", "--batch_size=1 --gradient_accumulation_steps=4"):
        call(train.main, f"{TINY} {cut} --out_dir=out/{len(losses)}")
        losses.append([line["test_loss"] for line in metrics(f"out/{len(losses)}") if "test_loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3


def test_a_run_can_be_made_longer(home):
    call(train.main, f"{TINY} --score=True --out_dir=out/x --lr_decay_iters=12")
    call(train.main, f"{TINY} --score=True --out_dir=out/x --lr_decay_iters=12 --max_iters=12 --init_from=resume")
    call(train.main, f"{TINY} --score=True --out_dir=out/y --lr_decay_iters=12 --max_iters=12")
    assert np.array_equal(load_values("out/x")[1], load_values("out/y")[1])


def refused(arguments, match):
    with pytest.raises(SystemExit, match=match) as error:
        call(train.main, arguments)
    assert "\n" not in str(error.value)


def test_the_corpus_is_checked(home):
    refused(f"{TINY} --dataset=nothing", "data/nothing.*prepare_owt.py")
    refused(f"{TINY} --block_size=100000", "train.bin: 'all' has 0 windows of 100000.*lower .*--block_size")
    refused(f"{TINY} --score=True --val_batch_size=100000", "val.bin.*100000 are needed; lower --val_batch_size")
    refused(f"{TINY} --vocab_size=100", "--vocab_size=100 .*the corpus tiny has 257 tokens and the model 100")
    path = home / "data" / "tiny" / "train.bin"
    path.write_bytes(path.read_bytes()[:-10])
    refused(TINY, "train.bin.*truncated")
    path.unlink()
    refused(TINY, "train.bin")


def test_a_token_id_beyond_the_vocabulary_is_named(home):
    tokens = np.fromfile("data/tiny/train.bin", dtype="<u2")
    tokens[:] = 60000
    tokens.tofile("data/tiny/train.bin")
    meta = json.loads((home / "data/tiny/meta.json").read_text())
    meta["splits"]["train"]["crc_sha256"] = prepare_owt.write_checksums("data/tiny/train.bin", "data/tiny/train.crc")
    (home / "data/tiny/meta.json").write_text(json.dumps(meta | {"checksum": checksum_of(meta)}))
    refused(f"{TINY} --out_dir=out/x", "train.bin: token id 60000 in window .*vocab_size = 257")


def test_the_out_dir_and_the_checkpoint_are_checked(home):
    refused(f"{TINY} --out_dir=out/x --init_from=resume", "out/x/ckpt.pt: no such file; start the run")
    call(train.main, f"{TINY} --out_dir=out/x")
    refused(f"{TINY} --out_dir=out/x", "out/x: holds a run already.*--init_from=resume")
    refused(
        f"{TINY} --out_dir=out/x --init_from=resume --n_embd=32",
        "--n_embd=32: the run of out/x/ckpt.pt began otherwise; resume with --n_embd=16",
    )
    refused(
        f"{TINY} --out_dir=out/y --init_from=out/x/ckpt.pt --n_layer=2", "a model of another shape; use --n_layer=1"
    )
    call(train.main, f"{TINY} --out_dir=out/y --init_from=out/x/ckpt.pt")  # the weights alone: another run
    meta = json.loads((home / "data/tiny/meta.json").read_text())
    meta["fingerprint"] = "0" * 64
    meta["checksum"] = checksum_of(meta)
    (home / "data/tiny/meta.json").write_text(json.dumps(meta))
    refused(f"{TINY} --out_dir=out/x --init_from=resume", "--dataset=tiny: not the corpus that out/x/ckpt.pt")
    (home / "out/x/ckpt.pt").write_bytes(b"not a checkpoint")
    refused(f"{TINY} --out_dir=out/x --init_from=resume", "ckpt.pt: damaged, or not written by this script")


def test_the_filter_s_source_is_checked(home, baseline):
    filtered = f"{TINY} --filter_negative=True --out_dir=out/f"
    refused(f"{filtered} --filter_from=out/none", "out/none/values.npz: no such file")
    refused(f"{filtered} --filter_from={baseline} --block_size=8", "windows of 16 tokens; use --block_size=16")
    shutil.copytree(baseline, "out/b")
    config = json.loads((home / "out/b/config.json").read_text())
    (home / "out/b/config.json").write_text(json.dumps(config | {"fingerprint": "0"}))
    refused(f"{filtered} --filter_from=out/b", "valued another corpus")
    (home / "out/b/config.json").write_text(json.dumps(config))
    sample_id, value, visits = load_values("out/b")
    np.savez("out/b/values.npz", sample_id=sample_id, value=-np.abs(value) - 1, visits=visits)
    refused(f"{filtered} --filter_from=out/b", "nothing is left to train on: 32 of 32 scored windows are negative")
    assert not os.path.exists("out/f")


def test_no_gpu_no_wandb(home, monkeypatch):
    if not torch.cuda.is_available():
        refused(f"{TINY} --device=cuda", "--device=cuda: no such device here; use --device=cpu")
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(f"{TINY} --wandb_log=True --out_dir=out/w", "pip install wandb")


def test_a_run_that_cannot_compile_is_refused_before_its_folder_is_made(home, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(home / "cache"))
    torch._dynamo.reset()  # what another test has compiled
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-compiler")}):
        refused(f"{TINY} --compile=True --out_dir=out/x", "--compile=True: .*No working C.. compiler.*--compile=False")
    assert not os.path.exists("out")


def test_a_folder_that_cannot_be_made_is_named(home):
    (home / "file").write_text("")
    for folder in ("file", "file/x", "/proc/x"):
        refused(f"{TINY} --out_dir={folder}", f"--out_dir={folder}: ")


def test_a_refused_run_leaves_no_trace(home):
    (home / "bad.pt").write_bytes(b"not a checkpoint")
    for flags in ("--init_from=bad.pt", "--init_from=resume", "--init_from=no/model", "--vocab_size=100"):
        refused(f"{TINY} --out_dir=out/x {flags}", "bad.pt|ckpt.pt|no/model|vocab_size")
        assert not os.path.exists("out")


def test_a_path_that_is_not_there_is_no_model_of_the_hub(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # which would ask it
    for path in ("./gpt2", "../x", "/gpt2", "~/gpt2", "data/gpt2", "out/x/model", "gpt2/", "my_model!"):
        refused(f"{TINY} --out_dir=out/x --init_from={path}", "no such folder; give a fol")
    for path in ("out/x/ckpt.pt", "ckpt.pt"):
        refused(f"{TINY} --out_dir=out/x --init_from={path}", f"{path}: no such file; give another --init_from")
    for name in ("gpt2", "owner/a.b-c"):
        refused(f"{TINY} --out_dir=out/x --init_from={name}", f"--init_from={name} needs transformers")
        assert not os.path.exists("out")


def test_bits_per_byte_stand_beside_every_test_loss(home, capsys):
    """A token of the byte tokenizer is a byte, but for the end-of-text tokens."""
    call(train.main, f"{TINY} --val_sets=even,all --out_dir=out/x")
    assert "test loss even" in capsys.readouterr().out
    for line in metrics("out/x"):
        for name in [name for name in line if name.startswith("test_loss")]:
            bits = line[name] / np.log(2)
            assert bits <= line[name.replace("loss", "bpb")] < 1.05 * bits
        assert "test_loss" not in line or line["test_bpb"] > line["test_loss"] / np.log(2)
    assert sum("test_bpb_even" in line and "test_bpb" in line for line in metrics("out/x")) == 3


def test_a_mistake_on_the_command_line_is_one_line_and_no_traceback(home):
    result = subprocess.run([sys.executable, f"{ROOT}/train.py", "--bach_size=3"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "the command line: there is no knob 'bach_size'; did you mean 'batch_size'?\n"


def test_training_from_pretrained_weights(home):
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained("gpt2-tiny")
    call(train.main, f"{TINY} --init_from=gpt2-tiny --score=True --out_dir=out/x")
    config = json.loads((home / "out/x/config.json").read_text())
    assert config["model"]["vocab_size"] == 300 and config["model"]["n_layer"] == 1
    call(train.main, f"{TINY} --init_from=resume --score=True --out_dir=out/x")
    assert config["model"]["block_size"] == 16
    flags = f"{TINY} --init_from=gpt2-tiny --out_dir=out/y"
    refused(f"{flags} --block_size=64", "--init_from=gpt2-tiny: a model of another shape; use --block_size=32$")
    changed = json.loads((home / "gpt2-tiny/config.json").read_text()) | dict(activation_function="relu")
    (home / "gpt2-tiny/config.json").write_text(json.dumps(changed))
    refused(flags, "--init_from=gpt2-tiny: its configuration has activation_function = relu")
    assert not os.path.exists("out/y")


def as_nanogpt(path):
    """The checkpoint of a run as nanoGPT writes it: compiled, with the masks of older PyTorch, nothing of ours."""
    ours = torch.load(path, weights_only=True)
    weights = {f"_orig_mod.{key}": value for key, value in ours["model"].items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(16, 16).tril()[None, None]
    torch.save(dict(model=weights, model_args=ours["model_args"], iter_num=8, config={}), "nanogpt.pt")
    return ours["model"]


def test_a_checkpoint_of_nanogpt_is_loaded_whole_or_cropped_to_a_smaller_block(home):
    call(train.main, f"{TINY} --out_dir=out/x")
    theirs, flags = as_nanogpt("out/x/ckpt.pt"), f"{TINY} --init_from=nanogpt.pt --learning_rate=0 --min_lr=0"
    call(train.main, f"{flags} --out_dir=out/y")
    call(train.main, f"{flags} --out_dir=out/z --block_size=8")
    for run, length in dict(y=16, z=8).items():
        found = torch.load(f"out/{run}/ckpt.pt", weights_only=True)
        assert found["model_args"]["block_size"] == length
        for key, value in found["model"].items():
            assert torch.equal(value, theirs[key][:length] if "wpe" in key else theirs[key])
    call(train.main, f"{flags} --out_dir=out/z --block_size=8 --init_from=resume --max_iters=9 --lr_decay_iters=8")


def test_a_model_of_another_shape_names_all_its_flags_at_once(home):
    call(train.main, f"{TINY} --out_dir=out/x --bias=False")
    flags = f"{TINY} --init_from=out/x/ckpt.pt --out_dir=out/y"
    refused(f"{flags} --n_layer=2 --n_head=4 --n_embd=32", "use --n_layer=1 --n_head=2 --n_embd=16 --bias=False$")
    refused(f"{flags} --bias=False --block_size=32 --n_layer=2", "use --n_layer=1 --block_size=16$")
    refused(f"{flags} --bias=False --vocab_size=300", "use --vocab_size=257$")
    found = torch.load("out/x/ckpt.pt", weights_only=True)
    found["model_args"]["rotary"] = True
    torch.save(found, "out/x/ckpt.pt")
    refused(flags, "out/x/ckpt.pt: a model with other settings than nanoGPT's .*rotary")
    assert not os.path.exists("out/y")


class _NumbersRead(TorchDispatchMode):
    """Counts calls of the operators through which all of PyTorch, its C++ included, reads a number from a tensor."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        if operator.namespace == "data_value":  # one node: look inside
            with self:
                return operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--score=True --grad_clip=1 --dropout=0.1",
        "--score=True --val_sets=odd,even --value_direction=sgd,adam --val_groups=2 --val_average=4",
        "--score=True --value_order=2",
        "--score=True --value_order=2 --optimizer=sgd",
    ],
)
def test_a_step_reads_nothing_from_its_device(home, monkeypatch, flags):
    """On a GPU every such read would have a step wait: a longer run reads no more than a shorter one."""
    monkeypatch.setattr(train, "watch_signals", lambda *_: lambda: 0)  # its number is a CPU's on every device
    read, counts = [], []

    def counted(method):
        return lambda *args, **kwargs: read.append(method) or method(*args, **kwargs)

    for name in ("tolist", "cpu", "numpy", "__array__", "nonzero"):  # a whole tensor
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    for n in (3, 9):  # one part of the log, and no iteration but the first and last prints or evaluates
        quiet = f"--max_iters={n} --log_interval=100 --eval_interval=100 --checkpoint_interval=100 --val_batch_size=4"
        read.clear()
        with _NumbersRead() as numbers:
            call(train.main, f"{TINY} {quiet} {flags} --out_dir=out/{n}")
        counts.append((numbers.count, len(read)))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0, "nothing is counted"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--score=True --val_average=4",
        "--score=True --value_order=2",
        "--score=True --value_order=2 --compile=True",  # the replays of CUDA graphs
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_on_a_gpu_does_not_wait(home, monkeypatch, flags, dtype):
    """The steps 4 to 11 neither report nor evaluate. Each begins with its learning rate; the next one ends it."""
    get_lr, watched = train.get_lr, []

    def watching(it, knobs):
        torch.cuda.set_sync_debug_mode("error" if 4 <= it < 12 else "default")
        watched.append(torch.cuda.get_sync_debug_mode())
        return get_lr(it, knobs)

    monkeypatch.setattr(train, "get_lr", watching)
    quiet = "--device=cuda --max_iters=14 --log_interval=100 --eval_interval=100 --checkpoint_interval=100"
    try:
        call(train.main, f"{TINY} {quiet} --dtype={dtype} --val_batch_size=4 {flags} --out_dir=out/x")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched[4:12] == [2] * 8 and watched[12] == 0


def test_the_loader_s_thread_lives_as_long_as_the_run(home, monkeypatch):
    """A window of iteration 5 is damaged: the run stops there, not before, and its thread is gone."""
    names, get_lr = [], train.get_lr

    def watching(it, knobs):
        names.append([thread.name for thread in threading.enumerate() if thread.name.startswith("loader")])
        return get_lr(it, knobs)

    monkeypatch.setattr(train, "get_lr", watching)
    call(train.main, f"{TINY} --out_dir=out/whole")
    assert names == [[]] + [["loader_0"]] * 7
    n_windows = (os.path.getsize("data/tiny/train.bin") // 2 - 1) // 16
    damaged = training_order(n_windows, 1337, False, "scored", 0.0)[0].take(5 * 4, 4)[0]
    windows = Tokens.windows

    def checked(self, ids, block_size):
        if self.path.endswith("train.bin") and set(ids) == set(damaged):
            raise UserError(f"{self.path}: damaged")
        return windows(self, ids, block_size)

    monkeypatch.setattr(Tokens, "windows", checked)
    names.clear()
    refused(f"{TINY} --log_interval=1 --out_dir=out/damaged", "train.bin: damaged")
    assert [line["iter"] for line in metrics("out/damaged") if "loss" in line] == [0, 1, 2, 3, 4]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_the_time_of_a_step_has_what_the_run_waits_for_its_device(home, monkeypatch):
    """On a GPU the steps between two lines end while the next check waits; here the wait is made up."""
    monkeypatch.setattr(train.Watch, "check", lambda self: 1e6)
    call(train.main, f"{TINY} --score=True --val_batch_size=4 --log_interval=4 --out_dir=out/x")
    with open("out/x/metrics.jsonl", encoding="utf-8") as file:
        times = [line["step_ms"] for line in map(json.loads, file) if "step_ms" in line]
    assert len(times) == 3 and min(times) > 1e6 / 4


def test_a_check_says_for_how_long_it_has_waited(monkeypatch):
    clock = iter([10.0, 10.25])

    class Slow:
        def tolist(self):
            return [-1.0, 0.0, 0.0, 0.0, 0.0]

    watch = train.Watch(SimpleNamespace(knobs=SimpleNamespace(device="cpu")), None, None)
    watch.first = Slow()
    monkeypatch.setattr("support.watch.time.perf_counter", lambda: next(clock))
    assert watch.check() == 250.0
