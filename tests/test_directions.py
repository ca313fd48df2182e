"""Several directions, the midpoint of a step, and directions that are reused: each against its definition."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_value import brute_force, relative_error, tokens, trained_model
from test_train import TINY, call, corpus, home, metrics  # noqa: F401 (fixtures)
from torch.nn.attention import SDPBackend, sdpa_kernel

import data_value
import train
from data_value import attach_directions, mean_gradient, retreat_to_midpoint, set_direction, validation_gradient
from model import GPT, GPTConfig
from support.corpus import checksum_of, load_meta
from support.values import load_values, read_log
from support.windows import Windows

SHAPE = dict(block_size=8, vocab_size=23, n_layer=2, n_head=2, n_embd=12)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_each_of_several_directions_has_its_own_dots(K, B, bias, seed):
    torch.manual_seed(seed)
    model = trained_model(**SHAPE, bias=bias)
    buffers = attach_directions(model, K)
    directions = [[torch.randn_like(p) for p in model.parameters()] for _ in range(K)]
    for k, direction in enumerate(directions):
        set_direction(buffers, dict(zip(model.parameters(), direction, strict=True)), row=k)
    x, y = tokens(23, B, 8), tokens(23, B, 8)
    alpha = torch.zeros(B, K, dtype=torch.float64, requires_grad=True)
    model(x, y, alpha)[1].backward()
    oracle = torch.stack([brute_force(model, x, y, direction) for direction in directions], 1)
    torch.testing.assert_close(alpha.grad * B, oracle, rtol=1e-9, atol=1e-11)


def test_groups_average_to_the_direction_of_all_and_a_slice_can_be_left_out():
    torch.manual_seed(0)
    model = trained_model(**SHAPE)
    optimizer = model.configure_optimizers("adamw", 0.1, 1e-3, (0.9, 0.95))
    model(tokens(23, 4, 8), tokens(23, 4, 8))[1].backward()
    optimizer.step()
    windows = tokens(23, 6, 8), tokens(23, 6, 8)
    groups = [validation_gradient(model, *(part[i : i + 2] for part in windows))[0] for i in (0, 2, 4)]
    whole, _ = validation_gradient(model, *windows)
    buffers = attach_directions(model, 5)
    for k, gradient in enumerate(groups):
        set_direction(buffers, gradient, optimizer, k, mean=mean_gradient(groups))
    set_direction(buffers, whole, optimizer, 3)
    wte = model.lm_head.weight
    set_direction(buffers, whole, optimizer, 4, without=wte)
    for p, buffer in buffers.items():
        torch.testing.assert_close(buffer[:3].mean(0), buffer[3], rtol=1e-9, atol=1e-9)
        assert torch.equal(buffer[4], torch.zeros_like(p) if p is wte else buffer[3])


# ---------------------------------------------------------------------------------------------------------------------
# Second order.


def model_loss(model, x, y):
    """The mean token loss by torch.nn's own functions, which can be differentiated twice."""
    return torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())


def step_and_midpoint(name, lr):
    """
    One step from the same theta and state at learning rate `lr`: what retreat_to_midpoint and the directions make of
    it, and by the definition: delta_0 from the state before, H (delta_0 + delta_N) / 2 by autograd.
    """
    torch.manual_seed(3)
    model = trained_model(**SHAPE)
    params = list(model.parameters())
    optimizer = model.configure_optimizers(name, 0.1, 1e-2, (0.9, 0.95))
    for _ in range(3):
        model(tokens(23, 4, 8), tokens(23, 4, 8))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = lr
    x, y, x_val, y_val = (tokens(23, 4, 8) for _ in range(4))
    theta = [p.detach().clone() for p in params]
    before = copy.deepcopy(optimizer.state_dict()["state"])
    model(x, y)[1].backward()
    optimizer.step()
    step = [p.detach() - t for p, t in zip(params, theta, strict=True)]
    without_samples = []
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for p, t in zip(params, theta, strict=True):
        delta = -lr * decay[p] * t
        if name == "adamw":  # a gradient of zero joins the momentum; the second moment is the full batch's
            v_hat = optimizer.state[p]["exp_avg_sq"] / (1 - 0.95**4)
            delta -= lr * 0.9 * before[index[p]]["exp_avg"] / (1 - 0.9**4) / (v_hat.sqrt() + 1e-8)
        without_samples.append(delta)

    retreat_to_midpoint(optimizer)
    half = [(a + b) / 2 for a, b in zip(step, without_samples, strict=True)]
    for p, t, h in zip(params, theta, half, strict=True):
        torch.testing.assert_close(p.detach(), t + h, rtol=1e-7, atol=1e-9)  # AdamW counts its steps in float32
    buffers = attach_directions(model)
    gradient, _ = validation_gradient(model, x_val, y_val)
    set_direction(buffers, gradient, optimizer if name == "adamw" else None, stepped=True)
    ours = torch.cat([buffers[p][0].flatten() for p in params])

    with torch.no_grad():
        torch._foreach_copy_(params, theta)
    gradient = torch.autograd.grad(model(x_val, y_val)[1], params)
    with sdpa_kernel(SDPBackend.MATH):  # the other attentions have no second derivative
        windows = torch.autograd.grad(model_loss(model, x_val, y_val), params, create_graph=True)
        curved = torch.autograd.grad(sum((g * h).sum() for g, h in zip(windows, half, strict=True)), params)
    scale = [1.0] * len(params)
    if name == "adamw":
        scale = [1 / ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.95**4)).sqrt() + 1e-8) for p in params]
    first = torch.cat([(s * g).flatten() for s, g in zip(scale, gradient, strict=True)])
    second = torch.cat([(s * (g + h)).flatten() for s, g, h in zip(scale, gradient, curved, strict=True)])
    return (ours - second).norm().item(), (ours - first).norm().item()


