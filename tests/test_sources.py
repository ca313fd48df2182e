"""Text as people have it: every kind of file, folder and data set gives its documents, each once and in order."""

import gzip
import json
import lzma
import os
import re
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from test_prepare import SHARED, TEXTS

from prepare_owt import Knobs
from support.carry import whole
from support.corpus import get_tokenizer
from support.sources import BEFORE_SPACE, MARKS, documents_of, plain_documents


def read(source, **knobs):
    """[(text, domain)] of a source, the pieces of a document put together."""
    return list(whole(documents_of(Knobs(str(source), name="x", **knobs))))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def gpt2():
    if not os.path.isdir(f"{SHARED}/tiktoken_cache"):
        pytest.skip("GPT-2's BPE files are not beside the repository (../shared/tiktoken_cache)")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TIKTOKEN_CACHE_DIR", f"{SHARED}/tiktoken_cache")
        return get_tokenizer("gpt2")


@pytest.fixture
def hub_folder(tmp_path):
    """A data set as the hub has them, with two configurations."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    for config in "ab":
        (folder / config).mkdir(parents=True)
        write_lines(folder / config / "train.jsonl", [dict(text=f"{config}{i}", n=i) for i in range(3)])
    configs = "".join(f"- config_name: {c}\n  data_files: {c}/train.jsonl\n" for c in "ab")
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# A set\n")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_text_of_every_kind_with_nested_domains(kind, tmp_path):
    text = pa.array(TEXTS).cast(kind) if kind != pa.string_view() else pa.array(TEXTS, kind)
    domains = pa.array(
        [{"set": {"name": None if i % 5 == 0 else i % 3, "n": i}} if i % 7 else None for i in range(200)]
    )
    table = pa.table({"id": list(range(200)), "text": text, "meta": domains})
    parquet.write_table(table, f"{tmp_path}/a.parquet", row_group_size=60)
    expected = [str(i % 3) if i % 5 and i % 7 else "none" for i in range(200)]
    assert read(f"{tmp_path}/a.parquet", domain_field="meta.set.name") == list(zip(TEXTS, expected, strict=True))


def test_of_rows_nothing_but_the_text_and_the_domain_is_read(tmp_path):
    """Fields that come, go and change their type further down or in another file."""
    rows = [[dict(text="a", meta=dict(id=1), d=None), dict(text=None, meta=dict(id="1"), extra=[1])]]
    rows.append([dict(d="x", text="b", id=[{}]), dict(text="c", d=3)])
    for i, lines in enumerate(rows):
        with open(f"{tmp_path}/{i}.jsonl", "w", encoding="utf-8-sig" if i else "utf-8") as file:
            file.writelines(json.dumps(line) + "\n\n" for line in lines)
    assert read(f"{tmp_path}/*.jsonl", domain_field="d") == [("a", "none"), ("", "none"), ("b", "x"), ("c", "3")]
    (tmp_path / "list.json").write_text(json.dumps(rows[0], indent=1))
    assert read(f"{tmp_path}/list.json", domain_field="d") == [("a", "none"), ("", "none")]
    (tmp_path / "one.json").write_text(json.dumps(rows[0][0], indent=1))
    assert read(f"{tmp_path}/one.json", domain_field="d") == [("a", "none")]
    (tmp_path / "more.json").write_text(json.dumps(dict(version=1, data=rows[0]), indent=1))
    with pytest.raises(SystemExit, match="more.json, row 1 has no such field; there are: version, data"):
        read(f"{tmp_path}/more.json")
    parquet.write_table(pa.table({"text": ["a"], "n": [1]}), f"{tmp_path}/0.parquet")
    parquet.write_table(pa.table({"more": [[1]], "text": ["b"]}), f"{tmp_path}/1.parquet")
    assert read(f"{tmp_path}/*.parquet") == [("a", "all"), ("b", "all")]


def test_of_a_parquet_file_nothing_but_the_two_columns_is_decoded(tmp_path):
    """The bytes of the third column are damaged, which only who reads them can find."""
    other = ["never to be read " * 20] * 2000
    table = pa.table({"other": other, "meta": [{"of": "d", "other": other[0]}] * 2000, "text": ["a"] * 2000})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"never to be read", b"\xff" * 16))
    assert read(path, domain_field="meta.of") == [("a", "d")] * 2000
    with pytest.raises(SystemExit, match="a.parquet: could not be read as text .UnicodeDecodeError"):
        read(path, text_field="other")


def test_a_field_that_begins_or_changes_far_down_changes_nothing(tmp_path):
    rows = [dict(text=str(i), id=i, domain=None) for i in range(14_000)]
    rows += [dict(text="late", id="x", new={"a": [1]}, domain="d")]
    write_lines(tmp_path / "a.jsonl", rows)
    assert read(tmp_path / "a.jsonl", domain_field="domain")[-2:] == [("13999", "none"), ("late", "d")]


def test_csv_columns_are_named_by_its_header(tmp_path):
    long = "x" * 300_000
    lines = f'id,text,of\n1,"a ""quoted""\ntext, of two lines",d\n2,{long},\n3,,e\n4\n5,123,f,beyond\n'
    (tmp_path / "a.csv").write_text(lines)
    expected = [('a "quoted"\ntext, of two lines', "d"), (long, "none"), ("", "e"), ("", "none"), ("123", "f")]
    assert read(tmp_path / "a.csv", domain_field="of") == expected
    with pytest.raises(
        SystemExit, match="--text_field=body: .*a.csv, row 1 has no such field; there are: id, text, of"
    ):
        read(tmp_path / "a.csv", text_field="body")
    (tmp_path / "a.csv").write_text('text\n"never ends\n')
    with pytest.raises(SystemExit, match="a.csv: could not be read as text .Error: unexpected end of data"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"txt": "b"}', "--text_field=text: .*a.jsonl, row 2 has no such field; there are: txt"),
        ('{"text": ["b"]}', "--text_field=text: .*a.jsonl, row 2 has .'b'. there, not text"),
        ('"b"', "--text_field=text: .*a.jsonl, row 2 has no such field; there are: none"),
        ('{"text": "b', "--source=.*a.jsonl: could not be read as text .ValueError: line 3: Invalid"),
    ],
)
def test_a_row_that_is_wrong_is_named(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(SystemExit, match=message):
        read(tmp_path / "a.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Plain text


@pytest.mark.parametrize(
    "how, expected",
    [
        ("file", ["one\r\ntwo\n\n \nthree\n<|endoftext|>\nfour\n"]),
        ("line", ["one", "two", "", " ", "three", "<|endoftext|>", "four"]),
        ("blank_line", ["one\r\ntwo", "three\n<|endoftext|>\nfour"]),
        ("<|endoftext|>", ["one\r\ntwo\n\n \nthree", "four"]),
    ],
)
def test_plain_text_is_split_as_asked(how, expected, tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\n\n \nthree\n<|endoftext|>\nfour\n".encode())
    assert read(tmp_path / "a.txt", split_documents=how) == [(text, "all") for text in expected]


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["a", "bc ", " ", "\n", "\r\n", "<|endoftext|>", "x" * 40]), max_size=60),
    how=st.sampled_from(sorted(MARKS)),
    characters=st.integers(150, 300),
)
def test_the_documents_do_not_depend_on_the_pieces(parts, how, characters, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes("".join(parts).encode())
    found = []
    for most in (10**6, characters):
        with open(path, encoding="utf-8", newline="") as file:
            pieces = list(plain_documents(file, MARKS[how], most))
        assert all(len(piece) <= 3 * most for piece, _ in pieces)
        documents = []
        for piece, domain in pieces:
            documents.append(piece) if domain == "all" else documents.append(documents.pop() + piece)
        found.append([document for document in documents if document])
    assert found[0] == found[1]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "'s", "bc", " ", "\n", "\r\n", "\n\n", "!!", "\u3000", "\x1c", "\xa0", "12", "é"])
    ).map("".join)
)
def test_pieces_have_gpt2_s_tokens_of_the_whole(gpt2, text):
    pieces, rest = [], text
    while len(rest) > 8 and (found := BEFORE_SPACE.match(rest[:8])):
        pieces.append(rest[: found.end()])
        rest = rest[found.end() :]
    tokens = [token for piece in [*pieces, rest] for token in gpt2.encode_ordinary(piece)]
    assert tokens == gpt2.encode_ordinary(text)


@pytest.mark.parametrize("how", MARKS)
@pytest.mark.parametrize("line", ["a line " * 20 + "\r\n", "words without a line ", "\u6f22\u5b57"])
def test_the_memory_of_a_long_text_is_that_of_its_pieces(line, how, tmp_path):
    (tmp_path / "a.txt").write_bytes((line * (12 * 2**20 // len(line.encode()))).encode())
    knobs, size = Knobs(str(tmp_path / "a.txt"), split_documents=how), 0
    tracemalloc.start()
    for text, _ in documents_of(knobs):
        size += len(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 4e6 and peak < 7e6  # of two bytes a character in the last case


# ---------------------------------------------------------------------------------------------------------------------
# Files, folders, globs


def test_compressed_files_of_every_kind(tmp_path):
    raw = {
        "a.jsonl": b'{"text": "a"}\n{"text": "b"}\n',
        "a.json": b'[{"text": "a"},\n{"text": "b"}]',
        "a.csv": b"text,n\na,1\nb,2\n",
        "a.txt": b"a\n\nb",
        "A.MD": b"a\n\nb",
    }
    for name, content in raw.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content[:9]) + gzip.compress(content[9:]))
        (tmp_path / f"{name}.xz").write_bytes(lzma.compress(content))
        zst = pa.Codec("zstd")
        (tmp_path / f"{name}.zst").write_bytes(
            zst.compress(content[:9]).to_pybytes() + zst.compress(content[9:]).to_pybytes()
        )
        for packed in (".gz", ".xz", ".zst"):
            plain = dict(split_documents="blank_line") if name in ("a.txt", "A.MD") else {}
            assert read(tmp_path / f"{name}{packed}", **plain) == [("a", "all"), ("b", "all")]
    (tmp_path / "B.TXT.GZ").write_bytes(gzip.compress(b"b"))
    assert read(tmp_path / "B.TXT.GZ") == [("b", "all")]
    for name in ("a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) - 6])
        with pytest.raises(SystemExit, match=f"--source=.*{name}: could not be read as text"):
            read(tmp_path / name)
    with pytest.raises(SystemExit, match="a.parquet.gz: could not be read as text .ArrowInvalid"):
        (tmp_path / "a.parquet.gz").write_bytes(b"")
        read(tmp_path / "a.parquet.gz")


def test_a_folder_is_all_files_of_these_kinds_below_it(tmp_path):
    (tmp_path / "in [v2]" / "deeper").mkdir(parents=True)
    folder = tmp_path / "in [v2]"
    (folder / "b.txt").write_text("b")
    (folder / "deeper" / "c.md").write_text("c")
    write_lines(folder / "a.jsonl", [dict(text="a")])
    (folder / ".hidden.txt").write_text("no")
    (folder / "picture.png").write_bytes(b"\xff")
    assert read(folder) == [("a", "all"), ("b", "all"), ("c", "all")]
    assert read(f"{tmp_path}/in [v2]/b.txt") == [("b", "all")]  # what is there wins over the pattern
    assert read(f"{tmp_path}/*/b.txt,{folder}/deeper,{tmp_path}/*/*.txt") == [("b", "all"), ("c", "all")]
    with pytest.raises(SystemExit, match="--source=.*picture.png: expected .parquet, .jsonl"):
        read(f"{folder}/picture.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="--source=.*empty: expected .*or a folder that has some"):
        read(tmp_path / "empty")
    for missing in ("none.txt", "none/*.txt", "./none", "a/b/c", f"{folder}/b.txt,none.txt"):
        with pytest.raises(SystemExit, match=f"--source={re.escape(missing.split(',')[-1])}: no such file or folder"):
            read(missing)


@pytest.mark.parametrize(
    "source", ["texts/none", "texts/none.parquet", "none.jsonl.gz", "none.zst", "./none", "~/none", "/none", "a/b/c"]
)
def test_a_mistyped_path_is_refused_and_no_hub_asked(source, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub is asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    with pytest.raises(SystemExit, match=f"^--source={source}: no such file or folder$"):
        read(source)


# ---------------------------------------------------------------------------------------------------------------------
# The library `datasets`


def test_a_configuration_of_a_data_set_is_chosen_by_its_name(hub_folder):
    for config in "ab":
        assert read(hub_folder, config=config) == [(f"{config}{i}", "all") for i in range(3)]
    with pytest.raises(SystemExit, match="'a', 'b'.*choose one with --config=<name>") as error:
        read(hub_folder)
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="--text_field=body: .*set, row 1 has no such field; there are: .*text"):
        read(hub_folder, config="a", text_field="body")
    with pytest.raises(SystemExit, match="--config=c: .*set has 'a', 'b'; choose one with --config=<name>$"):
        read(hub_folder, config="c")
    for split in ("nope", "train[:10%]"):
        message = f"--split={re.escape(split)}: .*set has 'train'; choose one with --split=<name>$"
        with pytest.raises(SystemExit, match=message):
            read(hub_folder, config="a", split=split)


def test_an_unknown_split_of_a_downloaded_data_set_is_told_in_our_words(hub_folder, monkeypatch, tmp_path):
    import datasets

    load = datasets.load_dataset
    options = dict(cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, split, **__: load(str(hub_folder), "a", split=split, **options)
    )
    with pytest.raises(SystemExit, match="--split=nope: some/set has 'train'; choose one with --split=<name>$"):
        read("some/set", split="nope")


def test_a_hub_that_cannot_be_reached_costs_one_line(monkeypatch, capfd):
    """Its client says what it tries again, and waits in between."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    def unreachable(*arguments, **options):
        for library in (datasets, huggingface_hub):
            library.logging.get_logger(f"{library.__name__}.http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        SystemExit, match="--source=some/set: could not be read .*no route.; is there a network, and a data"
    ):
        read("some/set")
    assert capfd.readouterr() == ("asking the Hugging Face hub for some/set\n", "")


