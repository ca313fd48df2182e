"""
Which windows a run sees, and when.

Window i of a split is its tokens i*T to i*T + T, both included, T = block_size: x is the first T of them, y the last T.
The last token of a window is the first of the next. The order is a pure function of (seed, stream, position). Every
epoch visits each eligible window once, in an order that a keyed permutation computes on the fly. So memory does not
grow with the corpus, and the state of a run is one integer, its position.
"""

import difflib
import glob
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch

from support.configurator import UserError, check, split_names
from support.corpus import count_windows, get_tokenizer, load_meta, open_split, window_domains
from support.files import reading
from support.values import load_values

TRAIN, VAL, TEST, DROP = range(4)  # streams: sequences that know nothing of each other


def mix(x):
    """Scramble an array of uint64s: the finaliser of splitmix64 (Steele, Lea and Flood 2014, Fig. 16)."""
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
    four; what falls outside n is permuted again until it falls inside (cycle-walking: Black and Rogaway 2002, Sec. 4).
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
    """Which of the ids, (k,) int64, are in the random `share` that this seed drops: (k,) bool, always the same."""
    return mix(ids.astype(np.uint64) + np.uint64(hash_of(seed, DROP))) < np.uint64(int(share * 2**64))


class WindowOrder:
    """
    The sequence of window ids of one stream. The windows are 0 .. n_windows-1 or the array `ids`; those in the sorted
    array `rejected`, and a random share `drop_random`, are passed over.
    """

    def __init__(self, n_windows, seed, stream, ids=None, rejected=(), drop_random=0.0):
        self.n = n_windows if ids is None else len(ids)
        self.seed, self.ids, self.drop_random = seed, ids, drop_random
        self.rejected = np.asarray(rejected, dtype=np.int64)
        self.key = np.uint64(hash_of(seed, stream))

    def digest(self):
        """Of what decides, with seed and stream, which ids come at a position."""
        parts = b"" if self.ids is None else self.ids.tobytes(), self.rejected.tobytes()
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def eligible(self):
        """How many windows are not passed over; the expected number where a random share is."""
        return round((self.n - len(self.rejected)) * (1 - self.drop_random))

    def at(self, position):
        """The ids at the positions (k,), those passed over included: (k,) int64."""
        epoch, index = np.divmod(position.astype(np.uint64), np.uint64(self.n))
        index = permute(index, self.n, mix(epoch + self.key)).astype(np.int64)
        return index if self.ids is None else self.ids[index]

    def accepts(self, ids):
        """Which of the ids (k,) are not passed over: (k,) bool."""
        ok = ~dropped(ids, self.seed, self.drop_random)
        if len(self.rejected):
            nearest = np.searchsorted(self.rejected, ids).clip(max=len(self.rejected) - 1)
            ok &= self.rejected[nearest] != ids
        return ok

    def take(self, position, count):
        """The next `count` ids from `position` on, (count,) int64, and the position behind them."""
        taken, start = np.empty(0, dtype=np.int64), position
        while len(taken) < count:
            nothing = not len(taken) and position - start > 2 * self.n
            check(not nothing, f"--drop_random={self.drop_random}: drops all of the {self.n:,} windows; lower it")
            ids = self.at(position + np.arange(count))
            accepted = np.flatnonzero(self.accepts(ids))[: count - len(taken)]
            taken = np.concatenate([taken, ids[accepted]])
            position += int(accepted[-1]) + 1 if len(taken) == count else count
        return taken, position


class PairedOrder(WindowOrder):
    """
    The sequence of the windows `ids` without those that an arm passes over. An epoch is one permutation of all `ids`,
    whatever the arm: slot p holds its window p, or, where the arm passes that over, the next one counted back from the
    epoch's end that it does not. So two arms of a seed have the same window in every slot that both accept. Memory is
    O(ids).
    """

    def __init__(self, seed, stream, ids, rejected=(), drop_random=0.0):
        super().__init__(len(ids), seed, stream, ids, rejected, drop_random)
        self.slots, self.epoch = int(self.accepts(ids).sum()), None

    def eligible(self):
        """How many windows are not passed over: an epoch's slots."""
        return self.slots

    def at(self, position):
        """The ids in the slots (k,) of the sequence, in rising order: (k,) int64."""
        epochs, slots = np.divmod(position, self.slots)
        return np.concatenate([self._windows(epoch)[slots[epochs == epoch]] for epoch in np.unique(epochs)])

    def _windows(self, epoch):
        """An epoch's windows, (slots,)."""
        if epoch != self.epoch:
            ids = super().at(epoch * self.n + np.arange(self.n))
            accepted = self.accepts(ids)
            self.windows, behind = np.split(ids, [self.slots])
            self.windows[~accepted[: self.slots]] = behind[accepted[self.slots :]][::-1]
            self.epoch = epoch
        return self.windows


