"""
Text -> tokens: data/<name>/{train,val,test}.bin, where each document begins, and meta.json.

    python prepare_owt.py                                                        # OpenWebText with GPT-2's BPE
    python prepare_owt.py --max_tokens=100000000                                 # its beginning, without the download
    python prepare_owt.py --source=<hub id> --domain_field=meta.pile_set_name    # another text data set of the hub
    python prepare_owt.py --source='texts/*.parquet' --name=mine --text_field=text --domain_field=domain
    python prepare_owt.py --source=input.txt,notes/ --name=mine --tokenizer=bytes # files and folders of them
    python prepare_owt.py --source=../nanoGPT/data/openwebtext                   # train.bin and val.bin, taken over
    python prepare_owt.py --source=python                                        # this Python's own library, as bytes

Files are .parquet, .jsonl, .json or .csv, of which only the text and the domain are read, or .txt or .md; all but
.parquet also with .gz, .xz or .zst. A document's split is drawn; if one were empty, the text is cut by position.

The .bin files are nanoGPT's; docs/files.md describes the others. meta.json is written last, and a corpus is replaced
once its successor is whole. Memory grows neither with the corpus nor with a document of plain text.
"""

import bisect
import glob
import hashlib
import itertools
import json
import os
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from support.configurator import UserError, check, configure
from support.corpus import DOCUMENT, PAGE, SPLITS, checksum_of, get_tokenizer, is_nanogpt, mapped, sha256_of
from support.files import atomic_write, lock, writing
from support.sources import KINDS, MARKS, PACKED, PLAIN, documents_of, kind_of, paths_of


