"""
Documents, (text, domain), from files, from the library `datasets` and from this Python. A long plain text comes in
pieces; the domain of all but the first is None.
"""

import csv
import functools
import glob
import io
import json
import lzma
import os
import pathlib
import re
import sysconfig
from collections import Counter

from support.configurator import UserError, check
from support.files import is_hub_id

PLAIN = (".txt", ".md")
KINDS = (".parquet", ".jsonl", ".json", ".csv", *PLAIN)  # of files
PACKED = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
# what stands between two documents of plain text, beside the newlines around it
MARKS = {"file": None, "line": r"\n", "blank_line": r"\n(?:[ \t]*\r?\n)+", "<|endoftext|>": r"<\|endoftext\|>"}
# GPT-2's pattern crosses from no other character to a space: a text that is cut there has the tokens of the whole
BEFORE_SPACE = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def documents_of(knobs):
    """The documents of knobs.source. Raises UserError naming the file that cannot be read or lacks a field."""
    if knobs.source == "python":
        yield from python_documents()
    elif not knobs.paths:
        yield from row_documents(hub_rows(knobs), knobs.source, knobs)
    for path in knobs.paths:
        try:
            yield from file_documents(path, knobs)
        except Exception as error:  # damaged files raise all kinds
            mend = "; convert it to UTF-8" if isinstance(error, UnicodeError) else ""
            what = f"could not be read as text ({type(error).__name__}: {error})"
            raise UserError(f"--source={path}: {what}{mend}") from error


def paths_of(knobs):
    """
    The files that knobs.source names: none for 'python', and none for what the library `datasets` is to read, a hub id
    or a folder with configurations. Raises UserError where nothing is there.
    """
    source, paths, card = knobs.source, [], pathlib.Path(knobs.source, "README.md")
    described = card.is_file() and "\nconfigs:\n" in card.read_text("utf-8", "replace")
    on_hub = is_hub_id(source) and not source.lower().endswith((*KINDS, *PACKED))
    if source == "python" or on_hub or described or (knobs.config and os.path.isdir(source)):
        return []
    for part in [source] if os.path.exists(source) else source.split(","):
        found = [part] if os.path.exists(part) else sorted(glob.glob(part, recursive=True))
        check(found, f"--source={part}: no such file or folder")
        for path in found:
            files = [path, *sorted(glob.glob(f"{glob.escape(path)}/**/*", recursive=True))]
            files = [name for name in files if is_text(name)]
            if any(kind_of(name) not in PLAIN for name in files):  # a README beside them describes them
                files = [name for name in files if os.path.basename(name) != "README.md"]
            check(files, f"--source={path}: expected {', '.join(KINDS)}, or a folder that has some")
            paths += files
    return list(dict.fromkeys(paths))


def kind_of(path):
    """The ending of a file's name, without that of its compression: '.jsonl' of a.jsonl.gz."""
    base, last = os.path.splitext(path.lower())
    return os.path.splitext(base)[1] if last in PACKED else last


def is_text(path):
    """Whether a file may have documents: the meta.json of a corpus has none."""
    own = os.path.basename(path) == "meta.json" and os.path.isfile(os.path.join(os.path.dirname(path), "train.bin"))
    return os.path.isfile(path) and kind_of(path) in KINDS and not own


def file_documents(path, knobs):
    import pyarrow  # comes with `datasets`

    kind = kind_of(path)
    if kind == ".parquet":
        yield from row_documents(parquet_rows(path, knobs), path, knobs)
        return
    packed = PACKED.get(os.path.splitext(path.lower())[1])
    opened = lzma.LZMAFile if packed == "xz" else functools.partial(pyarrow.input_stream, compression=packed)
    with io.TextIOWrapper(opened(path), encoding="utf-8-sig", newline="") as file:
        if kind in PLAIN:
            yield from plain_documents(file, MARKS[knobs.split_documents])
        else:
            csv.field_size_limit(2**31 - 1)
            rows = csv.DictReader(file, restkey="", strict=True) if kind == ".csv" else json_rows(file)
            yield from row_documents(rows, path, knobs)


def plain_documents(file, marks, characters=2**16):
    """
    The documents of a plain text, split at the pattern `marks` (None: the file is one document), with the domain 'all'.
    One of more than `characters` comes in pieces, cut before a space, where GPT-2's tokens are those of the whole, or
    anywhere if it has no space.
    """
    text, domain = "", "all"
    while more := file.read(characters):
        *documents, text = re.split(marks, text + more) if marks else [text + more]
        for document in documents:
            yield document.rstrip("\r\n") if domain is None else document.strip("\r\n"), domain
            domain = "all"
        text = text.lstrip("\r\n") if marks and domain else text
        if len(text) >= characters:
            found = BEFORE_SPACE.match(text)
            cut = found.end() if found else len(text) - len("<|endoftext|>")  # which may have begun
            yield text[:cut], domain
            text, domain = text[cut:], None
    text = text.rstrip("\r\n") if marks else text
    if text or not marks:
        yield text, domain