def micro_batches(ids, batch_size, rank, world):
    """The micro-batches of `rank` in the global batch `ids`, (B,): a list of (number in the batch, (batch_size,))."""
    numbered = list(enumerate(ids.reshape(-1, batch_size)))
    share = len(numbered) // world
    return numbered[rank * share : (rank + 1) * share]


def get_batch(data, ids, block_size, vocab_size, device):
    """
    The windows `ids`, (k,), of the Tokens `data`: x, y, (k, T) int64 on `device`; a copy to a GPU is not waited for.
    Raises UserError for a token id that the model has no embedding for.
    """
    windows = data.windows(ids, block_size)
    highest = windows.max(initial=0)
    if highest >= vocab_size:
        found = f"token id {highest} in window {ids[windows.max(1).argmax()]}, but vocab_size = {vocab_size}"
        raise UserError(f"{data.path}: {found}; prepare the corpus again or raise --vocab_size")
    windows = torch.from_numpy(windows.astype(np.int64))
    if torch.device(device).type == "cuda":
        windows = windows.pin_memory()  # a GPU copies from there by itself
    windows = windows.to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]


def drawn_ahead(draw, position, device):
    """
    A generator of draw(position), draw(the position that this returned), ...: a thread draws each one while the caller
    works with the one before. `draw` returns a tuple that begins with the next position. What it raises is raised when
    its turn comes. The thread ends when the generator is closed.
    """
    # a thread begins on the first GPU; set_device takes no 'cuda' without a number
    choose_gpu = (torch.cuda.set_device, (torch.device(device).index or 0,)) if device.startswith("cuda") else ()
    with ThreadPoolExecutor(1, "loader", *choose_gpu) as thread:
        coming = thread.submit(draw, position)
        while True:
            drawn = coming.result()
            coming = thread.submit(draw, drawn[0])
            yield drawn


def other_corpus(knobs, meta, name):
    """The folder and meta.json of `name` in data_dir. Raises UserError for none, and for another tokenizer."""
    folder, ours = os.path.join(knobs.data_dir, name), meta["tokenizer"]
    if not os.path.isfile(f"{folder}/meta.json"):
        others = [os.path.dirname(path) for path in glob.glob("*/meta.json", root_dir=knobs.data_dir)]
        known = [known.replace(",", "\\,") for known in ("all", *meta["domains"], *others)]
        near = ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0))
        found = f"'{name}' is no corpus in {knobs.data_dir} and no domain of {knobs.dataset}"
        raise UserError(f"--val_sets={knobs.val_sets}: {found}; of {len(known):,} names the nearest are {near}")
    theirs = load_meta(folder)
    found = f"{folder}: has the tokenizer {theirs['tokenizer']}, {knobs.dataset} has {ours}"
    check(theirs["tokenizer"] == ours, f"{found}; prepare it with --tokenizer={ours}")
    return folder, theirs