@dataclass
class Knobs:
    source: str = "Skylion007/openwebtext"  # a hub id, 'python', or files, folders, globs: a.txt,b/*.csv
    config: str = ""  # the configuration of a hub's data set, or of a local folder of that kind, with several
    split: str = "train"  # of the hub's data set
    text_field: str = "text"  # where a document's text stands
    domain_field: str = ""  # where a document's domain stands; dots for nested fields, as in meta.pile_set_name
    split_documents: str = "file"  # plain text: a document ends with a file, line, blank_line or <|endoftext|>
    max_tokens: int = 0  # stop after so many (0: never); a hub's data set is then streamed, not downloaded
    tokenizer: str = ""  # 'gpt2' or 'bytes'; the default is bytes for 'python', else gpt2
    data_dir: str = "data"
    name: str = ""  # of the folder in data_dir; the default comes from the source
    val_fraction: float = 0.05  # of the documents; validation windows are drawn anew every step, so not too few
    test_fraction: float = 0.05
    seed: int = 0  # of the split
    num_proc: int = max(1, (os.cpu_count() or 2) // 2)  # threads that encode, processes that read

    def __post_init__(self):
        v, t = self.val_fraction, self.test_fraction
        check(min(v, t) > 0 and v + t < 1, f"--val_fraction={v} --test_fraction={t}: expected above 0, in all below 1")
        for key, low in dict(num_proc=1, seed=0, max_tokens=0).items():
            check(getattr(self, key) >= low, f"--{key}={getattr(self, key)}: expected at least {low}")
        check(self.split_documents in MARKS, f"--split_documents={self.split_documents}: expected {', '.join(MARKS)}")
        self.tokenizer = self.tokenizer or ("bytes" if self.source == "python" else "gpt2")
        check(self.tokenizer in ("gpt2", "bytes"), f"--tokenizer={self.tokenizer}: expected gpt2 or bytes")
        if not self.name:
            self.name = os.path.basename(os.path.abspath(self.source))
            for ending in (*PACKED, *KINDS):  # a hub id may have other dots
                self.name = self.name.removesuffix(ending)
            one = os.path.exists(self.source) or not (glob.has_magic(self.name) or "," in self.source)
            check(one and self.name, f"--source={self.source}: give the corpus a name, --name=<folder>")
        self.paths = [] if is_nanogpt(self.source) else paths_of(self)


def check_used(knobs, kinds):
    """Raise UserError for a knob that this source, files of these `kinds` or none, has no use for."""
    taken_over, plain, rows = is_nanogpt(knobs.source), kinds & set(PLAIN), kinds - set(PLAIN)
    hub = not (taken_over or kinds or knobs.source == "python")
    used = dict(max_tokens=not taken_over, seed=not taken_over, config=hub, split=hub, split_documents=plain)
    for key, of_use in (used | dict.fromkeys(("text_field", "domain_field"), hub or rows)).items():
        value, default = getattr(knobs, key), getattr(Knobs, key)
        check(of_use or value == default, f"--{key}={value}: {knobs.source} has no use for it; leave it out")


# ---------------------------------------------------------------------------------------------------------------------
# From documents to tokens


def encode(tokenizer, text):
    """The tokens of a text as uint16, and whether U+FFFD stands for lone surrogates. '<|endoftext|>' in it is text."""
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken's encode does
    if tokenizer.name == "bytes":  # the same tokens as the Encoding's, without its search for merges
        tokens = np.frombuffer(clean.encode(), dtype=np.uint8)
    else:
        tokens = tokenizer.encode_to_numpy(clean, disallowed_special=())
    return tokens.astype("<u2"), clean != text


def by_chance(documents, knobs):
    """(text, domain, split) of documents. The split, 0, 1 or 2, follows from the seed and the place among all."""
    edges = [1 - knobs.val_fraction - knobs.test_fraction, 1 - knobs.test_fraction]
    rng, split = np.random.default_rng(knobs.seed), 0
    for text, domain in documents:
        if text and domain is not None:
            split = bisect.bisect_right(edges, rng.random())
        yield text, domain, split


def by_position(knobs, characters):
    """
    (text, domain, split) of the documents, of so many characters in all, in order: train first, test last. A document
    is cut only where a split would have less than half of its share without: behind a line that ends near the edge,
    else behind a word, else at the edge.
    """
    ends = [0]  # and then the end of every document
    for text, domain in documents_of(knobs):
        ends += [ends[-1]] * (domain is not None)
        ends[-1] += len(text)
        if ends[-1] >= characters:
            break
    v, t = knobs.val_fraction, knobs.test_fraction
    shares = characters * np.array([1 - v - t, v, t])
    edges, near = np.cumsum(shares)[:2].astype(int), shares.min() // 2
    how = "the text is cut, where a line or a word ends nearby"
    test = min(ends[:-1], key=lambda end: abs(end - edges[1]))
    val = min((end for end in ends if end < test), key=lambda end: abs(end - edges[0]), default=0)
    if (np.diff([0, val, test, characters]) >= shares / 2).all():
        edges, near, how = [val, test], 0, "whole documents go by position"
    print(f"too few documents to draw the splits, so {how}: the beginning is train, the end is test")
    edges, split, read, name = [*edges, sys.maxsize], 0, 0, ""
    for text, domain in documents_of(knobs):
        name = name if domain is None else domain
        while read + len(text) > edges[split]:
            at = int(edges[split]) - read
            low = max(0, at - int(near))
            cut = text.rfind("\n", low, at) + 1 or text.rfind(" ", low, at) + 1 or at
            cut = 0 if domain is not None and at < near else cut
            if cut:
                yield text[:cut], domain, split
            text, domain, read, split = text[cut:], name, read + cut, split + 1
        yield text, domain, split
        read += len(text)


def encoded(documents, tokenizer, knobs, counts):
    """
    (ids, domain, split) of documents: tokens (n,) uint16. Adds to the Counter `counts` the 'characters', the
    documents left out as 'empty', and the 'damaged' ones: see encode.
    """
    room = max(2, knobs.max_tokens or sys.maxsize)  # one token and its end-of-text
    with ThreadPoolExecutor(knobs.num_proc) as pool, tqdm(unit="B", unit_scale=True, disable=None) as bar:
        while batch := list(itertools.islice(documents, 256)):
            ids_of_batch = pool.map(lambda document: encode(tokenizer, document[0]), batch)
            for (text, domain, split), (ids, damaged) in zip(batch, ids_of_batch, strict=True):
                bar.update(len(text))
                if not text:
                    counts["empty"] += domain is not None
                    continue
                room -= domain is not None
                kept = ids[:room]
                room -= len(kept)
                yield kept, domain, split
                counts["characters"] += len(text) * len(kept) // len(ids)
                counts["damaged"] += damaged
                if room < 2:
                    return


def nanogpt_pieces(tokenizer, knobs):
    """
    (ids, domain, split) of nanoGPT's train.bin and val.bin, of which the end is the test split: from a document on, if
    one ends within 2 MB before the edge. Raises UserError where they are not tokens of `tokenizer`.
    """
    folder, most = knobs.source, 2**20  # tokens at a time
    mend = f"prepare its text with --source={folder}/input.txt --tokenizer=bytes"
    check(not os.path.exists(f"{folder}/meta.pkl"), f"{folder}/meta.pkl: the tokens are characters; {mend}")
    train, val = (mapped(f"{folder}/{name}.bin", "<u2") for name in ("train", "val"))
    edge = int(len(val) * knobs.val_fraction / (knobs.val_fraction + knobs.test_fraction))
    near = max(0, edge - most)
    ends = np.flatnonzero(val[near:edge] == tokenizer.eot_token)
    edge = near + ends[-1] + 1 if len(ends) else edge
    some = len(train) and 0 < edge < len(val)
    found = f"{folder}: a split would be empty, since train.bin has {len(train):,} tokens and val.bin {len(val):,}"
    check(some, f"{found}; take another corpus, or change --val_fraction or --test_fraction")
    for split, name, tokens in (0, "train", train), (1, "val", val[:edge]), (2, "val", val[edge:]):
        domain = "all"
        for ids in np.split(tokens, range(most, len(tokens), most)):
            top, n = ids.max(initial=0), tokenizer.n_vocab
            found = f"{folder}/{name}.bin has token {top}, {tokenizer.name} has {n} tokens"
            check(top < n, f"--tokenizer={tokenizer.name}: {found}; name the tokenizer that made it")
            for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot_token) + 1):
                if len(part):
                    yield part, domain, split
                    domain = "all" if part[-1] == tokenizer.eot_token else None


