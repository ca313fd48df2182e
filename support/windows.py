"""
Which windows a run sees, and when.

Window i of a split is its tokens i*T to i*T + T, both included, T = block_size: x is the first T of them, y the last T.
The next window begins with the last one. The order is a pure function of (seed, stream, position): every epoch visits
each eligible window once, in an order that a keyed permutation computes on the fly, so that memory does not grow with
the corpus and the state of a run is one integer, its position.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from support.configurator import UserError
from support.corpus import count_windows, load_meta, open_split, window_domains
from support.values import load_values

TRAIN, VAL, TEST, DROP = range(4)  # streams: sequences that know nothing of each other


def mix(x):
    """
    Scramble uint64s, an array of at least one dimension: the finaliser of splitmix64 (Steele, Lea and Flood 2014,
    Fig. 16).
    """
    x = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_of(*numbers):
    """One uint64 out of several non-negative integers, as an int."""
    h = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        h = mix(h + np.uint64(number))
    return int(h[0])


def permute(index, n, key):
    """
    A keyed bijection of 0 .. n-1: index, key (k,) uint64 -> (k,) uint64. A Feistel network permutes the next power of
    four; what falls outside n is permuted again until it falls inside (cycle-walking: Black and Rogaway 2002, Sec.
    4).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    x = index.copy()
    outside = np.arange(len(x))
    while len(outside):
        left, right = x[outside] >> half, x[outside] & mask
        for round_ in range(6):
            left, right = right, left ^ (mix(mix(key[outside] + np.uint64(round_)) ^ right) & mask)
        x[outside] = left << half | right
        outside = outside[x[outside] >= n]
    return x


def dropped(ids, seed, share):
    """
    Which of the ids, (k,) int64, belong to the random `share` that this seed drops: (k,) bool, always the same
    ones.
    """
    return mix(ids.astype(np.uint64) + np.uint64(hash_of(seed, DROP))) < np.uint64(int(share * 2**64))


class WindowOrder:
    """
    The sequence of window ids of one stream. The windows are 0 .. n_windows-1 or the array `ids`; those in the sorted
    array `rejected`, and a random share `drop_random`, are passed over.
    """

    def __init__(self, n_windows, seed, stream, ids=None, rejected=None, drop_random=0.0):
        self.n = n_windows if ids is None else len(ids)
        self.seed, self.ids, self.rejected, self.drop_random = seed, ids, rejected, drop_random
        self.key = np.uint64(hash_of(seed, stream))

    def digest(self):
        """Of what decides, with seed and stream, which ids come at a position."""
        parts = (np.empty(0) if part is None else part for part in (self.ids, self.rejected))
        return hashlib.sha256(b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)).hexdigest()

    def at(self, position):
        """The ids at the positions (k,), those passed over included: (k,) int64."""
        epoch, index = np.divmod(position.astype(np.uint64), np.uint64(self.n))
        index = permute(index, self.n, mix(epoch + self.key)).astype(np.int64)
        return index if self.ids is None else self.ids[index]

    def accepts(self, ids):
        """Which of the ids (k,) are not passed over: (k,) bool."""
        ok = np.ones(len(ids), dtype=bool)
        if self.drop_random:
            ok &= ~dropped(ids, self.seed, self.drop_random)
        if self.rejected is not None and len(self.rejected):
            nearest = np.searchsorted(self.rejected, ids).clip(max=len(self.rejected) - 1)
            ok &= self.rejected[nearest] != ids
        return ok

    def take(self, position, count):
        """The next `count` ids from `position` on, (count,) int64, and the position behind them."""
        taken, start = np.empty(0, dtype=np.int64), position
        while len(taken) < count:
            if not len(taken) and position - start > 2 * self.n:
                raise UserError(
                    f"nothing is left to train on: drop_random = {self.drop_random} of {self.n:,}; lower it"
                )
            ids = self.at(position + np.arange(count))
            accepted = np.flatnonzero(self.accepts(ids))[: count - len(taken)]
            taken = np.concatenate([taken, ids[accepted]])
            position += int(accepted[-1]) + 1 if len(taken) == count else count
        return taken, position


