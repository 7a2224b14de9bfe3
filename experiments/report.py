"""Make results.md, the tables of README.md and the figures of results from the logs.

    python experiments/report.py      the figures need matplotlib (pip install matplotlib), the text does not

Only the figures of the paper are typed in here. All others are computed from experiments/logs/.
"""

import re
import statistics
import sys
import textwrap

import study
from recall import SEARCH_SEEDS, best_rate
from text import best_rates

LOGS = (
    "text",
    "text-words",
    "recall",
    "recall-cells",
    "search",
    *(f"methods-{scale}-{corpus}" for scale in ("small", "paper") for corpus in ("ptb", "wt2")),
)
# Each method: its name, the test perplexities of the paper's Tables 1 and 2 on PTB and WT2, and the method
# that it is compared with.
PAPER = {
    "bptt": ("truncated BPTT", 62.78, 72.6, None),
    "dni": ("neuron-wise DNI", 62.42, 72.37, "bptt"),
    "cosine": ("BPTT, one cosine", "-", "-", "bptt"),
    "restart": ("BPTT with restart", 64.44, 73.97, "cosine"),
    "dni-restart": ("DNI with restart", 64.71, 73.42, "restart"),
    "alternating": ("alternating", 63.76, 73.35, "restart"),
}
RECALL = {
    "bptt": "truncated BPTT",
    "full": "full BPTT",
    "linear": "layer-wise DNI, one linear map",
    "layer": "layer-wise DNI",
    "neuron": "neuron-wise DNI",
}
TEXT = {
    "bptt": "truncated BPTT",
    "full": "BPTT through 40 steps",
    "twice": "BPTT through two chunks",
    "linear": "layer-wise, one linear map",
    "mlp": "layer-wise, MLP",
    "neuron": "neuron-wise (the paper's)",
    "neuron4": "neuron-wise, taught through 4 borders",
}
COLOURS = {
    "bptt": "0.35",
    "dni": "#d62728",
    "cosine": "#2ca02c",
    "restart": "0.35",
    "dni-restart": "#d62728",
    "alternating": "#1f77b4",
}


def groups(rows, *names):
    """{values of the columns `names`: [rows]}, in the order of the log."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def having(rows, **values):
    """The rows with these values in these columns."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def numbers(rows, name):
    return [float(row[name]) for row in rows]


def spread(values, digits=2):
    """mean ± standard deviation where there are several values; "" for none."""
    if not values:
        return ""
    mean = f"{round(statistics.mean(values), digits) + 0:.{digits}f}"  # + 0: no -0.000
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(head, rows):
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("|" + "|".join(map(str, line)) + "|" for line in lines) + "\n"


# ---------------------------------------------------------------------------------------------------- text.py


def ends(rows):
    """{(arm, T, alpha, rate): {seed: the last row}}"""
    found = {}
    for row in rows:
        found.setdefault((row["arm"], row["T"], row["alpha"], row["rate"]), {})[row["seed"]] = row
    return found


def at_best(rows):
    """{(arm, T): key of `ends`}: each arm at α = 1 and the rate that text.py takes along."""
    best = best_rates(rows)
    return {
        key[:2]: key
        for key in ends(rows)
        if key[2] in ("", "1.0") and key[3] in ("", str(best.get(key[0])))
    }


def gains(found, key):
    """(fewer bits than truncated BPTT of the same seed, the same as shares of what longer BPTT gains).

    There are no shares where longer BPTT gains nothing.
    """
    saved, shares = [], []
    for seed, row in found.get(key, {}).items():
        truncated, ceiling = (
            found.get((arm, key[1], "", ""), {}).get(seed) for arm in ("bptt", "full")
        )
        if truncated and ceiling:
            bits, whole, least = (float(its["bits"]) for its in (row, truncated, ceiling))
            saved.append(whole - bits)
            shares += [(whole - bits) / (whole - least)] if whole > least else []
    return saved, shares if len(shares) == len(saved) else []