# ---------------------------------------------------------------------------------------------------------------------
# From tokens to files


class EmptySplit(UserError):
    """No document fell into one of the splits."""


class Split:
    """A split on its way into `folder`: its tokens, and where each of its documents begins."""

    def __init__(self, folder, name, eot, stack):
        self.name, self.path, self.tokens, self.documents = name, f"{folder}/{name}", 0, 0
        self.eot = self.last = eot  # an end-of-text token; the last token
        self.bin = stack.enter_context(atomic_write(f"{self.path}.bin"))
        self.docs = stack.enter_context(atomic_write(f"{self.path}_docs.npy"))
        self.write_header()

    def write_header(self):
        """Of <split>_docs.npy; numpy leaves room in it for the number of documents to grow."""
        said = dict(descr=np.lib.format.dtype_to_descr(DOCUMENT), fortran_order=False, shape=(self.documents,))
        np.lib.format.write_array_header_1_0(self.docs, said)

    def write(self, ids, domain):
        """The tokens begin a document of the domain of this index, or go on with one where it is None."""
        if domain is not None:
            self.end_document()
            self.docs.write(np.array((self.tokens, domain), dtype=DOCUMENT).tobytes())
            self.documents += 1
        self.bin.write(ids)
        self.tokens += len(ids)
        self.last = ids[-1]

    def end_document(self):
        """An end-of-text token stands behind every document; nanoGPT's have it already."""
        if self.last != self.eot:
            self.write(np.array([self.eot], dtype="<u2"), None)

    def finish(self):
        """Write <split>.crc; returns what meta.json says about the split."""
        self.end_document()
        self.docs.seek(0)
        self.write_header()
        self.docs.flush()
        self.bin.flush()
        counts = dict(tokens=self.tokens, documents=self.documents, sha256=sha256_of(self.bin.name))
        crc_sha256 = write_checksums(self.bin.name, f"{self.path}.crc")
        return counts | dict(docs_sha256=sha256_of(self.docs.name), crc_sha256=crc_sha256)


