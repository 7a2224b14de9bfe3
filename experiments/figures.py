"""The pictures that explain the method, and the picture of your own training. Needs matplotlib.

    python experiments/figures.py                      steps.png and schedule.png, in experiments/
    python experiments/figures.py trainings/FOLDER ..  training.png, here, of each folder's log.csv

The steps are drawn by hand. The schedule is computed by sgdr.py and train.py.
"""

import argparse
from math import cos, pi
from pathlib import Path

import study  # puts the modules above on the path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import train
from sgdr import run_at

BLACK = "0.15"
RED = "#c62828"
BLUE = "#1565c0"
GREY = "0.94"


def main():
    parser = argparse.ArgumentParser(
        description="Draw the pictures that explain, or your training."
    )
    parser.add_argument("folders", nargs="*", help="of trainings; without one: the pictures")
    folders = parser.parse_args().folders
    for folder in folders:
        if not Path(folder, "log.csv").exists():
            parser.error(f"{folder} holds no log.csv: give the folder of a training")
    matplotlib.use("Agg")
    if folders:
        training_figure(folders).savefig("training.png", dpi=130)
    else:
        steps_figure().savefig(study.HERE / "steps.png", dpi=110)
        schedule_figure().savefig(study.HERE / "schedule.png", dpi=110)


# ------------------------------------------------------------------------------ what a picture has


def canvas(width, height):
    """Axes in which one unit is one inch, with nothing drawn."""
    figure, axis = plt.subplots(figsize=(width, height))
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def label(axis, x, y, text, colour=BLACK, size=10, side="center", **look):
    """Text whose side (left, center, right) is at x, and whose middle is at y. size: in points."""
    axis.text(x, y, text, ha=side, va="center", fontsize=size, color=colour, **look)


def box(axis, x, y, text, width=0.7, height=0.42, colour=BLACK, size=11, edge=None, face="white"):
    """A box with its centre at (x, y), and text in it. edge: the outline's colour, if another."""
    corner = (x - width / 2, y - height / 2)
    patch = FancyBboxPatch(
        corner,
        width,
        height,
        edgecolor=edge or colour,
        linewidth=1.3,
        facecolor=face,
        boxstyle="round,pad=0,rounding_size=0.08",
    )
    axis.add_patch(patch)
    label(axis, x, y, text, colour, size)


def panel(axis, x, y, width, height, title):
    """A grey background with its lower left corner at (x, y)."""
    box(axis, x + width / 2, y + height / 2, "", width, height, edge="none", face=GREY)
    label(axis, x + 0.05, y + height + 0.2, title, size=11, side="left", fontweight="bold")


def arrows(axis, colour, *ends, style="-"):
    """ends: (x, y, x, y), from and to."""
    for x, y, to_x, to_y in ends:
        arrow = FancyArrowPatch(
            (x, y),
            (to_x, to_y),
            arrowstyle="-|>",
            mutation_scale=12,
            color=colour,
            linewidth=1.4,
            linestyle=style,
            shrinkA=0,
            shrinkB=0,
        )
        axis.add_patch(arrow)


# ------------------------------------------------------------------------------- the three pictures