def row_documents(rows, where, knobs):
    """
    The documents of rows, dicts that may hold dicts; a null is the text '' or the domain 'none'. Raises UserError where
    a row has no text field, or other than text there, and where the first has no domain field.
    """
    fields = dict(text_field=knobs.text_field) | (dict(domain_field=knobs.domain_field) if knobs.domain_field else {})
    for i, row in enumerate(rows, 1):
        found = {}
        for flag, field in fields.items():
            value = row
            for part in field.split("."):
                known = value if isinstance(value, dict) else {}
                if value is not None and part not in known and (i == 1 or flag == "text_field"):
                    names = ", ".join(known) or "none"
                    raise UserError(f"--{flag}={field}: {where}, row {i:,} has no such field; there are: {names:.500}")
                value = known.get(part)
            found[flag] = value
        text, domain = found["text_field"], found.get("domain_field", "all")
        if text is not None and not isinstance(text, str):
            raise UserError(f"--text_field={knobs.text_field}: {where}, row {i:,} has {text!r:.80} there, not text")
        yield text or "", "none" if domain in (None, "") else str(domain)


def parquet_rows(path, knobs):
    from pyarrow import parquet

    with parquet.ParquetFile(path, memory_map=True) as file:
        columns = {knobs.text_field, knobs.domain_field} - {""}
        known = columns <= {column.path for column in file.schema}  # else all are read, and the message names them
        for batch in file.iter_batches(batch_size=256, columns=sorted(columns) if known else None):
            yield from batch.to_pylist()


def json_rows(file):
    """The rows of JSON lines, each of which is parsed by itself, or of one value: a list of rows, or a row."""
    for i, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            if i > 1:
                raise ValueError(f"line {i:,}: {error}") from error
            found = json.loads(line + file.read())
        yield from found if isinstance(found, list) else [found]


def hub_rows(knobs):
    """The rows of a data set of the library `datasets`, of which nothing but the text and the domain is kept."""
    # the copy of a local folder that `datasets` has made may be an old one, so such a folder is read as it is
    streaming = knobs.max_tokens > 0 or os.path.isdir(knobs.source)
    options = dict(streaming=True) if streaming else dict(num_proc=knobs.num_proc)
    if not os.path.isdir(knobs.source):
        print(f"asking the Hugging Face hub for {knobs.source}")
    try:
        import datasets
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()  # not a word of its retries
        datasets.logging.set_verbosity_error()
        data = datasets.load_dataset(knobs.source, knobs.config or None, split=knobs.split, **options)
        columns = {field.split(".")[0] for field in (knobs.text_field, knobs.domain_field) if field}
        if columns <= set(data.column_names or ()):
            data = data.select_columns(sorted(columns))
        for table in data.with_format("arrow").iter(batch_size=256):
            yield from table.to_pylist()
    except Exception as error:  # of many types: no network, no such data set, a damaged file
        cause = error.__cause__ or error
        what = f"{type(cause).__name__}: {cause}"
        if "Traceback" in what:  # of one of the num_proc processes: its first error is the cause of the others
            what = re.search(r"^[\w.]*(?:Error|Exception)\b.*|\Z", what, re.MULTILINE)[0]
        named = re.search(r"(Config|split)\b.*?\[('.*?')\]", what, re.DOTALL)
        if named:
            flag = named[1].lower()
            found = f"--{flag}={getattr(knobs, flag)}: {knobs.source} has {named[2]:.500}"
            raise UserError(f"{found}; choose one with --{flag}=<name>") from error
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        mends = {
            "[Nn]o space|disk space|[Qq]uota": f"; HF_HOME={home} is full: name another folder, or try --max_tokens",
            "Connection|on the Hub": "; is there a network, and a data set of this name?",
            "column|CastError|JSON parse": "; download its files, which --source=<folder> reads row by row",
        }
        mend = next((mend for found, mend in mends.items() if re.search(found, what)), "")
        raise UserError(f"--source={knobs.source}: could not be read by the library datasets ({what}){mend}") from error


def python_documents():
    """
    The running Python's standard library without its tests: the sources, and pydoc's topics, each text once. The domain
    of a file is its package, 'modules' where it is in none, or 'packages' where that has fewer than 20 files.
    """
    from pydoc_data.topics import topics

    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    root, documents = pathlib.Path(sysconfig.get_path("stdlib")), {}
    places = [path.relative_to(root).parts for path in root.rglob("*.py")]
    places = [parts for parts in places if not skipped & set(parts[:-1])]
    # the files of a folder before those of its subfolders
    places.sort(key=lambda parts: [*((1, part) for part in parts[:-1]), (0, parts[-1])])
    packages = [[*parts[:-1], "modules"][0] for parts in places]
    files = Counter(packages)
    for parts, domain in zip(places, packages, strict=True):
        # what is not UTF-8 becomes lone surrogates, which `encode` replaces and counts
        text = root.joinpath(*parts).read_text("utf-8", "surrogateescape")
        documents.setdefault(text, domain if files[domain] >= 20 else "packages")
    for name in sorted(topics):
        documents.setdefault(topics[name], "topics")
    return [(text, domain) for text, domain in documents.items() if text]
