"""The pictures that explain the method, and the picture of your own training. Needs matplotlib.

    python experiments/figures.py                        steps.png, qrnn.png and schedule.png, in experiments/
    python experiments/figures.py trainings/FOLDER ..    training.png, here, of the log.csv in each folder
"""

import sys
from math import cos, pi
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import study                                                            # puts the modules above on the path
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from sgdr import run_at

BLACK, RED, BLUE = "0.15", "#c62828", "#1565c0"


def canvas(width, height):
    """Axes in which one unit is one inch, with nothing drawn."""
    figure, axis = plt.subplots(figsize=(width, height))
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def box(axis, x, y, text, width=0.7, height=0.42, colour=BLACK, size=11):
    """A box with its centre at (x, y)."""
    axis.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, edgecolor=colour,
                                  linewidth=1.3, facecolor="white",
                                  boxstyle="round,pad=0,rounding_size=0.08"))
    axis.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)


def arrow(axis, start, end, colour=BLACK):
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour,
                                   linewidth=1.4, shrinkA=0, shrinkB=0))


def panel(axis, x, y, width, height, title):
    """A grey background with its lower left corner at (x, y)."""
    axis.add_patch(FancyBboxPatch((x, y), width, height, facecolor="0.94", edgecolor="none",
                                  boxstyle="round,pad=0,rounding_size=0.1"))
    axis.text(x + 0.05, y + height + 0.2, title, fontsize=11, va="center", fontweight="bold")


def chunk(axis, xs, y):
    """Cells from left to right: words below, losses above, forward in black and backward in red."""
    for x in xs:
        box(axis, x, y, "QRNN", width=0.8)
        axis.text(x, y - 0.85, "word", ha="center", va="center", fontsize=10)
        axis.text(x, y + 0.88, "loss", ha="center", va="center", fontsize=10)
        arrow(axis, (x, y - 0.7), (x, y - 0.23))
        arrow(axis, (x - 0.1, y + 0.23), (x - 0.1, y + 0.72))
        arrow(axis, (x + 0.1, y + 0.72), (x + 0.1, y + 0.23), RED)
    for left, right in zip(xs, xs[1:]):
        arrow(axis, (left + 0.42, y + 0.08), (right - 0.42, y + 0.08))
        arrow(axis, (right - 0.42, y - 0.08), (left + 0.42, y - 0.08), RED)


def steps():
    figure, axis = canvas(10, 4.5)
    y, border = 3.0, 5.0
    for left, title in ((0.35, "chunk k"), (5.75, "chunk k + 1")):
        panel(axis, left, 1.85, 3.9, 2.3, title)
    chunk(axis, (1.0, 2.3, 3.6), y)
    chunk(axis, (6.4, 7.7, 9.0), y)
    axis.plot([border, border], [1.2, 4.15], color="0.55", linewidth=1.2, linestyle=(0, (4, 3)))
    axis.text(border, 4.35, "border k + 1", ha="center", va="center", fontsize=11, color="0.35")
    arrow(axis, (4.02, y + 0.08), (5.98, y + 0.08))
    axis.text(4.92, y + 0.27, "state $s_{k+1}$", fontsize=10, ha="right")
    axis.text(border, y - 0.1, "✕", color=RED, fontsize=13, ha="center", va="center")
    arrow(axis, (5.98, y - 0.1), (5.12, y - 0.1), RED)
    box(axis, border, 0.85, "g", width=0.9, height=0.46, colour=BLUE, size=13)
    arrow(axis, (4.78, y), (4.78, 1.11), BLUE)
    axis.text(4.74, 1.62, "sees", color=BLUE, fontsize=10, ha="right", va="center")
    arrow(axis, (9.9, y - 0.1), (9.42, y - 0.1), BLUE)
    axis.text(9.66, y - 0.3, "$\\alpha\\,\\hat\\delta_{k+2}$", color=BLUE, fontsize=10, ha="center",
              va="center")
    arrow(axis, (3.5, 0.7), (4.53, 0.7), BLUE)
    arrow(axis, (5.47, 0.7), (6.5, 0.7), BLUE)
    axis.text(6.6, 0.7, "memory $h_g$, from border to border", color=BLUE, fontsize=10, va="center")
    axis.plot([4.53, 4.34, 4.34], [0.95, 0.95, y - 0.1], color=BLUE, linewidth=1.4)
    arrow(axis, (4.34, y - 0.1), (4.02, y - 0.1), BLUE)
    axis.text(4.25, 1.2, "2  synthesise: $\\alpha\\,\\hat\\delta_{k+1}$ goes into\n"
                         "the backward pass of chunk k", color=BLUE, fontsize=10, ha="right", va="center")
    arrow(axis, (5.28, y - 0.14), (5.28, 1.11), RED)
    axis.text(5.6, 1.2, "4  regress, in chunk k + 1: g is taught the gradient\n"
              "that $s_{k+1}$ receives there (with $\\alpha\\,\\hat\\delta_{k+2}$ in it)", color=RED,
              fontsize=10, va="center")
    axis.text(0.35, 0.25, "1  forward (black)        3  backward (red), stopped at the border        "
              "5  update the weights of the QRNN", fontsize=10, va="center")
    return figure


