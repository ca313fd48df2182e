"""
The windows that a run valued, or the documents that they were cut from, as a data set for another trainer.

Window i predicts the tokens i*T + 1 to i*T + T. Each of them has 1/T of its value, 0 if the window was not scored; a
document has the sum of its tokens' values.
"""

import json
import os
from contextlib import ExitStack

import numpy as np

from support.values import load_values

PIECE = 1024  # rows in memory at a time


def windows_of(scored, T):
    """{column: (n,)} of the scored windows."""
    start = scored["sample_id"] * T
    columns = dict(sample_id=scored["sample_id"], start=start, end=start + T + 1, domain=scored["domain"])
    return columns | {key: scored[key] for key in ("value", "visits", "error") if key in scored}


def documents_of(scored, T):
    """{column: (d,)} of the documents that have a scored token; `visits` is the mean over such tokens."""
    bounds = np.append(scored["documents"]["start"], len(scored["tokens"]))
    edges = (scored["sample_id"][:, None] * T + [0, T]).ravel()  # the first and last token of each window
    sums = dict(value=scored["value"], visits=scored["visits"] * T, tokens=np.full_like(scored["visits"], T))
    for key, amount in sums.items():  # (n,) of the windows, (D,) of the documents
        total = np.cumsum(np.stack([np.zeros_like(amount), amount], axis=1))
        sums[key] = np.diff(np.interp(bounds - 1, edges, total))  # it grows evenly inside a window, and only there
    some = np.flatnonzero(sums["tokens"])
    value, visits, tokens = (total[some] for total in sums.values())
    columns = dict(document=some, start=bounds[some], end=bounds[some + 1], domain=scored["documents"]["domain"][some])
    return columns | dict(value=value, visits=visits / tokens, scored_tokens=tokens.astype(int))


def read_column(folder, column):
    """{value: (n,)} of a column of a scored run, with its standard error (n,) if that is known."""
    _, value, _ = load_values(folder, column)
    with np.load(os.path.join(folder, "values.npz"), allow_pickle=False) as arrays:
        place = list(arrays["columns"]).index(column) if column else 0
        return dict(value=value) | (dict(error=arrays["errors"][:, place]) if "errors" in arrays else {})


def export(file, path, by, scored, T):
    """Write the rows to the open binary file, as the ending of `path` says: how many, and how many a filter keeps."""
    import pyarrow  # comes with `datasets`
    from pyarrow.parquet import ParquetWriter

    columns, writer = dict(window=windows_of, document=documents_of)[by](scored, T), None
    columns["kept"] = columns["value"] >= 0
    with ExitStack() as stack:
        for first in range(0, len(columns["kept"]), PIECE):
            rows = {key: column[first : first + PIECE] for key, column in columns.items()}
            spans = [scored["tokens"].span(*ends) for ends in zip(rows["start"], rows["end"], strict=True)]
            rows["domain"] = [scored["domains"][domain] for domain in rows["domain"]]
            rows["text"] = [scored["encoding"].decode(span.tolist()) for span in spans]
            if by == "document":
                rows["text"] = [text.removesuffix("<|endoftext|>") for text in rows["text"]]
            table = pyarrow.table(rows)
            if path.endswith(".jsonl"):
                file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in table.to_pylist())
            else:
                writer = writer or stack.enter_context(ParquetWriter(file, table.schema))
                writer.write_table(table)
    return len(columns["kept"]), int(columns["kept"].sum())
