"""The pictures that explain the method, and the picture of your own training. Needs matplotlib.

python experiments/figures.py                        steps.png and schedule.png, in experiments/
python experiments/figures.py trainings/FOLDER ..    training.png, here, of the log.csv in each folder
"""

import sys
from math import cos, pi
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import study  # puts the modules above on the path
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from sgdr import run_at

BLACK, RED, BLUE, GREY = "0.15", "#c62828", "#1565c0", "0.94"


def canvas(width, height):
    """Axes in which one unit is one inch, with nothing drawn."""
    figure, axis = plt.subplots(figsize=(width, height))
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def write(axis, x, y, text, colour=BLACK, size=10, side="center", **look):
    axis.text(x, y, text, ha=side, va="center", fontsize=size, color=colour, **look)


def box(axis, x, y, text, width=0.7, height=0.42, colour=BLACK, size=11, edge=None, face="white"):
    """A box with its centre at (x, y)."""
    axis.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            edgecolor=edge or colour,
            linewidth=1.3,
            facecolor=face,
            boxstyle="round,pad=0,rounding_size=0.08",
        )
    )
    write(axis, x, y, text, colour, size)


def panel(axis, x, y, width, height, title):
    """A grey background with its lower left corner at (x, y)."""
    box(axis, x + width / 2, y + height / 2, "", width, height, edge="none", face=GREY)
    write(axis, x + 0.05, y + height + 0.2, title, size=11, side="left", fontweight="bold")


def arrows(axis, colour, *ends):
    """ends: (x, y, x, y), from and to."""
    for x, y, to_x, to_y in ends:
        axis.add_patch(
            FancyArrowPatch(
                (x, y),
                (to_x, to_y),
                arrowstyle="-|>",
                mutation_scale=12,
                color=colour,
                linewidth=1.4,
                shrinkA=0,
                shrinkB=0,
            )
        )


def steps():
    figure, axis = canvas(10, 4.5)
    for left, title in ((0.35, "chunk k − 1"), (5.75, "chunk k")):
        panel(axis, left, 1.85, 3.9, 2.3, title)
    for n, x in enumerate((1.0, 2.3, 3.6, 6.4, 7.7, 9.0)):  # words below, losses above
        box(axis, x, 3, "QRNN", width=0.8)
        write(axis, x, 2.15, "word")
        write(axis, x, 3.88, "loss")
        arrows(axis, BLACK, (x, 2.3, x, 2.77), (x - 0.1, 3.23, x - 0.1, 3.72))
        arrows(axis, RED, (x + 0.1, 3.72, x + 0.1, 3.23))
        if n % 3:
            arrows(axis, BLACK, (x - 0.88, 3.08, x - 0.42, 3.08))
            arrows(axis, RED, (x - 0.42, 2.92, x - 0.88, 2.92))
    axis.plot([5, 5], [1.2, 4.15], color="0.55", linewidth=1.2, linestyle=(0, (4, 3)))
    write(axis, 5, 4.35, "border k", "0.35", 11)
    write(axis, 4.92, 3.31, "state $s_k$", side="right")
    write(axis, 5, 2.9, "✕", RED, 13)
    box(axis, 5, 0.85, "g", width=0.9, height=0.46, colour=BLUE, size=13)
    write(axis, 4.74, 1.62, "sees", BLUE, side="right")
    write(axis, 9.62, 2.7, "2  $\\alpha\\,\\hat\\delta_{k+1}$", BLUE)
    write(axis, 6.6, 0.7, "memory $h_g$, from border to border", BLUE, side="left")
    axis.plot([4.53, 4.34, 4.34], [0.95, 0.95, 2.9], color=BLUE, linewidth=1.4)
    arrows(axis, BLACK, (4.02, 3.08, 5.98, 3.08))
    arrows(axis, RED, (5.98, 2.9, 5.12, 2.9), (5.28, 2.86, 5.28, 1.11))
    arrows(
        axis,
        BLUE,
        (4.78, 3, 4.78, 1.11),
        (9.9, 2.9, 9.42, 2.9),
        (3.5, 0.7, 4.53, 0.7),
        (5.47, 0.7, 6.5, 0.7),
        (4.34, 2.9, 4.02, 2.9),
    )
    write(
        axis,
        4.25,
        1.2,
        "2  synthesise, in chunk k − 1:\n$\\alpha\\,\\hat\\delta_k$ goes into its backward pass",
        BLUE,
        side="right",
    )
    write(
        axis,
        5.6,
        1.2,
        "4  regress, in chunk k: g is taught the gradient\n"
        "that $s_k$ receives there (with $\\alpha\\,\\hat\\delta_{k+1}$ in it)",
        RED,
        side="left",
    )
    write(
        axis,
        0.35,
        0.25,
        "1  forward (black)        3  backward (red), from the border to g alone        "
        "5  update the weights of the QRNN",
        side="left",
    )
    return figure


def schedule(epochs=75, base=5, rate=1e-2):
    figure, axis = plt.subplots(figsize=(10, 2.8), layout="tight")
    at = [epochs * i / 3000 for i in range(3000)]
    runs = [run_at(epoch, base) for epoch in at]
    axis.plot(
        at, [rate * (1 + cos(pi * run.elapsed / run.length)) / 2 for run in runs], color=BLACK
    )
    for index, source, colour in (
        (0, "real", BLACK),
        (1, "synthetic", BLUE),
        (2, "real", BLACK),
        (3, "synthetic", BLUE),
    ):
        span = [epoch for epoch, run in zip(at, runs) if run.index == index]
        axis.axvspan(span[0], span[-1], color=BLUE, alpha=0.12 * (index % 2), linewidth=0)
        write(axis, (span[0] + span[-1]) / 2, 1.13 * rate, f"run {index}\n{source}", colour, 9)
    axis.set(
        xlim=(0, epochs),
        ylim=(0, 1.28 * rate),
        xlabel="epoch",
        ylabel="learning rate",
        yticks=[0, rate / 2, rate],
    )
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def training(folders):
    """Validation perplexity above, learning rate below. Shaded: synthetic epochs of the first folder."""
    figure, axes = plt.subplots(
        2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(3, 1), layout="tight"
    )
    for axis, name in zip(axes, ("valid_perplexity", "learning_rate")):
        for folder in folders:
            rows = study.read_log(Path(folder, "log.csv"))
            axis.plot(
                [int(row["epoch"]) for row in rows],
                [float(row[name]) for row in rows],
                marker=".",
                label=folder,
            )
        for row in study.read_log(Path(folders[0], "log.csv")):
            if row["gradient"] == "synthetic":
                axis.axvspan(
                    int(row["epoch"]) - 1, int(row["epoch"]), color="0.9", linewidth=0, zorder=-1
                )
        axis.set(ylabel=name.replace("_", " "), xlabel="epoch")
    axes[0].legend()
    return figure


def main():
    matplotlib.use("Agg")
    if len(sys.argv) > 1:
        return training(sys.argv[1:]).savefig("training.png", dpi=130)
    for draw in (steps, schedule):
        draw().savefig(study.HERE / f"{draw.__name__}.png", dpi=110)


if __name__ == "__main__":
    main()