def lengths_table(rows, keys):
    """Bits, gain and share for each T and arm; keys: as of `at_best`."""
    found, lines = ends(rows), []
    for T in sorted({T for _, T in keys}, key=int):
        for arm in TEXT:
            key = keys.get((arm, T))
            its, (saved, shares) = list(found.get(key, {}).values()), gains(found, key)
            if its:
                lines.append(
                    [
                        T,
                        TEXT[arm],
                        key[3] or "-",
                        len(its),
                        spread(numbers(its, "bits"), 3),
                        "" if arm == "bptt" else spread(saved, 3),
                        "" if arm in ("bptt", "full") else spread(shares),
                        *(
                            spread([float(row[x]) for row in its if key[3] and row[x]], 3)
                            for x in ("own_cosine", "own_r2")
                        ),
                    ]
                )
    return table(
        [
            "T",
            "",
            "rate of g",
            "seeds",
            "bits",
            "fewer than truncated BPTT, same seed",
            "share of the ceiling's",
            "cosine with its own targets",
            "R² with them",
        ],
        lines,
    )


def characters(rows):
    found, best, lines, alphas = (
        ends(having(rows, seed="0")),
        at_best(rows),
        [],
        ("0.1", "0.9", "1.0"),
    )
    rates = sorted({row["rate"] for row in rows if row["rate"]}, key=float, reverse=True)
    for T in ("2", "5"):
        for arm in ("linear", "mlp", "neuron", "neuron4"):
            mine = [found.get((arm, T, "1.0", rate), {}).get("0") for rate in rates]
            if any(mine):
                lines.append(
                    [
                        T,
                        TEXT[arm],
                        *(
                            f"{float(row['bits']):.3f} ({float(row['own_r2']):+.3f})" if row else ""
                            for row in mine
                        ),
                    ]
                )
    text = (
        "Bits per character, and in brackets R² with g's own targets in the last fifth, by the rate of "
        "g. One seed.\n\n"
        + table(["T", "", *rates], lines)
        + "\nEach g at its best rate, α = 1, on seeds that were not used to find it.\n\n"
        + lengths_table([row for row in rows if row["seed"] != "0"], best)
    )
    two = ends([row for row in rows if row["seed"] in ("1", "2")])
    lines = [
        [
            T,
            TEXT[arm],
            *(spread(gains(two, (arm, T, alpha, best[arm, T][3]))[0], 3) for alpha in alphas),
        ]
        for T in ("2", "5")
        for arm in ("linear", "mlp")
        if (arm, T) in best
    ]
    return (
        text
        + "\nThe discount α: fewer bits than truncated BPTT, same seed; two seeds.\n\n"
        + table(["T", "", *(f"α = {alpha}" for alpha in alphas)], lines)
    )


def gains_table(rows):
    """README's table of text, on seeds that found no rate."""
    found, keys = ends([row for row in rows if row["seed"] != "0"]), at_best(rows)
    lengths = sorted({T for _, T, _, _ in found}, key=int)
    lines = [
        [TEXT[arm], *(spread(gains(found, keys.get((arm, T), (arm, T)))[0], 3) for T in lengths)]
        for arm in ("full", "twice", "linear", "mlp", "neuron")
    ]
    return table(
        ["gain over truncated BPTT, bits per character", *(f"T = {T}" for T in lengths)], lines
    )


# ------------------------------------------------------------------------------------ recall.py, reproduce.py


