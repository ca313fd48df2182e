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
import io
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
    return file_documents(paths, knobs) if paths else hub_documents(knobs)


def file_documents(paths, knobs):
    """
    The documents of .parquet files, of which nothing but the two fields is read, of .jsonl files (.json: the same, or
    one list), of which every line stands for itself, and of .txt files, of which each is one document. Raises UserError
    naming the file where one cannot be read or lacks a field.
    """
    import pyarrow  # comes with `datasets`

    fields, readers = fields_of(knobs), {".parquet": parquet_rows, ".txt": text_rows}
    for path in paths:
        try:
            yield from readers.get(os.path.splitext(path)[1], json_rows)(path, fields)
        except UnicodeDecodeError as error:
            what = f"--source={path}: could not be read as text: it has what is not UTF-8 ({error})"
            raise UserError(f"--text_field={knobs.text_field}: {what}") from error
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"--source={path}: could not be read ({type(error).__name__}: {error})") from error


def parquet_rows(path, fields):
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetFile(path, memory_map=True) as file:
        for flag, field in fields.items():
            kind = pa.struct(file.schema_arrow)
            for part in field.split("."):
                found = {one.name: one for one in kind} if pa.types.is_struct(kind) else None
                if not found or part not in found:
                    raise no_such_field(flag, field, path, found)
                kind = found[part].type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
            if flag == "text_field" and not text:
                raise UserError(f"--text_field={field}: {path} has {kind} there, not text")
        columns = sorted(set(fields.values()))
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                yield text_and_domain(row, fields)


def json_rows(path, fields):
    with open(path, encoding="utf-8-sig") as file:
        listed = file.read(1) == "["  # one list of rows, which json reads whole
        file.seek(0)
        rows = enumerate(json.load(file) if listed else (json.loads(line) for line in file if line.strip()))
        for i, row in rows:
            for flag, field in fields.items():
                found = row
                # a domain may be missing further down, where it is 'none'
                for part in field.split(".") if i == 0 or flag == "text_field" else ():
                    if not isinstance(found, dict) or part not in found:
                        raise no_such_field(flag, field, f"{path}, row {i + 1}", found)
                    found = found[part]
                    if found is None:
                        break
                if flag == "text_field" and not isinstance(found, (str, type(None))):
                    raise UserError(f"--text_field={field}: {path}, row {i + 1}: has {found!r:.80} there, not text")
            yield text_and_domain(row, fields)


def text_rows(path, fields):
    with open(path, encoding="utf-8", newline="") as file:
        yield file.read(), "all"


def fields_of(knobs):
    """{flag: the path of the field that it names}, of the text and, if there is one, of the domain."""
    return {flag: getattr(knobs, flag) for flag in ("text_field", "domain_field") if getattr(knobs, flag)}


def no_such_field(flag, field, where, found):
    names = ", ".join(found) if isinstance(found, dict) else ""
    return UserError(f"--{flag}={field}: {where} has no such field; there are: {names or 'none':.500}")


def text_and_domain(row, fields):
    """(text, domain) of a row, a dict that holds dicts. No text is an empty one, no domain is 'none'."""
    found = {}
    for flag, field in fields.items():
        value = row
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        found[flag] = value
    domain = found.get("domain_field", "all")
    return found["text_field"] or "", "none" if domain is None else str(domain)