def test_a_local_data_set_is_read_as_it_is_now(hub_folder):
    path = hub_folder / "a" / "train.jsonl"
    os.utime(path, (0, 0))
    assert len(read(hub_folder, config="a")) == 3
    write_lines(path, [dict(text=f"{i}", n=i) for i in range(9)])
    os.utime(path, (0, 0))
    assert len(read(hub_folder, config="a")) == 9


def test_a_hub_s_data_set_is_streamed_where_little_of_it_is_wanted(hub_folder, monkeypatch):
    import datasets

    load, asked = datasets.load_dataset, []

    def from_folder(source, config, **options):
        asked.append(options.get("streaming", False))
        return load(str(hub_folder), config or "a", split=options["split"], streaming=options.get("streaming", False))

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    expected = [(f"a{i}", "all") for i in range(3)]
    assert read("some/set") == expected and read("some/set", max_tokens=100) == expected
    assert asked == [False, True]


@pytest.mark.parametrize(
    "error, mend",
    [
        (ValueError("Couldn't cast a because column names don't match"), "--source=<folder> reads row by row"),
        (ConnectionError("no route"), "ConnectionError: no route.; is there a network, and a data set of this name.$"),
    ],
)
def test_what_the_library_finds_comes_with_a_mend(error, mend, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(SystemExit, match=f"--source=some/set: could not be read .*{mend}"):
        read("some/set")


REMOTE = """
Traceback (most recent call last):
  File "writer.py", line 1, in write
OSError: [Errno 28] No space left on device

The above exception was the direct cause of the following exception:

DatasetGenerationError: An error occurred while generating the dataset"""


@pytest.mark.parametrize("cause", [OSError(28, "No space left on device"), OSError("Not enough disk space"), REMOTE])
def test_a_full_disk_under_hf_home_is_named(cause, monkeypatch):
    """Also where one of several processes has found it, which tells it in a traceback."""
    datasets = pytest.importorskip("datasets")

    def full(*arguments, **options):
        raised = type("RemoteTraceback", (Exception,), {})(REMOTE) if cause is REMOTE else cause
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from raised

    monkeypatch.setattr(datasets, "load_dataset", full)
    message = r"--source=some/set: .* \(OSError: [^)]*space[^)]*\); HF_HOME=.* is full: .*--max_tokens"
    with pytest.raises(SystemExit, match=message) as error:
        read("some/set")
    assert "Traceback" not in str(error.value)


def test_a_readme_beside_data_is_no_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a row"}\n')
    (tmp_path / "README.md").write_text("# a card")
    assert read(tmp_path) == [("a row", "all")]
    (tmp_path / "a.jsonl").unlink()
    assert read(tmp_path) == [("# a card", "all")]


def test_a_text_that_is_not_utf_8_is_refused_with_the_way_to_mend_it(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(SystemExit, match="a.txt: could not be read as text .*; convert it to UTF-8"):
        read(tmp_path / "a.txt")