def recall(rows):
    lines = []
    final = [row for row in rows if int(row["seed"]) not in SEARCH_SEEDS]
    for (counts, arm, b, rate), its in groups(final, "counts", "arm", "borders", "rate").items():
        accuracy = numbers(its, "accuracy")
        several = accuracy * 2 if len(accuracy) == 1 else accuracy
        low, middle, high = statistics.quantiles(several, n=4, method="inclusive")
        found = rate == str(best_rate(rows, counts, arm, b))
        lines.append(
            [
                counts,
                b,
                RECALL[arm],
                (rate or "-") if found else f"{rate}, tried afterwards",
                f"{middle:.2f} [{low:.2f}, {high:.2f}]",
                f"{sum(a > 0.9 for a in accuracy)}/{len(accuracy)}",
            ]
        )
    lines.sort(key=lambda line: (line[:2], list(RECALL.values()).index(line[2])))
    return (
        "Accuracy of the answer at the end, median [quartiles] over the seeds (chance: 0.25), and how "
        "many trainings ended above 0.9. The rates of g were found on two other seeds.\n\n"
        + table(["scored", "borders", "", "rate of g", "accuracy", "above 0.9"], lines)
    )


def cells(rows):
    lines = []
    for (cell, arm, penalty), its in groups(rows, "cell", "arm", "penalty").items():
        accuracy, name = numbers(its, "accuracy"), {"bptt": "no g"}.get(arm, RECALL[arm])
        lines.append(
            [
                cell,
                name,
                penalty if arm != "bptt" else "-",
                f"{statistics.median(accuracy):.2f}",
                f"{sum(a > 0.9 for a in accuracy)}/{len(accuracy)}",
                f"{statistics.median(numbers(its, 'size')):,.2f}",
            ]
        )
    return (
        "One border, answers scored, α = 1, g's rate 1e-4, 1,500 updates. Medians. Size: mean |c| at "
        "the end.\n\n" + table(["network", "g", "penalty", "accuracy", "above 0.9", "size"], lines)
    )


def searched(rows):
    lines = []
    for case, its in groups(rows, "data", "method", "epochs", "lr", "seed").items():
        best = min(its, key=lambda row: float(row["valid_perplexity"]))
        lines.append(
            [
                case[0],
                case[2],
                PAPER[case[1]][0],
                *case[3:],
                *(f"{float(best[name]):.2f}" for name in ("valid_perplexity", "train_perplexity")),
            ]
        )
    lines.sort(key=lambda line: (line[0], int(line[1]), line[2], float(line[5])))
    return (
        "Perplexity of validation and training text (the latter with dropout) at the best epoch, with "
        "the settings of preset `small`.\n\n"
        + table(["text", "epochs", "method", "rate", "seed", "validation", "training"], lines)
    )


def methods_table(ptb, wt2):
    """README's table of methods; "-": not run."""
    of_ptb, of_wt2 = (
        {case: its[-1] for case, its in groups(rows, "method", "seed").items()}
        for rows in (ptb, wt2)
    )
    lines = []
    for method, (name, paper_ptb, paper_wt2, beside) in PAPER.items():
        mine, other = (
            [row for row in last.values() if row["method"] == method] for last in (of_ptb, of_wt2)
        )
        less = [
            float(row["test_perplexity"]) - float(of_ptb[beside, row["seed"]]["test_perplexity"])
            for row in mine
            if (beside, row["seed"]) in of_ptb
        ]
        lines.append(
            [
                name,
                paper_ptb,
                paper_wt2,
                spread(numbers(mine, "test_perplexity")) or "-",
                f"{spread(less)} from {PAPER[beside][0]}" if less else "",
                f"{statistics.median(numbers(mine, 'seconds')) / 60:.0f}" if mine else "-",
                spread(numbers(other, "test_perplexity")) or "-",
            ]
        )
    return table(
        [
            "test perplexity",
            "paper, 4 × 1550, 320 epochs: PTB",
            "WT2",
            "here, 512 + 256, 15 epochs: PTB",
            "difference",
            "core minutes",
            "2 epochs: WT2",
        ],
        lines,
    )


# ---------------------------------------------------------------------------------------------------- figures


