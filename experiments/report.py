"""Make results.md, the tables of README.md and the figures of results from the logs.

    python experiments/report.py      the figures need matplotlib (pip install matplotlib), the text does not

Only the figures of the paper are typed in here. All others are computed from experiments/logs/.
"""

import json
import re
import statistics
import sys
import textwrap

import study
from dni import LayerDNI, NeuronDNI
from recall import SEARCH_SEEDS, best_rate
from text import best_rates

METHODS = ("methods-small-ptb", "methods-small-wt2", "methods-paper-ptb", "methods-paper-wt2")
LOGS = ("text", "text-words", "taught-ptb-chars", "recall", "search", *METHODS)
# Each method: its name, the test perplexities of the paper's Tables 1 and 2 on PTB and WT2, and the method
# that it is compared with.
PAPER = {"bptt": ("truncated BPTT", 62.78, 72.6, None),
         "dni": ("neuron-wise DNI", 62.42, 72.37, "bptt"),
         "cosine": ("BPTT, one cosine", "-", "-", "bptt"),
         "restart": ("BPTT with restart", 64.44, 73.97, "cosine"),
         "dni-restart": ("DNI with restart", 64.71, 73.42, "restart"),
         "alternating": ("alternating", 63.76, 73.35, "restart")}
RECALL = {"bptt": "truncated BPTT", "full": "full BPTT", "layer": "layer-wise DNI",
          "linear": "layer-wise DNI, one linear map", "neuron": "neuron-wise DNI"}
TEXT = {"bptt": "truncated BPTT", "full": "longer BPTT (the ceiling)", "twice": "BPTT through two chunks",
        "linear": "layer-wise, one linear map", "mlp": "layer-wise, MLP",
        "neuron": "neuron-wise (the paper's)", "neuron4": "neuron-wise, taught through 4 borders",
        "line": "each neuron: a c + b"}
RED, BLUE, GREEN, GREY, PURPLE, CYAN = "#d62728", "#1f77b4", "#2ca02c", "0.35", "#9467bd", "#17becf"
COLOURS = {"bptt": GREY, "full": GREEN, "twice": PURPLE, "neuron": RED, "layer": CYAN, "linear": BLUE,
           "mlp": CYAN, "line": "#ff7f0e", "dni": RED, "cosine": GREEN, "restart": GREY, "dni-restart": RED,
           "alternating": BLUE}


# ------------------------------------------------------------------------------------------- a few statistics

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


def quartiles(values):
    """(first quartile, median, third)"""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def spread(values, digits=2, alone=""):
    """mean ± standard deviation; `alone` is said of a single value."""
    mean = f"{round(statistics.mean(values), digits) + 0:.{digits}f}"         # + 0: no -0.000
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else alone)


def borders_of(b):
    return f"{b} border" if b == "1" else f"{b} borders"


def table(head, rows):
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("|" + "|".join(map(str, line)) + "|" for line in lines) + "\n"


# --------------------------------------------------------------------------------------------- text.py

def ends(rows):
    """{(arm, T, alpha, rate): {seed: the last row}}"""
    found = {}
    for row in rows:
        found.setdefault((row["arm"], row["T"], row["alpha"], row["rate"]), {})[row["seed"]] = row
    return found


def bits_of(its):
    return {seed: float(row["bits"]) for seed, row in its.items()}


def given_back(found, key):
    """{seed: (fewer bits than truncated BPTT's, the same as a share of what longer BPTT gains)}.

    The share is None where longer BPTT gains nothing.
    """
    truncated, ceiling = (bits_of(found.get((arm, key[1], "", ""), {})) for arm in ("bptt", "full"))
    gains = {}
    for seed, bits in bits_of(found[key]).items():
        if seed in truncated and seed in ceiling:
            gain, gap = truncated[seed] - bits, truncated[seed] - ceiling[seed]
            gains[seed] = gain, gain / gap if gap > 0 else None
    return gains


