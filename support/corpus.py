"""Reading what prepare_owt.py has written: tokens, checked as they are read, and the domains of windows."""

import hashlib
import json
import mmap
import os
import zlib

import numpy as np
import tiktoken

from support.configurator import UserError, check
from support.files import reading

SPLITS = ("train", "val", "test")
DOCUMENT = np.dtype([("start", "<i8"), ("domain", "<i4")])
META = dict(name=str, source=str, tokenizer=str, vocab_size=int, eot_token=int, seed=int, val_fraction=float)
META |= dict(test_fraction=float, domains=list, splits=dict, fingerprint=str)
SPLIT = dict(tokens=int, documents=int, sha256=str, docs_sha256=str, crc_sha256=str)  # of META's splits
AGAIN = "prepare the corpus again with prepare_owt.py"
PAGE = 4096  # bytes of a .bin that have a checksum: a window is read with one or two pages, and 1 in 1,000 is added


def get_tokenizer(name):
    """'gpt2' or 'bytes', the 256 bytes and an end-of-text token, as a tiktoken.Encoding."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str="(?s).", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        mend = "set TIKTOKEN_CACHE_DIR to a folder that has them, or use --tokenizer=bytes"
        raise UserError(f"GPT-2's BPE files could not be fetched ({type(error).__name__}); {mend}") from error


def is_nanogpt(folder):
    """Whether a folder has nanoGPT's train.bin and val.bin, and is no corpus of prepare_owt.py."""
    names = ("train.bin", "val.bin", "train_docs.npy", "meta.json")
    return [os.path.isfile(os.path.join(folder, name)) for name in names] == [True, True, False, False]


def load_meta(folder):
    """meta.json of a corpus as a dict. Raises UserError where it is missing, damaged or of another kind."""
    data_dir, name = os.path.split(os.path.normpath(folder))
    mend = "there is no whole corpus; make it"
    flags = {"openwebtext": "", "python": " --source=python"}.get(name, f" --name={name} --source=<...>")
    if is_nanogpt(folder):
        mend, flags = "take nanoGPT's corpus over", f" --source={folder} --name={name}_with_test"
    flags += f" --data_dir={data_dir}" if data_dir != "data" else ""
    path = os.path.join(folder, "meta.json")
    with reading(path, f"{mend} with python prepare_owt.py{flags}"), open(path, encoding="utf-8") as file:
        meta = json.load(file)
        if meta["checksum"] != checksum_of(meta):
            raise ValueError("its checksum differs")
        for part, kinds in [(meta, META), *((meta["splits"][split], SPLIT) for split in SPLITS)]:
            for key, kind in kinds.items():
                if type(part[key]) is not kind:
                    raise ValueError(f"{key} = {part[key]!r:.80}, expected {kind.__name__}")
        if meta["tokenizer"] not in ("gpt2", "bytes") or {type(name) for name in meta["domains"]} != {str}:
            raise ValueError("an unknown tokenizer, or domains that are no names")
    return meta


def open_split(folder, split, meta):
    """The Tokens of a split. Raises UserError where a file is missing or of another length."""
    path, part = os.path.join(folder, f"{split}.bin"), meta["splits"][split]
    found, expected = os.path.getsize(path) if os.path.isfile(path) else 0, 2 * part["tokens"]
    check(found == expected, f"{path}: missing, truncated or of another corpus: {found} bytes, not {expected}; {AGAIN}")
    check_file(f"{path[:-4]}.crc", part["crc_sha256"])
    return Tokens(path)


def check_file(path, sha256):
    """Raise UserError unless the file has this sha256."""
    check(sha256_of(path) == sha256, f"{path}: missing, damaged or of another corpus; {AGAIN}")


def mapped(path, dtype):
    """The numbers of a file, mapped and not read."""
    n = os.path.getsize(path) // np.dtype(dtype).itemsize
    return np.memmap(path, dtype, "r", shape=(n,)) if n else np.empty(0, dtype)


