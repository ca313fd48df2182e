"""
The windows that a run valued, or the documents that they were cut from, as a data set for another trainer.

Window i predicts the tokens i*T + 1 to i*T + T. Each of them has 1/T of the window's value, and a document has the sum
of its tokens' values. A token of a window that was not scored has none.
"""

import json
import os
from contextlib import ExitStack

import numpy as np

from support.values import load_values

PIECE = 1024  # rows in memory at a time


def window_rows(scored, T):
    """The scored windows in pieces, each {column: its rows}; tokens start to end - 1 of the split are the window."""
    for first in range(0, len(scored["sample_id"]), PIECE):
        some = {key: scored[key][first : first + PIECE] for key in ("sample_id", "domain", "value", "visits", "error")}
        start = some["sample_id"] * T
        texts = [text_of(window, scored["encoding"]) for window in scored["tokens"].windows(some["sample_id"], T)]
        domains = [scored["domains"][domain] for domain in some["domain"]]
        rows = dict(sample_id=some["sample_id"], start=start, end=start + T + 1, text=texts, domain=domains)
        rows |= dict(value=some["value"], visits=some["visits"], kept=some["value"] >= 0)
        yield rows | (dict(error=some["error"]) if len(some["error"]) else {})


def document_rows(scored, T):
    """The documents with a scored token in pieces, each {column: its rows}; `visits` is the mean over such tokens."""
    tokens, documents = scored["tokens"], scored["documents"]
    starts = np.append(documents["start"], len(tokens))
    sample_id = np.append(scored["sample_id"], -1)
    before = []  # how many scored windows, the last one in part, predict the tokens before each of the starts
    for some in np.array_split(starts - 1, len(starts) // 2**16 + 1):
        window, inside = np.divmod(some, T)
        place = np.searchsorted(sample_id[:-1], window)
        before.append(place + (sample_id[place] == window) * inside / T)
    before = np.concatenate(before)
    touched, count = np.flatnonzero(np.diff(before) > 0), np.arange(len(sample_id), dtype=float)
    sums = [np.append(0, np.cumsum(scored[key])) for key in ("value", "visits")]
    for first in range(0, len(touched), PIECE):
        some = touched[first : first + PIECE]
        low, high, start, end = before[some], before[some + 1], starts[some], starts[some + 1]
        value, visits = (np.interp(high, count, total) - np.interp(low, count, total) for total in sums)
        texts = [text_of(tokens.span(*ends), scored["encoding"]) for ends in zip(start, end, strict=True)]
        texts = [text.removesuffix("<|endoftext|>") for text in texts]
        domains = [scored["domains"][domain] for domain in documents["domain"][some]]
        rows = dict(document=some, start=start, end=end, text=texts, domain=domains, value=value)
        yield rows | dict(visits=visits / (high - low), scored_tokens=np.rint((high - low) * T), kept=value >= 0)


def text_of(tokens, encoding):
    """A window may cut a character: the replacement character stands for what is there of it."""
    return encoding.decode_bytes(tokens.tolist()).decode("utf-8", errors="replace")


def read_column(folder, column):
    """value (n,) of a column of a scored run and its standard error, (n,) or (0,) if unknown, as a dict."""
    _, value, _ = load_values(folder, column)
    with np.load(os.path.join(folder, "values.npz"), allow_pickle=False) as arrays:
        place = list(arrays["columns"]).index(column) if column else 0
        return dict(value=value, error=arrays["errors"][:, place] if "errors" in arrays else np.empty(0))


def export(file, path, by, scored, T):
    """Write the rows to the open binary file, as the ending of `path` says; returns how many, and how many are kept."""
    import pyarrow  # comes with `datasets`
    from pyarrow.parquet import ParquetWriter

    count, kept, writer = 0, 0, None
    with ExitStack() as stack:
        for piece in dict(window=window_rows, document=document_rows)[by](scored, T):
            table = pyarrow.table(piece)
            if path.endswith(".jsonl"):
                file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in table.to_pylist())
            else:
                writer = writer or stack.enter_context(ParquetWriter(file, table.schema))
                writer.write_table(table)
            count, kept = count + len(table), kept + int(piece["kept"].sum())
    return count, kept