def at_best(rows):
    """{(arm, T): key of `ends`}: each arm at α = 1 and the rate that text.py takes along."""
    best = best_rates(rows)
    return {key[:2]: key for key in ends(rows)
            if key[2] in ("", "1.0") and key[3] in ("", str(best.get(key[0])))}


def text_rates(rows):
    """Bits at every rate of g, T = 2 and 5, seed 0."""
    found, lines = ends(having(rows, seed="0")), []
    rates = sorted({row["rate"] for row in rows if row["rate"]}, key=float, reverse=True)
    for T in ("2", "5"):
        plain = [f"{TEXT[arm]} {bits_of(found[arm, T, '', ''])['0']:.3f}" for arm in ("bptt", "full")]
        lines.append([f"**T = {T}**: {', '.join(plain)}", *[""] * len(rates)])
        for arm in TEXT:
            mine = [found.get((arm, T, "1.0", rate), {}).get("0") for rate in rates]
            if any(mine):
                cells = (f"{float(row['bits']):.3f} ({float(row['r2']):+.3f})" if row else "" for row in mine)
                lines.append([TEXT[arm], *cells])
    return table(["g, its learning rate:", *rates], lines)


def text_lengths(rows, keys):
    """Bits, gain and share for each T and arm; keys: of `at_best`."""
    found, lines = ends(rows), []
    for T in sorted({T for _, T in keys}, key=int):
        for arm in TEXT:
            key = keys.get((arm, T))
            if key in found:
                its, gains = found[key], given_back(found, key).values()
                shares, more = [share for _, share in gains], ["", "", "", ""]
                if arm != "bptt" and gains:
                    more[0] = spread([gain for gain, _ in gains], 3)
                    more[1] = "" if arm == "full" or None in shares else spread(shares)
                if key[3]:
                    more[2:] = (spread(numbers(its.values(), name), 3) for name in ("cosine", "r2"))
                bits = spread(list(bits_of(its).values()), 3)
                lines.append([T, TEXT[arm], key[3] or "-", len(its), bits, *more])
    return table(["T", "", "rate of g", "seeds", "bits", "fewer than truncated BPTT, same seed",
                  "share of the ceiling's", "cosine with target", "R²"], lines)


def characters(rows):
    others, best = [row for row in rows if row["seed"] != "0"], best_rates(rows)
    lines, alphas = [], ("0.1", "0.9", "1.0")
    found = ends(others)
    for T in ("2", "5"):
        for arm in ("linear", "mlp"):
            keys = [(arm, T, alpha, str(best.get(arm))) for alpha in alphas]
            if all(key in found for key in keys):
                gains = [given_back(found, key) for key in keys]
                seeds = sorted(set.intersection(*map(set, gains)))
                fewer = (spread([gain[seed][0] for seed in seeds], 3) for gain in gains)
                lines.append([T, TEXT[arm], len(seeds), *fewer])
    return ("Bits per character, and in brackets R² with g's own targets in the last fifth. One seed.\n\n"
            + text_rates(rows)
            + "\nEach g at its best rate, α = 1, on seeds that were not used to find it.\n\n"
            + text_lengths(others, at_best(rows)) + "\nThe discount α: fewer bits than truncated BPTT, same "
            "seeds.\n\n" + table(["T", "", "seeds", *(f"α = {alpha}" for alpha in alphas)], lines))


def words(rows):
    return "Bits per word.\n\n" + text_lengths(rows, at_best_of_one(rows))


def at_best_of_one(rows):
    """`at_best` of a log in which each arm has one rate."""
    return {key[:2]: key for key in ends(rows)}


