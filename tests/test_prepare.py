"""From text to tokens: what goes in comes out, on one side only, whole or not at all."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import prepare_owt
from prepare_owt import SPLITS, encode
from support import sources
from support.corpus import DOCUMENT, checksum_of, get_tokenizer, load_meta, open_split, window_domains

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(ROOT, "..", "shared")
TEXTS = [f"document {i}: " + "naïve “text” <|endoftext|> \t" * (i % 7) for i in range(200)]


def prepare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_owt.py", *arguments])
    prepare_owt.main()


@pytest.fixture
def gpt2(monkeypatch):
    cache = os.path.join(SHARED, "tiktoken_cache")
    if not os.path.isdir(cache):
        pytest.skip("GPT-2's BPE files are not beside the repository (../shared/tiktoken_cache)")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)


@pytest.fixture
def jsonl(tmp_path):
    with open(tmp_path / "texts.jsonl", "w", encoding="utf-8") as file:
        for i, text in enumerate(TEXTS):
            file.write(json.dumps({"text": text, "n": i, "meta": {"set": {"name": f"set {i % 3}"}}}) + "\n")
    return str(tmp_path / "texts.jsonl")


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def signed(meta):
    """meta.json whose checksum fits."""
    return json.dumps(meta | {"checksum": checksum_of(meta)})


def documents_of(folder):
    """{text: (split, domain)} as the files say, by the start of every document."""
    meta = load_meta(folder)
    tokenizer = get_tokenizer(meta["tokenizer"])
    found = {}
    for split in SPLITS:
        tokens = np.fromfile(f"{folder}/{split}.bin", dtype="<u2")
        whole = open_split(folder, split, meta)
        assert len(whole) == len(tokens)
        assert np.array_equal(whole.windows(np.array([0]), len(tokens) - 1)[0], tokens)
        records = np.load(f"{folder}/{split}_docs.npy", allow_pickle=False)
        assert len(records) == meta["splits"][split]["documents"]
        ends = [*records["start"][1:], len(tokens)]
        for (start, domain), end in zip(records.tolist(), ends, strict=True):
            assert tokens[end - 1] == meta["eot_token"] and meta["eot_token"] not in tokens[start : end - 1]
            text = tokenizer.decode(tokens[start : end - 1].tolist())
            assert text not in found
            found[text] = split, meta["domains"][domain]
    return found


def test_every_document_comes_out_once_with_its_domain(jsonl, tmp_path, monkeypatch):
    arguments = f"--source={jsonl} --tokenizer=bytes --domain_field=meta.set.name --data_dir={tmp_path}/a".split()
    prepare(monkeypatch, *arguments, "--num_proc=1")
    found = documents_of(f"{tmp_path}/a/texts")
    assert {text: domain for text, (_, domain) in found.items()} == {t: f"set {i % 3}" for i, t in enumerate(TEXTS)}
    sizes = {split: sum(side == split for side, _ in found.values()) for split in SPLITS}
    assert 0 < sizes["val"] < 30 and 0 < sizes["test"] < 30 and sum(sizes.values()) == 200

    prepare(monkeypatch, *arguments[:-1], f"--data_dir={tmp_path}/b", "--num_proc=3")
    assert documents_of(f"{tmp_path}/b/texts") == found
    assert load_meta(f"{tmp_path}/a/texts") == load_meta(f"{tmp_path}/b/texts")
    prepare(monkeypatch, *arguments[:-1], f"--data_dir={tmp_path}/c", "--seed=1")
    assert load_meta(f"{tmp_path}/c/texts")["fingerprint"] != load_meta(f"{tmp_path}/a/texts")["fingerprint"]


def test_gpt2_tokens(jsonl, tmp_path, monkeypatch, gpt2):
    prepare(monkeypatch, f"--source={jsonl}", f"--data_dir={tmp_path}", "--name=bpe")
    found = documents_of(f"{tmp_path}/bpe")
    assert set(found) == set(TEXTS) and {domain for _, domain in found.values()} == {"all"}
    assert load_meta(f"{tmp_path}/bpe")["vocab_size"] == 50257


def test_minipile_has_the_tokens_that_its_readme_says(tmp_path, monkeypatch, gpt2):
    source = os.path.join(SHARED, "minipile", "minipile.parquet")
    if not os.path.isfile(source):
        pytest.skip("minipile is not beside the repository (../shared/minipile)")
    prepare(monkeypatch, f"--source={source}", "--domain_field=domain", f"--data_dir={tmp_path}")
    meta = load_meta(f"{tmp_path}/minipile")
    assert len(meta["domains"]) == 9
    assert sum(split["tokens"] for split in meta["splits"].values()) == 7_799_627 + 3_078


def test_parquet_and_text_files_and_globs(tmp_path, monkeypatch, capsys):
    for i, part in enumerate((TEXTS[:100], TEXTS[100:])):
        parquet.write_table(pa.table({"body": part}), f"{tmp_path}/part{i}.parquet")
    flags = ["--tokenizer=bytes", f"--data_dir={tmp_path}"]
    prepare(monkeypatch, f"--source={tmp_path}/part*.parquet", "--text_field=body", "--name=parquet", *flags)
    assert set(documents_of(f"{tmp_path}/parquet")) == set(TEXTS)
    for i, text in enumerate(TEXTS[:30]):
        (tmp_path / f"{i}.txt").write_text(text + "\n\nend", encoding="utf-8")
    halves = ["--val_fraction=0.3", "--test_fraction=0.3"]
    (tmp_path / "note.md").write_text("a note")
    capsys.readouterr()
    prepare(monkeypatch, f"--source={tmp_path}/*.txt,{tmp_path}/note.md", "--name=txt", *flags, *halves)
    assert capsys.readouterr().out.startswith("reading 30 .txt files, 1 .md files\n")
    assert set(documents_of(f"{tmp_path}/txt")) == {"a note", *(text + "\n\nend" for text in TEXTS[:30])}


def test_the_embedded_corpus(tmp_path, monkeypatch, capsys):
    prepare(monkeypatch, "--source=python", f"--data_dir={tmp_path}")
    meta = load_meta(f"{tmp_path}/python")
    assert meta["tokenizer"] == "bytes" and meta["vocab_size"] == 257
    assert {"modules", "topics", "encodings"} <= set(meta["domains"]) and len(meta["domains"]) < 20
    assert meta["splits"]["train"]["tokens"] > 5e6 and "tokens by domain" in capsys.readouterr().out
    found = documents_of(f"{tmp_path}/python")
    with open(json.__file__, encoding="utf-8") as file:
        assert file.read() in found


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()))
def test_the_short_cut_for_bytes_gives_the_encoding_s_tokens(text):
    tokenizer = get_tokenizer("bytes")
    tokens, damaged = encode(tokenizer, text)
    assert tokens.dtype == np.dtype("<u2") and tokens.tolist() == tokenizer.encode_ordinary(text)
    assert damaged == any("\ud800" <= character <= "\udfff" for character in text)
    assert damaged or tokenizer.decode(tokens.tolist()) == text


def test_text_that_is_not_unicode_is_replaced_and_counted(tmp_path, monkeypatch, capsys):
    (tmp_path / "stdlib").mkdir()
    for i in range(60):
        (tmp_path / "stdlib" / f"m{i:02}.py").write_bytes(b"# caf\xe9 %d" % i if i < 3 else b"# module %d" % i)
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "stdlib"))
    prepare(monkeypatch, "--source=python", f"--data_dir={tmp_path}")
    assert "3 documents had text that is not Unicode" in capsys.readouterr().out
    assert "# caf\ufffd 0" in documents_of(f"{tmp_path}/python")


def test_lone_surrogates_with_the_gpt2_tokenizer(gpt2):
    tokenizer = get_tokenizer("gpt2")
    tokens, damaged = encode(tokenizer, "a\udce9b <|endoftext|>")
    assert damaged and tokenizer.decode(tokens.tolist()) == "a\ufffdb <|endoftext|>"


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    domains=st.lists(st.integers(0, 3), min_size=20, max_size=20),
    T=st.integers(1, 25),
)
def test_a_window_has_the_domain_of_most_of_its_tokens(tmp_path_factory, lengths, domains, T):
    folder = str(tmp_path_factory.mktemp("w"))
    records = np.zeros(len(lengths), dtype=DOCUMENT)
    records["start"], records["domain"] = np.cumsum([0, *lengths[:-1]]), domains[: len(lengths)]
    np.save(f"{folder}/train_docs.npy", records)
    train = dict(documents=len(lengths), tokens=sum(lengths), docs_sha256=digest(f"{folder}/train_docs.npy"))
    meta = dict(domains=list("abcd"), splits=dict(train=train))
    owner = np.repeat(records["domain"], lengths)
    ids = np.arange((sum(lengths) - 1) // T)
    expected = [np.bincount(owner[i * T : i * T + T + 1], minlength=4).argmax() for i in ids]
    assert window_domains(folder, "train", ids, T, meta).tolist() == expected
    assert window_domains(folder, "train", ids[::-2], T, meta).tolist() == expected[::-2]


def test_the_memory_of_window_domains_follows_the_windows(tmp_path):
    n, T = 2_000_000, 64
    records = np.zeros(n, dtype=DOCUMENT)
    records["start"], records["domain"] = np.arange(n) * 100, np.arange(n) % 100_000
    np.save(f"{tmp_path}/train_docs.npy", records)
    train = dict(documents=n, tokens=100 * n, docs_sha256=digest(f"{tmp_path}/train_docs.npy"))
    meta = dict(domains=["d"] * 100_000, splits=dict(train=train))
    ids = np.arange(0, 100 * n // T - 1, 5000)
    tracemalloc.start()
    found = window_domains(str(tmp_path), "train", ids, T, meta)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == len(ids) and peak < 5e6  # the starts alone are 16 MB, windows times domains 500 MB


def test_a_killed_preparation_leaves_no_corpus(jsonl, tmp_path, monkeypatch):
    flags = [f"--source={jsonl}", "--tokenizer=bytes", f"--data_dir={tmp_path}"]
    slow = (
        "import prepare_owt, time; e = prepare_owt.encode; prepare_owt.encode = lambda *a: (time.sleep(0.05), e(*a))[1]"
    )

    def killed():
        run = subprocess.Popen([sys.executable, "-c", f"{slow}; prepare_owt.main()", *flags, "--seed=1"], cwd=ROOT)
        while run.poll() is None and not os.path.exists(f"{tmp_path}/texts/test_docs.npy.tmp"):
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL

    killed()
    with pytest.raises(SystemExit, match="no whole corpus; make it with python prepare_owt.py"):
        load_meta(f"{tmp_path}/texts")
    prepare(monkeypatch, *flags)
    files = [f"{split}{end}" for split in SPLITS for end in (".bin", ".crc", "_docs.npy")]
    files = sorted([*files, "meta.json", ".lock"])
    assert sorted(os.listdir(f"{tmp_path}/texts")) == files
    found = documents_of(f"{tmp_path}/texts")
    killed()  # before any file was replaced: the corpus that stood there is whole
    assert documents_of(f"{tmp_path}/texts") == found


@pytest.mark.parametrize("last", ["train_docs.npy", "test_docs.npy", "val.crc", "train.bin", "val.bin", "meta.json"])
def test_a_preparation_that_ends_between_two_renames_leaves_no_corpus(last, jsonl, tmp_path, monkeypatch):
    flags = [f"--source={jsonl}", "--tokenizer=bytes", f"--data_dir={tmp_path}"]
    prepare(monkeypatch, *flags)
    meta, rename = load_meta(f"{tmp_path}/texts"), os.replace

    def interrupted(source, target):
        if target.endswith(f"/{last}"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        prepare(patch, *flags, "--seed=1")
    with pytest.raises(SystemExit, match="no whole corpus"):
        load_meta(f"{tmp_path}/texts")
    prepare(monkeypatch, *flags)
    assert load_meta(f"{tmp_path}/texts") == meta
    assert not [name for name in os.listdir(f"{tmp_path}/texts") if "tmp" in name]


def test_a_mistake_costs_no_corpus(jsonl, tmp_path, monkeypatch):
    flags = [f"--source={jsonl}", "--tokenizer=bytes", f"--data_dir={tmp_path}"]
    prepare(monkeypatch, *flags)
    meta, found = load_meta(f"{tmp_path}/texts"), documents_of(f"{tmp_path}/texts")
    for mistake in ("--max_tokens=4", "--text_field=body"):
        with pytest.raises(SystemExit, match=mistake.split("=")[0]):
            prepare(monkeypatch, *flags, mistake)
        assert load_meta(f"{tmp_path}/texts") == meta and documents_of(f"{tmp_path}/texts") == found


def test_a_corpus_is_whole_before_its_summary_is_printed(jsonl, tmp_path, monkeypatch):
    """The terminal may be gone by then, or lack the letters of a domain."""

    def closed(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(prepare_owt, "print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        prepare(monkeypatch, f"--source={jsonl}", "--tokenizer=bytes", f"--data_dir={tmp_path}")
    assert set(documents_of(f"{tmp_path}/texts")) == set(TEXTS)


def test_meta_has_the_digests_of_the_files(jsonl, tmp_path, monkeypatch):
    prepare(monkeypatch, f"--source={jsonl}", "--tokenizer=bytes", f"--data_dir={tmp_path}")
    meta = load_meta(f"{tmp_path}/texts")
    for split in SPLITS:
        for name, key in ((f"{split}.bin", "sha256"), (f"{split}_docs.npy", "docs_sha256")):
            assert digest(f"{tmp_path}/texts/{name}") == meta["splits"][split][key]


def test_the_side_of_a_document_follows_seed_and_index_alone(jsonl, tmp_path, monkeypatch):
    flags = ["--tokenizer=bytes", f"--data_dir={tmp_path}"]
    prepare(monkeypatch, f"--source={jsonl}", *flags)
    found = documents_of(f"{tmp_path}/texts")
    with open(jsonl, encoding="utf-8") as whole, open(tmp_path / "fewer.jsonl", "w", encoding="utf-8") as fewer:
        fewer.writelines(line for i, line in enumerate(whole) if i < 150)
    monkeypatch.setattr(prepare_owt.itertools, "islice", lambda documents, count: islice(documents, 7))
    prepare(monkeypatch, f"--source={tmp_path}/fewer.jsonl", *flags)
    assert documents_of(f"{tmp_path}/fewer") == {text: found[text] for text in TEXTS[:150]}


def test_a_document_without_a_domain_is_told_apart(tmp_path, monkeypatch):
    with open(tmp_path / "some.json", "w", encoding="utf-8") as file:
        for i, text in enumerate(TEXTS):
            file.write(json.dumps({"text": text, "of": "a" if i % 2 else None}) + "\n")
    prepare(
        monkeypatch,
        f"--source={tmp_path}/some.json",
        "--domain_field=of",
        "--tokenizer=bytes",
        f"--data_dir={tmp_path}",
    )
    assert {domain for _, domain in documents_of(f"{tmp_path}/some").values()} == {"a", "none"}


@pytest.mark.parametrize(
    "source, name",
    [
        ("Skylion007/openwebtext", "openwebtext"),
        ("org/wiki.v1.2", "wiki.v1.2"),
        ("a/b.jsonl", "b"),
        ("a/b.jsonl.zst", "b"),
        ("a/texts/", "texts"),
        ("a/my [v2]*/texts", "texts"),
        ("python", "python"),
    ],
)
def test_the_name_comes_from_the_source(source, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source.startswith("a/"):
        file = f"{source}/a.txt" if source.rstrip("/").endswith("texts") else source
        os.makedirs(os.path.dirname(file))
        with open(file, "w", encoding="utf-8"):
            pass
    assert prepare_owt.Knobs(source=source).name == name


def test_what_cannot_be_fetched_is_told_in_one_line(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*arguments, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SystemExit, match="--source=some/set: .*ConnectionError: no route to the hub") as error:
        prepare(monkeypatch, "--source=some/set", "--tokenizer=bytes", f"--data_dir={tmp_path}")
    assert "\n" not in str(error.value) and not os.path.exists(tmp_path / "set")
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(SystemExit, match="GPT-2's BPE files .* set TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--text_field=body"], "--text_field=body: .* no such field; there are: text, n, meta"),
        (["--text_field=n"], "--text_field=n: .*not text"),
        (["--domain_field=meta.name"], "--domain_field=meta.name: .*there are: set"),
        (["--source=nothing/*.txt", "--name=x"], "nothing/.*: no such file"),
        (["--source=a.txt,b.txt"], "give the corpus a name, --name="),
        (["--split_documents=word"], "--split_documents=word: expected file, line, blank_line, <.endoftext.>"),
        (["--max_tokens=-1"], "--max_tokens=-1: expected"),
        (["--source=nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--source=nothing/*", "--name=x"], "nothing/.*: no such file"),
        (["--source=a/*.parquet"], "give the corpus a name, --name="),
        (["--tokenizer=gpt3"], "--tokenizer=gpt3: expected gpt2 or bytes"),
        (["--val_fraction=0.0"], "--val_fraction=0.0 .*above 0"),
        (["--val_fraction=0.6", "--test_fraction=0.6"], "--val_fraction=0.6 --test_fraction=0.6: .*in all below 1"),
        (["--max_tokens=4"], "no document fell into .*; raise --max_tokens"),
        (["--split=nope"], "--split=nope: .*texts.jsonl has no use for it; leave it out"),
        (["--config=b"], "--config=b: .*texts.jsonl has no use for it; leave it out"),
        (["--split_documents=line"], "--split_documents=line: .*texts.jsonl has no use for it; leave it out"),
        (["--source=python", "--config=b"], "--config=b: python has no use for it; leave it out"),
        (["--source=python", "--split=val"], "--split=val: python has no use for it; leave it out"),
        (["--source=python", "--domain_field=of"], "--domain_field=of: python has no use for it; leave it out"),
        (["--source=python", "--split_documents=line"], "--split_documents=line: python has no use for it"),
        ([f"--source={ROOT}/LICENSE.md"], "LICENSE.md: no such file or folder"),
        ([f"--source={ROOT}/README.md", "--text_field=b"], "--text_field=b: .*README.md has no use for it"),
        ([f"--source={ROOT}/README.md", "--domain_field=b"], "--domain_field=b: .*README.md has no use for it"),
        (["--num_proc=0"], "--num_proc=0"),
        (["--sauce=x"], "did you mean 'source'"),
    ],
)
def test_mistakes(jsonl, tmp_path, monkeypatch, flags, message):
    with pytest.raises(SystemExit, match=message) as error:
        prepare(monkeypatch, f"--source={jsonl}", "--tokenizer=bytes", f"--data_dir={tmp_path}/data", *flags)
    assert "\n" not in str(error.value) and not os.path.exists(f"{tmp_path}/data/texts/meta.json")


def test_sources_without_text(tmp_path, monkeypatch):
    flags = ["--tokenizer=bytes", f"--data_dir={tmp_path}"]
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "notes.pdf").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    latin = pa.array([b"text", b"caf\xe9"] * 50).view(pa.string())
    parquet.write_table(pa.table({"text": latin}), tmp_path / "latin.parquet")
    for name, message in (
        ("empty.jsonl", "--source=.*empty.jsonl"),
        ("blank.jsonl", "no text in it"),
        ("broken.parquet", "could not be read"),
        ("latin.txt", "could not be read as text"),
        ("latin.parquet", "latin.parquet: could not be read as text .UnicodeDecodeError"),
        ("notes.pdf", "notes.pdf: expected .parquet, .jsonl, .json"),
    ):
        with pytest.raises(SystemExit, match=message):
            prepare(monkeypatch, f"--source={tmp_path}/{name}", *flags)


def test_readers_name_what_is_wrong(jsonl, tmp_path, monkeypatch):
    prepare(monkeypatch, f"--source={jsonl}", "--tokenizer=bytes", f"--data_dir={tmp_path}")
    folder = tmp_path / "texts"
    meta = load_meta(str(folder))
    (folder / "train.bin").write_bytes(b"\0" * 10)
    with pytest.raises(SystemExit, match="train.bin: missing, truncated or of another corpus: 10 bytes"):
        open_split(str(folder), "train", meta)
    (folder / "train_docs.npy").write_bytes(b"")
    with pytest.raises(SystemExit, match="train_docs.npy: missing, damaged"):
        window_domains(str(folder), "train", np.arange(3), 4, meta)
    for text, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps(meta | {"seed": 1}), "its checksum differs"),
        (signed(meta | {"vocab_size": "a"}), "vocab_size = 'a', expected int"),
        (signed(meta | {"eot_token": True}), "eot_token = True, expected int"),
        (signed({key: meta[key] for key in meta if key != "fingerprint"}), ".KeyError: 'fingerprint'"),
        (signed(meta | {"splits": {"train": {}}}), "not written by this script .KeyError"),
        (signed(meta | {"splits": []}), "not written by this script .TypeError"),
    ):
        (folder / "meta.json").write_text(text)
        with pytest.raises(SystemExit, match=message):
            load_meta(str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Few documents, long ones, and no text


def by_split(documents):
    """{split: its texts}, of what documents_of gives."""
    return {split: [text for text, (side, _) in documents.items() if side == split] for split in SPLITS}


def texts_of(folder):
    """{split: its text, without the end-of-text tokens}."""
    meta = load_meta(folder)
    tokenizer, texts = get_tokenizer(meta["tokenizer"]), {}
    for split in SPLITS:
        tokens = np.fromfile(f"{folder}/{split}.bin", dtype="<u2")
        texts[split] = tokenizer.decode(tokens[tokens != meta["eot_token"]].tolist())
    return texts


def test_one_text_file_is_cut_by_position_at_line_ends(tmp_path, monkeypatch, capsys):
    text = "".join(f"line {i} of the play\n" for i in range(3000))
    (tmp_path / "input.txt").write_text(text)
    prepare(monkeypatch, f"--source={tmp_path}/input.txt", "--tokenizer=bytes", f"--data_dir={tmp_path}/data")
    said = capsys.readouterr().out
    assert "too few documents to draw the splits, so the text is cut, where a line or a word ends nearby" in said
    texts = texts_of(f"{tmp_path}/data/input")
    assert "".join(texts.values()) == text and all(part.endswith("\n") for part in texts.values())
    for split, share in dict(train=0.9, val=0.05, test=0.05).items():
        assert abs(len(texts[split]) - share * len(text)) < 50
    assert len(documents_of(f"{tmp_path}/data/input")) == 3


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_documents_of_one_line_are_cut_between_words(n, tmp_path, monkeypatch):
    rows = [dict(text=f"{i} " + "word " * 100, of=f"d{i}") for i in range(n)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--source={tmp_path}/a.jsonl", "--tokenizer=bytes", f"--data_dir={tmp_path}", "--domain_field=of"]
    prepare(monkeypatch, *flags, "--val_fraction=0.2", "--test_fraction=0.2")
    assert "".join(texts_of(f"{tmp_path}/a").values()) == "".join(row["text"] for row in rows)
    found = documents_of(f"{tmp_path}/a")
    assert all(text in rows[int(domain[1:])]["text"] for text, (_, domain) in found.items())
    assert [split for split, _ in found.values()] == sorted([split for split, _ in found.values()], key=SPLITS.index)
    assert {word for text in found for word in text.split()} == {"word", *map(str, range(n))}


@pytest.mark.parametrize("n, val, test", [(5, 1, 1), (10, 1, 1), (44, 2, 2)])
def test_no_document_is_cut_where_there_are_enough(n, val, test, tmp_path, monkeypatch, capsys):
    rows = [f"row {i:02} of a small\ndata set" for i in range(n)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=row)) + "\n" for row in rows))
    monkeypatch.setattr(prepare_owt, "by_chance", lambda documents, knobs: ((*document, 0) for document in documents))
    prepare(monkeypatch, f"--source={tmp_path}/a.jsonl", "--tokenizer=bytes", f"--data_dir={tmp_path}")
    assert "too few documents to draw the splits, so whole documents go by position" in capsys.readouterr().out
    expected = dict(train=rows[: n - val - test], val=rows[n - val - test : n - test], test=rows[n - test :])
    assert by_split(documents_of(f"{tmp_path}/a")) == expected


def test_a_large_document_among_tiny_ones_is_cut_at_line_ends(tmp_path, monkeypatch):
    large = "".join(f"line {i} of the play\n" for i in range(3000))
    for order in ([large, "a", "b"], ["a", large, "b"], ["a", "b", large]):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=row)) + "\n" for row in order))
        monkeypatch.setattr(prepare_owt, "by_chance", lambda documents, knobs: ((*one, 0) for one in documents))
        prepare(monkeypatch, f"--source={tmp_path}/a.jsonl", "--tokenizer=bytes", f"--data_dir={tmp_path}")
        texts = texts_of(f"{tmp_path}/a")
        assert "".join(texts.values()) == "".join(order)
        assert all(0.04 < len(texts[split]) / len(large) < 0.06 for split in ("val", "test"))
        assert texts["train"].endswith("\n") and texts["val"].endswith("\n")


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.tuples(st.text("ab \n", min_size=1, max_size=40), st.booleans()), min_size=1, max_size=8),
    val=st.sampled_from([0.05, 0.2, 0.3]),
)
def test_a_cut_by_position_loses_nothing_and_begins_a_document_in_every_split(parts, val):
    documents = [(text, "d" if i == 0 or begins else None) for i, (text, begins) in enumerate(parts)]
    whole = "".join(text for text, _ in documents)
    knobs = prepare_owt.Knobs("python", val_fraction=val, test_fraction=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_owt, "documents_of", lambda knobs: documents)
        found = list(prepare_owt.by_position(knobs, len(whole)))
    assert "".join(text for text, _, _ in found) == whole
    splits = [split for _, _, split in found]
    assert splits == sorted(splits)
    begun = {split: domain for _, domain, split in reversed(found)}
    assert set(begun.values()) == {"d"} and (len(whole) < 20 or len(begun) == 3)


def test_a_text_too_small_for_three_splits_is_refused_with_the_way_to_mend_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("ab")
    flags = [f"--source={tmp_path}/a.txt", "--tokenizer=bytes", f"--data_dir={tmp_path}"]
    for more in ([], ["--max_tokens=1000"]):
        with pytest.raises(SystemExit, match="a.txt: too little text, no document fell into val; take more text, or"):
            prepare(monkeypatch, *flags, *more)
    library = sources.python_documents()  # read once
    monkeypatch.setattr(sources, "python_documents", lambda: library)
    for most in range(1, 6):
        with pytest.raises(SystemExit, match="no document fell into .*; raise --max_tokens"):
            prepare(monkeypatch, "--source=python", "--name=a", *flags[1:], f"--max_tokens={most}")


def test_a_long_document_among_others_stays_one(tmp_path, monkeypatch):
    long = "".join(f"line {i}\n" for i in range(100_000))
    (tmp_path / "long.md").write_text(long)
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    for threads in (1, 3):
        flags = [f"--num_proc={threads}", f"--data_dir={tmp_path}/data{threads}", "--name=x", "--tokenizer=bytes"]
        prepare(monkeypatch, f"--source={tmp_path}/*.txt,{tmp_path}/*.md", *flags)
        found = documents_of(f"{tmp_path}/data{threads}/x")
        assert set(found) == {long, *(f"text {i}" for i in range(60))}


def test_the_cut_follows_what_max_tokens_leaves(tmp_path, monkeypatch):
    text = "".join(f"line {i} of the play\n" for i in range(50_000))
    (tmp_path / "input.txt").write_text(text)
    flags = ["--tokenizer=bytes", f"--data_dir={tmp_path}", "--max_tokens=10000"]
    prepare(monkeypatch, f"--source={tmp_path}/input.txt", *flags)
    texts = texts_of(f"{tmp_path}/input")
    assert text.startswith("".join(texts.values())) and 9900 < sum(map(len, texts.values())) <= 10_000
    assert all(400 < len(texts[split]) < 600 for split in ("val", "test"))


@pytest.mark.parametrize("most", [3000, 5000, 10**9])
def test_max_tokens_ends_the_corpus_early(most, jsonl, tmp_path, monkeypatch):
    prepare(monkeypatch, f"--source={jsonl}", "--tokenizer=bytes", f"--data_dir={tmp_path}", f"--max_tokens={most}")
    meta, found = load_meta(f"{tmp_path}/texts"), documents_of(f"{tmp_path}/texts")
    total = sum(split["tokens"] for split in meta["splits"].values())
    whole = sum(len(text.encode()) + 1 for text in TEXTS)
    assert total == whole if most > whole else most - 1 <= total <= most
    cut = [text for text in found if text not in TEXTS]
    assert set(found) == {*TEXTS[: len(found) - len(cut)], *cut} and len(cut) <= 1
    assert all(TEXTS[len(found) - 1].startswith(text) for text in cut)


def test_rows_without_text_are_left_out_and_counted(jsonl, tmp_path, monkeypatch, capsys):
    flags = ["--tokenizer=bytes", f"--data_dir={tmp_path}"]
    prepare(monkeypatch, f"--source={jsonl}", *flags)
    assert "no text" not in capsys.readouterr().out
    with open(jsonl, encoding="utf-8") as whole, open(tmp_path / "some.jsonl", "w", encoding="utf-8") as some:
        some.write('{"text": ""}\n{"text": null}\n')
        for line in whole:
            some.write(line + '{"text": null}\n')
    prepare(monkeypatch, f"--source={tmp_path}/some.jsonl", *flags)
    assert "202 documents had no text and were left out" in capsys.readouterr().out
    assert documents_of(f"{tmp_path}/some") == documents_of(f"{tmp_path}/texts")


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_a_second_preparation_of_one_folder_is_refused(jsonl, tmp_path, monkeypatch):
    flags = [f"--source={jsonl}", "--tokenizer=bytes", f"--data_dir={tmp_path}"]
    slow = (
        "import prepare_owt, time; e = prepare_owt.encode; prepare_owt.encode = lambda *a: (time.sleep(0.01), e(*a))[1]"
    )
    run = subprocess.Popen([sys.executable, "-c", f"{slow}; prepare_owt.main()", *flags, "--num_proc=1"], cwd=ROOT)
    while run.poll() is None and not os.path.exists(f"{tmp_path}/texts/test_docs.npy.tmp"):
        time.sleep(0.01)
    before = os.listdir(f"{tmp_path}/texts")
    with pytest.raises(SystemExit, match="texts: a preparation is writing there now; .*choose another --name"):
        prepare(monkeypatch, *flags, "--seed=1")
    assert run.poll() is None and os.listdir(f"{tmp_path}/texts") == before
    assert (
        run.wait() == 0
        and load_meta(f"{tmp_path}/texts")["seed"] == 0
        and len(documents_of(f"{tmp_path}/texts")) == 200
    )


def test_a_data_dir_that_cannot_be_written_is_named(jsonl, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (f"{tmp_path}/file", f"{tmp_path}/file/data", "/proc/data", "/dev/null"):
        with pytest.raises(SystemExit, match=f"{folder}/texts/.lock: could not be written .*choose a folder") as error:
            prepare(monkeypatch, f"--source={jsonl}", "--tokenizer=bytes", f"--data_dir={folder}")
        assert "\n" not in str(error.value)


def test_a_corpus_beside_its_texts_is_no_text(tmp_path, monkeypatch):
    for i, text in enumerate(TEXTS[:50]):
        (tmp_path / f"{i}.md").write_text(text + "!", encoding="utf-8")
    for folder in (tmp_path.parent, tmp_path):  # the corpus is where the texts are, or below
        flags = [f"--data_dir={folder}", f"--name={tmp_path.name}", "--tokenizer=bytes", "--val_fraction=0.2"]
        for _ in range(2):
            prepare(monkeypatch, f"--source={tmp_path}", *flags)
            assert set(documents_of(f"{folder}/{tmp_path.name}")) == {text + "!" for text in TEXTS[:50]}


# ---------------------------------------------------------------------------------------------------------------------
# A corpus of nanoGPT


@pytest.fixture
def nanogpt(tmp_path):
    """A folder as nanoGPT's prepare.py leaves it, with bytes for tokens: (folder, train documents, val documents)."""
    folder = tmp_path / "nano" / "owt"
    folder.mkdir(parents=True)
    documents = [f"document {i} of nanoGPT\n" * (1 + i % 5) for i in range(60)]
    for name, part in (("train", documents[:40]), ("val", documents[40:])):
        np.array([t for text in part for t in [*text.encode(), 256]], dtype=np.uint16).tofile(folder / f"{name}.bin")
    return folder, documents[:40], documents[40:]


