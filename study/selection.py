"""
Does it pay to choose every batch from more windows than are trained on?

    python study/selection.py               # the runs; needs the corpora and the scored runs of study/foretell.py
    python study/selection.py --tables      # the tables of study/selection.md, from study/selection.jsonl

Before each step, the direction of the current weights is made of validation windows, and one forward and backward pass
gives the dot products of `ratio` times as many candidates as a batch has. A rule chooses from them by these dots, the
gradients are thrown away, and an ordinary step trains on the chosen ones (online batch selection: GREATS, NeurIPS 2024;
OPUS, arXiv 2602.05400). The control has no candidates and no dots. The arms of one order are paired: the candidates are
the control's batch and windows that the control has not, so no window comes twice.

A run starts from a scored run's weights, as a trial does, or from scratch. It keeps train.py's schedules, steps and
test windows. When it has ended, one JSON line about it joins study/selection.jsonl. A run that has a line is not run
again. The plan is in rounds, by worth.
"""

import argparse
import json
import os
import sys
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from foretell import CLEAN, DAMAGED, ITERATIONS, PERCENT, TRIAL, prepare_worker, run_all, scored_folder, workers
from foretell_tables import said
from tables import markdown, saving

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import train  # noqa: E402
from data_value import Directions, set_direction, validation_gradient  # noqa: E402
from study import CENTRE, RETRAIN, T, damage_of  # noqa: E402
from support.configurator import check  # noqa: E402
from support.corpus import window_domains  # noqa: E402
from support.files import load_torch  # noqa: E402
from support.processes import Ranks  # noqa: E402
from support.run_folder import WEIGHTS  # noqa: E402
from support.windows import Windows  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The plan.

CORPORA = (CLEAN, DAMAGED, "wild")
START, SHORT, WHOLE = str(ITERATIONS), ITERATIONS // 10, RETRAIN["max_iters"]
DIRECTIONS = {"fresh": {}, "averaged": dict(val_average=32), "m 128": dict(val_batch_size=128)}  # fresh: CENTRE's m 16
REFERENCE = 512  # validation windows of the real dots


class Run(NamedTuple):
    corpus: str
    start: str  # the weights of the scored run after so many iterations, or '': from scratch
    rule: str  # 'control', or one of `choose`
    ratio: float  # candidates / windows of a batch
    direction: str  # of DIRECTIONS
    iterations: int
    seed: int  # of the scored run
    order: int


CONTROL = [("control", 1.0, "fresh")]
TOPS = [("top", 1.25, "fresh"), ("top", 2.0, "fresh"), ("negatives", 1.5, "fresh")]
OTHERS = [("sampling", 2.0, "fresh"), ("negatives", 1.0, "fresh"), ("top", 2.0, "averaged")]
REST = [("top", 1.1, "fresh"), ("top", 1.5, "fresh"), ("top", 2.0, "m 128")]
AFRESH = [*CONTROL, ("top", 2.0, "fresh"), ("negatives", 1.0, "fresh"), ("top", 1.25, "fresh")]
ROUNDS = [  # (start, iterations, orders, whether of every seed, arms); longer controls are what the time of an arm buys
    (START, SHORT, (1,), False, CONTROL + TOPS + OTHERS),
    (START, 2 * SHORT, (1,), False, CONTROL),
    (START, SHORT, (2,), False, CONTROL + TOPS),
    (START, 4 * SHORT, (1,), False, CONTROL),
    ("", WHOLE, (1,), False, AFRESH),
    (START, SHORT, (2, 3), False, CONTROL + TOPS + OTHERS),
    (START, SHORT, (1, 2, 3), True, CONTROL + TOPS),
    (START, 2 * SHORT, (2, 3), False, CONTROL),
    (START, 4 * SHORT, (2, 3), False, CONTROL),
    (START, SHORT, (1, 2, 3), False, REST),
    ("", WHOLE, (2,), False, AFRESH),
    ("", 2 * WHOLE, (1,), False, CONTROL),
    ("", 4 * WHOLE, (1,), False, CONTROL),
]
ALL = [("top", 1.0, "fresh"), ("top", 1.0, "averaged")]  # the control's own way, with dots that choose nothing
# what the dots of these are worth
MEASURED = [Run(corpus, START, *arm, SHORT, 1, 1) for corpus in CORPORA for arm in ALL + TOPS + OTHERS]