def figure_curves(plt, rows):
    """Validation perplexity of the methods, a line a seed: PTB (Figure 2), below it WT2 (Figure 3)."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharey="row")
    for (left, right), ((corpus,), its) in zip(axes, groups(rows, "data").items()):
        epochs, best = float(its[-1]["epoch"]), min(numbers(its, "valid_perplexity"))
        for method, (name, *_) in PAPER.items():
            axis = left if method in ("bptt", "dni", "cosine") else right
            for n, curve in enumerate(groups(having(its, method=method), "seed").values()):
                axis.plot(
                    numbers(curve, "epoch"),
                    numbers(curve, "valid_perplexity"),
                    linewidth=0.8,
                    color=COLOURS[method],
                    label=None if n else name,
                )
        right.axvline(epochs / 3, color="0.35", linewidth=0.8, linestyle=":")  # E_base: a third
        right.axvspan(epochs / 3, epochs, color=COLOURS["alternating"], alpha=0.1, linewidth=0)
        left.set(ylabel="validation perplexity", ylim=(0.95 * best, 2 * best))
        for axis, title in (
            (left, "without restarts"),
            (right, "with a restart (dotted; shaded: alternating is synthetic)"),
        ):
            axis.set(xlabel="epoch", xlim=(0, epochs))
            axis.set_title(f"{corpus.upper()}, {title}", fontsize=10)
            axis.legend(fontsize=7, loc="upper right")
    return figure


# -------------------------------------------------------------------------------------------------------- all


def results(logs):
    """The text of results.md. logs: {name: rows}."""
    text = [
        "# Results\n\nWritten by `python experiments/report.py` from [logs/](logs/README.md), which says "
        "what made them. ± is the standard deviation over seeds."
    ]
    methods = [
        methods_table(logs[f"methods-{scale}-ptb"], logs[f"methods-{scale}-wt2"])
        for scale in ("small", "paper")
        if logs[f"methods-{scale}-ptb"]
    ]
    words = lengths_table(logs["text-words"], {key[:2]: key for key in ends(logs["text-words"])})
    for title, body in (
        ("Does it help on text? `text.py`", characters(logs["text"])),
        ("On words. `text.py --study words`", "Bits per word.\n\n" + words),
        ("Is credit carried? `recall.py`", recall(logs["recall"])),
        ("With a GRU or an LSTM? `recall.py --cells`", cells(logs["recall-cells"])),
        ("Which rate suits which method? `reproduce.py --search`", searched(logs["search"])),
        ("The paper's methods. `reproduce.py`", "![curves](curves.png)\n\n" + "\n".join(methods)),
        *(
            (f"How fast? {path.relative_to(study.LOGS)}", path.read_text())
            for path in (study.LOGS / "speed.txt", *sorted(study.LOGS.glob("gpu/*.txt")))
        ),
    ):
        text.append(f"\n## {title}\n\n{body}")
    # Prose in lines of at most 108 columns; the row of a table as it is.
    return "\n".join(
        line if line.startswith(("|", "!")) else textwrap.fill(line, 108, break_on_hyphens=False)
        for line in "\n".join(text).split("\n")
    )


def with_tables(readme, logs):
    """The text of README.md with its tables between their markers: <!-- table NAME, .. -->, <!-- end -->."""
    tables = {
        "methods": methods_table(logs["methods-small-ptb"], logs["methods-small-wt2"]),
        "text": gains_table(logs["text"]),
    }
    narrow = {name: text.replace(" ± ", "±") for name, text in tables.items()}
    return re.sub(
        r"(<!-- table (\w+).*?-->\n).*?(<!-- end -->)",
        lambda marks: marks[1] + narrow[marks[2]] + marks[3],
        readme,
        flags=re.S,
    )


def main():
    logs, readme = (
        {name: study.read_log(study.LOGS / f"{name}.csv") for name in LOGS},
        study.ROOT / "README.md",
    )
    (study.HERE / "results.md").write_text(results(logs))
    readme.write_text(with_tables(readme.read_text(), logs))
    try:
        import matplotlib
    except ImportError:
        sys.exit("report.py: results.md is written; for the figures, pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
        }
    )
    methods = logs["methods-small-ptb"] + logs["methods-small-wt2"]
    figure_curves(plt, methods).savefig(study.HERE / "curves.png", dpi=130)


if __name__ == "__main__":
    main()