def micro_batches(ids, batch_size, rank, world):
    """
    The share of rank `rank` of `world` in the global batch `ids`, (B,): a list of (number, ids (batch_size,)), the
    number counting the micro-batches of all ranks. Every rank has as many.
    """
    micro_steps = len(ids) // batch_size // world
    mine = range(rank * micro_steps, (rank + 1) * micro_steps)
    return [(n, ids[n * batch_size : (n + 1) * batch_size]) for n in mine]


def read_windows(data, ids, block_size, vocab_size, device):
    """
    The windows `ids`, (k,), of the Tokens `data` as (k, T + 1) int64 on the host, in memory from which a GPU `device`
    copies by itself. Raises UserError for a token id that the model has no embedding for.
    """
    windows = data.windows(ids, block_size)
    if windows.max(initial=0) >= vocab_size:
        found = f"token id {windows.max()} in window {ids[windows.max(1).argmax()]}"
        raise UserError(
            f"{data.path}: {found}, but vocab_size = {vocab_size}; prepare the corpus again or raise --vocab_size"
        )
    windows = torch.from_numpy(windows.astype(np.int64))
    return windows.pin_memory() if torch.device(device).type == "cuda" else windows


def to_device(windows, device):
    """(k, T + 1) on the host -> x, y, (k, T), on `device`; a copy to a GPU is not waited for."""
    windows = windows.to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]


def get_batch(data, ids, block_size, vocab_size, device):
    """The windows `ids`, (k,), of the Tokens `data`: x, y, (k, T) int64 on `device`; raises as read_windows does."""
    return to_device(read_windows(data, ids, block_size, vocab_size, device), device)


def drawn_ahead(draw, position, device):
    """
    A generator of draw(position), draw(the position that this returned), ...: a thread draws each one while the caller
    works with the one before. `draw` returns a tuple that begins with the next position. What it raises is raised when
    its turn comes. The thread ends when the generator is closed.
    """
    on_gpu = torch.device(device).type == "cuda"
    # a thread begins on the first GPU; set_device takes no 'cuda' without a number
    choose_gpu = (torch.cuda.set_device, (torch.device(device).index or 0,)) if on_gpu else ()
    with ThreadPoolExecutor(1, "loader", *choose_gpu) as thread:
        coming = thread.submit(draw, position)
        while True:
            drawn = coming.result()
            coming = thread.submit(draw, drawn[0])
            yield drawn


def load_corpus(knobs):
    """meta.json, the tokens and the number of windows of every split; raises UserError where a split has too few."""
    folder = os.path.join(knobs.data_dir, knobs.dataset)
    meta = load_meta(folder)
    data = {split: open_split(folder, split, meta) for split in ("train", "val", "test")}
    n_windows = {split: count_windows(tokens, knobs.block_size) for split, tokens in data.items()}
    B = knobs.batch_size * knobs.gradient_accumulation_steps
    for split, needed in dict(train=B, test=1).items():  # open_sets asks for val
        n = n_windows[split]
        if n < needed:
            flag = "batch_size or --gradient_accumulation_steps" if n else "block_size"
            found = f"{len(data[split])} tokens make {n} windows of {knobs.block_size}, and {needed} are needed"
            raise UserError(f"{folder}/{split}.bin: {found}; lower --{flag} or prepare a larger corpus")
    return meta, data, n_windows


def open_sets(knobs, meta, data, split, seed, stream):
    """
    {name: (its Tokens, the WindowOrder of its windows, its corpus's fingerprint)} of `split` of val_sets. Raises
    UserError for a set that is neither a domain nor a corpus, or has too few windows.
    """
    T, sets = knobs.block_size, {}
    folder = os.path.join(knobs.data_dir, knobs.dataset)
    needed = max(knobs.val_batch_size, knobs.val_windows) if split == "val" else 1
    domains = None  # of every window of the split, once one is asked for
    for name in knobs.val_sets.split(","):
        where, tokens, ids, fingerprint = folder, data[split], None, meta["fingerprint"]
        if name in meta["domains"] and name != "all":
            if domains is None:
                domains = window_domains(folder, split, np.arange(count_windows(tokens, T)), T, meta)
            ids = np.flatnonzero(domains == meta["domains"].index(name))
        elif name != "all":
            where = os.path.join(knobs.data_dir, name)
            if not os.path.isfile(os.path.join(where, "meta.json")):
                found = f"'{name}' is no corpus in {knobs.data_dir} and no domain of {knobs.dataset}"
                raise UserError(f"--val_sets={knobs.val_sets}: {found}; there are: all, {', '.join(meta['domains'])}")
            theirs = load_meta(where)
            if theirs["tokenizer"] != meta["tokenizer"]:
                found = f"'{name}' has the tokenizer {theirs['tokenizer']}, {knobs.dataset} has {meta['tokenizer']}"
                mend = f"prepare it with --tokenizer={meta['tokenizer']}"
                raise UserError(f"--val_sets={knobs.val_sets}: {found}; {mend}")
            tokens, fingerprint = open_split(where, split, theirs), theirs["fingerprint"]
        n = count_windows(tokens, T) if ids is None else len(ids)
        if n < needed:
            flag = "val_batch_size or --val_windows" if split == "val" else "block_size"
            found = f"'{name}' has {n} windows of {T} tokens, and {needed} are needed"
            raise UserError(f"{where}/{split}.bin: {found}; lower --{flag} or prepare a larger corpus")
        order = WindowOrder(n, seed, stream, ids)
        if split == "val" and knobs.val_windows:
            few, _ = order.take(0, knobs.val_windows)
            order = WindowOrder(len(few), seed, stream, few)
        sets[name] = tokens, order, fingerprint
    return sets