def taught(rows):
    """R² of each g with the true gradient, by the borders it has learned from, at its best rate."""
    lines, counts = [], sorted({row["borders"] for row in rows}, key=int)
    for (arm,), mine in groups(rows, "arm").items():
        last = groups(having(mine, borders=counts[-1]), "rate")
        (best,) = max(last, key=lambda rate: statistics.mean(numbers(last[rate], "r2")))
        found = (numbers(having(mine, rate=best, borders=n), "r2") for n in counts)
        lines.append([TEXT[arm], best, *(spread(r2, 4, " (one seed)") for r2 in found)])
    return ("R² with the true gradient, of predictions made before learning from it, by the number of "
            "borders that g has learned from, each stream's counted; at the rate that is best in the end.\n\n"
            + table(["", "rate of g", *(f"{int(n):,}" for n in counts)], lines))


# --------------------------------------------------------------------------------------------- recall.py

def finals(rows):
    """(rows of the search, {(counts, arm, borders): rows at the best rate}, {the same: rows at others})."""
    search, found, others = [], {}, {}
    for row in rows:
        if int(row["seed"]) in SEARCH_SEEDS:
            search.append(row)
    for case, its in groups(rows, "counts", "arm", "borders").items():
        best = str(best_rate(search, *case))
        its = [row for row in its if int(row["seed"]) not in SEARCH_SEEDS]
        found[case], others[case] = having(its, rate=best), [row for row in its if row["rate"] != best]
    return search, found, others


def accuracy_of(rows):
    accuracy = numbers([its[-1] for its in groups(rows, "seed").values()], "accuracy")
    low, middle, high = quartiles(accuracy)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}], {sum(a > 0.9 for a in accuracy)}/{len(accuracy)}"


def recall(rows):
    search, found, others = finals(rows)
    borders, lines, agreement, again, searched = sorted({b for *_, b in found}), [], [], [], []
    for counts in ("all", "answers"):
        for arm in [arm for arm in ("bptt", "full", "layer", "linear", "neuron")
                    if any(found.get((counts, arm, b)) for b in borders)]:
            line, of_g = [counts, RECALL[arm]], [counts, RECALL[arm]]
            for b in borders:
                mine = found.get((counts, arm, b), [])
                rate = mine[0]["rate"] if mine else ""
                line.append((accuracy_of(mine) if mine else "") + (f" (rate {rate})" if rate else ""))
                for name in ("true_cosine", "target_r2"):
                    means = [statistics.mean(numbers(its, name)) for its in groups(mine, "seed").values()]
                    of_g.append(f"{statistics.median(means):+.3f}" if means else "")
            lines.append(line)
            if arm not in ("bptt", "full"):
                agreement.append(of_g)
    for (counts, arm, b), its in others.items():
        again += [[counts, RECALL[arm], b, rate, accuracy_of(mine)]
                  for (rate,), mine in groups(its, "rate").items()]
    rates = sorted({row["rate"] for row in search}, key=float, reverse=True)
    for (counts, arm, b), its in groups(search, "counts", "arm", "borders").items():
        last = [groups(having(its, rate=rate), "seed").values() for rate in rates]
        means = (f"{statistics.mean(numbers([r[-1] for r in by_seed], 'accuracy')):.2f}" if by_seed else ""
                 for by_seed in last)
        searched.append([counts, RECALL[arm], b, *means])
    searched.sort(key=lambda line: (line[0], line[1], line[2]))
    return (f"Accuracy of the answer after {max(int(row['updates']) for row in rows):,} updates, median "
            "[quartiles] over the seeds (chance: 0.25), how many of the runs ended above 0.9, and the rate "
            "of g.\n\n" + table(["counted", "arm", *map(borders_of, borders)], lines)
            + "\nDoes g learn? Cosine of its predictions with the true future gradient, and R² with its own "
              "targets in training; means over the tests of a run, medians over seeds.\n\n"
            + table(["counted", "arm", *(f"{borders_of(b)}: {of_what}" for b in borders
                                         for of_what in ("cosine, true", "R², target"))], agreement)
            + "\nThe same at another rate.\n\n"
            + table(["counted", "arm", "borders", "rate", "accuracy"], again)
            + "\nThe search: mean accuracy of two seeds of its own.\n\n"
            + table(["counted", "arm", "borders", *(f"rate {rate}" for rate in rates)], searched))


