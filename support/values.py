"""
From dot products to nats: the log of dot products in a run's folder, and the values that it adds up to.

A run has one column of values for each kind of direction and validation set. With val_groups above 1 its name stands
several times among the log's directions, once for each group of validation windows.
"""

import glob
import os

import numpy as np
import torch

from support.configurator import check
from support.files import atomic_write, load_torch, reading

FORMAT = 1  # of a file of the log; those without a number are of the code before it was written, and read the same
LOG = dict(iter=(1, torch.int64), lr=(1, torch.float64), clip=(1, torch.float64))  # dimensions and types
LOG |= dict(sample_id=(2, torch.int64), dot_product=(3, torch.float32))


def write_log(out_dir, iter_num, entries, directions=("all:sgd",)):
    """
    Write the steps before `iter_num` that no earlier file holds to dot_prod/dot_prod_log_iter_<iter_num>.pt:
    `entries` is a list of {iter: int, lr: float, clip: scalar, sample_id: (B,) int64, dot_product: (B, K) float32},
    which become tensors of one more dimension, but dot_product (k, B) where K = 1; `directions` are the K names.
    """
    log = dict(format=FORMAT, directions=list(directions))
    for key, (_, dtype) in LOG.items():
        log[key] = torch.stack([torch.as_tensor(entry[key], dtype=dtype) for entry in entries]).cpu()
    log["dot_product"] = log["dot_product"].squeeze(2)
    with atomic_write(os.path.join(out_dir, "dot_prod", f"dot_prod_log_iter_{iter_num}.pt")) as file:
        torch.save(log, file)


def log_files(out_dir):
    """The paths of a run's dot-product log in order, as {iteration in the name: path}."""
    folder, prefix = os.path.join(out_dir, "dot_prod"), "dot_prod_log_iter_"
    numbers = [name[len(prefix) : -len(".pt")] for name in glob.glob(f"{prefix}*.pt", root_dir=folder)]
    numbers = sorted(int(n) for n in numbers if n.isdecimal())  # a copy 'dot_prod_log_iter_6 (1).pt' is no part of it
    return {n: os.path.join(folder, f"{prefix}{n}.pt") for n in numbers}


def read_log(out_dir):
    """
    A run's whole log as numpy arrays: iter, lr, clip (k,), sample_id (k, B), dot_product (k, B, K), the list of their
    K `directions`, the `scale` (k, 1) = lr * clip / B, and the value (k, B) = scale * dot_product in nats of the first
    column. Raises UserError where there is none, a file does not load, or an iteration is missing or there twice.
    """
    files, parts, anew = log_files(out_dir), [], "train it anew in another --out_dir"
    check(files, f"{out_dir}/dot_prod: no dot-product log there; make one with --score=True --out_dir={out_dir}")
    for path in files.values():
        part = load_torch(path, [*LOG, "directions"], anew)
        newer = f"{path}: its format is {part.get('format')}, this code knows {FORMAT}; read it with newer code"
        check(part.get("format", 0) <= FORMAT, newer)
        with reading(path, anew):
            shape = (*part["sample_id"].shape, len(part["directions"]))  # (k, B, K), B and K the same in all files
            part["dot_product"] = part["dot_product"].view(shape)
            parts.append(part)
            fits = all(part[key].shape == shape[:dims] for key, (dims, _) in LOG.items())
            fits &= part["directions"] == parts[0]["directions"] and shape[1] == parts[0]["sample_id"].shape[1]
            if not fits:
                raise ValueError("not a dot-product log, or of a run with another batch")
    log = {key: torch.cat([part[key] for part in parts]).numpy() for key in LOG}
    whole = np.array_equal(log["iter"], np.arange(len(log["iter"])))
    check(whole, f"{out_dir}/dot_prod: iterations are missing or there twice; {anew}")
    log["directions"] = parts[0]["directions"]
    log["scale"] = (log["lr"] * log["clip"] / log["sample_id"].shape[1])[:, None]
    first, *_ = columns_of(log["directions"]).values()
    log["value"] = log["scale"] * log["dot_product"][:, :, first].mean(2, dtype=np.float64)
    return log


def columns_of(directions):
    """{name: its places} for a list of names, in order of first appearance."""
    return {name: [i for i, other in enumerate(directions) if other == name] for name in dict.fromkeys(directions)}


def z_score(dots):
    """(k, B) less the mean of its row, over its standard deviation; 0 where there is none, as in a batch of one."""
    spread = dots.std(1, keepdims=True)
    return (dots - dots.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)


def write_values(out_dir, folder):
    """
    Add up a run's log to values.npz in `folder`: sample_id (n,) int64 in order, value (n,) float64 in nats, visits (n,)
    int64, and z_score (n,), the mean over visits of (value - mean of its batch) / standard deviation of its batch.
    `columns` (C,) names the columns. Of several, these are of the first, and values, z_scores (n, C) of all.
    Where there are groups of validation windows, errors (n, C) are the standard errors.
    """
    log = read_log(out_dir)
    sample_id, where, visits = np.unique(log["sample_id"], return_inverse=True, return_counts=True)

    def summed(by_visit):  # (k, B) -> (n,)
        return np.bincount(where.ravel(), weights=by_visit.ravel())

    groups, z_scores = [], []  # of each column (groups, n) and (n,)
    for places in columns_of(log["directions"]).values():
        dots = log["dot_product"][:, :, places]
        groups.append(np.stack([summed(log["scale"] * dots[:, :, group]) for group in range(len(places))]))
        z_scores.append(summed(z_score(dots.mean(2, dtype=np.float64))) / visits)
    values, z_scores = np.stack([group.mean(0) for group in groups], 1), np.stack(z_scores, 1)
    arrays = dict(sample_id=sample_id, value=values[:, 0], visits=visits, z_score=z_scores[:, 0])
    arrays["columns"] = np.array(list(columns_of(log["directions"])))
    if len(groups) > 1:
        arrays |= dict(values=values, z_scores=z_scores)
    if len(groups[0]) > 1:
        arrays["errors"] = np.stack([group.std(0, ddof=1) / len(group) ** 0.5 for group in groups], 1)
    with atomic_write(os.path.join(folder, "values.npz")) as file:
        np.savez(file, **arrays)


def load_values(out_dir, column="", key="value"):
    """
    (sample_id, value, visits) of a scored run, sorted by id; the value or, as `key` says, the z_score, of `column` or
    of the first one. Raises UserError where they are missing or damaged, or the run has no such column.
    """
    path = os.path.join(out_dir, "values.npz")
    mend = "a run with --score=True writes it when it ends; resume it, --init_from=resume"
    with reading(path, mend), np.load(path, allow_pickle=False) as arrays:  # which compares arrays with their CRC-32
        sample_id, value, visits = arrays["sample_id"], arrays[key], arrays["visits"]
        columns = list(arrays["columns"]) if "columns" in arrays else []
        if column in columns[1:]:
            value = arrays[f"{key}s"][:, columns.index(column)]
        fits = sample_id.shape == value.shape == visits.shape == (sample_id.size,) and np.isfinite(value).all()
        if not fits or sample_id.dtype != np.int64 or (np.diff(sample_id, prepend=-1) <= 0).any():
            raise ValueError("ids that are not in order, or values that are not finite or of another number")
    check(not column or column in columns, f"{path}: has no column '{column}', only {', '.join(columns)}")
    return sample_id, value, visits
