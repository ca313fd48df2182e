"""The drawing of report.py and trial.py. `rows` and `scored` are what report.py's compare and read_scored return."""

import fcntl
import functools
import io
import logging
import os
import unicodedata

import numpy as np
from matplotlib import font_manager, rc_context, rcParams
from matplotlib.figure import Figure

from support.files import atomic_write, writing

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it warns of a font without a regular weight
RC = {"font.size": 8.5, "legend.fontsize": 8, "legend.frameon": False, "hatch.linewidth": 0.6, "savefig.dpi": 200}
RC |= {"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}  # a $ is a dollar
RC |= {"axes.formatter.useoffset": False, "figure.constrained_layout.h_pad": 0.08}
# A reader can tell the runs apart in grey too: by dashes and markers.
COMPARED = [("#0064b0", "-", "o"), ("#d9730d", "-.", "s"), ("#2f9e6e", (0, (1, 1)), "^"), ("#b06ab3", (0, (6, 2)), "D")]
HEIGHTS = dict(loss=3.9, histogram=3.0, share=1.1, quantiles=1.9, windows=3.0)  # of panels, inches
DOTTED = dict(color="0.35", linewidth=0.8, linestyle=(0, (1, 2)))
NEGATIVE = dict(facecolor="#b2432f", edgecolor="white", hatch="/////", linewidth=0)
POSITIVE = dict(facecolor="#a9c7e4", linewidth=0)


def number(cell, form, absent="–"):
    """'12.3 ± 0.4%' of {mean, sd}, `absent` if there is no mean."""
    if cell["mean"] is None:
        return absent
    sd = f" ± {cell['sd']:{form}}" if cell["sd"] is not None else ""
    return f"{cell['mean']:{form}}{sd}".replace("% ±", " ±").replace("-", "−")


@functools.cache
def has_glyph(family, c):
    path = font_manager.findfont(font_manager.FontProperties(family=[family]))
    return font_manager.get_font(path).get_char_index(ord(c)) > 0


def printable(text, families=()):
    """The text on one line: ↵ for a line end, an escape for what does not print or what no font of `families` has."""
    shown, marks = "", 0
    for c in text.replace("\r\n", "↵").replace("\n", "↵"):
        marks = marks + 1 if unicodedata.category(c) == "Mn" else 0
        # isprintable is False for spaces of other scripts and for the joiners that Hindi and emoji are spelt with
        prints = c.isprintable() or unicodedata.category(c) == "Zs" or c in "\u200c\u200d"
        # a pile of accents would run into the lines above
        drawn = not families or (marks < 4 and any(has_glyph(family, c) for family in families))
        shown += c if prints and drawn else c.encode("unicode_escape").decode()
    return shown


def families_for(text):
    """DejaVu Sans, and other fonts of this system that have what it lacks of `text`."""
    families, missing = ["DejaVu Sans"], {c for c in printable(text) if not has_glyph("DejaVu Sans", c)}
    for family in sorted(set(font_manager.get_font_names()) - {"Last Resort High-Efficiency"}):  # which has boxes
        if any(has_glyph(family, c) for c in missing):
            families.append(family)
            missing = {c for c in missing if not has_glyph(family, c)}
    return families


def shorten(text, columns, rows):
    """The text as it is drawn, in rows of so many cells: a character that DejaVu Sans Mono lacks takes two."""
    drawn = printable(text[: 5 * columns * rows], rcParams["font.family"])
    cells = "".join(c if has_glyph("DejaVu Sans Mono", c) else c + "\0" for c in " ".join(drawn.split()))
    if len(cells) > columns * rows:
        cells = cells[: columns * rows - 1] + "…"
    return "\n".join(cells[i : i + columns] for i in range(0, len(cells), columns)).replace("\0", "")


def draw_loss(ax, rows, loss, goal):
    """Test loss against iterations, a band of one sd over seeds, arrows for savings. `loss` and `goal` are names."""
    reference, others = next(row for row in rows if row["reference"]), [row for row in rows if not row["reference"]]
    loss, goal = (printable(text, rcParams["font.family"]) for text in (loss, goal))
    marked = [row for row in others if row["arm"] == "treatment"] or others
    target = low = high = reference["target"]["mean"]
    for row in rows:
        iters = min((run.iters for run in row["runs"]), key=len)  # some may not have ended
        losses = np.stack([run.losses[: len(iters)] for run in row["runs"]])
        mean, sd = losses.mean(0), losses.std(0, ddof=min(1, len(losses) - 1))
        color, dashes, marker = ("black", "--", None) if row is reference else ("0.62", "-", None)
        label = row["name"] + " (reference)" * (row is reference) + f", {len(losses)} seeds ± sd" * (len(losses) > 1)
        if row in marked:
            color, dashes, marker = COMPARED[marked.index(row) % len(COMPARED)]
            label += f": saving {number(row['saved'], '.1%')}"
        look = dict(color=color, linestyle=dashes, marker=marker, ms=3.5, markevery=max(1, len(iters) // 12))
        ax.plot(iters, mean, label=printable(label, rcParams["font.family"]), **look)
        ax.fill_between(iters, mean - sd, mean + sd, color=color, alpha=0.18, linewidth=0)
        # the steep fall of the first iterations would leave no room for the rest: it is cut off
        low, high = np.fmin(low, np.fmin.reduce(mean)), np.fmax(high, np.interp(0.15 * iters[-1], iters, mean))
    ax.axhline(target, label=f"{goal}: {target:.3f}", **DOTTED)
    step = max(high - low, 1e-6) / 14
    for row in marked:
        begin, end = reference["iterations"]["mean"], row["iterations"]["mean"]
        if begin and end is not None:
            low -= step
            ax.vlines([begin, end], low, target, **DOTTED)
            ax.annotate("", (end, low), (begin, low), arrowprops=dict(arrowstyle="-|>", shrinkA=0, shrinkB=0))
    ax.set(xlabel="iteration", ylabel=f"{loss} (nats per token)", xlim=(0, None), ylim=(low - step, high + step))
    ax.legend(loc="upper right")


def draw_histogram(ax, value):
    """Values of windows, (n,) in nats, from the 0.5th to the 99.5th percentile. A bar is on one side of zero."""
    low, high = np.percentile(value, [0.5, 99.5])
    shown = 1e6 * value[(value >= low) & (value <= high)]
    width = max(np.ptp(np.append(shown, 0)), 1e-12) / 60
    edges = np.arange(np.floor(min(shown.min(), 0) / width), np.floor(max(shown.max(), 0) / width) + 2) * width
    share, beyond = (value < 0).mean(), 1 - len(shown) / len(value)
    ax.hist(shown[shown < 0], edges, label=f"below zero: {share:.1%}", **NEGATIVE)
    ax.hist(shown[shown >= 0], edges, label=f"zero or above: {1 - share:.1%}", **POSITIVE)
    ax.axvline(0, color="black", linewidth=1)
    ax.margins(y=0.25)
    ax.legend(loc="upper right")
    ax.set(xlabel=f"value of a window (10⁻⁶ nats; {beyond:.1%} lie beyond the axis)", ylabel="windows")


def draw_domains(ax, value, domain, names):
    """Boxes of the values (n,) in the 14 largest domains, fewest negative ones on top; domain (n,) indexes names."""
    present, sizes = np.unique(domain, return_counts=True)
    largest = present[np.argsort(-sizes)[:14]]
    parts = sorted([(value[domain == d], names[d]) for d in largest], key=lambda part: -(part[0] < 0).mean())
    labels = [f"{shorten(name, 22, 1)}\n{(v < 0).mean():.0%} of {len(v):,}" for v, name in parts]
    look = dict(patch_artist=True, boxprops=POSITIVE, medianprops=dict(color="black", linewidth=1.5), showfliers=False)
    ax.boxplot([1e6 * v for v, _ in parts], tick_labels=labels, orientation="horizontal", whis=(5, 95), **look)
    ax.axvline(0, color="black", linewidth=1)
    ax.set(xlabel="value of a window (10⁻⁶ nats): quartiles, 5th to 95th percentile", ylabel="domain, negative windows")


def stretches(log):
    """The log in up to 40 stretches of the run: their middles (n,), and n arrays of the values of their draws."""
    iters, values = (np.array_split(log[key], min(40, len(log["iter"]))) for key in ("iter", "value"))
    return [part.mean() for part in iters], values


def draw_share(ax, log):
    """The share of negative draws over the run."""
    middle, values = stretches(log)
    ax.plot(middle, [100 * (part < 0).mean() for part in values], color=NEGATIVE["facecolor"])
    ax.set(ylabel="negative\ndraws (%)", ylim=(0, None), xlim=(0, len(log["iter"])))


def draw_quantiles(ax, log):
    """Quantiles of the draws' values over the run."""
    middle, values = stretches(log)
    q = np.stack([np.percentile(1e6 * part, [5, 25, 50, 75, 95]) for part in values], 1)
    ax.fill_between(middle, q[0], q[4], color="#d6e4f1", linewidth=0, label="5th to 95th percentile")
    ax.fill_between(middle, q[1], q[3], color="#7fa8d1", linewidth=0, label="quartiles")
    ax.plot(middle, q[2], color="black", label="median")
    ax.axhline(0, color="black", linewidth=0.8, linestyle="--")
    ax.set(xlabel="iteration", ylabel="value of a draw\n(10⁻⁶ nats)", xlim=(0, len(log["iter"])))
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 0.98), borderpad=0)


def draw_windows(ax, windows):
    """{title: windows}, one on the left, one on the right: a heading and two lines of each window."""
    mono = ["DejaVu Sans Mono", *rcParams["font.family"]]
    ax.axis("off")
    ax.set(ylim=(1 + max(map(len, windows.values())) * 3.6, 0), xlim=(0, 1))
    for x, (title, side) in zip((0, 0.51), windows.items(), strict=True):
        ax.text(x, 0, title, fontweight="bold", va="center", family="DejaVu Sans")
        for y, (heading, text) in zip(np.arange(len(side)) * 3.6 + 1.6, side, strict=True):
            ax.text(x, y, shorten(heading, 80, 1), fontsize=7.5, va="center", color="0.25")
            ax.text(x, y + 0.5, shorten(text, 90, 2), fontsize=6.2, family=mono, va="top", linespacing=1.6)


def draw_figures(rows, loss, goal, scored):
    """loss.png and, of a `scored` run, values.png, report.png and windows.txt: {name: bytes}."""
    windows, mosaics, made = scored.get("windows", {}), {"loss.png": [["loss"]]}, {}
    panels = dict(loss=(draw_loss, rows, loss, goal))
    if scored:
        panels |= dict(histogram=(draw_histogram, scored["value"]))
        panels |= dict(share=(draw_share, scored["log"]), quantiles=(draw_quantiles, scored["log"]))
        mosaics["values.png"] = [["histogram"], ["share"], ["quantiles"]]
        mosaics["report.png"] = [["loss", "histogram"]]
    if windows:
        panels["domains"] = draw_domains, scored["value"], scored["domain"], scored["domains"]
        panels["windows"] = draw_windows, windows
        mosaics["values.png"] = [[name, "domains"] for name in ("histogram", "share", "quantiles")]
        mosaics["report.png"].append(["windows", "windows"])
    texts = [loss, goal, *(row["name"] for row in rows), *scored.get("domains", [])]
    texts += [text for side in windows.values() for window in side for text in window]
    with rc_context(RC | {"font.family": families_for("".join(texts))}):
        for name, mosaic in mosaics.items():
            heights = [HEIGHTS[row[0]] for row in mosaic]
            fig = Figure(figsize=(5.1 * len(mosaic[0]), sum(heights)), layout="constrained")
            for panel, ax in fig.subplot_mosaic(mosaic, height_ratios=heights).items():
                draw, *shown = panels[panel]
                draw(ax, *shown)
            picture = io.BytesIO()
            fig.savefig(picture, format="png")
            made[name] = picture.getvalue()
    parts = []
    for title, side in windows.items():
        parts += [title, *(f"{heading}\n    " + text.replace("↵", "↵\n    ") for heading, text in side)]
    if windows:
        made["windows.txt"] = "".join(f"{part}\n\n" for part in parts).encode()
    return made


def write_figures(out, rows, loss, goal, scored):
    """Write what draw_figures gives to the folder `out`: {name: path}."""
    with writing(out):
        os.makedirs(out, exist_ok=True)
        with open(os.path.join(out, ".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # reports that write here at the same time follow each other, each whole
            made = draw_figures(rows, loss, goal, scored)
            for name, content in made.items():
                with atomic_write(os.path.join(out, name)) as file:
                    file.write(content)
    return {name: os.path.join(out, name) for name in made}


def write_trial(path, losses, found, name):
    """A trial's figure: the losses of every arm, {arm: (n,)}, an order a line, and what judge has `found` of them."""
    with rc_context(RC | {"font.family": families_for(name)}):
        fig = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = fig.subplots(1, 2)
        for order in zip(*losses.values(), strict=True):
            left.plot(range(len(order)), order, color="0.6", linewidth=0.8, marker="o", ms=3.5)
        for x, arm in enumerate(losses.values()):
            left.plot([x - 0.15, x + 0.15], [np.mean(arm)] * 2, color="black", linewidth=2)
        left.set_xticks(range(len(losses)), losses)
        left.set(xlim=(-0.5, len(losses) - 0.5), ylabel=f"{printable(name, rcParams['font.family'])} (nats per token)")
        left.set_title("a line for each order; bars: means")
        for y, (mean, bounds) in enumerate(found["beside"].values()):
            color, _, marker = COMPARED[y]
            right.plot(bounds or [mean] * 2, [y, y], color=color, linewidth=2)
            right.plot(mean, y, color=color, marker=marker)
        right.set_yticks(range(len(found["beside"])), [f"beside\n{arm}" for arm in found["beside"]])
        right.axvline(0, color="black", linewidth=0.8)
        right.axvline(found["no_help"], label="all to the right of it: 'no help'", **DOTTED)
        right.set(ylim=(len(found["beside"]) - 0.5, -0.5), xlabel="filtered − the other arm (nats per token)")
        right.set_title(f"{found['verdict']}, {found['orders']} orders")
        right.legend(loc="center")
        picture = io.BytesIO()
        fig.savefig(picture, format="png")
    with atomic_write(path) as file:
        file.write(picture.getvalue())