# --------------------------------------------------------------------------------------------- reproduce.py

def by_method(rows):
    """{method: (test perplexities, their differences from its counterpart's of the same seed, median minutes,
    the best validation perplexity of each training at the end of an epoch)}."""
    trainings, found = groups(rows, "method", "seed"), {}
    tests = {case: float(its[-1]["test_perplexity"]) for case, its in trainings.items()}
    for method, (_, _, _, other) in PAPER.items():
        mine = {seed: its for (name, seed), its in trainings.items() if name == method}
        if mine:
            less = [tests[method, seed] - tests[other, seed] for seed in mine if (other, seed) in tests]
            valid = [min(float(row["valid_perplexity"]) for row in its if float(row["epoch"]).is_integer())
                     for its in mine.values()]                          # only their models are tested
            minutes = statistics.median(float(its[-1]["seconds"]) for its in mine.values()) / 60
            found[method] = [tests[method, seed] for seed in mine], less, f"{minutes:.0f}", valid
    return found


def methods(logs):
    """The paper's methods, a table for each of the logs [rows]."""
    text = []
    for rows in filter(None, logs):
        data, lines = rows[0]["data"], []
        for method, (tests, less, minutes, valid) in by_method(rows).items():
            name, ptb, wt2, other = PAPER[method]
            lines.append([name, ptb if data == "ptb" else wt2, len(tests), spread(tests),
                          f"{PAPER[other][0]}: {spread(less)}" if less else "", spread(valid), minutes])
        text.append(f"**{data}**, {rows[-1]['epoch']} epochs\n\n" + table(
            ["method", "test: the paper", "seeds", "test: here", "difference from, same seed",
             "best validation at an epoch's end", "minutes"], lines))
    return "\n".join(text)


def searched(rows):
    """The best validation perplexity of each case of `reproduce.py --search`."""
    lines = []
    cases = groups(rows, "data", "method", "epochs", "lr", "seed")
    for (corpus, method, epochs, rate, seed), its in cases.items():
        best = min(its, key=lambda row: float(row["valid_perplexity"]))
        lines.append([corpus, epochs, PAPER[method][0], rate, seed,
                      *(f"{float(best[name]):.2f}" for name in ("valid_perplexity", "train_perplexity"))])
    lines.sort(key=lambda line: (line[0], int(line[1]), line[2], float(line[5])))
    return ("Perplexity of validation and training text (the latter with dropout) at the best epoch, with "
            "the settings of preset `small`.\n\n"
            + table(["text", "epochs", "method", "rate", "seed", "validation", "training"], lines))


def methods_table(ptb, wt2):
    """README's table of methods; "-": not run."""
    found, other, lines = by_method(ptb), by_method(wt2), []
    for method, (name, paper_ptb, paper_wt2, beside) in PAPER.items():
        tests, less, minutes, _ = found.get(method, ([], [], "-", []))
        lines.append([name, paper_ptb, paper_wt2, spread(tests) if tests else "-",
                      f"{spread(less)} from {PAPER[beside][0]}" if less else "", minutes,
                      spread(other[method][0]) if method in other else "-"])
    return table(["test perplexity", "paper: PTB", "paper: WT2", "here: PTB", "difference, same seed",
                  "minutes", "here: WT2"], lines)


def gains_table(rows):
    """README's table of text: bits saved against truncated BPTT, on seeds that found no rate."""
    found, keys = ends([row for row in rows if row["seed"] != "0"]), at_best(rows)
    lengths, lines = sorted({T for _, T, _, _ in found}, key=int), []
    for arm in ("full", "twice", "linear", "mlp", "neuron"):
        gains = [given_back(found, keys[arm, T]).values() if keys.get((arm, T)) in found else []
                 for T in lengths]
        lines.append([TEXT[arm], *(spread([gain for gain, _ in g], 3) if g else "" for g in gains)])
    return table(["bits saved per character", *(f"T = {T}" for T in lengths)], lines)