def qrnn():
    figure, axis = canvas(10, 3.5)
    for left, title in ((0.2, "LSTM: each step waits for the one before"),
                        (5.2, "QRNN: one product for all steps, then f × c")):
        panel(axis, left, 0.35, 4.6, 2.65, title)
    for n, x in enumerate((1.0, 2.5, 4.0)):
        box(axis, x, 1.75, "$W\\,[x_t, h_{t-1}]$", width=1.1, height=0.5, colour=RED)
        arrow(axis, (x, 0.85), (x, 1.48))
        axis.text(x, 0.68, f"$x_{n + 1}$", ha="center", va="center", fontsize=11)
        arrow(axis, (x, 2.02), (x, 2.5))
        axis.text(x, 2.66, f"$h_{n + 1}$", ha="center", va="center", fontsize=11)
        if n < 2:
            arrow(axis, (x + 0.57, 1.75), (x + 0.93, 1.75), RED)
    box(axis, 7.5, 1.3, "$W x_1,\\; W x_2,\\; W x_3$ at once: gates of all steps", width=4.1,
        height=0.42, colour=BLUE)
    for n, x in enumerate((6.0, 7.5, 9.0)):
        arrow(axis, (x, 0.75), (x, 1.07))
        axis.text(x, 0.58, f"$x_{n + 1}$", ha="center", va="center", fontsize=11)
        arrow(axis, (x, 1.53), (x, 1.83))
        box(axis, x, 2.05, f"$f_{n + 1} c_{n} + (1 - f_{n + 1}) z_{n + 1}$", width=1.28, height=0.4, size=8)
        arrow(axis, (x, 2.27), (x, 2.57))
        axis.text(x, 2.72, f"$c_{n + 1} \\to h_{n + 1} = o_{n + 1} c_{n + 1}$", ha="center", va="center",
                  fontsize=9)
        if n < 2:
            arrow(axis, (x + 0.65, 2.05), (x + 0.85, 2.05))
    return figure


def schedule(epochs=75, base=5, rate=1e-3):
    figure, axis = plt.subplots(figsize=(10, 2.8))
    at = [epochs * i / 3000 for i in range(3000)]
    runs = [run_at(epoch, base) for epoch in at]
    axis.plot(at, [rate * (1 + cos(pi * run.elapsed / run.length)) / 2 for run in runs], color=BLACK)
    for index in sorted({run.index for run in runs}):
        span = [epoch for epoch, run in zip(at, runs) if run.index == index]
        synthetic = index % 2 == 1
        axis.axvspan(span[0], span[-1], color=BLUE if synthetic else "white", alpha=0.12, linewidth=0)
        source = "synthetic" if synthetic else "real"
        axis.text((span[0] + span[-1]) / 2, 1.13 * rate, f"run {index}\n{source}", ha="center", va="center",
                  fontsize=9, color=BLUE if synthetic else BLACK)
    axis.set(xlim=(0, epochs), ylim=(0, 1.28 * rate), xlabel="epoch", ylabel="learning rate",
             yticks=[0, rate / 2, rate])
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def training(folders):
    """Validation perplexity above, learning rate below. Shaded: epochs of the first folder that ended with
    synthetic gradients.
    """
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(3, 1),
                                layout="constrained")
    for n, folder in enumerate(folders):
        rows = study.read(Path(folder, "log.csv"))
        for axis, name in zip(axes, ("valid_perplexity", "learning_rate")):
            axis.plot([int(row["epoch"]) for row in rows], [float(row[name]) for row in rows], marker=".",
                      label=Path(folder).name)
            for row in rows if n == 0 else ():
                if row["gradient"] == "synthetic":
                    epoch = int(row["epoch"])
                    axis.axvspan(epoch - 1, epoch, color="0.9", linewidth=0, zorder=-1)
            axis.set(ylabel=name.replace("_", " "), xlabel="epoch" if axis is axes[1] else "")
    axes[0].legend()
    return figure


def main():
    matplotlib.use("Agg")
    if len(sys.argv) > 1:
        training(sys.argv[1:]).savefig("training.png", dpi=130)
        return
    for draw in (steps, qrnn, schedule):
        draw().savefig(study.HERE / f"{draw.__name__}.png", dpi=110)


if __name__ == "__main__":
    main()
