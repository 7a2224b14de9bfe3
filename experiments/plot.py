"""Draw trainings: validation perplexity above, learning rate below, against epochs.

    python experiments/plot.py trainings/ptb-alternating trainings/ptb-restart --out training.png

What is drawn is each folder's log.csv. Vertical lines are restarts, at the row before the one they fall in.
Shaded spans ended with synthetic gradients, in the first training that has any. Needs matplotlib.
"""

import argparse
import csv
from pathlib import Path


def read(folder):
    """The rows of the folder's log, {column: string}. Raises OSError where there is none."""
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def draw(plt, logs):
    """A figure of logs, {label: rows}."""
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(3, 1),
                                          layout="constrained")
    for width, (label, rows) in zip(range(len(logs), 0, -1), logs.items()):     # so that none hides another
        epochs, look = [float(row["epoch"]) for row in rows], dict(linewidth=width, marker=".", ms=width + 5)
        above.plot(epochs, [float(row["valid_perplexity"]) for row in rows], label=label, **look)
        below.plot(epochs, [float(row["learning_rate"]) for row in rows], **look)
    pairs = [list(zip([{**rows[0], "epoch": 0}, *rows], rows)) for rows in logs.values()]
    restarts = {float(last["epoch"]) for its in pairs for last, row in its if last["run"] != row["run"]}
    spans = [[(float(last["epoch"]), float(row["epoch"])) for last, row in its
              if row["gradient"] == "synthetic"] for its in pairs]
    for axis in (above, below):
        for n, epoch in enumerate(sorted(restarts)):
            axis.axvline(epoch, color="0.6", linewidth=0.6, zorder=0, label="_" * n + "restart")
        for n, span in enumerate(next(filter(None, spans), [])):
            axis.axvspan(*span, color="0.9", linewidth=0, zorder=-1,
                         label="_" * n + "synthetic gradients")
    above.set(ylabel="validation perplexity", xlim=(0, None))
    below.set(ylabel="learning rate", xlabel="epoch", yscale="log")
    below.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path)
    parser.add_argument("--out", metavar="FILE", default="training.png", help="[%(default)s]")
    arguments = parser.parse_args()
    names = [folder.resolve().name for folder in arguments.folders]
    try:
        import matplotlib.pyplot as plt
        logs = {name if names.count(name) == 1 else str(folder): read(folder)
                for name, folder in zip(names, arguments.folders)}
        draw(plt, logs).savefig(arguments.out, dpi=130)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"plot.py: error: {error}\n")


if __name__ == "__main__":
    main()