def open_sets(knobs, meta, names, split, seed, stream):
    """
    {name: (its Tokens, the WindowOrder of its windows, its corpus's fingerprint)} of `split`: 'all' is the whole, other
    names are domains or corpora. Raises UserError for one that is neither, or has too few windows.
    """
    sets, T, B = {}, knobs.block_size, knobs.batch_size * knobs.gradient_accumulation_steps
    needed = dict(train=B, val=knobs.val_windows or knobs.val_batch_size, test=1)[split]
    smaller = dict(train="--batch_size, --gradient_accumulation_steps, ", val="--val_batch_size, --val_windows, ")
    domains = None  # of every window of the split, once one is asked for
    for name in names:
        own = os.path.join(knobs.data_dir, knobs.dataset), meta
        folder, theirs = own if name in ("all", *meta["domains"]) else other_corpus(knobs, meta, name)
        tokens, ids = open_split(folder, split, theirs), None
        n = count_windows(tokens, T)
        if name != "all" and name in meta["domains"]:
            if domains is None:
                domains = window_domains(folder, split, np.arange(n), T, meta)
            ids = np.flatnonzero(domains == meta["domains"].index(name))
        order = WindowOrder(n, seed, stream, ids)
        found = f"{tokens.path}: '{name}' has {order.n} windows of {T} tokens, and {needed} are needed"
        check(order.n >= needed, f"{found}; lower {smaller.get(split, '')}--block_size, or prepare a larger corpus")
        if split == "val" and knobs.val_windows:
            order = WindowOrder(needed, seed, stream, order.take(0, needed)[0])
        sets[name] = tokens, order, theirs["fingerprint"]
    return sets


def load_filter(knobs, fingerprint, n_windows):
    """(sample_id, value) of the run that the filter goes by, checked to speak of this run's windows, or None."""
    if not knobs.filter_from:
        return None
    sample_id, value, _ = load_values(knobs.filter_from, knobs.filter_column)
    path = os.path.join(knobs.filter_from, "config.json")
    with reading(path, "--filter_from takes the folder of a run of train.py"), open(path, encoding="utf-8") as file:
        config = json.load(file)
        theirs, dataset, T = config["fingerprint"], config["knobs"]["dataset"], config["knobs"]["block_size"]
    flag = f"--filter_from={knobs.filter_from}"
    check(theirs == fingerprint, f"{flag}: valued another corpus, '{dataset}', than --dataset={knobs.dataset}")
    check(T == knobs.block_size, f"{flag}: valued windows of {T} tokens; use --block_size={T}")
    beyond = f"{knobs.filter_from}/values.npz: has windows that the corpus has not"
    check(sample_id.max(initial=0) < n_windows, f"{beyond}; resume its run, --init_from=resume, to write it again")
    return sample_id, value


def training_order(n_windows, seed, filter_negative, filter_pool, drop_random, scored=None):
    """
    The training stream, and what it covers. `scored` is (sample_id, value) of the filter's run, or None. filter_pool
    'scored' draws from these windows, all arms in one order (PairedOrder); 'all' draws from the whole corpus and takes
    the next of the sequence for a rejected one. With `filter_negative` those of negative value are rejected. Returns
    (order, coverage): coverage counts the windows in the corpus, scored, negative and eligible, and has `touchable`,
    the share of draws that the filter can touch; None without `scored`. Raises UserError where nothing is eligible.
    """
    if scored is None:
        return WindowOrder(n_windows, seed, TRAIN, drop_random=drop_random), None
    sample_id, value = scored
    negative = sample_id[value < 0]
    passed_over = dict(rejected=negative if filter_negative else (), drop_random=drop_random)
    if filter_pool == "scored":
        order, touchable = PairedOrder(seed, TRAIN, sample_id, **passed_over), 1.0
    else:
        order = WindowOrder(n_windows, seed, TRAIN, **passed_over)
        touchable = 1.0 if drop_random else len(sample_id) / n_windows  # every draw is tossed for
    counts = dict(scored=len(sample_id), negative=len(negative), eligible=order.eligible())
    found = "{negative} of {scored} scored windows are negative".format(**counts)
    mend = "score with a larger --val_batch_size, or let unscored windows in with --filter_pool=all"
    check(order.eligible(), f"nothing is left to train on: {found}, drop_random = {drop_random}; {mend}")
    return order, dict(corpus=n_windows, **counts, touchable=touchable)