# ------------------------------------------------------------------------------------ figures, and all of it

def figure_text(plt, rows):
    """Bits, share of the gap and R² against T, each arm at its best rate."""
    found, keys = ends([row for row in rows if row["seed"] != "0"]), at_best(rows)
    lengths = sorted({T for _, T, _, _ in found}, key=int)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for arm in ("bptt", "full", "twice", "linear", "mlp", "neuron", "line"):
        mine = [keys[arm, T] for T in lengths if keys.get((arm, T)) in found]
        curves = [[list(bits_of(found[key]).values()) for key in mine], [], []]
        if arm not in ("bptt", "full"):
            curves[1] = [[share for _, share in given_back(found, key).values()] for key in mine]
        if mine[0][3]:                                                  # it has a g
            curves[2] = [numbers(found[key].values(), "r2") for key in mine]
        for axis, values in zip(axes, curves):
            if values:
                axis.errorbar([int(key[1]) for key in mine], list(map(statistics.mean, values)),
                              list(map(statistics.stdev, values)), color=COLOURS[arm], label=TEXT[arm],
                              marker="o", markersize=4, capsize=2)
    for axis, label, title in zip(axes, ("bits per character", "share", "R²"), (
            "validation text", "share of the truncation gap given back", "R² of g with its targets")):
        axis.set_xscale("log")
        axis.set_xticks([int(T) for T in lengths], lengths)
        axis.minorticks_off()
        axis.set(xlabel="T, characters of a chunk", ylabel=label, title=title)
    for axis in axes[1:]:
        axis.axhline(0, color="0.35", linewidth=0.8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=7)
    return figure