def open_test_sets(knobs, meta, data):
    """
    {name in metrics.jsonl: (its Tokens, the ids of its windows)} for the test split of the corpus and of every one of
    val_sets, the same windows for all runs, and {name of the set: its corpus's fingerprint}.
    """
    B = knobs.batch_size * knobs.gradient_accumulation_steps
    named = open_sets(knobs, meta, data, "test", 0, TEST)  # seed 0 whatever the run's
    orders = {"test_loss": (data["test"], WindowOrder(count_windows(data["test"], knobs.block_size), 0, TEST))}
    orders |= {f"test_loss_{name}": test_set for name, (*test_set, _) in named.items() if name != "all"}
    test_sets = {}
    for name, (tokens, order) in orders.items():
        n = min(order.n, knobs.eval_iters * B)  # however the batch is cut into micro-batches
        n -= n % B if n > B else 0  # full batches: torch.compile makes a graph for every shape
        test_sets[name] = tokens, order.take(0, n)[0]
    return test_sets, {name: fingerprint for name, (*_, fingerprint) in named.items()}


def load_filter(knobs, fingerprint, n_windows):
    """(sample_id, value) of the run that the filter goes by, checked to speak of this run's windows, or None."""
    if not knobs.filter_from:
        return None
    sample_id, value, _ = load_values(knobs.filter_from, knobs.filter_column)
    path = os.path.join(knobs.filter_from, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            scored = json.load(file)
        theirs = scored["knobs"]["dataset"], scored["knobs"]["block_size"], scored["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        mend = "--filter_from takes the folder of a run of train.py"
        raise UserError(f"{path}: missing or damaged ({type(error).__name__}); {mend}") from error
    dataset, block_size, their_fingerprint = theirs
    if their_fingerprint != fingerprint:
        raise UserError(
            f"--filter_from={knobs.filter_from}: valued another corpus, '{dataset}', than --dataset={knobs.dataset}"
        )
    if block_size != knobs.block_size:
        raise UserError(
            f"--filter_from={knobs.filter_from}: valued windows of {block_size} tokens; use --block_size={block_size}"
        )
    if sample_id.max(initial=0) >= n_windows:
        mend = "resume its run, --init_from=resume, to write it again"
        raise UserError(f"{knobs.filter_from}/values.npz: has windows that the corpus has not; {mend}")
    return sample_id, value


def training_order(n_windows, seed, filter_negative, filter_pool, drop_random, scored=None):
    """
    The training stream, and what it covers. `scored` is (sample_id, value) of the run that the filter goes by, or
    None.

    filter_pool 'scored' draws from the scored windows, 'all' from the whole corpus; with `filter_negative` those of
    negative value are rejected and the next of the sequence taken. Returns (order, coverage): coverage counts the
    windows in the corpus, scored, negative and eligible, and `touchable`, the share of draws that the filter can
    touch; None without `scored`. Raises UserError where nothing is eligible.
    """
    if scored is None:
        return WindowOrder(n_windows, seed, TRAIN, drop_random=drop_random), None
    sample_id, value = scored
    negative = sample_id[value < 0]
    if filter_pool == "scored":
        keep = ~dropped(sample_id, seed, drop_random)
        if filter_negative:
            keep &= value >= 0
        eligible, touchable = int(keep.sum()), 1.0
        order = WindowOrder(n_windows, seed, TRAIN, ids=sample_id[keep])
    else:
        rejected = negative if filter_negative else negative[:0]
        eligible = n_windows - len(rejected)
        touchable = len(sample_id) / n_windows
        if drop_random:  # every draw is tossed for, and counting who wins would take the whole corpus
            eligible, touchable = round(n_windows * (1 - drop_random)), 1.0
        order = WindowOrder(n_windows, seed, TRAIN, rejected=rejected, drop_random=drop_random)
    if eligible == 0:
        what = f"{len(negative)} of {len(sample_id)} scored windows are negative"
        mend = "score with a larger --val_batch_size, or let unscored windows in with --filter_pool=all"
        raise UserError(f"nothing is left to train on: {what}, drop_random = {drop_random}; {mend}")
    coverage = dict(
        corpus=n_windows, scored=len(sample_id), negative=len(negative), eligible=eligible, touchable=touchable
    )
    return order, coverage


class Windows:
    """
    The windows of a run: the order in which it trains, its validation and test sets, and the filter's coverage.
    `val_sets` is empty without `score`. Raises UserError where the corpus or the filter's source does not fit.
    """

    def __init__(self, knobs):
        self.knobs = knobs
        self.meta, self.data, self.n_windows = load_corpus(knobs)
        self.vocab_size = self.meta["vocab_size"]  # and then the model's: no token may be beyond its embedding
        scored = load_filter(knobs, self.meta["fingerprint"], self.n_windows["train"])
        filter_knobs = knobs.filter_negative, knobs.filter_pool, knobs.drop_random
        self.order, self.coverage = training_order(self.n_windows["train"], knobs.seed, *filter_knobs, scored)
        self.val_sets = open_sets(knobs, self.meta, self.data, "val", knobs.seed, VAL) if knobs.score else {}
        self.test_sets, self.fingerprints = open_test_sets(knobs, self.meta, self.data)

    def identity(self):
        """What a run and its resumption must share."""
        fingerprint = self.meta["fingerprint"]
        return dict(fingerprint=fingerprint, val_sets=self.fingerprints, order=self.order.digest())

    def batch(self, tokens, ids):
        """x, y, (k, T) on the device, of the windows `ids` of these Tokens."""
        return get_batch(tokens, ids, self.knobs.block_size, self.vocab_size, self.knobs.device)

    def validation(self, name, iter_num):
        """The Tokens of a validation set, and the ids (m,) of an iteration's windows."""
        tokens, order, _ = self.val_sets[name]
        ids, _ = order.take(iter_num * self.knobs.val_batch_size, self.knobs.val_batch_size)
        return tokens, ids

    def batches(self, position, ranks):
        """
        A generator of the iterations from `position` on: the position behind it, the ids (B,) of its windows, and
        [(number, (b, T + 1) on the host)] of the micro-batches of this rank.
        """
        knobs = self.knobs
        B = knobs.batch_size * knobs.gradient_accumulation_steps

        def draw(position):
            ids, position = self.order.take(position, B)
            how = knobs.block_size, self.vocab_size, knobs.device
            mine = micro_batches(ids, knobs.batch_size, ranks.rank, ranks.world)
            return position, ids, [(n, read_windows(self.data["train"], some, *how)) for n, some in mine]

        return drawn_ahead(draw, position, knobs.device)

    def describe(self, ranks):
        """Rank 0 prints what the run will see: its windows, and what share of them the filter can touch."""
        if ranks.rank > 0:
            return
        knobs, coverage = self.knobs, self.coverage
        tokens = knobs.batch_size * knobs.gradient_accumulation_steps * knobs.block_size
        print(f"{tokens:,} tokens an iteration; windows of {knobs.block_size} tokens: {self.n_windows}")
        if coverage:
            counts = "{corpus:,} windows in the corpus, {scored:,} scored, {negative:,} negative, {eligible:,} eligible"
            print(f"values of {knobs.filter_from}, pool '{knobs.filter_pool}': {counts.format(**coverage)};")
            print(f"the filter can touch {coverage['touchable']:.1%} of the draws")
            if coverage["touchable"] < 0.5:
                print("most draws are unscored windows that no filter can reject: expect little of it")