@pytest.mark.parametrize("name, lr", [("sgd", 0.05), ("adamw", 1e-3)])
def test_the_midpoint_is_second_order(name, lr):
    """Against G + H (delta_0 + delta_N) / 2 by autograd the error shrinks as lr^2, against G alone as lr."""
    errors = np.array([step_and_midpoint(name, lr / 2**i) for i in range(4)])
    halved = errors[:-1] / errors[1:]
    assert (np.abs(halved[1:, 0] - 4) < 0.5).all(), halved
    assert (np.abs(halved[1:, 1] - 2) < 0.3).all(), halved
    assert (errors[1:, 0] < errors[1:, 1] / 10).all(), errors


SCORED = f"{TINY} --score=True --val_batch_size=4 --lr_decay_iters=8"


def test_second_order_leaves_training_as_it_was_and_its_values_equal_brute_force(home):  # noqa: F811
    flags = f"{SCORED} --value_order=2 --value_direction=sgd,adam --bias=False"
    call(train.main, f"{flags} --out_dir=out/x --max_iters=4")
    found = torch.load("out/x/ckpt.pt", weights_only=True)
    call(train.main, f"{flags} --out_dir=out/x --max_iters=5 --init_from=resume")
    call(train.main, f"{TINY} --lr_decay_iters=8 --bias=False --out_dir=out/plain --max_iters=5")
    ours, plain = (torch.load(f"out/{run}/ckpt.pt", weights_only=True)["model"] for run in ("x", "plain"))
    for key in ours:
        torch.testing.assert_close(ours[key], plain[key], rtol=1e-4, atol=1e-6)

    # iteration 4 again, in float64
    model = GPT(GPTConfig(**found["model_args"])).double()
    model.load_state_dict(found["model"])
    optimizer = model.configure_optimizers("adamw", 0.1, 1e-2, (0.9, 0.95))
    optimizer.load_state_dict(found["optimizer"])
    log, knobs = read_log("out/x"), train.Knobs(**found["knobs"])
    windows = Windows(knobs)
    x, y = windows.batch(windows.train, log["sample_id"][4])
    x_val, y_val = windows.batch(*windows.validation("all", 4))
    theta = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["lr"] = log["lr"][4]
    model(x, y)[1].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    retreat_to_midpoint(optimizer)
    gradient, _ = validation_gradient(model, x_val, y_val)
    scaled = [g / ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.95**5)).sqrt() + 1e-8) for p, g in gradient.items()]
    for k, direction in enumerate((list(gradient.values()), scaled)):
        dots = torch.tensor(log["dot_product"][4, :, k])
        assert relative_error(dots, brute_force(theta, x, y, direction)) < 1e-3
    assert log["directions"] == ["all:sgd", "all:adam"]


# ---------------------------------------------------------------------------------------------------------------------
# Sets, kinds and groups, through the script.