def plan(seeds):
    """Lists of Runs, by worth."""
    for start, iterations, orders, every, arms in ROUNDS:
        some = seeds if every else seeds[:1]
        keys = [(seed, order, corpus, arm) for seed in some for order in orders for corpus in CORPORA for arm in arms]
        yield [Run(corpus, start, *arm, iterations, seed, order) for seed, order, corpus, arm in keys]


# ---------------------------------------------------------------------------------------------------------------------
# A run.


def knobs_of(run):
    knobs = CENTRE | dict(dataset=run.corpus, seed=run.seed + 1000 * run.order, max_iters=run.iterations)
    knobs |= dict(eval_interval=run.iterations // 8)
    if run.start:
        weights = f"{scored_folder(run.corpus, 'average32', run.seed)}/{run.start}.pt"
        check(os.path.isfile(weights), f"{weights}: missing; python study/foretell.py makes it")
        knobs |= TRIAL | dict(init_from=weights, eval_interval=run.iterations)
    if run.rule != "control":
        knobs |= dict(score=True, value_direction="adam") | DIRECTIONS[run.direction]
    return train.Knobs(**knobs)


def candidates(order, iter_num, run, B):
    """
    The ids of an iteration's candidates: the control's batch, and the first windows of a batch that comes after all
    batches of the control.
    """
    more = order.take((run.iterations + iter_num) * B, round(run.ratio * B) - B)[0]
    return np.concatenate([order.take(iter_num * B, B)[0], more])


def choose(dots, rule, B, rng):
    """
    The places in dots (n,) of the windows to train on, (k,) in rising order, k <= B. 'top': the highest. 'sampling': at
    random without replacement, by the softmax of the dots in standard deviations (their order with Gumbel noise, Kool,
    van Hoof and Welling 2019, arXiv 1903.06059). 'negatives': the first that are not negative, at least the highest.
    """
    if rule == "negatives":
        return np.flatnonzero(dots >= min(0.0, dots.max()))[:B]
    if rule == "sampling":
        dots = (dots - dots.mean()) / dots.std() + rng.gumbel(size=len(dots))
    return np.sort(np.argsort(-dots, kind="stable")[:B])


def dots_of(model, directions, x, y):
    """<grad l_i, D> of every window of x, y (n, T), a numpy array (n,), and their mean loss."""
    alpha = directions.alpha(len(x))
    loss = model(x, y, alpha)[1]
    (dots,) = torch.autograd.grad(loss, alpha)
    return dots[:, 0].numpy() * len(x), loss.item()


def step(model, optimizer, x, y, grad_clip):
    """train.py's step on x, y (k, T). Returns the mean loss and the gradient's norm before it is clipped."""
    loss, params = model(x, y)[1], list(model.parameters())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    torch._foreach_mul_([p.grad for p in params], (grad_clip / (norm + 1e-6)).clamp(max=1.0))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


def real_dots(model, directions, optimizer, windows, x, y):
    """The dots by REFERENCE validation windows that no direction of the run is made of, at the same weights: (n,)."""
    tokens, order, _ = windows.val_sets["all"]
    reference = windows.batch(tokens, order.take(order.n - REFERENCE, REFERENCE)[0])
    gradient, _ = validation_gradient(model, *reference, windows.B)
    set_direction(directions.buffers, gradient, optimizer)
    return dots_of(model, directions, x, y)[0]


def train_selecting(run, measured=False):
    """
    (model, found) of a Run: its test losses at `iter`, the CPU time `step_ms` of the median step without evaluations,
    and what `describe` says of the choice. `measured` adds what the dots are worth: `measure`.
    """
    knobs, ranks = knobs_of(run), Ranks()
    windows, B = Windows(knobs), knobs.batch_size
    torch.manual_seed(knobs.seed)
    weights = load_torch(knobs.init_from, WEIGHTS, "python study/foretell.py makes it") if run.start else None
    model = train.make_model(knobs, windows.meta["vocab_size"], weights, False).train()
    betas = (knobs.beta1, knobs.beta2)
    optimizer = model.configure_optimizers(knobs.optimizer, knobs.weight_decay, knobs.learning_rate, betas)
    directions = Directions(model, windows.val_sets, knobs) if run.rule != "control" else None
    gradient_of = partial(train.validate, model, knobs)
    rng, found = np.random.default_rng(knobs.seed), dict(iter=[], test_loss=[])
    log, real = [], []
    for iter_num in range(run.iterations):
        started = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = train.get_lr(iter_num, knobs)
        ids = candidates(windows.order, iter_num, run, B)
        x, y = windows.batch(windows.train, ids)
        chosen, dots, all_loss = np.arange(len(ids)), None, None
        if directions:
            fresh = train.fresh_gradients(gradient_of, list(model.parameters()), windows, iter_num, knobs, ranks)
            directions.update(fresh, iter_num)
            directions.fill(optimizer)
            dots, all_loss = dots_of(model, directions, x, y)
            chosen = choose(dots, run.rule, B, rng)
        if measured and iter_num % 8 == 4:
            real.append(measure(dots, real_dots(model, directions, optimizer, windows, x, y), chosen))
        loss, norm = step(model, optimizer, x[chosen], y[chosen], knobs.grad_clip)
        seconds = time.process_time() - started
        log.append(dict(ids=ids, chosen=chosen, dots=dots, losses=(all_loss, loss), norm=norm, seconds=seconds))
        if (iter_num + 1) % knobs.eval_interval == 0:
            found["iter"].append(iter_num + 1)
            found["test_loss"].append(train.evaluate(model, windows, *windows.test_sets["test_loss"], knobs, ranks))
    found["step_ms"] = 1000 * float(np.median([each["seconds"] for each in log]))
    if measured:
        found["real"] = np.mean(real, 0).tolist()
    return model, found | describe(run, log, windows.meta)


def measure(dots, real, chosen):
    """
    Of the dots (n,) and the `real` ones: their correlation; the mean real dot of the candidates, of the chosen ones and
    of as many that have the highest real dots.
    """
    best = np.sort(real)[-len(chosen) :]
    return [float(np.corrcoef(dots, real)[0, 1]), *(float(each.mean()) for each in (real, real[chosen], best))]


def describe(run, log, meta):
    """Means over the iterations, and [of the candidates, of the chosen ones]: their loss, damaged share and domains."""
    found = dict(norm=float(np.mean([each["norm"] for each in log])))
    if run.rule == "control":
        return found
    ids, chosen = (np.concatenate(each) for each in zip(*[(i["ids"], i["ids"][i["chosen"]]) for i in log], strict=True))
    found["loss"] = np.mean([each["losses"] for each in log], 0).tolist()
    found["negative"] = float(np.mean([(each["dots"] < 0).mean() for each in log]))
    found["batch"] = float(np.mean([len(each["chosen"]) for each in log]))
    both = [(each["dots"].mean(), each["dots"][each["chosen"]].mean()) for each in log]
    found["dot"] = np.mean(both, 0).tolist()
    found["damaged"] = [float((damage_of(some, PERCENT.get(run.corpus, ())) > 0).mean()) for some in (ids, chosen)]
    shares = []
    for some in (ids, chosen):
        domain = window_domains(f"data/{run.corpus}", "train", some, T, meta)
        shares.append(np.bincount(domain, minlength=len(meta["domains"])) / len(some))
    found["domains"] = {
        name: list(map(float, pair)) for name, pair in zip(meta["domains"], np.array(shares).T, strict=True)
    }
    return found


def run_one(run):
    """The results of a Run, or of (*Run, 'measured')."""
    started = time.perf_counter()
    _, found = train_selecting(Run(*run[:8]), measured=len(run) > 8)
    return found | dict(seconds=time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------------------------
# The tables.


def loss_after(lines, control, iterations):
    """
    The final loss of a control whose schedule has so many iterations, interpolated in their logarithm between those of
    the same order that have run; None where there are none as long.
    """
    runs = [run for run in lines if run._replace(iterations=control.iterations) == control]
    known = sorted((run.iterations, lines[run]["test_loss"][-1]) for run in runs)
    if not known[0][0] <= iterations <= known[-1][0]:
        return None
    return float(np.interp(np.log(iterations), *np.array([(np.log(n), loss) for n, loss in known]).T))


def control_of(run):
    return run._replace(rule="control", ratio=1.0, direction="fresh")


def pairs_of(lines, start, iterations, corpora, arm):
    """[(run, its line, the line of the control of the same order)] of an arm, (rule, ratio, direction)."""
    runs = [run for run in lines if (run.start, run[2:5], run.iterations) == (start, arm, iterations)]
    controls = {run: control_of(run) for run in runs}
    found = [run for run in runs if run.corpus in corpora and controls[run] in lines]
    return [(run, lines[run], lines[controls[run]]) for run in found]


def compared(lines, pairs):
    """
    {name: [a number for each order]}. `effect`: of equal iterations, in nats. `cost`: the time of a step over the
    control's. `paid`: the effect beside a control that trains as long as the arm. Of runs with a curve, `saved`: the
    share of iterations saved, as in tables.py; `longer`: the time to the same loss over the control's.
    """
    found = dict(effect=[], cost=[], paid=[], saved=[], longer=[])
    for run, ours, theirs in pairs:
        cost, final = ours["step_ms"] / theirs["step_ms"], ours["test_loss"][-1]
        control = control_of(run)
        bought = loss_after(lines, control, cost * run.iterations)
        found["cost"].append(cost)
        found["effect"].append(final - theirs["test_loss"][-1])
        found["paid"] += [final - bought] if bought else []
        if len(ours["iter"]) > 1:
            saved = saving(ours["iter"], ours["test_loss"], theirs["test_loss"])
            found["saved"].append(saved)
            found["longer"].append(cost * (1 - saved) if saved > 0 else cost / (1 + saved))
    return found


def groups_of(lines, start, iterations):
    """(label, arm, pairs) for every corpus, and for all three where an arm has an order in each."""
    arms = {run[2:5] for run in lines if run.start == start and run.rule != "control"}
    for label, corpora in [*((corpus, (corpus,)) for corpus in CORPORA), ("all three", CORPORA)]:
        for arm in sorted(arms, key=lambda arm: (arm[2] != "fresh", arm[0] == "negatives", arm[0] == "sampling", arm)):
            pairs = pairs_of(lines, start, iterations, corpora, arm)
            if len({run.corpus for run, _, _ in pairs}) == len(corpora):
                yield label, arm, pairs


def gains_table(lines, start, iterations):
    """What every arm changes, for the same iterations and for the same time."""
    rows = []
    for label, (rule, ratio, direction), pairs in groups_of(lines, start, iterations):
        found = compared(lines, pairs)
        row = [label, f"{rule}, {direction}", f"{ratio:g}", str(len(pairs)), said(found["effect"])]
        row += [said(found["cost"], "{:.1f}"), said(found["paid"]) if found["paid"] else "–", str(len(found["paid"]))]
        if found["saved"]:
            row += [said(np.multiply(100, found["saved"]), "{:+.0f}"), said(found["longer"], "{:.1f}")]
        rows.append(row)
    head = ["corpus", "trained on", "candidates / batch", "orders", "test loss beside control"]
    head += ["time of a step / control's", "beside a control of as much time", "orders of it"]
    return markdown(head + ([] if start else ["iterations saved, %", "time to the same loss / control's"]), rows)


def choice_table(lines, start, iterations):
    """What the rules choose, from the candidates to the chosen ones: means over the orders."""
    rows = []
    for label, (rule, ratio, direction), pairs in groups_of(lines, start, iterations):
        ours, theirs = [ours for _, ours, _ in pairs], [theirs for _, _, theirs in pairs]
        row = [label, f"{rule}, {direction}", f"{ratio:g}", f"{100 * np.mean([line['negative'] for line in ours]):.0f}"]
        row.append(f"{np.mean([line['batch'] for line in ours]):.0f}")
        for key, form, scale in (("damaged", "{:.1f}", 100), ("loss", "{:.3f}", 1), ("dot", "{:.0f}", 1)):
            row.append(" → ".join(form.format(scale * x) for x in np.mean([line[key] for line in ours], 0)))
        moved = [np.abs(np.diff(list(line["domains"].values()))).sum() / 2 for line in ours]
        row.append(f"{100 * np.mean(moved):.1f}")
        row.append(f"{np.mean([one['norm'] / other['norm'] for one, other in zip(ours, theirs, strict=True)]):.2f}")
        rows.append(row)
    head = ["corpus", "trained on", "candidates / batch", "negative, %", "batch", "damaged, %", "loss, nats", "dot"]
    return markdown([*head, "domains moved, %", "gradient norm / control's"], rows)


def controls_table(lines):
    """What longer training alone brings: the final loss of controls, less that of the shortest of the same order."""
    rows = []
    for start, shortest in ((START, SHORT), ("", WHOLE)):
        for corpus in CORPORA:
            for times in (2, 4):
                pairs = [
                    (lines[run], lines[run._replace(iterations=shortest)])
                    for run in lines
                    if (run.corpus, run.start, run.rule, run.iterations) == (corpus, start, "control", times * shortest)
                ]
                if pairs:
                    gains = [long["test_loss"][-1] - short["test_loss"][-1] for long, short in pairs]
                    row = [corpus, "the scored run's weights" if start else "scratch", f"{times * shortest}"]
                    rows.append([*row, f"{times}", str(len(gains)), said(gains)])
    return markdown(["corpus", "from", "iterations", "time / control's", "orders", "test loss beside control"], rows)


def worth_table(lines, measured):
    """
    Beside the dots by REFERENCE validation windows, the dots of all candidates being 1. The last column divides the
    real dot of the chosen by the norm of their gradient: AdamW's steps do not grow with it.
    """
    rows = []
    for line in measured:
        run, (correlation, everyone, chosen, best) = Run(*line["run"][:8]), line["real"]
        control = control_of(run)
        if control not in lines:
            continue
        longer = line["norm"] / lines[control]["norm"]
        row = [run.corpus, f"{run.rule}, {run.direction}", f"{run.ratio:g}", f"{correlation:.2f}"]
        row += [f"{line['dot'][1] / line['dot'][0]:.2f}", f"{chosen / everyone:.2f}", f"{best / everyone:.2f}"]
        rows.append([*row, f"{longer:.2f}", f"{chosen / everyone / longer:.2f}"])
    head = ["corpus", "trained on", "candidates / batch", "correlation with the real dots", "dot of the chosen"]
    head += ["real dot of the chosen", "of the best", "gradient norm / control's", "real dot / norm"]
    return markdown(head, rows)


def print_tables(path):
    with open(path, encoding="utf-8") as file:
        everything = list(map(json.loads, file))
    lines = {Run(*line["run"]): line for line in everything if "real" not in line}
    measured = [line for line in everything if "real" in line]
    print(f"## From the scored run's weights\n\n{gains_table(lines, START, SHORT)}")
    print(f"## From scratch\n\n{gains_table(lines, '', WHOLE)}")
    print(f"## What more time alone brings\n\n{controls_table(lines)}")
    print(f"## What is chosen\n\n{choice_table(lines, START, SHORT)}")
    print(f"## What the dots are worth\n\n{worth_table(lines, measured)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the scored runs; default: 1 2 3")
    parser.add_argument("--rounds", type=int, default=len(ROUNDS), help="no more than so many rounds of the plan")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--results", default=f"{HERE}/selection.jsonl")
    parser.add_argument("--tables", action="store_true", help="print the tables, run nothing")
    args = parser.parse_args()

    if args.tables:
        print_tables(args.results)
        return
    with workers(args.jobs, prepare_worker) as pool:
        for runs in list(plan(args.seeds))[: args.rounds]:
            run_all(pool, run_one, runs, args.results)
        run_all(pool, run_one, [(*run, "measured") for run in MEASURED], args.results)


if __name__ == "__main__":
    main()
