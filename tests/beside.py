"""
Is the code of one checkout slower than that of another? Their benches take turns, step by step.

    python tests/beside.py OLD NEW [--rounds=21] [bench.py's knobs: --n_layer=6 --block_size=256 ...]

Each checkout has a process of its own, which runs one step when it is told to. In every round both run a stock step, a
plain one, the validation gradient and a scored one, and the first of a round moves on by one. The ratios are of two
times of the same round: medians, with quartiles in parentheses.
"""

import os
import statistics
import subprocess
import sys

ARMS = ("stock", "plain", "val", "scored")


def worker(folder, flags):
    """Reads names of arms from stdin, runs a step of each, and writes its seconds."""
    sys.path.insert(0, folder)
    import bench

    knobs = bench.configure(bench.Knobs, flags)
    bench.keep_freed_memory()
    stock, ours = bench.Bench(knobs, True), bench.Bench(knobs, False)
    arms = dict(stock=stock.plain, plain=ours.plain, val=ours.val, scored=ours.scored)
    for run in (*arms.values(), *arms.values()):
        run()
    print("ready", flush=True)
    for line in sys.stdin:
        print(bench.seconds(arms[line.strip()], knobs.device), flush=True)


def main(old, new, *flags):
    rounds = next((int(flag.split("=")[1]) for flag in flags if flag.startswith("--rounds=")), 21)
    sides = {}
    for side, folder in dict(old=old, new=new).items():
        command = [sys.executable, os.path.abspath(__file__), "--worker", os.path.abspath(folder), *flags]
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # who waits for its turn leaves the cores alone
        sides[side] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert sides[side].stdout.readline() == "ready\n"
    turns = [(side, arm) for arm in ARMS for side in sides]
    found = []
    for round_ in range(rounds):
        times = {}
        for turn in turns[round_ % len(turns) :] + turns[: round_ % len(turns)]:
            side, arm = turn
            sides[side].stdin.write(f"{arm}\n")
            sides[side].stdin.flush()
            times[turn] = float(sides[side].stdout.readline())
        found.append(times)
    for side in sides.values():
        side.stdin.close()
        side.wait()
    ratios = {f"{arm}, new / old": [t["new", arm] / t["old", arm] for t in found] for arm in ARMS}
    for side in sides:
        ratios[f"plain / stock, {side}"] = [t[side, "plain"] / t[side, "stock"] for t in found]
        ratios[f"overhead, {side}"] = [(t[side, "scored"] - t[side, "val"]) / t[side, "plain"] - 1 for t in found]
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name}: {middle:.3f} ({low:.3f} to {high:.3f})")
    print(f"{rounds} rounds, a stock step {1000 * statistics.median(t['old', 'stock'] for t in found):.0f} ms")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3:])
    else:
        main(*sys.argv[1:])
