"""From the logs of recall.py, truncation.py and reproduce.py: experiments/results.md and its figures.

    python experiments/report.py              needs matplotlib for the figures (pip install matplotlib); without it, the text alone

Nothing is typed in but what others have published: every other figure is computed from experiments/logs/.
"""

import json
import statistics
import sys

import study
import train

from dni import LayerDNI, NeuronDNI

OUT = study.ROOT / "experiments"
REPRODUCED = {scale: [f"reproduce-{scale}-{data}" for data in ("ptb", "wt2")] for scale in ("small", "paper")}
LOGS = ("recall", "recall-pairs", "recall-answers", "taught", "truncation", *REPRODUCED["small"], *REPRODUCED["paper"])
# Test perplexities of the paper that could be checked; (corpus, method): figure.
PUBLISHED = {("ptb", "bptt"): 62.78, ("wt2", "bptt"): 72.6}
NAMES = {"bptt": "truncated BPTT", "cut": "truncated BPTT, short texts", "dni": "neuron-wise DNI", "restart": "BPTT with restart", "dni-restart": "DNI with restart",
         "alternating": "alternating", "full": "full BPTT", "neuron": "neuron-wise DNI", "layer": "layer-wise DNI",
         "window": "neuron-wise, window 2", "scaled": "neuron-wise, targets normalised",
         "shuffled": "neuron-wise, predictions shuffled among streams", "swapped": "neuron-wise, predictions swapped between streams at the same place", "line": "neuron-wise, g(c) = w c",
         "amnesic": "neuron-wise, h_g zero at every border", "memory": "neuron-wise, h_g learned over 4 borders", "named": "neuron-wise, each neuron named", "terminal": "neuron-wise, zero at the end of short texts"}
ORDER = ("bptt", "cut", "full", "neuron", "window", "amnesic", "memory", "scaled", "terminal", "line", "shuffled", "swapped", "named", "layer")
COLOURS = {"bptt": "0.35", "full": "#2ca02c", "neuron": "#d62728", "layer": "#1f77b4", "dni": "#d62728",
           "restart": "0.35", "dni-restart": "#d62728", "alternating": "#1f77b4"}


# ------------------------------------------------------------------------------------------------------ a few statistics