def test_a_corpus_of_nanogpt_is_taken_over(nanogpt, tmp_path, monkeypatch):
    folder, train, val = nanogpt
    flags = [f"--source={folder}", "--tokenizer=bytes", f"--data_dir={tmp_path}/data"]
    prepare(monkeypatch, *flags)
    meta, found = load_meta(f"{tmp_path}/data/owt"), by_split(documents_of(f"{tmp_path}/data/owt"))
    assert found["train"] == train and found["val"] + found["test"] == val
    assert 8 <= len(found["test"]) <= 12 and meta["domains"] == ["all"]
    assert digest(folder / "train.bin") == digest(f"{tmp_path}/data/owt/train.bin")
    kept = [np.fromfile(f"{tmp_path}/data/owt/{split}.bin", "<u2") for split in ("val", "test")]
    assert np.array_equal(np.concatenate(kept), np.fromfile(folder / "val.bin", "<u2"))
    assert sorted(os.listdir(folder)) == ["train.bin", "val.bin"]


def test_a_corpus_of_nanogpt_without_end_of_text_tokens(nanogpt, tmp_path, monkeypatch):
    """Its Shakespeare is one stream; read in pieces, the tokens are the same."""
    folder, train, val = nanogpt
    for name, part in (("train", train), ("val", val)):
        np.frombuffer("".join(part).encode(), np.uint8).astype(np.uint16).tofile(folder / f"{name}.bin")
    prepare(monkeypatch, f"--source={folder}", "--tokenizer=bytes", f"--data_dir={tmp_path}", "--test_fraction=0.15")
    texts = texts_of(f"{tmp_path}/owt")
    assert texts["train"] == "".join(train) and texts["val"] + texts["test"] == "".join(val)
    assert len(texts["val"]) == len("".join(val)) // 4
    assert [part["documents"] for part in load_meta(f"{tmp_path}/owt")["splits"].values()] == [1, 1, 1]


