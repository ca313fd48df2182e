"""
Text -> tokens: data/<name>/{train,val,test}.bin, where each document begins, and meta.json.

    python prepare_owt.py                                                        # OpenWebText with GPT-2's BPE
    python prepare_owt.py --source=<hub id> --domain_field=meta.pile_set_name    # another text data set of the hub
    python prepare_owt.py --source='texts/*.parquet' --name=mine --text_field=text --domain_field=domain
    python prepare_owt.py --source=python                                        # this Python's own library, as bytes

The .bin files are nanoGPT's: uint16 token ids, an end-of-text token behind every document. <split>_docs.npy holds the
first token of every document and its domain, an index into meta.json's domains; <split>.crc the CRC-32 of every 4,096
bytes of the .bin, which whoever reads a window compares. meta.json is written last: a folder without it is no corpus,
and a corpus that stands there already is replaced only once its successor is whole. Memory does not grow with the
corpus.
"""

import glob
import hashlib
import itertools
import json
import os
import sys
import sysconfig
import tempfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from support.configurator import UserError, configure
from support.corpus import DOCUMENT, PAGE, SPLITS, checksum_of, get_tokenizer, sha256_of
from support.files import atomic_write

KINDS = (".parquet", ".jsonl", ".json", ".txt")  # of files


@dataclass
class Knobs:
    source: str = "Skylion007/openwebtext"  # a hub id, 'python', or a file or glob of .parquet, .jsonl or .txt
    split: str = "train"  # of the hub's data set
    text_field: str = "text"  # where a document's text stands
    domain_field: str = ""  # where a document's domain stands; dots for nested fields, as in meta.pile_set_name
    tokenizer: str = ""  # 'gpt2' or 'bytes'; the default is bytes for 'python', else gpt2
    data_dir: str = "data"
    name: str = ""  # of the folder in data_dir; the default comes from the source
    val_fraction: float = 0.05  # of the documents; validation windows are drawn anew every step, so not too few
    test_fraction: float = 0.05
    seed: int = 0  # of the split
    num_proc: int = max(1, (os.cpu_count() or 2) // 2)  # threads that encode, processes that read

    def __post_init__(self):
        if min(self.val_fraction, self.test_fraction) <= 0 or self.val_fraction + self.test_fraction >= 1:
            found = f"--val_fraction={self.val_fraction} --test_fraction={self.test_fraction}"
            raise UserError(f"{found}: both must be above 0 and leave something to train on")
        if self.num_proc < 1 or self.seed < 0:
            raise UserError(f"--num_proc={self.num_proc} --seed={self.seed}: expected at least 1 and 0")
        self.tokenizer = self.tokenizer or ("bytes" if self.source == "python" else "gpt2")
        if self.tokenizer not in ("gpt2", "bytes"):
            raise UserError(f"--tokenizer={self.tokenizer}: expected gpt2 or bytes")
        base, extension = os.path.splitext(os.path.basename(self.source))
        self.name = self.name or (base if extension in KINDS else base + extension)  # a hub id may have dots
        if glob.has_magic(self.name):
            raise UserError(f"--source={self.source}: give the corpus a name, --name=<folder in {self.data_dir}>")


# ---------------------------------------------------------------------------------------------------------------------
# Documents: iterators over (text, domain)


def python_documents():
    """
    The running Python's standard library without its tests: the sources, and pydoc's topics, each text once. The domain
    of a file is its package where that has at least 20 files, 'packages' for the smaller ones, and 'modules' for the
    files that are in none.
    """
    from pydoc_data.topics import topics

    root, skipped = sysconfig.get_path("stdlib"), {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - skipped - {"pydoc_data", "__pycache__"})
        paths += [os.path.relpath(os.path.join(folder, name), root) for name in sorted(names) if name.endswith(".py")]
    package = {path: os.path.dirname(path).split(os.sep)[0] for path in paths}
    files = Counter(package.values())

    def sources():
        for path in paths:
            # what is not UTF-8 becomes lone surrogates, which `encode` replaces and counts
            with open(os.path.join(root, path), encoding="utf-8", errors="surrogateescape") as file:
                domain = package[path] if files[package[path]] >= 20 else "packages"
                yield file.read(), domain if package[path] else "modules"

    seen = {""}  # the library has empty files and a few twins
    for text, domain in itertools.chain(sources(), ((topics[name], "topics") for name in sorted(topics))):
        if text not in seen:
            seen.add(text)
            yield text, domain


def documents_of(knobs):
    """The documents of knobs.source: of the embedded corpus, of files or of the hub."""
    if knobs.source == "python":
        return python_documents()
    paths = sorted(glob.glob(knobs.source, recursive=True))
    extension = os.path.splitext(knobs.source)[1]
    if (extension in KINDS or glob.has_magic(knobs.source)) and not paths:
        raise UserError(f"--source={knobs.source}: no such file")
    if paths and extension not in KINDS:
        raise UserError(f"--source={knobs.source}: expected .parquet, .jsonl or .txt, found '{extension}'")
    return file_documents(paths, knobs) if paths else row_documents(hub_rows(knobs), knobs.source, knobs)


def file_documents(paths, knobs):
    """The documents of files. Raises UserError naming the file where one cannot be read or lacks a field."""
    import pyarrow  # comes with `datasets`

    for path in paths:
        kind = os.path.splitext(path)[1]
        try:
            if kind == ".txt":
                with open(path, encoding="utf-8", newline="") as file:
                    yield file.read(), "all"
            else:
                rows = parquet_rows(path, knobs) if kind == ".parquet" else json_rows(path)
                yield from row_documents(rows, path, knobs)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"--source={path}: could not be read as text ({type(error).__name__}: {error})") from error


