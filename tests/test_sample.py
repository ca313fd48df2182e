"""Text from a checkpoint: the same for a seed, the likeliest at temperature 0, and bad input in one line."""

import pytest
import torch
from test_train import TINY, as_nanogpt, call, corpus, home  # noqa: F401 (fixtures)

import sample
import train
from model import GPT, GPTConfig
from support.corpus import get_tokenizer

CONFIG = dict(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(**CONFIG)).eval()


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):  # noqa: F811
    """A short run with the byte tokenizer."""
    out_dir = str(tmp_path_factory.mktemp("runs") / "run")
    call(train.main, f"{TINY} --data_dir={corpus}/data --out_dir={out_dir}")
    return out_dir


def sampled(capsys, flags):
    """What sample.py prints."""
    capsys.readouterr()
    call(sample.main, f"--device=cpu --num_samples=2 --max_new_tokens=20 {flags}")
    return capsys.readouterr().out


def greedy(model, ids, count, vocab_size):
    """Token by token, from the last block_size of them, by the definition."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-8:]]))[0][0, -1, :vocab_size]
        ids = [*ids, int(logits.argmax())]
    return ids


def test_the_text_depends_on_the_seed_alone(run, capsys):
    first = sampled(capsys, f"--out_dir={run} --start=def")
    assert first == sampled(capsys, f"--out_dir={run} --start=def")
    assert first != sampled(capsys, f"--out_dir={run} --start=def --seed=1")
    samples = first.split("\n---------------\n")
    assert len(samples) == 3 and samples[0] != samples[1] and not samples[2]
    assert all(text.startswith("def") for text in samples[:2])


def test_temperature_zero_and_top_k_one_take_the_likeliest_after_the_last_block(model):
    start = list(range(30))  # longer than a block
    expected = greedy(model, start, 12, 300)
    for temperature, top_k in ((0.0, 200), (1e-6, 200), (1.0, 1)):
        drawn = sample.generate(model, torch.tensor([start]), 12, temperature, top_k, 300)
        assert drawn[0].tolist() == expected


def test_tokens_are_drawn_from_the_top_k_as_often_as_the_softmax_says(model):
    idx = torch.zeros(20_000, 1, dtype=torch.long)
    drawn = sample.generate(model, idx, 1, 0.1, 3, 300)[:, 1]
    with torch.no_grad():
        logits = model(idx[:1])[0][0, -1] / 0.1
    expected = torch.zeros(300)
    expected[logits.topk(3).indices] = torch.softmax(logits.topk(3).values, 0)
    counts = torch.bincount(drawn, minlength=300) / len(drawn)
    torch.testing.assert_close(counts, expected, atol=0.02, rtol=0)


def test_the_padding_of_the_vocabulary_is_never_drawn(model):
    idx = torch.zeros(64, 1, dtype=torch.long)
    assert sample.generate(model, idx, 20, 5.0, 10**6, 257).max() < 257


def test_a_run_is_read_with_the_tokenizer_of_its_corpus(run, corpus, capsys):  # noqa: F811
    assert torch.load(f"{run}/ckpt.pt", weights_only=True)["tokenizer"] == "bytes"
    shown = sampled(capsys, f"--out_dir={run} --start=é --temperature=0 --max_new_tokens=1")
    model, tokenizer = sample.load(sample.Knobs(out_dir=run, device="cpu"))
    ids = list("é".encode())
    assert shown.split("\n---")[0] == tokenizer.decode(greedy(model, ids, 1, 257))


def test_the_start_is_read_from_a_file_and_may_be_empty(run, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("two\nlines", encoding="utf-8")
    assert sampled(capsys, f"--out_dir={run} --start=FILE:{tmp_path}/prompt.txt").startswith("two\nlines")
    assert sampled(capsys, f"--out_dir={run} --start=").startswith("<|endoftext|>")


def test_a_checkpoint_with_gpt2_s_vocabulary_is_read_with_gpt2_s_tokens(tmp_path, capsys):
    try:
        tokenizer = get_tokenizer("gpt2")
    except SystemExit:
        pytest.skip("GPT-2's BPE files are not here")
    config = CONFIG | dict(vocab_size=50304)
    torch.save(dict(model=GPT(GPTConfig(**config)).state_dict(), model_args=config), tmp_path / "gpt2.pt")
    shown = sampled(capsys, f"--init_from={tmp_path}/gpt2.pt --start=Hello")
    assert shown.startswith("Hello") and tokenizer.n_vocab == 50257


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--out_dir=none", "none/ckpt.pt: no such file; --out_dir takes the folder of a run"),
        ("--init_from=none.pt", "none.pt: no such file"),
        ("--temperature=-1", "--temperature=-1.0: must be at least 0"),
        ("--top_k=0", "--top_k=0: must be at least 1"),
        ("--num_samples=0", "--num_samples=0: must be at least 1"),
        ("--max_new_tokens=0", "--max_new_tokens=0: must be at least 1"),
        ("--init_from=./none", "--init_from=./none: no such folder"),
        ("--start=FILE:none.txt", "none.txt: no such file; give another --start"),
        ("--device=abacus", "--device=abacus: no such device here"),
        ("--tempature=1", "did you mean 'temperature'"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        call(sample.main, flags)
    assert "\n" not in str(error.value)


def test_a_vocabulary_smaller_than_the_tokenizer_s_is_refused(tmp_path, capsys):
    config = CONFIG | dict(vocab_size=65)
    weights = GPT(GPTConfig(**config)).state_dict()
    torch.save(dict(model=weights, model_args=config, tokenizer="bytes"), tmp_path / "char.pt")  # gpt2's may be missing
    with pytest.raises(SystemExit, match="char.pt: its vocabulary of 65 is not that of the tokenizer 'bytes', 257"):
        sampled(capsys, f"--init_from={tmp_path}/char.pt")