def test_what_is_wrong_with_a_corpus_of_nanogpt_is_named(nanogpt, tmp_path, monkeypatch):
    folder, _, _ = nanogpt
    flags = [f"--source={folder}", "--tokenizer=bytes", f"--data_dir={tmp_path}/data"]
    command = f"python prepare_owt.py --source={folder} --name=owt_with_test --data_dir={tmp_path}/nano"
    with pytest.raises(SystemExit, match=f"meta.json: no such file; take nanoGPT's corpus over with {command}"):
        load_meta(str(folder))
    before = {name: digest(folder / name) for name in os.listdir(folder)}
    for more, message in (
        (
            [f"--data_dir={tmp_path}/nano"],
            "nano/owt: holds a corpus of nanoGPT, which would be lost; take another --name",
        ),
        (["--max_tokens=5"], "--max_tokens=5: .*owt has no use for it; leave it out"),
        (["--seed=1"], "--seed=1: .*owt has no use for it; leave it out"),
        (["--text_field=b"], "--text_field=b: .*owt has no use for it; leave it out"),
        (["--split_documents=line"], "--split_documents=line: .*owt has no use for it; leave it out"),
    ):
        with pytest.raises(SystemExit, match=message):
            prepare(monkeypatch, *flags, *more)
    np.array([300] * 100, dtype=np.uint16).tofile(folder / "val.bin")
    with pytest.raises(SystemExit, match="--tokenizer=bytes: .*val.bin has token 300, bytes has 257 tokens"):
        prepare(monkeypatch, *flags)
    (folder / "val.bin").write_bytes(b"")
    with pytest.raises(
        SystemExit, match="owt: a split would be empty, since train.bin has 2,770 tokens and val.bin 0; take"
    ):
        prepare(monkeypatch, *flags, f"--data_dir={tmp_path}/none")
    assert not os.path.exists(tmp_path / "none")
    (folder / "meta.pkl").write_bytes(b"never unpickled")
    with pytest.raises(SystemExit, match="meta.pkl: the tokens are characters.*--source=.*input.txt --tokenizer=bytes"):
        prepare(monkeypatch, *flags)
    assert before["train.bin"] == digest(folder / "train.bin") and not os.path.exists(f"{tmp_path}/data/owt/meta.json")


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer, kind", [("bytes", "jsonl"), ("gpt2", "jsonl"), ("bytes", "txt")])
def test_memory_stays_flat_and_the_speed_is_that_of_a_bare_loop(tokenizer, kind, tmp_path, request):
    """
    The embedded corpus repeated to 100 MB and to 1 GB, in rows or as one text, which is encoded twice: peak anonymous
    memory and, printed with -s, MB/s on one core beside a bare loop over tiktoken's encode_ordinary_batch.
    """
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2")
    texts = [text for text, _ in sources.python_documents()]
    encoding, peaks, seconds = get_tokenizer(tokenizer), [], []
    start = time.perf_counter()
    for i in range(0, len(texts), 64):
        encoding.encode_ordinary_batch(texts[i : i + 64], num_threads=1)
    bare = sum(map(len, texts)) / 1e6 / (time.perf_counter() - start)
    for megabytes in (100, 1000):
        source = tmp_path / f"{megabytes}.{kind}"
        with open(source, "w", encoding="utf-8") as file:
            for i in range(megabytes * 10**6 // (sum(map(len, texts)) // len(texts))):
                text = texts[i % len(texts)].encode("utf-8", "replace").decode()
                file.write(json.dumps({"text": text}) + "\n" if kind == "jsonl" else text)
        flags = [f"--source={source}", f"--tokenizer={tokenizer}", f"--data_dir={tmp_path}", "--num_proc=1"]
        start, peak = time.perf_counter(), 0
        run = subprocess.Popen([sys.executable, f"{ROOT}/prepare_owt.py", *flags], stdout=subprocess.DEVNULL)
        while run.poll() is None:
            with open(f"/proc/{run.pid}/status", encoding="utf-8") as file:
                peak = max([peak, *(int(line.split()[1]) for line in file if line.startswith("RssAnon"))])
            time.sleep(0.05)
        assert run.returncode == 0
        peaks.append(peak / 1e3)
        seconds.append(time.perf_counter() - start)
    ours = 900 / (seconds[1] - seconds[0])
    print(f"\n{tokenizer}: peak {peaks[0]:.0f} and {peaks[1]:.0f} MB; {ours:.1f} MB/s, bare loop {bare:.1f} MB/s")
    assert peaks[1] < 1.2 * peaks[0]
