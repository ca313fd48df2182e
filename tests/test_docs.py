"""README.md and docs/: their commands run, what they name exists, and they stay short."""

import glob
import os
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from test_processes import run_ranks
from test_run_folder import start_forks
from test_train import ROOT, TINY, call, corpus, home  # noqa: F401 (fixtures)
from test_trial import make_some_negative

import bench
import prepare_owt
import report
import sample
import train
import trial
from model import GPT, GPTConfig
from support import sources

DOCS = sorted(f"docs/{name}" for name in os.listdir(f"{ROOT}/docs"))
PAGES = ["README.md", *DOCS]

# commands that cannot run here, with the reason
NOT_RUN = {
    "make demo": "takes minutes; the commands that it consists of run here and in test_train.py",
    "make test": "runs this test",
    "python prepare_owt.py": "downloads OpenWebText",
    "python prepare_owt.py --max_tokens=100000000": "downloads its beginning",
    "python prepare_owt.py --source=../nanoGPT/data/openwebtext": "needs nanoGPT's corpus; test_prepare.py has one",
    "python prepare_owt.py --source=<hub id> --domain_field=meta.pile_set_name": "downloads a corpus from the hub",
    "torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=<host>:29500 train.py "
    "config/baseline.py --batch_size=1 --gradient_accumulation_steps=16": "needs two nodes",
}

# These flags make a command short. They follow the documented flags, because the later one of two wins.
TINY_RUN = f"{TINY} --vocab_size=0 --gradient_accumulation_steps=2 --val_batch_size=4"
TINY_BENCH = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=2 --val_batch_size=2 --vocab_size=50"
TINY_BENCH += " --rounds=1 --compile=False"


def read(path):
    with open(f"{ROOT}/{path}", encoding="utf-8") as file:
        return file.read()


def blocks(page, language):
    """The contents of the page's fenced blocks in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def commands(page):
    """The lines of the page's sh blocks, without comments."""
    lines = [re.sub(r"\s*#.*", "", line) for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


def run(command):
    """Run a documented command with tiny knobs. Fails if it is neither known here nor in NOT_RUN."""
    words = shlex.split(command)
    flags = " ".join(words[2:])
    if words[:2] == ["python", "train.py"]:
        call(train.main, f"{flags} {TINY_RUN}")
    elif words[:3] == ["torchrun", "--standalone", "--nproc_per_node=8"]:
        run_ranks(2, f"{' '.join(words[4:])} {TINY_RUN} --out_dir=out/torchrun")
    elif words[:2] == ["python", "prepare_owt.py"]:
        call(prepare_owt.main, f"{flags} --tokenizer=bytes")  # GPT-2's tokens may have to be downloaded
    elif words[:2] == ["python", "trial.py"]:
        make_some_negative(words[2])
        start_forks()
        call(trial.main, f"{flags} --share=1 --orders=1 --arms=control,filtered")
    elif words[:2] == ["python", "report.py"]:
        call(report.main, flags)
    elif words[:2] == ["python", "sample.py"]:
        call(sample.main, f"{flags} --num_samples=1 --max_new_tokens=2 --device=cpu")
    elif words[:2] == ["python", "bench.py"]:
        call(bench.main, f"{flags} {TINY_BENCH}")
    elif words[:3] == [".venv/bin/python", "-m", "pytest"]:
        path, word = next(word for word in words if word.startswith("tests")), words[-1] if "-k" in words else "test_"
        assert any(word in name for name in test_names(path)), f"{command}: selects no test"
    else:
        raise AssertionError(f"{command}: this test does not know how to run it; add it to run() or to NOT_RUN")


def test_names(path="tests"):
    """The names of the test functions in a file or folder."""
    files = glob.glob(f"{ROOT}/{path}/*.py") or [f"{ROOT}/{path}"]
    return [name for file in files for name in re.findall(r"^def (test_\w+)", read(os.path.relpath(file, ROOT)), re.M)]


test_names.__test__ = False


@pytest.fixture
def one_thread():
    """Tiny models are faster on one thread, above all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_run(page, home, monkeypatch, one_thread):  # noqa: F811
    datasets = pytest.importorskip("datasets")
    os.symlink(f"{ROOT}/config", "config")
    texts = {"text": ["a text of some words"] * 100, "domain": ["words"] * 100}
    datasets.Dataset.from_dict(texts).to_parquet("texts/a.parquet")
    monkeypatch.setattr(sources, "python_documents", lambda: zip(texts["text"], texts["domain"], strict=True))
    # bench.py measures memory in processes of its own, which test_bench.py tests
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=lambda *_, **__: SimpleNamespace(stdout="1")))
    for command in commands(page):
        if command not in NOT_RUN:
            run(command)


def test_every_command_that_cannot_run_here_is_still_in_the_pages():
    assert set(NOT_RUN) <= {command for page in PAGES for command in commands(page)}


def test_a_command_that_this_test_does_not_know_fails():
    with pytest.raises(AssertionError, match="does not know how to run it"):
        run("python unknown.py out/baseline")


def test_the_first_commands_of_the_readme_are_make_demo_and_make_test():
    assert commands("README.md")[:2] == ["make demo", "make test"]


def test_the_python_examples_run():
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=1, n_embd=8))
    x, y = torch.randint(20, (2, 3, 8))
    examples = [block for page in PAGES for block in blocks(page, "python")]
    assert examples
    for example in examples:
        names = dict(model=model, x=x, y=y, x_val=x[:2], y_val=y[:2])
        exec(example, names)
        assert names["dots"].shape == (3,)


def test_the_pages_are_short():
    assert len(read("README.md").split()) <= 1500
    assert sum(len(read(page).split()) for page in DOCS) <= 4500


@pytest.mark.parametrize("page", DOCS)
def test_a_page_begins_with_the_question_that_it_answers(page):
    first = read(page).splitlines()[0]
    assert first.startswith("# ") and first.endswith("?")


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_the_files_and_links_of_a_page_exist(page):
    text = read(page)
    for link in re.findall(r"\]\((?!https:)([^)]*)\)", text):
        path, _, anchor = link.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(f"{ROOT}/{path}"), link
        assert not anchor or anchor in anchors(path), link
    named = set(re.findall(r"(?<![\w/.])(?:[\w-]+/)*[\w-]+\.(?:py|png|toml)\b", text))
    named |= set(re.findall(r"(?<![\w/.])requirements[\w-]*\.txt|\b(?:config|docs|study|support|tests)/", text))
    made = {"loss.png", "values.png", "report.png", "trial.png"}  # by report.py and trial.py
    missing = sorted(name for name in named - made if not os.path.exists(f"{ROOT}/{name}"))
    assert not missing


def test_a_section_that_a_message_names_exists():
    for path in glob.glob(f"{ROOT}/*.py") + glob.glob(f"{ROOT}/*/*.py"):
        for page, section in re.findall(r"((?:docs/\w+|README)\.md), '([^']+)'", read(os.path.relpath(path, ROOT))):
            assert section in re.findall(r"^#+ (.*)$", read(page), re.MULTILINE), path


def test_the_words_behind_k_in_the_table_of_bad_days_select_tests():
    words = re.findall(r"`(?:-k )?(\w+)`", " ".join(re.findall(r"\|([^|]*)\|$", read("docs/reliability.md"), re.M)))
    assert len(words) > 10
    names = test_names()
    assert not [word for word in words if not any(word in name for name in names)]
