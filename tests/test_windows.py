"""The order of the windows: every eligible one once an epoch, wherever one starts, whatever is rejected."""

import json
import threading
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import TINY, call, corpus, home  # noqa: F401 (fixtures)

import prepare_owt
import train
from prepare_owt import write_checksums
from support import windows
from support.configurator import UserError, configure
from support.corpus import PAGE, Tokens, count_windows, get_tokenizer, load_meta, open_split, sha256_of
from support.processes import Ranks
from support.windows import (
    TEST,
    TRAIN,
    VAL,
    WindowOrder,
    Windows,
    drawn_ahead,
    get_batch,
    micro_batches,
    permute,
    training_order,
)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n, key):
    index = np.arange(n, dtype=np.uint64)
    assert np.array_equal(np.sort(permute(index, n, np.full(n, key, dtype=np.uint64))), index)


def test_permutations_look_random_and_differ():
    n = 1000
    index = np.arange(n, dtype=np.uint64)
    a, b = (permute(index, n, np.full(n, key, dtype=np.uint64)).astype(float) for key in (1, 2))
    for x, y in ((index.astype(float), a), (a, b), (a[1:], a[:-1])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.1


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 200),
    seed=st.integers(0, 2**63 - 1),
    share=st.sampled_from([0.0, 0.3]),
    reject=st.integers(0, 100),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=12),
)
def test_every_eligible_window_once_an_epoch_and_resumable_anywhere(n, seed, share, reject, sizes):
    rejected = np.sort(np.random.default_rng(reject).permutation(n)[: n * reject // 101])
    order = WindowOrder(n, seed, TRAIN, rejected=rejected, drop_random=share)
    eligible = np.flatnonzero(order.accepts(np.arange(n)))
    if len(eligible) == 0:
        return
    stream, _ = order.take(0, 3 * len(eligible))
    for epoch in range(3):
        assert np.array_equal(np.sort(stream[epoch * len(eligible) :][: len(eligible)]), eligible)
    pieces, position = [], 0
    for size in sizes:  # in pieces, each from the position that the last one left
        ids, position = WindowOrder(n, seed, TRAIN, rejected=rejected, drop_random=share).take(position, size)
        pieces.append(ids)
    whole, end = order.take(0, sum(sizes))
    assert np.array_equal(np.concatenate(pieces), whole) and end == position


def test_streams_seeds_and_epochs_differ():
    orders = [WindowOrder(500, seed, stream) for seed in (1, 2) for stream in (TRAIN, VAL, TEST)]
    taken = [tuple(order.take(0, 500)[0]) for order in orders] + [tuple(orders[0].take(500, 500)[0])]
    assert len(set(taken)) == 7


def scored(n=100, negatives=30):
    sample_id = np.arange(0, 3 * n, 3)
    value = np.ones(n)
    value[np.random.default_rng(0).permutation(n)[:negatives]] = -1.0
    return sample_id, value


def test_the_scored_pool_and_its_filter():
    sample_id, value = scored()
    control, coverage = training_order(1000, 5, False, "scored", 0.0, (sample_id, value))
    assert sorted(control.take(0, 100)[0]) == sample_id.tolist()
    assert coverage == dict(corpus=1000, scored=100, negative=30, eligible=100, touchable=1.0)
    filtered, coverage = training_order(1000, 5, True, "scored", 0.0, (sample_id, value))
    assert sorted(filtered.take(0, 70)[0]) == sample_id[value >= 0].tolist()
    assert coverage["eligible"] == 70


@settings(max_examples=30, deadline=None)
@given(n=st.integers(20, 300), seed=st.integers(0, 2**63 - 1), share=st.floats(0, 0.8), start=st.integers(0, 600))
def test_all_arms_of_a_seed_have_the_same_window_in_every_slot_that_they_accept(n, seed, share, start):
    rng = np.random.default_rng(seed)
    sample_id = np.sort(rng.choice(10 * n, n, replace=False))
    value = np.where(rng.permutation(n) < int(share * n), -1.0, 1.0)
    arms = dict(control=(False, "scored", 0.0), filtered=(True, "scored", 0.0), random=(False, "scored", share))
    for name, arm in arms.items():
        try:
            order, _ = training_order(10 * n, seed, *arm, (sample_id, value))
        except UserError:  # a random drop may drop all of a few windows
            continue
        accepted, slots = set(sample_id[order.accepts(sample_id)]), order.eligible()
        # the twin: one slot after the other, of one permutation of all scored windows an epoch
        expected = []
        for epoch in range((start + 3 * n) // slots + 1):
            windows = WindowOrder(n, seed, TRAIN, ids=sample_id).take(epoch * n, n)[0].tolist()
            spare = [window for window in windows if window in accepted]
            expected += [window if window in accepted else spare.pop() for window in windows[:slots]]
        assert slots == len(accepted) and order.take(start, 3 * n)[0].tolist() == expected[start : start + 3 * n], name


def test_the_whole_corpus_as_the_pool():
    sample_id, value = scored()
    order, coverage = training_order(1000, 5, True, "all", 0.0, (sample_id, value))
    assert sorted(order.take(0, 970)[0]) == sorted(set(range(1000)) - set(sample_id[value < 0]))
    assert coverage == dict(corpus=1000, scored=100, negative=30, eligible=970, touchable=0.1)


@pytest.mark.parametrize("pool, n", [("scored", 5000), ("all", 20000)])
def test_a_random_drop_of_a_share(pool, n):
    order, coverage = training_order(20000, 3, False, pool, 0.25, scored(5000))
    kept = set(order.take(0, 2 * n)[0])  # more than an epoch
    assert len(kept) == pytest.approx(0.75 * n, rel=0.04) and coverage["eligible"] == pytest.approx(0.75 * n, rel=0.03)
    again, _ = training_order(20000, 3, False, pool, 0.25, scored(5000))
    assert np.array_equal(again.take(0, 99)[0], order.take(0, 99)[0])


def test_nothing_left_is_refused():
    sample_id, value = scored(100, 100)
    for pool, n in (("scored", 1000), ("all", 100)):
        ids = sample_id if pool == "scored" else np.arange(100)
        with pytest.raises(SystemExit, match="100 of 100 scored windows are negative"):
            training_order(n, 0, True, pool, 0.0, (ids, value))


def test_memory_does_not_follow_the_corpus():
    n = 10**9
    rejected = np.arange(0, n, 10**5)
    tracemalloc.start()
    order = WindowOrder(n, 0, TRAIN, rejected=rejected)
    ids, _ = order.take(0, 4096)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    assert len(set(ids)) == 4096 and ids.max() < n and ids.min() >= 0
    assert np.histogram(ids, bins=8, range=(0, n))[0].min() > 400  # 512 expected in each eighth


def test_a_batch_is_its_windows(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50, 101).astype("<u2")
    tokens.tofile(tmp_path / "x.bin")
    write_checksums(tmp_path / "x.bin", tmp_path / "x.crc")
    data = Tokens(str(tmp_path / "x.bin"))
    assert len(data) == 101
    assert count_windows(data, 10) == 10 and count_windows(tokens[:100], 10) == 9 and count_windows([], 10) == 0
    x, y = get_batch(data, np.array([9, 0, 3]), 10, 50, "cpu")
    assert x.dtype == torch.int64 and x.shape == (3, 10)
    for row, i in enumerate((9, 0, 3)):
        assert x[row].tolist() == tokens[i * 10 : i * 10 + 10].tolist()
        assert y[row].tolist() == tokens[i * 10 + 1 : i * 10 + 11].tolist()
    with pytest.raises(SystemExit, match=r"x.bin: token id \d+ in window 9, but vocab_size = 2"):
        get_batch(data, np.array([9]), 10, 2, "cpu")


def test_a_billion_windows_on_a_sparse_file(tmp_path):
    """Start-up and batches neither read nor map out the corpus; -s prints what they cost (never asserted)."""
    n, T, B = 10**9, 128, 32
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(2 * (n * T + 1))
    with open(tmp_path / "train.crc", "wb") as file:
        for _ in range(1000):
            np.full(-(-2 * n * T // PAGE) // 1000, zlib.crc32(bytes(PAGE)), dtype="<u4").tofile(file)
        np.array([zlib.crc32(bytes(2))], dtype="<u4").tofile(file)
    train = dict(tokens=n * T + 1, crc_sha256=sha256_of(tmp_path / "train.crc"))
    sample_id = np.arange(0, n, 1000)
    value = np.random.default_rng(0).normal(size=len(sample_id)) + 1
    tracemalloc.start()
    started = time.perf_counter()
    data = open_split(str(tmp_path), "train", dict(splits=dict(train=train)))
    orders = {
        pool: training_order(count_windows(data, T), 0, True, pool, 0.0, (sample_id, value))[0]
        for pool in ("scored", "all")
    }
    started = time.perf_counter() - started
    assert tracemalloc.get_traced_memory()[1] < 30 * len(sample_id)  # bytes
    tracemalloc.stop()
    for pool, order in orders.items():
        position, times = 0, []
        for _ in range(50):
            start = time.perf_counter()
            ids, position = order.take(position, B)
            x, _ = get_batch(data, ids, T, 257, "cpu")
            times.append(time.perf_counter() - start)
        assert x.shape == (B, T) and not np.isin(ids, sample_id[value < 0]).any()
        print(f"\n{pool}: start-up {started:.2f} s, a batch of {B} x {T} {1000 * np.median(times):.2f} ms", end="")


def windows_of(flags):
    """The windows that `train.py <flags>` sees."""
    return Windows(configure(train.Knobs, f"{TINY} {flags}".split()))


def test_a_run_says_how_often_it_will_see_the_windows_that_are_left(home, capsys):  # noqa: F811
    windows_of("").describe(Ranks())
    assert "each is seen" not in capsys.readouterr().out  # 32 draws of 620 windows
    value = np.where(np.arange(30) < 10, -1.0, 1.0)
    np.savez("values.npz", sample_id=np.arange(30), value=value, visits=np.ones(30, dtype=np.int64))
    scored = dict(fingerprint=load_meta("data/tiny")["fingerprint"], knobs=dict(dataset="tiny", block_size=16))
    (home / "config.json").write_text(json.dumps(scored))
    windows_of("--filter_from=. --filter_negative=True").describe(Ranks())
    assert "32 draws of 20 windows: each is seen 1.6 times" in capsys.readouterr().out
    windows_of("--max_iters=1000 --batch_size=31").describe(Ranks())
    assert "31,000 draws of 620 windows: each is seen 50.0 times" in capsys.readouterr().out
    windows_of("--max_iters=31 --batch_size=20 --drop_random=0.5").describe(Ranks())
    assert "620 draws of 310 windows: each is seen 2.0 times" in capsys.readouterr().out


def prepare(folder, domains):
    """A corpus 'many' in `folder`/data, of 1,000 documents or one of each domain."""
    with open(f"{folder}/many.jsonl", "w", encoding="utf-8") as file:
        for i in range(max(len(domains), 1000)):
            text = f"{i} {domains[i % len(domains)]} {'abcde' * 8}"
            file.write(json.dumps(dict(text=text, domain=domains[i % len(domains)])) + "\n")
    flags = f"--source={folder}/many.jsonl --domain_field=domain --tokenizer=bytes --data_dir={folder}/data"
    call(prepare_owt.main, f"{flags} --val_fraction=0.3 --test_fraction=0.3")


def test_a_domain_with_a_comma_is_chosen_with_a_backslash(tmp_path):
    prepare(tmp_path, ["Books, fiction", "Books", "a\\b", "x,y,z", "Straße [1]"])
    knobs = configure(train.Knobs, [*TINY.split(), "--dataset=many", f"--data_dir={tmp_path}/data", "--score=True"])
    knobs.val_sets = r"Books\, fiction,all,Books,a\b,x\,y\,z,Straße [1]"
    seen = Windows(knobs)
    assert list(seen.val_sets) == ["Books, fiction", "all", "Books", "a\\b", "x,y,z", "Straße [1]"]
    assert list(seen.test_sets)[:3] == ["test_loss", "test_loss_Books, fiction", "test_loss_Books"]
    tokens, ids = seen.test_sets["test_loss_Books, fiction"]
    text = bytes(tokens.windows(ids, 16).clip(max=255).astype(np.uint8).ravel())
    assert text.count(b"Books, fi") > text.count(b"x,y,z")
    knobs.val_sets = "Books, fiction"
    with pytest.raises(
        UserError, match=r"' fiction' is no corpus in .*; of 7 names the nearest are Books\\, fiction, "
    ):
        Windows(knobs)


def test_an_unknown_set_among_ten_thousand_domains_is_told_in_a_short_line(tmp_path):
    prepare(tmp_path, [f"site-{i}.example.org" for i in range(10_000)])
    with pytest.raises(UserError, match="'site-77.exmaple.org' is no .*of 10,002 names.* site-77.example.org") as error:
        windows_of(f"--dataset=many --data_dir={tmp_path}/data --val_sets=site-77.exmaple.org")
    assert len(str(error.value)) < 500


def test_bits_per_byte_count_the_bytes_of_the_targets_of_each_test_set(home, monkeypatch):  # noqa: F811
    """Of a tokenizer with tokens of one and two bytes; an end-of-text token has none."""
    ranks = {bytes([i]): i for i in range(256)} | {b"e": 257, b"th": ord("e")}
    encoding = tiktoken.Encoding(
        "pairs", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    for tokenizer in (get_tokenizer("bytes"), encoding):
        monkeypatch.setattr(windows, "get_tokenizer", lambda name, tokenizer=tokenizer: tokenizer)
        seen = windows_of("--val_sets=odd --eval_iters=1000")
        assert list(seen.bytes_per_token) == ["test_loss", "test_loss_odd"]
        for name, (tokens, ids) in seen.test_sets.items():
            targets = [token for window in tokens.windows(ids, 16).tolist() for token in window[1:]]
            pieces = [b"" if token == 256 else tokenizer.decode_single_token_bytes(token) for token in targets]
            assert seen.bytes_per_token[name] == pytest.approx(len(b"".join(pieces)) / len(targets))
            assert 256 in targets and max(map(len, pieces)) == (1 if tokenizer.n_vocab == 257 else 2)


def test_without_the_tokenizer_s_files_a_run_has_no_bits_per_byte_and_trains(home, monkeypatch):  # noqa: F811
    def offline(name):
        raise UserError("GPT-2's BPE files could not be fetched")

    monkeypatch.setattr(windows, "get_tokenizer", offline)
    assert windows_of("").bytes_per_token == {}
    call(train.main, f"{TINY} --max_iters=3 --out_dir=out/x")


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(8, 200),
    seed=st.integers(0, 2**63 - 1),
    kept=st.integers(1, 100),
    batch_size=st.integers(1, 5),
    micro_steps=st.integers(1, 3),
    cuts=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 4])), min_size=1, max_size=5),
)
def test_ranks_share_every_batch_whatever_their_number_and_wherever_a_run_was_resumed(
    n, seed, kept, batch_size, micro_steps, cuts
):
    """As train.py draws: in `cuts`, pieces of so many iterations on so many ranks, from where the last one ended."""
    sample_id = np.sort(np.random.default_rng(kept).permutation(10 * n)[: max(1, n * kept // 100)])
    value = np.where(sample_id % 3 == 0, -1.0, 1.0)
    value[0] = 1.0
    B, position, seen = batch_size * micro_steps * 4, 0, []
    for iterations, world in cuts:
        order, _ = training_order(10 * n, seed, True, "scored", 0.0, (sample_id, value))
        for _ in range(iterations):
            ids, position = order.take(position, B)
            parts = [micro_batches(ids, batch_size, rank, world) for rank in range(world)]
            assert {len(part) for part in parts} == {micro_steps * 4 // world}
            flat = [pair for part in parts for pair in part]
            assert [number for number, _ in flat] == list(range(micro_steps * 4))
            assert np.array_equal(np.concatenate([part_ids for _, part_ids in flat]), ids)
            seen.append(ids)
    seen, eligible = np.concatenate(seen), sample_id[value >= 0]
    for epoch in range(len(seen) // len(eligible)):
        assert np.array_equal(np.sort(seen[epoch * len(eligible) :][: len(eligible)]), eligible)


# ---------------------------------------------------------------------------------------------------------------------
# The thread that draws ahead


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_the_next_batch_is_drawn_while_the_caller_works_with_this_one():
    drawn, released = [], threading.Event()

    def draw(position):
        if position == 2:
            assert released.wait(10)  # the caller has the batch of position 1 and goes on
        drawn.append(position)
        return position + 1, f"batch {position}"

    batches = drawn_ahead(draw, 0, "cpu")
    assert [next(batches), next(batches)] == [(1, "batch 0"), (2, "batch 1")]
    assert drawn == [0, 1]
    released.set()
    assert next(batches) == (3, "batch 2")
    batches.close()
    assert drawn in ([0, 1, 2], [0, 1, 2, 3]) and not loader_threads()


def test_what_the_thread_raises_is_raised_when_its_turn_comes_and_ends_it():
    def draw(position):
        if position == 1:
            raise UserError("window 7 is damaged")
        return position + 1, None

    batches = drawn_ahead(draw, 0, "cpu")
    next(batches)
    assert loader_threads()
    with pytest.raises(UserError, match="window 7"):
        next(batches)
    assert not loader_threads()