def test_a_run_with_several_columns_has_the_values_of_runs_with_one(home):  # noqa: F811
    """SGD's batch and order are the same, scored or not: each column equals a run of its own."""
    shutil.copytree("data/tiny", "data/other")
    flags = f"{SCORED} --bias=False"
    sets, kinds = ("odd", "all", "other"), ("adam", "sgd-wte", "sgd")
    call(
        train.main,
        f"{flags} --val_sets=odd,all,other --value_direction=adam,sgd-wte,sgd --val_groups=2 --out_dir=out/x",
    )
    log = read_log("out/x")
    assert log["dot_product"].shape == (8, 4, 18)
    names = [f"{name}:{kind}" for name in sets for kind in kinds]
    with np.load("out/x/values.npz") as arrays:
        assert list(arrays["columns"]) == names and arrays["values"].shape == arrays["errors"].shape == (32, 9)
        assert np.array_equal(arrays["value"], arrays["values"][:, 0])
        order = np.argsort(log["sample_id"].ravel())
        for i, name in enumerate(names):
            places = [k for k, other in enumerate(log["directions"]) if other == name]
            a, b = ((log["scale"] * log["dot_product"][:, :, k]).ravel()[order] for k in places)
            np.testing.assert_allclose(arrays["values"][:, i], (a + b) / 2, rtol=1e-9, atol=1e-15)
            np.testing.assert_allclose(arrays["errors"][:, i], np.abs(a - b) / 2, rtol=1e-6, atol=1e-15)
    for name, kind in (("odd", "adam"), ("odd", "sgd-wte"), ("all", "sgd"), ("other", "adam")):
        alone = f"out/{name}_{kind}"
        call(train.main, f"{flags} --val_sets={name} --value_direction={kind} --out_dir={alone}")
        ours, theirs = load_values("out/x", f"{name}:{kind}"), load_values(alone)
        assert np.array_equal(ours[0], theirs[0])
        np.testing.assert_allclose(ours[1], theirs[1], rtol=2e-3, atol=2e-3 * np.abs(theirs[1]).max())
    assert np.array_equal(load_values("out/x")[1], load_values("out/x", "odd:adam")[1])
    np.testing.assert_allclose(load_values("out/x", "all:sgd")[1], load_values("out/x", "other:sgd")[1], rtol=1e-5)
    assert not np.allclose(load_values("out/x", "odd:sgd")[1], load_values("out/x", "all:sgd")[1], rtol=1e-2)
    tested = [line for line in metrics("out/x") if "test_loss" in line]
    assert all({"test_loss_odd", "test_loss_other"} <= set(line) for line in tested)
    assert all(line["test_loss_other"] == pytest.approx(line["test_loss"], rel=1e-5) for line in tested)

    # a filter goes by the column it is told
    value = load_values("out/x", "odd:sgd")[1]
    middle = np.median(value)
    with np.load("out/x/values.npz") as arrays:
        changed = dict(arrays) | dict(values=arrays["values"] - middle)
    np.savez("out/x/values.npz", **changed)
    call(train.main, f"{TINY} --filter_from=out/x --filter_column=odd:sgd --filter_negative=True --out_dir=out/y")
    with open("out/y/config.json", encoding="utf-8") as file:
        assert json.load(file)["coverage"]["negative"] == (value < middle).sum()
    with pytest.raises(SystemExit, match="no column 'even:sgd', only odd:adam, odd:sgd-wte"):
        call(train.main, f"{TINY} --filter_from=out/x --filter_column=even:sgd --out_dir=out/z")


def test_fixed_validation_windows_are_the_same_every_iteration(home):  # noqa: F811
    flags = f"{SCORED} --learning_rate=0 --min_lr=0 --weight_decay=0 --dropout=0"
    call(train.main, f"{flags} --out_dir=out/fixed --val_windows=4 --log_interval=1")
    call(train.main, f"{flags} --out_dir=out/fresh --log_interval=1")
    with open("out/fixed/config.json", encoding="utf-8") as file:
        knobs = train.Knobs(**json.load(file)["knobs"])
    first, *others = (set(Windows(knobs).validation("all", i)[1]) for i in range(9))
    assert all(other == first for other in others)
    assert not np.allclose(read_log("out/fixed")["dot_product"][1:], read_log("out/fresh")["dot_product"][1:], rtol=0.1)


