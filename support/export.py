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
        piece = slice(first, first + PIECE)
        ids = scored["sample_id"][piece]
        texts = [scored["encoding"].decode(window) for window in scored["tokens"].windows(ids, T).tolist()]
        domains = [scored["domains"][domain] for domain in scored["domain"][piece]]
        rows = dict(sample_id=ids, start=ids * T, end=ids * T + T + 1, text=texts, domain=domains)
        rows |= {key: scored[key][piece] for key in ("value", "visits", "error") if key in scored}
        yield rows | dict(kept=rows["value"] >= 0)


def document_rows(scored, T):
    """The documents with a scored token in pieces, each {column: its rows}; `visits` is the mean over such tokens."""
    tokens, documents, ids = scored["tokens"], scored["documents"], scored["sample_id"]
    bounds = np.append(documents["start"], len(tokens))
    edges = (ids[:, None] * T + [0, T]).ravel()  # the first and last token of each window
    amounts = dict(value=scored["value"], visits=scored["visits"] * T, scored_tokens=np.full_like(ids, T))
    sums = {}  # of the documents: that of the tokens grows evenly inside a scored window, and only there
    for key, amount in amounts.items():
        total = np.cumsum(np.stack([np.zeros_like(amount), amount], axis=1))
        sums[key] = np.diff(np.interp(bounds - 1, edges, total))
    touched = np.flatnonzero(sums["scored_tokens"])
    for first in range(0, len(touched), PIECE):
        some = touched[first : first + PIECE]
        start, end = bounds[some], bounds[some + 1]
        texts = [scored["encoding"].decode(tokens.span(*ends).tolist()) for ends in zip(start, end, strict=True)]
        texts = [text.removesuffix("<|endoftext|>") for text in texts]
        domains = [scored["domains"][domain] for domain in documents["domain"][some]]
        value, visits, scored_tokens = (sums[key][some] for key in amounts)
        rows = dict(document=some, start=start, end=end, text=texts, domain=domains, value=value)
        rows |= dict(visits=visits / scored_tokens, scored_tokens=scored_tokens.astype(int))
        yield rows | dict(kept=value >= 0)


def read_column(folder, column):
    """{value: (n,)} of a column of a scored run, with its standard error (n,) if that is known."""
    found = dict(value=load_values(folder, column)[1])
    with np.load(os.path.join(folder, "values.npz"), allow_pickle=False) as arrays:
        if "errors" in arrays:
            found["error"] = arrays["errors"][:, list(arrays["columns"]).index(column) if column else 0]
    return found


def export(file, path, by, scored, T):
    """Write the rows to the open binary file, as the ending of `path` says; returns how many, and how many are kept."""
    import pyarrow  # comes with `datasets`
    from pyarrow.parquet import ParquetWriter

    count, kept, writer = 0, 0, None
    with ExitStack() as stack:
        for rows in dict(window=window_rows, document=document_rows)[by](scored, T):
            table = pyarrow.table(rows)
            if path.endswith(".jsonl"):
                file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in table.to_pylist())
            else:
                writer = writer or stack.enter_context(ParquetWriter(file, table.schema))
                writer.write_table(table)
            count, kept = count + len(table), kept + int(rows["kept"].sum())
    return count, kept