def steps_figure():
    """Two chunks of three words, the border between them, and g: the five steps of train.py."""
    figure, axis = canvas(10, 4.5)
    panel(axis, 0.35, 1.85, 3.9, 2.3, "chunk k − 1")
    panel(axis, 5.75, 1.85, 3.9, 2.3, "chunk k")
    for chunk in ((1.0, 2.3, 3.6), (6.4, 7.7, 9.0)):  # words below, losses above
        for x in chunk:
            box(axis, x, 3, "QRNN", width=0.8)
            label(axis, x, 2.15, "word")
            label(axis, x, 3.88, "loss")
            arrows(axis, BLACK, (x, 2.3, x, 2.77), (x - 0.1, 3.23, x - 0.1, 3.72))
            arrows(axis, RED, (x + 0.1, 3.72, x + 0.1, 3.23))
        for x in chunk[1:]:  # from step to step, and back
            arrows(axis, BLACK, (x - 0.88, 3.08, x - 0.42, 3.08))
            arrows(axis, RED, (x - 0.42, 2.92, x - 0.88, 2.92))

    # The border. The state crosses it; the gradient stops there.
    axis.plot([5, 5], [1.2, 4.15], color="0.55", linewidth=1.2, linestyle=(0, (4, 3)))
    label(axis, 5, 4.35, "border k", "0.35", 11)
    label(axis, 4.92, 3.31, "state $s_k$", side="right")
    label(axis, 5, 2.9, "✕", RED, 13)
    arrows(axis, BLACK, (4.02, 3.08, 5.98, 3.08))
    arrows(axis, RED, (5.98, 2.9, 5.12, 2.9))

    # g sees s_k and predicts its gradient, which goes into chunk k - 1. Chunk k tells what it was.
    box(axis, 5, 0.85, "g", width=0.9, height=0.46, colour=BLUE, size=13)
    label(axis, 4.74, 1.62, "sees", BLUE, side="right")
    arrows(axis, BLUE, (4.78, 3, 4.78, 1.11))
    dashed = (0, (3, 2))  # in synthetic chunks only
    axis.plot([4.53, 4.34, 4.34], [0.95, 0.95, 2.9], color=BLUE, linewidth=1.4, linestyle=dashed)
    arrows(axis, BLUE, (4.34, 2.9, 4.02, 2.9), style=dashed)
    arrows(axis, RED, (5.28, 2.86, 5.28, 1.11))
    arrows(axis, BLUE, (3.5, 0.7, 4.53, 0.7), (5.47, 0.7, 6.5, 0.7))
    label(axis, 6.6, 0.7, "memory $h_g$, from border to border", BLUE, side="left")
    arrows(axis, BLUE, (9.9, 2.9, 9.42, 2.9), style=dashed)
    label(axis, 9.62, 2.7, "3  $\\alpha\\,\\hat\\delta_{k+1}$", BLUE)

    synthesise = (
        "2  synthesise, in a synthetic chunk k − 1: g predicts $\\hat\\delta_k$\n"
        "3  $\\alpha\\,\\hat\\delta_k$ goes into the backward pass of this chunk"
    )
    regress = "4  regress, in chunk k: g is taught the gradient\nthat $s_k$ receives there"
    others = (
        "1  forward (black)    3  backward (red), at the border to g alone    "
        "5  update the QRNN's weights    dashed: in synthetic chunks only"
    )
    label(axis, 4.25, 1.2, synthesise, BLUE, side="right")
    label(axis, 5.6, 1.2, regress, RED, side="left")
    label(axis, 0.35, 0.25, others, side="left")
    return figure


def schedule_figure():
    """Learning rate and gradient source of train.py's defaults, by epoch."""
    settings = train.Settings()  # --mode alternating
    moments = [settings.epochs * i / 3000 for i in range(3000)]
    rates = []
    times_of = {}  # {run: the moments in it}
    for moment in moments:
        index, elapsed, length = run_at(moment, settings.e_base, settings.mult)
        rates.append(settings.lr * (1 + cos(pi * elapsed / length)) / 2)
        times_of.setdefault(index, []).append(moment)

    figure, axis = plt.subplots(figsize=(10, 2.8), layout="tight")
    axis.plot(moments, rates, color=BLACK)
    for index, times in times_of.items():
        begin = times[0]
        end = times[-1]
        source = train.gradient_at(settings, index, begin)
        colour = BLACK
        if source == "synthetic":
            colour = BLUE
            axis.axvspan(begin, end, color=BLUE, alpha=0.12, linewidth=0)
        label(axis, (begin + end) / 2, 1.13 * settings.lr, f"run {index}\n{source}", colour, 9)
    restarts = [times[0] for times in times_of.values()]
    axis.set(xlim=(0, settings.epochs), xlabel="epoch", xticks=[*restarts, settings.epochs])
    axis.set(ylim=(0, 1.28 * settings.lr), ylabel="learning rate")
    axis.set(yticks=[0, settings.lr / 2, settings.lr])
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def training_figure(folders):
    """Validation perplexity above, learning rate below, by epoch, a line for each folder.

    Shaded are the epochs of the first folder whose gradient was synthetic.
    """
    logs = {folder: study.read_log(Path(folder, "log.csv")) for folder in folders}
    figure, axes = plt.subplots(
        2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(3, 1), layout="tight"
    )
    for axis, column in zip(axes, ("valid_perplexity", "learning_rate")):
        for folder, rows in logs.items():
            epochs = [int(row["epoch"]) for row in rows]
            values = [float(row[column]) for row in rows]
            axis.plot(epochs, values, marker=".", label=folder)
        for row in logs[folders[0]]:
            if row["gradient"] == "synthetic":
                end = int(row["epoch"])
                axis.axvspan(end - 1, end, color="0.9", linewidth=0, zorder=-1)
        axis.set(ylabel=column.replace("_", " "), xlabel="epoch")
    axes[0].legend()
    return figure


if __name__ == "__main__":
    main()