def test_validation_gradients_are_averaged_as_told(home, monkeypatch):  # noqa: F811
    """What the direction is made of is the weighted mean of all iterations' gradients, oldest first."""
    fresh, used = [], []

    def spy_gradient(model, *rest):
        gradient, loss = validation_gradient(model, *rest)
        fresh.append({p: g.clone() for p, g in gradient.items()})
        return gradient, loss

    def spy_direction(buffers, gradient, *rest):
        used.append({p: g.clone() for p, g in gradient.items()})
        set_direction(buffers, gradient, *rest)

    monkeypatch.setattr(train, "validation_gradient", spy_gradient)
    monkeypatch.setattr(data_value, "set_direction", spy_direction)
    call(train.main, f"{SCORED} --val_average=3 --out_dir=out/x")
    assert len(fresh) == len(used) == 8
    for i, gradient in enumerate(used):
        weights = np.array([0.5 ** ((i - j) / 3) for j in range(i + 1)])
        for p, g in gradient.items():
            oracle = sum(w * fresh[j][p] for j, w in enumerate(weights / weights.sum()))
            torch.testing.assert_close(g, oracle, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("flags", ["--val_average=6", "--value_order=2 --dropout=0.3"])
def test_an_interrupted_run_goes_on_with_its_average_as_if_it_was_not(home, flags):  # noqa: F811
    flags = f"{SCORED} {flags} --value_direction=adam --val_sets=even,odd"
    call(train.main, f"{flags} --out_dir=out/a")
    call(train.main, f"{flags} --out_dir=out/b --max_iters=5")
    os.remove("out/b/values.npz")
    call(train.main, f"{flags} --out_dir=out/b --init_from=resume")
    assert np.array_equal(read_log("out/a")["dot_product"], read_log("out/b")["dot_product"])
    a, b = (torch.load(f"out/{run}/ckpt.pt", weights_only=True) for run in "ab")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert len(a["val_gradients"]) == (2 if "--val_average" in flags else 0)


def test_a_very_long_half_life_is_the_plain_mean(home):  # noqa: F811
    call(train.main, f"{SCORED} --val_average=1e20 --out_dir=out/x")
    call(train.main, f"{SCORED} --val_average=1e9 --out_dir=out/y")
    np.testing.assert_allclose(read_log("out/x")["dot_product"], read_log("out/y")["dot_product"], rtol=1e-3, atol=1e-6)


def test_a_validation_set_that_has_become_another_corpus_is_refused(home):  # noqa: F811
    shutil.copytree("data/tiny", "data/other")
    flags = f"{SCORED} --val_sets=other --out_dir=out/x"
    call(train.main, f"{flags} --max_iters=3")
    with open("out/x/config.json", encoding="utf-8") as file:
        assert json.load(file)["val_sets"] == dict(other=load_meta("data/tiny")["fingerprint"])
    meta = load_meta("data/other") | dict(fingerprint="another")
    meta["checksum"] = checksum_of(meta)
    with open("data/other/meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file)
    with pytest.raises(SystemExit, match="--val_sets=other: not the corpora that out/x/ckpt.pt began with"):
        call(train.main, f"{flags} --init_from=resume")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--value_direction=adam,adam", "--value_direction=adam,adam: expected sgd, adam, sgd-wte"),
        ("--value_direction=momentum", "--value_direction=momentum: expected"),
        ("--value_direction=sgd,adam --optimizer=sgd", "needs --optimizer=adamw"),
        ("--val_sets=even,,odd", "expected names, each once"),
        ("--val_sets=even,even", "expected names, each once"),
        ("--val_sets=evne", "'evne' is no corpus in data and no domain of tiny; of 4 names the nearest are even, "),
        ("--val_sets=pieces", "has the tokenizer gpt2, tiny has bytes; prepare it with --tokenizer=bytes"),
        ("--val_sets=even --val_batch_size=500", "'even' has .* windows of 16 tokens, and 500 are needed"),
        ("--val_groups=3", "--val_groups=3: does not divide --val_batch_size=4"),
        ("--val_windows=3", "--val_windows=3: fewer than --val_batch_size=4"),
        ("--value_order=3", "--value_order=3: expected 1 or 2"),
        ("--value_order=2 --val_average=2", "no --val_average"),
        ("--value_order=2 --dropout=0.1 --compile=True", "needs --compile=False"),
        ("--val_average=-1", "--val_average=-1.0: must be at least 0"),
    ],
)
def test_what_a_user_may_get_wrong(home, flags, message):  # noqa: F811
    if "pieces" in flags:
        shutil.copytree("data/tiny", "data/pieces")
        meta = load_meta("data/pieces") | dict(tokenizer="gpt2")
        meta["checksum"] = checksum_of(meta)
        with open("data/pieces/meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file)
    with pytest.raises(SystemExit, match=message):
        call(train.main, f"{SCORED} --out_dir=out/x {flags}")