def row_documents(rows, where, knobs):
    """
    The documents of rows, dicts that may hold dicts. No text is an empty one, no domain is 'none'. Raises UserError
    where a row has no text field, where it holds no text, and where the first row has no domain field.
    """
    fields = {flag: getattr(knobs, flag) for flag in ("text_field", "domain_field") if getattr(knobs, flag)}
    for i, row in enumerate(rows, 1):
        found = {}
        for flag, field in fields.items():
            value = row
            for part in field.split("."):
                missing = not isinstance(value, dict) or part not in value
                if missing and value is not None and (i == 1 or flag == "text_field"):
                    names = ", ".join(value) if isinstance(value, dict) else "none"
                    what = f"{where}, row {i:,} has no such field; there are: {names:.500}"
                    raise UserError(f"--{flag}={field}: {what}")
                value = None if missing else value[part]
            found[flag] = value
        text, domain = found["text_field"], found.get("domain_field", "all")
        if text is not None and not isinstance(text, str):
            raise UserError(f"--text_field={knobs.text_field}: {where}, row {i:,} has {text!r:.80} there, not text")
        yield text or "", "none" if domain is None else str(domain)


def parquet_rows(path, knobs):
    from pyarrow import parquet

    with parquet.ParquetFile(path, memory_map=True) as file:
        columns = {knobs.text_field, knobs.domain_field} - {""}
        if not columns <= {column.path for column in file.schema}:
            columns = None  # all of them, for the message about the missing one
        for batch in file.iter_batches(batch_size=256, columns=columns and sorted(columns)):
            yield from batch.to_pylist()


def json_rows(path):
    """The rows of JSON lines, each of which is parsed by itself, or of one list."""
    with open(path, encoding="utf-8-sig") as file:
        listed = file.read(1) == "["
        file.seek(0)
        yield from json.load(file) if listed else (json.loads(line) for line in file if line.strip())


def hub_rows(knobs):
    """The rows of a hub id's data set, of which nothing but the text and the domain is read."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(knobs.source, split=knobs.split, num_proc=knobs.num_proc)
        columns = {field.split(".")[0] for field in (knobs.text_field, knobs.domain_field) if field}
        if columns <= set(data.column_names):
            data = data.select_columns(sorted(columns))
        for table in data.with_format("arrow").iter(batch_size=256):
            yield from table.to_pylist()
    except Exception as error:  # of many types: no network, no such data set, a damaged file
        cause = error.__cause__ or error
        what = f"could not be read as text by the library datasets ({type(cause).__name__}: {cause})"
        raise UserError(f"--source={knobs.source}: {what}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def encode(tokenizer, text):
    """
    The tokens of one document and an end-of-text: a uint16 array, and whether lone surrogates had to be replaced by
    U+FFFD. '<|endoftext|>' in the text is text.
    """
    try:
        raw, damaged = text.encode(), False
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken's encode does
        raw, damaged = text.encode(), True
    if tokenizer.name == "bytes":  # the same tokens as the Encoding's, without its search for merges
        tokens = np.frombuffer(raw, dtype=np.uint8)
    else:
        tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
    return np.append(tokens, tokenizer.eot_token).astype("<u2"), damaged


def batches_of(documents, characters=2**22, count=2**12):
    """Lists of documents, each of about `characters` characters and at most `count` documents."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if size >= characters or len(batch) == count:
            yield batch
            batch, size = [], 0
    yield batch


class Split:
    """A split on its way into `folder`: its tokens, and where each of its documents begins."""

    def __init__(self, folder, name, stack):
        self.name, self.path = name, f"{folder}/{name}"
        self.bin = stack.enter_context(atomic_write(f"{self.path}.bin"))
        self.starts = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        self.sha256, self.tokens, self.documents = hashlib.sha256(), 0, 0

    def write(self, ids, domain):
        """Add a document, tokens (n,) uint16, of the domain of this index."""
        self.starts.write(np.array([(self.tokens, domain)], dtype=DOCUMENT).tobytes())
        self.bin.write(ids)
        self.sha256.update(ids)
        self.tokens += len(ids)
        self.documents += 1

    def finish(self):
        """Write <split>.crc and <split>_docs.npy; returns what meta.json says about the split."""
        self.bin.flush()
        self.starts.flush()
        docs = f"{self.path}_docs.npy"
        with atomic_write(docs) as file:
            np.save(file, np.memmap(self.starts, dtype=DOCUMENT, mode="r"))
        counts = dict(tokens=self.tokens, documents=self.documents, sha256=self.sha256.hexdigest())
        crc_sha256 = write_checksums(self.bin.name, f"{self.path}.crc")
        return counts | dict(docs_sha256=sha256_of(docs), crc_sha256=crc_sha256)