def write_corpus(pieces, tokenizer, knobs, folder):
    """
    Write pieces, (ids, domain, split), into `folder`. Returns what meta.json says about them, and the tokens of every
    domain, a Counter. Raises EmptySplit, and leaves the folder as it was, where a split is empty.
    """
    domains, by_domain, name = {}, Counter(), None
    with ExitStack() as stack:
        splits = [Split(folder, name, tokenizer.eot_token, stack) for name in SPLITS]
        for ids, domain, split in pieces:
            name = name if domain is None else domain
            splits[split].write(ids, None if domain is None else domains.setdefault(domain, len(domains)))
            by_domain[name] += len(ids)
        empty = [split.name for split in splits if not split.documents]
        if empty:
            short = 0 < knobs.max_tokens < sum(split.tokens for split in splits) + 5  # with end-of-text tokens to come
            mend = "raise --max_tokens" if short else "take more text, or change --val_fraction or --test_fraction"
            raise EmptySplit(f"--source={knobs.source}: too little text, no document fell into {empty[0]}; {mend}")
        if os.path.exists(f"{folder}/meta.json"):
            os.remove(f"{folder}/meta.json")  # files are replaced from here on: no corpus until it is written anew
        said = {split.name: split.finish() for split in splits}
    # of the tokens, whatever their domains are
    counts = {name: {key: part[key] for key in ("tokens", "documents", "sha256")} for name, part in said.items()}
    fingerprint = hashlib.sha256(json.dumps([tokenizer.name, counts], sort_keys=True).encode()).hexdigest()
    return dict(domains=list(domains), splits=said, fingerprint=fingerprint), by_domain


def write_checksums(bin_path, crc_path):
    """Write the CRC-32 of every PAGE bytes of a file, little-endian uint32; returns the sha256 of what was written."""
    with open(bin_path, "rb") as tokens, atomic_write(crc_path) as file:
        while piece := tokens.read(PAGE * 256):
            pages = [zlib.crc32(piece[i : i + PAGE]) for i in range(0, len(piece), PAGE)]
            file.write(np.array(pages, dtype="<u4"))
    return sha256_of(crc_path)


def main():
    knobs = configure(Knobs, sys.argv[1:])
    folder, counts = os.path.join(knobs.data_dir, knobs.name), Counter()
    check(not is_nanogpt(folder), f"{folder}: holds a corpus of nanoGPT, which would be lost; take another --name")
    kinds = Counter(map(kind_of, knobs.paths))
    check_used(knobs, kinds.keys())
    if kinds.total() > 1:
        print(f"reading {', '.join(f'{n:,} {kind} files' for kind, n in kinds.most_common())}")
    tokenizer = get_tokenizer(knobs.tokenizer)
    if is_nanogpt(knobs.source):
        pieces = nanogpt_pieces(tokenizer, knobs)
    else:
        pieces = encoded(by_chance(documents_of(knobs), knobs), tokenizer, knobs, counts)
    first = next(pieces, None)  # so that a source that cannot be read fails before anything is written
    check(first is not None, f"--source={knobs.source}: no text in it")
    with ExitStack() as stack:
        with writing(f"{folder}/.lock"):
            os.makedirs(folder, exist_ok=True)
            held = stack.enter_context(open(f"{folder}/.lock", "ab"))
        lock(held, folder, "a preparation", "name")
        try:
            written, by_domain = write_corpus(itertools.chain([first], pieces), tokenizer, knobs, folder)
        except EmptySplit:
            documents, counts = by_position(knobs, counts["characters"]), Counter()
            pieces = encoded(documents, tokenizer, knobs, counts)
            written, by_domain = write_corpus(pieces, tokenizer, knobs, folder)
        meta = dict(name=knobs.name, source=knobs.source, tokenizer=knobs.tokenizer, vocab_size=tokenizer.n_vocab)
        meta |= dict(eot_token=tokenizer.eot_token, seed=knobs.seed, val_fraction=knobs.val_fraction)
        meta |= dict(test_fraction=knobs.test_fraction, **written)
        with atomic_write(f"{folder}/meta.json") as file:
            file.write(json.dumps(meta | {"checksum": checksum_of(meta)}, indent=1).encode())
    for split, part in written["splits"].items():
        print(f"{split}: {part['documents']:,} documents, {part['tokens']:,} tokens")
    if len(by_domain) > 1:
        most = (f"{name} {n / by_domain.total():.1%}" for name, n in by_domain.most_common(20))
        print(f"tokens by domain, the largest of {len(by_domain):,}: {', '.join(most)}")
    told = dict(empty="no text and were left out", damaged="text that is not Unicode: U+FFFD stands for it")
    for key in told:
        if counts[key]:
            print(f"{counts[key]:,} documents had {told[key]}")
    print(f"{folder}: ready for --dataset={knobs.name} --data_dir={knobs.data_dir}")


if __name__ == "__main__":
    main()