def hub_documents(knobs):
    """The documents of a hub id, by the library `datasets`."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(knobs.source, split=knobs.split, num_proc=knobs.num_proc)
    except Exception as error:  # of many types: no network, no such data set, a damaged file
        cause = error.__cause__ or error
        what = f"{type(cause).__name__}: {cause}"
        raise UserError(
            f"--source={knobs.source}: could not be read as text by the library datasets ({what})"
        ) from error
    fields = fields_of(knobs)
    for flag, field in fields.items():
        found = data.features
        for part in field.split("."):
            if not isinstance(found, dict) or part not in found:
                raise no_such_field(flag, field, knobs.source, found)
            found = found[part]
        if flag == "text_field" and getattr(found, "dtype", "") not in ("string", "large_string"):
            raise UserError(f"--text_field={field}: {knobs.source} has {found} there, not text")
    columns = sorted({field.split(".")[0] for field in fields.values()})
    try:
        for batch in data.select_columns(columns).iter(batch_size=256):
            for values in zip(*batch.values(), strict=True):
                yield text_and_domain(dict(zip(batch, values, strict=True)), fields)
    except UnicodeDecodeError as error:
        raise UserError(f"--text_field={knobs.text_field}: {knobs.source} has what is not UTF-8 ({error})") from error


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


def write_corpus(documents, tokenizer, folder, knobs):
    """Encode the documents into `folder` and return meta.json's part on them: domains, splits and fingerprint."""
    domains, digests = {}, {split: hashlib.sha256() for split in SPLITS}
    tokens, counts, by_domain = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), Counter()
    docs_digests, crc_digests = {}, {}
    edges = [1 - knobs.val_fraction - knobs.test_fraction, 1 - knobs.test_fraction]
    rng, damaged = np.random.default_rng(knobs.seed), 0
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(knobs.num_proc))
        bins = {split: stack.enter_context(atomic_write(f"{folder}/{split}.bin")) for split in SPLITS}
        starts = {split: stack.enter_context(tempfile.TemporaryFile(dir=folder)) for split in SPLITS}
        progress = stack.enter_context(tqdm(unit="B", unit_scale=True, desc="encoding", disable=None))
        for batch in batches_of(documents):
            encoded = pool.map(lambda document: encode(tokenizer, document[0]), batch)
            sides = np.searchsorted(edges, rng.random(len(batch)), side="right")
            for (text, domain), side, (ids, replaced) in zip(batch, sides, encoded, strict=True):
                split = SPLITS[side]
                index = domains.setdefault(domain, len(domains))
                bins[split].write(ids)
                digests[split].update(ids)
                damaged += replaced
                starts[split].write(np.array([(tokens[split], index)], dtype=DOCUMENT).tobytes())
                tokens[split] += len(ids)
                counts[split] += 1
                by_domain[domain] += len(ids)
                progress.update(len(text))
        if not domains or not any(tokens[split] > counts[split] for split in SPLITS):
            raise UserError(f"--source={knobs.source}: no text in it")
        for split in SPLITS:
            if not counts[split]:
                flag = "val_fraction" if split == "train" else f"{split}_fraction"
                total = sum(counts.values())
                raise UserError(f"none of the {total} documents fell into {split}; change --{flag} or --seed")
        if os.path.exists(f"{folder}/meta.json"):
            os.remove(f"{folder}/meta.json")  # files are replaced from here on: no corpus until it is written anew
        for split in SPLITS:
            bins[split].flush()
            crc_digests[split] = write_checksums(bins[split].name, f"{folder}/{split}.crc")
            docs_digests[split] = save_documents(starts[split], counts[split], f"{folder}/{split}_docs.npy")
    for split in SPLITS:
        print(f"{split}: {counts[split]:,} documents, {tokens[split]:,} tokens")
    if len(domains) > 1:
        total, most = sum(tokens.values()), by_domain.most_common(20)
        rest = f", and {len(domains) - 20} more" if len(domains) > 20 else ""
        print("tokens by domain: " + ", ".join(f"{name} {n / total:.1%}" for name, n in most) + rest)
    if damaged:
        print(f"{damaged:,} documents had text that is not Unicode: U+FFFD stands for it")
    splits = {
        split: {"tokens": tokens[split], "documents": counts[split], "sha256": digests[split].hexdigest()}
        for split in SPLITS
    }
    identity = json.dumps([tokenizer.name, splits], sort_keys=True)  # of the tokens, whatever their domains are
    for split in SPLITS:
        splits[split] |= dict(docs_sha256=docs_digests[split], crc_sha256=crc_digests[split])
    return dict(domains=list(domains), splits=splits, fingerprint=hashlib.sha256(identity.encode()).hexdigest())


def save_documents(records, n, path):
    """The `n` raw DOCUMENT records of a file as a .npy, a piece at a time; the sha256 of the .npy."""
    records.seek(0)
    header = io.BytesIO()
    array = dict(descr=np.lib.format.dtype_to_descr(DOCUMENT), fortran_order=False, shape=(n,))
    np.lib.format.write_array_header_1_0(header, array)
    digest, piece = hashlib.sha256(), header.getvalue()
    with atomic_write(path) as file:
        while piece:
            file.write(piece)
            digest.update(piece)
            piece = records.read(2**20)
    return digest.hexdigest()


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