class Tokens:
    """The uint16 tokens of a .bin, mapped; what is read of them, and nothing else, is compared with its checksums."""

    def __init__(self, path):
        self.path = path
        self.bytes, self.checksums = mapped(path, np.uint8), mapped(f"{path[:-4]}.crc", "<u4")
        if len(self.bytes):  # a window here, a window there: reading ahead would read megabytes for each
            self.bytes.base.madvise(mmap.MADV_RANDOM)

    def __len__(self):
        return len(self.bytes) // 2

    def windows(self, ids, block_size):
        """The tokens [i*T, i*T + T] of window i, (k,) -> (k, T + 1) uint16. Raises UserError where one is damaged."""
        self._check(ids * block_size, (ids + 1) * block_size)
        return self.bytes.view("<u2")[ids[:, None] * block_size + np.arange(block_size + 1)]

    def span(self, start, stop):
        """The tokens start to stop - 1, (stop - start,) uint16. Raises UserError where one is damaged."""
        self._check(np.array([start]), np.array([stop - 1]))
        return self.bytes.view("<u2")[start:stop]

    def _check(self, first, last):
        """Raise UserError if a token from first to last, (k,), both included, is on a damaged page."""
        first, last = 2 * first, 2 * last + 1  # in bytes
        for page in {page for a, b in zip(first // PAGE, last // PAGE, strict=True) for page in range(a, b + 1)}:
            if zlib.crc32(self.bytes[page * PAGE : (page + 1) * PAGE]) != self.checksums[page]:
                raise UserError(f"{self.path}: the bytes from {page * PAGE:,} on are damaged; {AGAIN}")


def count_windows(data, block_size):
    return max(0, (len(data) - 1) // block_size)


def window_domains(folder, split, ids, block_size, meta):
    """
    The domain of each window, (k,) indices into meta['domains']: the first of those with most of the tokens i*T ..
    i*T + T of window i. Memory follows the documents that these windows touch. Raises UserError where <split>_docs.npy
    does not fit meta.json.
    """
    path = os.path.join(folder, f"{split}_docs.npy")
    check_file(path, meta["splits"][split]["docs_sha256"])
    documents = np.load(path, mmap_mode="r", allow_pickle=False)
    ids = np.asarray(ids, dtype=np.int64)
    starts, n_domains = documents["start"], len(meta["domains"])
    first, last = _document_of(starts, ids * block_size), _document_of(starts, (ids + 1) * block_size)
    touched = last - first + 1
    window = np.repeat(np.arange(len(ids)), touched)  # one entry per window and document that it touches
    document = np.arange(len(window)) + np.repeat(first - (np.cumsum(touched) - touched), touched)
    begin = np.maximum(starts[document], ids[window] * block_size)
    end = (ids[window] + 1) * block_size + 1
    inner = document < last[window]  # it ends inside the window
    end[inner] = starts[document[inner] + 1]
    domain = documents["domain"][document]
    check(domain.max(initial=0) < n_domains, f"{path}: has more domains than meta.json; {AGAIN}")
    pairs, where = np.unique(window * n_domains + domain, return_inverse=True)
    tokens = np.bincount(where, weights=end - begin)
    window, domain = np.divmod(pairs, n_domains)
    order = np.lexsort((-tokens, window))  # stable: of equals, the first domain
    return domain[order][np.searchsorted(window, np.arange(len(ids)))]


def _document_of(starts, tokens):
    """searchsorted(starts, tokens, side='right') - 1; numpy's own copies the column, unaligned in its file, whole."""
    low, high = np.zeros_like(tokens), np.full_like(tokens, len(starts))
    for _ in range(len(starts).bit_length()):
        middle = (low + high) // 2
        before = starts[middle] <= tokens
        low, high = np.where(before, middle, low), np.where(before, high, middle)
    return low


def sha256_of(path):
    """The sha256 of a file, '' of none."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of(meta):
    """The sha256 of everything that meta.json says but the checksum."""
    said = {key: value for key, value in meta.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