class Windows:
    """
    What a run sees: the Tokens `train`, their `order`, and the filter's `coverage`; the `val_sets` of open_sets, empty
    without `score`; `test_sets`, {name in metrics.jsonl: (Tokens, ids)}, the same windows in all runs. Raises UserError
    where the corpus, a set or the filter's source does not fit.
    """

    def __init__(self, knobs):
        self.knobs, self.B = knobs, knobs.batch_size * knobs.gradient_accumulation_steps
        self.meta = load_meta(os.path.join(knobs.data_dir, knobs.dataset))
        named = split_names(knobs.val_sets)
        names = [name if name in self.meta["domains"] else os.path.normpath(name) for name in named]  # not 'other/'
        self.vocab_size = self.meta["vocab_size"]  # and then the model's: no token may be beyond its embedding
        self.train, whole, fingerprint = open_sets(knobs, self.meta, ["all"], "train", knobs.seed, TRAIN)["all"]
        arm = knobs.filter_negative, knobs.filter_pool, knobs.drop_random, load_filter(knobs, fingerprint, whole.n)
        self.order, self.coverage = training_order(whole.n, knobs.seed, *arm)
        self.val_sets = open_sets(knobs, self.meta, names, "val", knobs.seed, VAL) if knobs.score else {}
        found = open_sets(knobs, self.meta, ["all", *names], "test", 0, TEST)  # seed 0 whatever the run's
        self.test_sets = {}
        for name, (tokens, order, _) in found.items():
            n = min(order.n, knobs.eval_iters * self.B)  # however the batch is cut into micro-batches
            n = n // self.B * self.B or n  # full batches: torch.compile makes a graph for every shape
            self.test_sets["test_loss" if name == "all" else f"test_loss_{name}"] = tokens, order.take(0, n)[0]
        sets = {name: found[name][2] for name in names}
        # what a run and its resumption must share
        self.identity = dict(fingerprint=fingerprint, val_sets=sets, order=self.order.digest())

    @cached_property
    def bytes_per_token(self):
        """
        {name in metrics.jsonl: mean bytes of the target tokens of its windows}: bits per byte = nats / ln 2 / these. An
        end-of-text token has no bytes, but its nats count. Empty where GPT-2's BPE files cannot be had.
        """
        try:
            encoding = get_tokenizer(self.meta["tokenizer"])
        except UserError:  # a machine without network trains all the same
            return {}
        lengths = torch.tensor([len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab)])
        lengths[encoding.eot_token], T, found = 0, self.knobs.block_size, {}
        for name, (tokens, ids) in self.test_sets.items():
            batches = np.array_split(ids, len(ids) // self.B + 1)  # no more than one in memory
            targets = (get_batch(tokens, some, T, encoding.n_vocab, "cpu")[1] for some in batches)
            found[name] = sum(lengths[y].sum().item() for y in targets) / (len(ids) * T)
        return found

    def batch(self, tokens, ids):
        """x, y, (k, T) on the device, of the windows `ids` of these Tokens."""
        return get_batch(tokens, ids, self.knobs.block_size, self.vocab_size, self.knobs.device)

    def validation(self, name, iter_num):
        """The Tokens of a validation set, and the ids (m,) of an iteration's windows."""
        tokens, order, _ = self.val_sets[name]
        return tokens, order.take(iter_num * self.knobs.val_batch_size, self.knobs.val_batch_size)[0]

    def batches(self, position, ranks):
        """
        A generator of the iterations from `position` on: the position behind it, the ids (B,) of its windows, and
        [(number, (x, y) on the device)] of the micro-batches of this rank.
        """

        def draw(position):
            ids, position = self.order.take(position, self.B)
            mine = micro_batches(ids, self.knobs.batch_size, ranks.rank, ranks.world)
            return position, ids, [(n, self.batch(self.train, some)) for n, some in mine]

        return drawn_ahead(draw, position, self.knobs.device)

    def describe(self, ranks):
        """Rank 0 prints what the run will see: its windows, and what share of them the filter can touch."""
        if ranks.rank > 0:
            return
        knobs, coverage = self.knobs, self.coverage
        draws, eligible = knobs.max_iters * self.B, max(1, self.order.eligible())
        print(f"{self.B * knobs.block_size:,} tokens an iteration, of {len(self.train):,} in the corpus")
        if coverage:
            counts = "{corpus:,} windows in the corpus, {scored:,} scored, {negative:,} negative, {eligible:,} eligible"
            print(f"values of {knobs.filter_from}, pool '{knobs.filter_pool}': {counts.format(**coverage)};")
            few = "; most draws are unscored windows: expect little of it" if coverage["touchable"] < 0.5 else ""
            print(f"the filter can touch {coverage['touchable']:.1%} of the draws{few}")
        if draws > eligible:
            print(f"{draws:,} draws of {eligible:,} windows: each is seen {draws / eligible:.1f} times")