def write_corpus(documents, tokenizer, folder, knobs):
    """Encode the documents into `folder` and return meta.json's part on them: domains, splits and fingerprint."""
    domains, by_domain, damaged = {}, Counter(), 0
    edges = [1 - knobs.val_fraction - knobs.test_fraction, 1 - knobs.test_fraction]
    rng = np.random.default_rng(knobs.seed)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(knobs.num_proc))
        splits = [Split(folder, name, stack) for name in SPLITS]
        progress = stack.enter_context(tqdm(unit="B", unit_scale=True, desc="encoding", disable=None))
        for batch in batches_of(documents):
            encoded = pool.map(lambda document: encode(tokenizer, document[0]), batch)
            sides = np.searchsorted(edges, rng.random(len(batch)), side="right")
            for (text, domain), side, (ids, replaced) in zip(batch, sides, encoded, strict=True):
                splits[side].write(ids, domains.setdefault(domain, len(domains)))
                damaged += replaced
                by_domain[domain] += len(ids)
                progress.update(len(text))
        if all(split.tokens == split.documents for split in splits):
            raise UserError(f"--source={knobs.source}: no text in it")
        for split in splits:
            if not split.documents:
                flag = "val_fraction" if split.name == "train" else f"{split.name}_fraction"
                found = f"none of the {sum(split.documents for split in splits)} documents fell into {split.name}"
                raise UserError(f"{found}; change --{flag} or --seed")
        if os.path.exists(f"{folder}/meta.json"):
            os.remove(f"{folder}/meta.json")  # files are replaced from here on: no corpus until it is written anew
        said = {split.name: split.finish() for split in splits}
    for split in splits:
        print(f"{split.name}: {split.documents:,} documents, {split.tokens:,} tokens")
    if len(domains) > 1:
        total, most = by_domain.total(), by_domain.most_common(20)
        rest = f", and {len(domains) - 20} more" if len(domains) > 20 else ""
        print("tokens by domain: " + ", ".join(f"{name} {n / total:.1%}" for name, n in most) + rest)
    if damaged:
        print(f"{damaged:,} documents had text that is not Unicode: U+FFFD stands for it")
    # of the tokens, whatever their domains are
    counts = {name: {key: part[key] for key in ("tokens", "documents", "sha256")} for name, part in said.items()}
    identity = json.dumps([tokenizer.name, counts], sort_keys=True)
    return dict(domains=list(domains), splits=said, fingerprint=hashlib.sha256(identity.encode()).hexdigest())


def write_checksums(bin_path, crc_path):
    """
    Write the CRC-32 of every PAGE bytes of a file, the last of which may be short, as little-endian uint32; returns the
    sha256 of what was written.
    """
    with open(bin_path, "rb") as tokens, atomic_write(crc_path) as file:
        while piece := tokens.read(PAGE * 256):
            pages = [zlib.crc32(piece[i : i + PAGE]) for i in range(0, len(piece), PAGE)]
            file.write(np.array(pages, dtype="<u4"))
    return sha256_of(crc_path)


def main():
    knobs = configure(Knobs, sys.argv[1:])
    tokenizer = get_tokenizer(knobs.tokenizer)
    documents = documents_of(knobs)
    first = next(documents, None)  # so that a source that cannot be read fails before anything is written
    if first is None:
        raise UserError(f"--source={knobs.source}: no text in it")
    folder = os.path.join(knobs.data_dir, knobs.name)
    os.makedirs(folder, exist_ok=True)
    written = write_corpus(itertools.chain([first], documents), tokenizer, folder, knobs)
    meta = dict(
        name=knobs.name,
        source=knobs.source,
        tokenizer=knobs.tokenizer,
        vocab_size=tokenizer.n_vocab,
        eot_token=tokenizer.eot_token,
        seed=knobs.seed,
        val_fraction=knobs.val_fraction,
        test_fraction=knobs.test_fraction,
        **written,
    )
    with atomic_write(f"{folder}/meta.json") as file:
        file.write(json.dumps(meta | {"checksum": checksum_of(meta)}, indent=1).encode())
    print(
        f"{folder}: ready for --dataset={knobs.name}"
        + (f" --data_dir={knobs.data_dir}" if knobs.data_dir != "data" else "")
    )


if __name__ == "__main__":
    main()
