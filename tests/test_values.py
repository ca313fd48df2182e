"""What the values mean: efficiency, the Adam direction, and the log that they are added up from."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_value import attach_directions, set_direction, validation_gradient
from model import GPT, GPTConfig
from support.values import load_values, log_files, read_log, write_log, write_values

V, T = 17, 8


def small_model(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=16)).double()


def structured(B):
    """Windows with something to learn: counting upwards from a random start."""
    start = torch.randint(V, (B, 1))
    windows = (start + torch.arange(T + 1)) % V
    return windows[:, :-1], windows[:, 1:]


def sum_of_values_and_realised_drop(lr, steps, micro_steps=2):
    """Plain SGD on fresh batches, with fixed validation windows."""
    model = small_model()
    x_val, y_val = structured(5)
    buffers = attach_directions(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with torch.no_grad():
        first = model(x_val, y_val)[1].item()
    total = 0.0
    for _ in range(steps):
        set_direction(buffers, validation_gradient(model, x_val, y_val)[0])
        for _ in range(micro_steps):
            x, y = structured(4)
            alpha = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
            (model(x, y, alpha)[1] / micro_steps).backward()
            B = 4 * micro_steps
            total += (lr / B * (alpha.grad * B)).sum().item()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return total, first - model(x_val, y_val)[1].item()


def test_efficiency_the_values_add_up_to_the_realised_drop():
    """The gap is second order: over the same distance lr * steps it shrinks as lr does, and stays below 15 lr."""
    gaps = []
    for lr, steps in ((0.01, 75), (0.005, 150), (0.0025, 300)):
        total, realised = sum_of_values_and_realised_drop(lr, steps)
        assert realised > 0.5  # nats: something was learnt, so that the comparison means something
        gaps.append(abs(total - realised) / realised)
        assert gaps[-1] < 15 * lr, gaps
    assert gaps[1] < gaps[0] / 1.6 and gaps[2] < gaps[1] / 1.6, gaps


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_adam_direction_against_its_formula(steps):
    model = small_model()
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    optimizer = model.configure_optimizers("adamw", 0.1, 1e-2, (beta1, beta2))
    second_moment = {p: torch.zeros_like(p) for p in model.parameters()}
    for _ in range(steps):
        x, y = structured(4)
        model(x, y)[1].backward()
        for p in model.parameters():
            second_moment[p] = beta2 * second_moment[p] + (1 - beta2) * p.grad**2
        optimizer.step()
        optimizer.zero_grad()
    buffers = attach_directions(model)
    gradient, _ = validation_gradient(model, *structured(3))
    set_direction(buffers, gradient, optimizer)
    for p, g in gradient.items():
        # rtol: AdamW counts its steps in float32
        v = (beta2 * second_moment[p] + (1 - beta2) * g**2) / (1 - beta2 ** (steps + 1))
        torch.testing.assert_close(buffers[p][0], g / (v.sqrt() + eps), rtol=1e-6, atol=1e-12)
        assert buffers[p].abs().max() <= (1 / (1 - beta2)) ** 0.5  # an empty state would give up to |g| / eps


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_values_are_summed_over_visits(tmp_path_factory, seed, B, files):
    out_dir = str(tmp_path_factory.mktemp("run"))
    rng, oracle, visits, n = np.random.default_rng(seed), {}, {}, 0
    z_scores = {}
    for k in files:
        entries = []
        for _ in range(k):
            ids, dots = rng.integers(0, 8, B), torch.tensor(rng.normal(size=B), dtype=torch.float32)
            lr, clip = rng.random(), torch.tensor(rng.random(), dtype=torch.float32)
            entries.append(dict(iter=n, lr=lr, clip=clip, sample_id=ids, dot_product=dots[:, None]))
            exact = dots.double()
            z = torch.zeros(1, dtype=exact.dtype) if B == 1 else (exact - exact.mean()) / exact.std(correction=0)
            for i, one in zip(ids, z.tolist(), strict=True):
                z_scores.setdefault(i, []).append(one)
            for i, dot in zip(ids, dots.tolist(), strict=True):
                oracle[i] = oracle.get(i, 0.0) + lr * clip.item() / B * dot
                visits[i] = visits.get(i, 0) + 1
            n += 1
        write_log(out_dir, n, entries)
    write_values(out_dir, out_dir)
    sample_id, value, count = load_values(out_dir)
    assert sample_id.tolist() == sorted(oracle)
    np.testing.assert_allclose(value, [oracle[i] for i in sample_id], rtol=1e-12, atol=1e-15)
    assert count.tolist() == [visits[i] for i in sample_id]
    z_score = load_values(out_dir, key="z_score")[1]
    np.testing.assert_allclose(z_score, [np.mean(z_scores[i]) for i in sample_id], rtol=1e-9, atol=1e-9)
    assert read_log(out_dir)["iter"].tolist() == list(range(n))


def entry(n, B=2):
    return dict(iter=n, lr=0.1, clip=1.0, sample_id=np.arange(B), dot_product=torch.ones(B, 1))


def test_a_gap_or_a_repetition_in_the_log_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no dot-product log"):
        read_log(str(tmp_path))
    write_log(str(tmp_path), 2, [entry(0), entry(1)])
    write_log(str(tmp_path), 4, [entry(3)])
    with pytest.raises(SystemExit, match="missing or there twice"):
        read_log(str(tmp_path))
    write_log(str(tmp_path), 4, [entry(1), entry(2), entry(3)])
    with pytest.raises(SystemExit, match="missing or there twice"):
        read_log(str(tmp_path))
    write_log(str(tmp_path), 4, [entry(2), entry(3)])
    assert len(read_log(str(tmp_path))["iter"]) == 4


def test_a_folder_may_have_any_name_and_a_copy_of_a_file_is_no_part_of_the_log(tmp_path):
    out_dir = str(tmp_path / "my [v2] *?, ß")
    write_log(out_dir, 2, [entry(0), entry(1)])
    for copy in ("dot_prod_log_iter_2 (1).pt", "dot_prod_log_iter_.pt", "dot_prod_log_iter_2.pt~"):
        shutil.copy(f"{out_dir}/dot_prod/dot_prod_log_iter_2.pt", f"{out_dir}/dot_prod/{copy}")
    assert list(log_files(out_dir)) == [2] and len(read_log(out_dir)["iter"]) == 2
    write_values(out_dir, out_dir)
    assert load_values(out_dir)[2].tolist() == [2, 2]


@pytest.mark.parametrize(
    "changed",
    [
        dict(value=[1.0, np.nan]),
        dict(value=[1.0]),
        dict(sample_id=[1, 0]),
        dict(sample_id=[0, 0]),
        dict(sample_id=[-1, 0]),
        dict(sample_id=[0.0, 1.0]),
        dict(visits=1),
    ],
)
def test_values_that_do_not_fit_are_refused_with_their_mend(tmp_path, changed):
    arrays = dict(sample_id=[0, 1], value=[1.0, 2.0], visits=[1, 1])
    np.savez(tmp_path / "values.npz", **arrays)
    assert load_values(str(tmp_path))[1].tolist() == [1.0, 2.0]
    np.savez(tmp_path / "values.npz", **arrays | changed)
    with pytest.raises(SystemExit, match="values.npz: damaged.*--init_from=resume"):
        load_values(str(tmp_path))


def test_a_damaged_log_or_values_file_is_named(tmp_path):
    write_log(str(tmp_path), 1, [entry(0)])
    path = tmp_path / "dot_prod" / "dot_prod_log_iter_1.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SystemExit, match="dot_prod_log_iter_1.pt"):
        read_log(str(tmp_path))
    torch.save({"iter": torch.zeros(1)}, path)
    with pytest.raises(SystemExit, match="dot_prod_log_iter_1.pt"):
        read_log(str(tmp_path))
    with pytest.raises(SystemExit, match="no such file.*--score=True"):
        load_values(str(tmp_path))
    np.savez(tmp_path / "values.npz", sample_id=np.array([object()], dtype=object))
    with pytest.raises(SystemExit, match="values.npz: damaged"):
        load_values(str(tmp_path))
