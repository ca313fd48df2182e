"""
How well the values agree with the definition: the exact Shapley value of a single step.

    python study/fidelity.py --dataset=study_minipile_clean     # a corpus of study.py's, or any in data/

A subset S of a batch of B = 8 windows takes a step with (1/B) times the sum of its gradients, with the state of the
optimizer, momentum and decay. Its utility is the drop of the loss of m = 16 validation windows, compared with no step.
All 2^B steps are taken in float64, and each window's Shapley value is computed from them. In case (a) every subset has
the clipping coefficient and the second moments of the full batch; in case (b) it has its own. They are compared with
the values of data_value.py: 'sgd' and 'adam', of first and second order. The states come from runs of train.py with
AdamW at a constant learning rate, early (50 iterations) and late (800). SGD then takes its step from the same state.

One JSON line for every batch joins study/fidelity.jsonl. A batch that has a line is not computed again.
"""

import argparse
import json
import math
import os
import sys

import numpy as np
import torch
from torch.nn.utils import vector_to_parameters

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from data_value import attach_directions, retreat_to_midpoint, set_direction, validation_gradient  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from study import T, train  # noqa: E402
from support.corpus import count_windows, load_meta, open_split  # noqa: E402
from support.windows import TRAIN, VAL, WindowOrder, get_batch  # noqa: E402

B, M, BATCHES = 8, 16, 6
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
STAGES = dict(early=50, late=800)


def state_of(dataset, lr, stage):
    """The checkpoint of an AdamW run at this stage."""
    folder = f"out/fidelity/{dataset}_{lr:g}_{stage}"
    knobs = dict(learning_rate=lr, decay_lr=False, max_iters=STAGES[stage], eval_iters=4, eval_interval=10000)
    train(folder, dataset=dataset, seed=1337, **knobs)
    return torch.load(f"{folder}/ckpt.pt", weights_only=True)


def make(state, optimizer, lr):
    """The model in float64 and the optimizer that is about to take its step."""
    model = GPT(GPTConfig(**state["model_args"])).double()
    model.load_state_dict(state["model"])
    stepper = model.configure_optimizers(optimizer, DECAY, lr, BETAS)
    if optimizer == "adamw":
        stepper.load_state_dict(state["optimizer"])
    return model, stepper


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def utilities(state, optimizer, lr, batch, validation, own):
    """
    (2^B,) float64: by how much the validation loss falls when the subset with these bits steps; `own`: with its own
    clipping and second moments. Written from the formulas, without torch.optim.
    """
    model, stepper = make(state, optimizer, lr)
    params = list(model.parameters())
    decay = {p: group["weight_decay"] for group in stepper.param_groups for p in group["params"]}
    decay = flat(torch.full_like(p, decay[p]) for p in params)
    theta = flat(params).detach()
    grads = []
    for x, y in zip(*batch, strict=True):
        grads.append(flat(torch.autograd.grad(model(x[None], y[None])[1], params)))
    grads = torch.stack(grads) / B
    if optimizer == "adamw":
        m, v = (flat(stepper.state[p][key] for p in params).double() for key in ("exp_avg", "exp_avg_sq"))
        t = int(stepper.state[params[0]]["step"]) + 1

    def clipped(g, norm_of):
        return g * min(1.0, CLIP / (norm_of.norm().item() + 1e-6))

    full = grads.sum(0)
    found = np.zeros(2**B)
    for subset in range(2**B):
        g = grads[[i for i in range(B) if subset >> i & 1]].sum(0)
        g = clipped(g, norm_of=g if own else full)
        step = g
        if optimizer == "adamw":
            squared = g if own else clipped(full, norm_of=full)
            v_hat = (BETAS[1] * v + (1 - BETAS[1]) * squared**2) / (1 - BETAS[1] ** t)
            step = (BETAS[0] * m + (1 - BETAS[0]) * g) / (1 - BETAS[0] ** t) / (v_hat.sqrt() + EPS)
        vector_to_parameters(theta - lr * (decay * theta + step), params)
        with torch.no_grad():
            found[subset] = -model(*validation)[1].item()
    return found


def shapley(utility):
    """The Shapley values (B,) of the utilities (2^B,) of all subsets, a bit each."""
    n = int(math.log2(len(utility)))
    subsets = np.arange(len(utility))
    size = np.array([bin(subset).count("1") for subset in subsets])
    weight = np.array([1 / (n * math.comb(n - 1, s)) if s < n else 0.0 for s in range(n + 1)])
    values = np.zeros(n)
    for i in range(n):
        without = subsets[(subsets >> i & 1) == 0]
        values[i] = (weight[size[without]] * (utility[without | 1 << i] - utility[without])).sum()
    return values


def values(state, optimizer, lr, batch, validation):
    """{kind: (B,)} of data_value.py; a factor common to the batch is left out."""
    model, stepper = make(state, optimizer, lr)
    params = list(model.parameters())
    buffers = attach_directions(model, 4)
    theta = [p.detach().clone() for p in params]
    adam = stepper if optimizer == "adamw" else None
    kinds = ["sgd", "sgd, order 2"] + ["adam", "adam, order 2"] * bool(adam)
    gradient, _ = validation_gradient(model, *validation)
    set_direction(buffers, gradient)
    if adam:
        set_direction(buffers, gradient, adam, 2)
    model(*batch)[1].backward()
    torch.nn.utils.clip_grad_norm_(params, CLIP)
    stepper.step()
    retreat_to_midpoint(stepper)
    gradient, _ = validation_gradient(model, *validation)
    set_direction(buffers, gradient, row=1)
    if adam:
        set_direction(buffers, gradient, adam, 3, stepped=True)
    with torch.no_grad():
        torch._foreach_copy_(params, theta)
    alpha = torch.zeros(B, 4, dtype=torch.float64, requires_grad=True)
    (dots,) = torch.autograd.grad(model(*batch, alpha)[1], alpha)
    return {kind: dots[:, k].numpy() for k, kind in enumerate(kinds)}


def pearson(a, b):
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a, b):
    return pearson(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="python")
    parser.add_argument("--results", default=f"{HERE}/fidelity.jsonl")
    args = parser.parse_args()
    done = set()
    if os.path.exists(args.results):
        with open(args.results, encoding="utf-8") as file:
            done = {tuple(json.loads(line)["condition"]) for line in file}
    folder = f"data/{args.dataset}"
    meta = load_meta(folder)
    tokens = {split: open_split(folder, split, meta) for split in ("train", "val")}
    orders = [
        (tokens[split], WindowOrder(count_windows(tokens[split], T), 99, stream), n)
        for split, stream, n in (("train", TRAIN, B), ("val", VAL, M))
    ]
    for lr in (3e-4, 6e-4, 5e-3):
        for stage in STAGES:
            state = state_of(args.dataset, lr, stage)
            for optimizer in ("sgd", "adamw"):
                for number in range(BATCHES):
                    condition = args.dataset, lr, stage, optimizer, number
                    if condition in done:
                        continue
                    batch, validation = (
                        get_batch(data, order.take(number * n, n)[0], T, meta["vocab_size"], "cpu")
                        for data, order, n in orders
                    )
                    line = dict(condition=condition)
                    found = values(state, optimizer, lr, batch, validation)
                    for case, own in (("a", False), ("b", True)):
                        exact = shapley(utilities(state, optimizer, lr, batch, validation, own))
                        for kind, value in found.items():
                            line[f"{case}: {kind}"] = pearson(exact, value), spearman(exact, value)
                    with open(args.results, "a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    print(line, flush=True)


if __name__ == "__main__":
    main()