def groups(rows, *names):
    """{values of the columns `names`: [rows]}, in the order of the log."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def numbers(rows, name):
    return [float(row[name]) for row in rows]


def last_of(rows, *case):
    """The last row of each run."""
    return [run[-1] for run in groups(rows, *case).values()]


def quartiles(values):
    """(first quartile, median, third)"""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def spread(values, digits=2):
    """mean ± standard deviation over n values"""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else " (one seed)")


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *rows)) + "\n"


def made_by(log):
    commands = {}
    for facts in json.loads(log.with_suffix(".json").read_text()):
        rest = "; ".join(f"{name} {value}" for name, value in facts.items() if name not in ("command", "machine", "torch", "python"))
        commands.setdefault(f"on {facts['machine']}; torch {facts['torch']}, Python {facts['python']}; {rest}.", []).append(f"`{facts['command']}`")
    return "Made by " + " And by ".join(f"{', '.join(those)} {where}" for where, those in commands.items()) + f" Log: `{log.relative_to(study.ROOT)}`.\n"


# ---------------------------------------------------------------------------------------------------- the three studies

def recall(rows):
    runs = groups(rows, "arm", "alpha", "borders", "seed")
    borders = sorted({row["borders"] for row in rows})
    lines, agreement = [], []
    for arm, alpha in sorted(groups(rows, "arm", "alpha"), key=lambda case: (ORDER.index(case[0]), case[1])):
        line, of_g = [NAMES[arm], alpha or "-"], [NAMES[arm], alpha]
        for b in borders:
            mine = [run for (a, al, bo, _), run in runs.items() if (a, al, bo) == (arm, alpha, b)]
            if not mine:
                line += ["not run", "", ""]
            else:
                low, middle, high = quartiles([float(run[-1]["accuracy"]) for run in mine])
                line += [f"{middle:.2f} [{low:.2f}, {high:.2f}]", f"{sum(float(run[-1]['accuracy']) > 0.9 for run in mine)}/{len(mine)}",
                         f"{statistics.median(float(run[-1]['perplexity']) / float(run[-1]['floor']) for run in mine):.3f}"]
            for name in ("true_cosine", "own_cosine", "target_cosine", "target_r2"):
                means = [statistics.mean(numbers(run, name)) for run in mine]
                of_g.append(f"{statistics.median(means):+.3f}" if mine else "")
        lines.append(line)
        if alpha:
            agreement.append(of_g)
    return (f"Accuracy of the answer after {max(int(row['updates']) for row in rows):,} updates, median [quartiles] over the seeds (chance: 0.25); "
            "how many of the runs ended above 0.9; test perplexity over its floor, median.\n\n"
            + table(["arm", "α"] + [h for b in borders for h in (f"{b} border{'s' * (b > '1')}: accuracy", "above 0.9", "perplexity / floor")], lines)
            + "\nDoes g learn? Its predictions against the true future gradient, against the same with a factor α a border (own: the best its targets "
              "can come to), and against its bootstrapped targets in training; means over the tests of a run, medians over seeds.\n\n"
            + table(["arm", "α"] + [f"{b}: {h}" for b in borders for h in ("cosine, true", "cosine, own", "cosine, target", "R², target")], agreement))


def taught(rows):
    """R² and cosine of each interface with the true gradient, medians over seeds."""
    columns = sorted(groups(rows, "loss", "updates", "borders"), key=lambda column: (column[0] == "all", *map(int, column[1:])))
    lines = []
    for arm in sorted({row["arm"] for row in rows}, key=ORDER.index):
        mine = [[row for row in rows if (row["arm"], row["loss"], row["updates"], row["borders"]) == (arm, *column)] for column in columns]
        lines.append([NAMES[arm], *(f"{statistics.median(numbers(those, 'r2')):.2f}, {statistics.median(numbers(those, 'cosine')):.2f}" for those in mine)])
    answers = [[row for row in rows if (row["loss"], row["updates"], row["borders"]) == column] for column in columns]
    lines.append(["accuracy of the model", *(f"{statistics.median(numbers(those, 'accuracy')):.2f}" for those in answers)])
    return ("A model trained with full credit, frozen; each interface taught its true gradients. R² and cosine of predictions made before learning "
            "from them, medians over the seeds.\n\n"
            + table(["interface", *(f"{loss}, {updates} updates, {b} border{'s' * (b > '1')}" for loss, updates, b in columns)], lines)
            + f"\n{len({row['seed'] for row in rows})} seeds.\n")


def truncation(rows):
    best = {(row["T"], row["arm"], row["alpha"], row["seed"]): row for row in last_of(rows, "T", "arm", "alpha", "seed")}
    lines = []
    for T, arm, alpha in sorted({case[:3] for case in best}, key=lambda case: (int(case[0]), ORDER.index(case[1]), case[2])):
        mine = {seed: row for (*case, seed), row in best.items() if case == [T, arm, alpha]}
        gains = [float(row["test_perplexity"]) - float(best[T, "bptt", "", seed]["test_perplexity"]) for seed, row in mine.items()
                 if (T, "bptt", "", seed) in best]
        lines.append([T, NAMES[arm], alpha or "-", len(mine), spread(numbers(mine.values(), "valid_perplexity")), spread(numbers(mine.values(), "test_perplexity")),
                      *(["", "", ""] if arm == "bptt" else [spread(gains), spread(numbers(mine.values(), "dni_cosine"), 3), spread(numbers(mine.values(), "dni_r2"), 4)])])
    return table(["T", "arm", "α", "seeds", "validation", "test", "test, less BPTT of the same seed", "cosine with target, last epoch", "R²"], lines)


def chosen(rows, data, method):
    """The runs of a method at the rate that was best on validation text with its first seed."""
    from reproduce import best_rate
    mine = [row for row in rows if (row["data"], row["method"]) == (data, method)]
    if not mine:
        return []
    rate = best_rate(rows, data, method, mine[0]["seed"])
    return [row for row in mine if row["lr"] == rate]


def reproduce(logs):
    """Tables 1 and 2 of the paper; logs: {scale: rows}."""
    text = []
    for title, methods in (("Table 1: constant learning rate", ("bptt", "dni")), ("Table 2: warm restarts", ("restart", "dni-restart", "alternating"))):
        lines = []
        for method in methods:
            line = [NAMES[method]]
            for data in ("ptb", "wt2"):
                line.append(PUBLISHED.get((data, method), "not to hand"))
                for scale, rows in logs.items():
                    last = last_of(chosen(rows, data, method), "seed")
                    line.append(f"{spread(numbers(last, 'test_perplexity'))}{f', {len(last)} seeds' * (len(last) > 1)}, rate {last[0]['lr']}" if last else "not run at this scale")
            lines.append(line)
        text.append(f"**{title}**, test perplexity\n\n" + table(
            ["method"] + [h for data in ("PTB", "WT2") for h in (f"{data}: published", *(f"scale {scale}" for scale in logs))], lines))
    small = logs["small"]
    if small:
        rates = sorted({row["lr"] for row in small}, key=float)
        lines = []
        for (data, method), mine in groups(small, "data", "method").items():
            seed = mine[0]["seed"]
            best = {lr: min(numbers([row for row in mine if (row["lr"], row["seed"]) == (lr, seed)], "valid_perplexity"), default=None) for lr in rates}
            lines.append([data, NAMES[method], seed, *(f"{best[lr]:.2f}" if best[lr] else "-" for lr in rates)])
        pairs = []
        for data in dict.fromkeys(row["data"] for row in small):
            tested = {m: {row["seed"]: float(row["test_perplexity"]) for row in chosen(small, data, m)} for m in NAMES}
            for one, other in (("dni", "bptt"), ("dni-restart", "restart"), ("alternating", "restart"), ("alternating", "dni-restart"), ("restart", "bptt")):
                less = [tested[one][seed] - tested[other][seed] for seed in tested[one] if seed in tested[other]]
                pairs += [[data, f"{NAMES[one]} less {NAMES[other]}", len(less), spread(less)]] if less else []
        text.append("Test perplexity of one method less that of another, same seed, each at its own rate, scale small.\n\n"
                    + table(["corpus", "difference", "seeds", "mean"], pairs))
        text.append("The search at scale small: best validation perplexity of the first seed at each rate.\n\n"
                    + table(["corpus", "method", "seed", *rates], lines))
    return "\n".join(text)


# --------------------------------------------------------------------------------------------------------------- figures

def figure_recall(plt, studies):
    """A row of panels for each study, (what its loss counts, its rows); a panel for each number of borders."""
    borders = sorted({row["borders"] for _, rows in studies for row in rows})
    figure, axes = plt.subplots(len(studies), len(borders), figsize=(4 * len(borders), 0.6 + 2.6 * len(studies)), sharex=True, sharey=True, squeeze=False)
    for (counts, rows), line in zip(studies, axes):
        line[0].set_ylabel(f"{counts}\naccuracy of the answer")
        for axis, b in zip(line, borders):
            for (arm, alpha), mine in groups([row for row in rows if row["borders"] == b], "arm", "alpha").items():
                if alpha not in ("", "0.9") or arm not in ("bptt", "full", "neuron", "layer"):
                    continue
                steps = groups(mine, "updates")
                low, middle, high = zip(*(quartiles(numbers(step, "accuracy")) for step in steps.values()))
                updates = [int(u) for u, in steps]
                axis.plot(updates, middle, color=COLOURS[arm], label=NAMES[arm])
                axis.fill_between(updates, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
            axis.axhline(0.25, color="0.7", linewidth=0.8, linestyle=":")
    for top, bottom, b in zip(axes[0], axes[-1], borders):
        top.set_title(f"{b} border{'s' * (b > '1')} between symbol and answer")
        bottom.set_xlabel("updates")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def figure_truncation(plt, rows):
    last = {(row["T"], row["arm"], row["seed"]): float(row["test_perplexity"]) for row in last_of(rows, "T", "arm", "alpha", "seed")
            if row["alpha"] in ("", "0.9")}
    lengths = sorted({T for T, _, _ in last}, key=int)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2))
    for arm in ("bptt", "neuron", "layer"):
        found = {T: [value for (t, a, _), value in last.items() if (t, a) == (T, arm)] for T in lengths}
        found = {int(T): values for T, values in found.items() if values}
        left.plot(list(found), [statistics.mean(v) for v in found.values()], "o-", color=COLOURS[arm], label=NAMES[arm], markersize=4)
        if arm != "bptt":
            for T in lengths:
                gains = [value - last[T, "bptt", seed] for (t, a, seed), value in last.items() if (t, a) == (T, arm) and (T, "bptt", seed) in last]
                right.plot([int(T) * (0.96 if arm == "neuron" else 1.04)] * len(gains), gains, "o", color=COLOURS[arm], markersize=4,
                           label=NAMES[arm] if T == lengths[0] else None)
    right.axhline(0, color="0.35", linewidth=0.8)
    for axis, label in ((left, "test perplexity"), (right, "test perplexity less BPTT's, same seed")):
        axis.set_xscale("log")
        axis.set_xticks([int(T) for T in lengths], lengths)
        axis.minorticks_off()
        axis.set(xlabel="T, steps of a chunk", ylabel=label)
        axis.legend(fontsize=7)
    return figure


def figure_curves(plt, rows):
    from reproduce import e_base
    from sgdr import run_at
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    epochs = max(int(row["epoch"]) for row in rows)
    fine = [i * epochs / 2000 for i in range(2000)]
    for axis, title, methods in ((axes[0], "constant rate", ("bptt", "dni")), (axes[1], "restarts; shaded: alternating is synthetic", ("restart", "dni-restart", "alternating"))):
        for method in methods:
            curves = groups(chosen(rows, "ptb", method), "epoch")
            values = {int(e): numbers(of, "valid_perplexity") for (e,), of in curves.items()}
            axis.plot(list(values), [statistics.mean(v) for v in values.values()], ".-", color=COLOURS[method], label=NAMES[method])
            axis.fill_between(list(values), [min(v) for v in values.values()], [max(v) for v in values.values()], color=COLOURS[method], alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="epoch", xlim=(0, 1.02 * epochs))
        axis.legend(fontsize=7)
    runs = [run_at(e, base=e_base("small", "ptb")).run for e in fine]
    for run in sorted(set(runs)):
        span = [e for e, r in zip(fine, runs) if r == run]
        if run % 2:
            axes[1].axvspan(span[0], span[-1], color=COLOURS["alternating"], alpha=0.1, linewidth=0)
        elif run:
            axes[1].axvline(span[0], color="0.7", linewidth=0.8, linestyle=":")
    axes[0].set(ylabel="validation perplexity", ylim=(None, 2.2 * min(numbers(rows, "valid_perplexity"))))
    return figure


def results(logs):
    """The text of results.md. logs: {name: rows}."""
    text = ["# Results\n\nWritten by `python experiments/report.py` out of `experiments/logs/`. ± is the standard deviation over seeds.\n"]

    def section(title, body, rows, *names, picture=None):
        there = [name for name in names if logs[name]]
        text.append(f"\n## {title}\n")
        text.append("\n".join([*([f"![{title}]({picture})\n"] if picture else []), body(rows), *(made_by(study.LOGS / f"{name}.csv") for name in there)])
                    if there else "Not run yet.\n")
    section("Is credit carried? `recall.py`", recall, logs["recall"], "recall", picture="recall.png")
    section("Is it credit for the symbol? `recall.py --study pairs`", recall, logs["recall-pairs"], "recall-pairs")
    section("Where nothing else is to be learned: `recall.py --study answers`", recall, logs["recall-answers"], "recall-answers")
    section("What could be known: `taught.py`", taught, logs["taught"], "taught")
    section("Where does it matter? `truncation.py`", truncation, logs["truncation"], "truncation", picture="truncation.png")
    reproduced = {scale: [row for name in names for row in logs[name]] for scale, names in REPRODUCED.items()}
    section("The paper's tables. `reproduce.py`", reproduce, reproduced, *(name for names in REPRODUCED.values() for name in names), picture="curves.png")
    text.append("\nSize of the interface for the paper's model (layers of 1550, 1550, 1550, 400): neuron-wise "
                f"{train.parameters(NeuronDNI()):,} parameters, layer-wise {train.parameters(LayerDNI([1550] * 3 + [400])):,}.\n")
    return "\n".join(text)


def main():
    logs = {name: study.read(study.LOGS / f"{name}.csv") for name in LOGS}
    (OUT / "results.md").write_text(results(logs))
    try:
        import matplotlib
    except ImportError:
        sys.exit("report.py: results.md is written; for the figures, pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    studies = [(counts, logs[name]) for counts, name in (("every word counts", "recall"), ("answers alone count", "recall-answers")) if logs[name]]
    for name, draw, rows in (("recall", figure_recall, studies), ("truncation", figure_truncation, logs["truncation"]),
                             ("curves", figure_curves, logs["reproduce-small-ptb"])):
        if rows:
            figure = draw(plt, rows)
            figure.savefig(OUT / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