def figure_recall(plt, rows):
    """A row of panels for what is counted, a panel for each number of borders."""
    _, found, _ = finals(rows)
    figure, axes = plt.subplots(2, 3, sharex=True, sharey=True, figsize=(12, 5.8))
    for line, counts, what in zip(axes, ("all", "answers"), ("every word counts", "answers alone count")):
        line[0].set_ylabel(f"{what}\naccuracy of the answer")
        for axis, b in zip(line, "123"):
            for arm in ("bptt", "full", "linear", "layer", "neuron"):
                steps = groups(found[counts, arm, b], "updates")
                low, middle, high = zip(*(quartiles(numbers(step, "accuracy")) for step in steps.values()))
                updates = [int(u) for u, in steps]
                axis.plot(updates, middle, color=COLOURS[arm], label=RECALL[arm])
                axis.fill_between(updates, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
            axis.axhline(0.25, color="0.7", linewidth=0.8, linestyle=":")
            axis.set(title=f"{borders_of(b)} between symbol and answer" if counts == "all" else "",
                     xlabel="updates" if counts == "answers" else "")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def figure_curves(plt, rows):
    """Validation perplexity of the methods, a line a seed: PTB (Figure 2), below it WT2 (Figure 3)."""
    corpora = groups(rows, "data")
    figure, axes = plt.subplots(len(corpora), 2, figsize=(9, 3.2 * len(corpora)), sharey="row", squeeze=False)
    for line, ((corpus,), its) in zip(axes, corpora.items()):
        epochs = float(its[-1]["epoch"])
        sides = (("bptt", "dni", "cosine"), "without restarts"), (
            ("restart", "dni-restart", "alternating"),
            "with a restart (dotted; shaded: alternating is synthetic)")
        for axis, (methods, title) in zip(line, sides):
            for method in methods:
                for i, curve in enumerate(groups(having(its, method=method), "seed").values()):
                    axis.plot(numbers(curve, "epoch"), numbers(curve, "valid_perplexity"), linewidth=0.8,
                              color=COLOURS[method], label=None if i else PAPER[method][0])
            axis.set(xlabel="epoch", xlim=(0, epochs))
            axis.set_title(f"{corpus.upper()}, {title}", fontsize=10)
            axis.legend(fontsize=7, loc="upper right")
        line[1].axvline(epochs / 3, color="0.35", linewidth=0.8, linestyle=":")
        line[1].axvspan(epochs / 3, epochs, color=BLUE, alpha=0.1, linewidth=0)
        best = min(numbers(its, "valid_perplexity"))
        line[0].set(ylabel="validation perplexity", ylim=(0.95 * best, 2 * best))
    return figure


def made_by(log):
    """Which commands made a log, on which machines."""
    commands = {}
    for note in json.loads(log.with_suffix(".json").read_text()):
        where = f"on {note['machine']}; torch {note['torch']}, Python {note['python']}."
        commands.setdefault(where, []).append(f"`{note['command']}`")
    made = " And by ".join(f"{', '.join(dict.fromkeys(those))} {where}" for where, those in commands.items())
    return f"Made by {made} Log: `{log.relative_to(study.ROOT)}`.\n"


def results(logs):
    """The text of results.md. logs: {name: rows}."""
    text = ["# Results\n\nWritten by `python experiments/report.py` out of `experiments/logs/`. "
            "± is the standard deviation over seeds.\n"]
    for title, body, picture, *names in (
            ("Does it help on text? `text.py`", characters, "text.png", "text"),
            ("On words. `text.py --study words`", words, "", "text-words"),
            ("What could be known on text. `text.py --study taught`", taught, "", "taught-ptb-chars"),
            ("Is credit carried? `recall.py`", recall, "recall.png", "recall"),
            ("Which rate suits which method? `reproduce.py --search`", searched, "", "search"),
            ("The paper's methods. `reproduce.py`", methods, "curves.png", *METHODS)):
        there = [name for name in names if logs[name]]
        text.append(f"\n## {title}\n" + (f"\n![{title}]({picture})\n" if picture else ""))
        if there:
            rows = logs[names[0]] if len(names) == 1 else [logs[name] for name in names]
            text += [body(rows), *(made_by(study.LOGS / f"{name}.csv") for name in there)]
        else:
            text.append("Not run yet.\n")
    parameters = [sum(p.numel() for p in g.parameters()) for g in (NeuronDNI(), LayerDNI([1550] * 3 + [400]))]
    text.append("\n## Size of the interface\n\nFor the paper's model (layers of 1550, 1550, 1550, 400): "
                f"neuron-wise {parameters[0]:,} parameters, layer-wise {parameters[1]:,}.\n")
    for path in (study.LOGS / "speed.txt", *sorted(study.LOGS.glob("gpu/*.txt"))):
        text.append(f"\n## Log: {path.relative_to(study.LOGS)}\n\n{path.read_text()}")
    # Prose in lines of at most 108 columns; the row of a table as it is.
    return "\n".join(line if line.startswith(("|", "!")) else textwrap.fill(line, 108, break_on_hyphens=False)
                     for line in "\n".join(text).split("\n"))


def with_tables(readme, logs):
    """The text of README.md with its tables between their markers: <!-- table NAME -->, <!-- end -->."""
    for name, text in (("methods", methods_table(logs[METHODS[0]], logs[METHODS[1]])),
                       ("text", gains_table(logs["text"]))):
        readme = re.sub(rf"(<!-- table {name}.*?-->\n).*?(?=<!-- end -->)",
                        lambda found: found[1] + text.replace(" ± ", "±"), readme, flags=re.S)
    return readme


def main():
    logs = {name: study.read(study.LOGS / f"{name}.csv") for name in LOGS}
    (study.HERE / "results.md").write_text(results(logs))
    readme = study.ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(), logs))
    try:
        import matplotlib
    except ImportError:
        sys.exit("report.py: results.md is written; for the figures, pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"figure.constrained_layout.use": True, "axes.spines.top": False,
                         "axes.spines.right": False, "font.size": 9})
    for name, draw, rows in (("text", figure_text, logs["text"]), ("recall", figure_recall, logs["recall"]),
                             ("curves", figure_curves, logs[METHODS[0]] + logs[METHODS[1]])):
        draw(plt, rows).savefig(study.HERE / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
