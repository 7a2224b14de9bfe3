"""Out of the logs of the studies: experiments/results.md and its figures.

    python experiments/report.py      the figures need matplotlib (pip install matplotlib), the text does not

Nothing is typed in but what others have published: every other figure is computed from experiments/logs/.
"""

import json
import re
import statistics
import sys
import textwrap

import study

from dni import LayerDNI, NeuronDNI
from harness.machine import parameters

OUT = study.ROOT / "experiments"
METHODS = [f"methods-{scale}-{data}" for scale in ("small", "paper") for data in ("ptb", "wt2")]
LOGS = ("text", "text-words", "taught-ptb-chars", "recall", "taught", "search", *METHODS)
# The test perplexities of the paper's Tables 1 and 2; (corpus, method): figure.
PUBLISHED = {("ptb", "bptt"): 62.78, ("ptb", "dni"): 62.42, ("ptb", "restart"): 64.44,
             ("ptb", "dni-restart"): 64.71, ("ptb", "alternating"): 63.76,
             ("wt2", "bptt"): 72.6, ("wt2", "dni"): 72.37, ("wt2", "restart"): 73.97,
             ("wt2", "dni-restart"): 73.42, ("wt2", "alternating"): 73.35}
NAMES = {"bptt": "truncated BPTT",
         "dni": "neuron-wise DNI",
         "cosine": "BPTT, one cosine",
         "restart": "BPTT with restart",
         "dni-restart": "DNI with restart",
         "alternating": "alternating",
         "full": "full BPTT",
         "layer": "layer-wise DNI",
         "linear": "layer-wise DNI, one linear map",
         "neuron": "neuron-wise DNI",
         "neuron4": "neuron-wise, taught through 4 borders",
         "named": "neuron-wise, each neuron named",
         "line": "neuron-wise, g(c) = w c"}
# The method that each is compared with.
COUNTERPART = {"dni": "bptt", "cosine": "bptt", "restart": "cosine", "dni-restart": "restart",
               "alternating": "restart"}
ORDER = ("bptt", "full", "layer", "linear", "neuron", "neuron4", "named", "line")
# The arms of text.py.
TEXT = {"bptt": "truncated BPTT",
        "full": "longer BPTT (the ceiling)",
        "twice": "BPTT through two chunks",
        "linear": "layer-wise, one linear map",
        "mlp": "layer-wise, MLP",
        "neuron": "neuron-wise (the paper's)",
        "neuron4": "neuron-wise, taught through 4 borders at each border",
        "every4": "neuron-wise, taught through 4 borders at every fourth",
        "named": "neuron-wise, each neuron named",
        "line": "each neuron: a c + b",
        "constant": "each neuron: b"}
RED, BLUE, GREEN, GREY = "#d62728", "#1f77b4", "#2ca02c", "0.35"
COLOURS = {"bptt": GREY, "full": GREEN, "twice": "#9467bd", "neuron": RED, "layer": "#17becf",
           "linear": BLUE, "mlp": "#17becf", "line": "#ff7f0e",
           "dni": RED, "cosine": GREEN, "restart": GREY, "dni-restart": RED, "alternating": BLUE}


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


def last_of(rows, *case):
    """The last row of each case."""
    return [its[-1] for its in groups(rows, *case).values()]


def quartiles(values):
    """(first quartile, median, third)"""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def spread(values, digits=2, alone=" (one seed)"):
    """mean ± standard deviation over n values; `alone` is said of a single one"""
    mean = f"{round(statistics.mean(values), digits) + 0:.{digits}f}"         # + 0: no -0.000
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else alone)


def borders_of(b):
    return f"{b} border{'s' * (b > '1')}"


# ------------------------------------------------------------------------------------- the text of each study

def table(head, rows):
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("|" + "|".join(map(str, line)) + "|" for line in lines) + "\n"


def made_by(log):
    commands = {}
    for facts in json.loads(log.with_suffix(".json").read_text()):
        about = {"machine": facts.pop("machine"), "torch": facts.pop("torch"), "python": facts.pop("python")}
        command = facts.pop("command")
        where = "; ".join(["on {machine}; torch {torch}, Python {python}".format(**about),
                           *(f"{name} {value}" for name, value in facts.items())]) + "."
        commands.setdefault(where, []).append(f"`{command}`")
    made = " And by ".join(f"{', '.join(those)} {where}" for where, those in commands.items())
    return f"Made by {made} Log: `{log.relative_to(study.ROOT)}`.\n"


def ends(rows):
    """{(arm, T, alpha, rate): {seed: the last row}}"""
    found = {}
    for row in last_of(rows, "arm", "T", "alpha", "rate", "seed"):
        found.setdefault((row["arm"], row["T"], row["alpha"], row["rate"]), {})[row["seed"]] = row
    return found


def bits_of(its):
    return {seed: float(row["bits"]) for seed, row in its.items()}


def given_back(found, key):
    """{seed: (fewer bits than truncated BPTT's, the same as a share of what longer BPTT gains)}.

    The share is None where longer BPTT gains nothing.
    """
    T, gains = key[1], {}
    truncated, ceiling = (bits_of(found.get((arm, T, "", ""), {})) for arm in ("bptt", "full"))
    for seed, bits in bits_of(found[key]).items():
        if seed in truncated and seed in ceiling:
            gain, gap = truncated[seed] - bits, truncated[seed] - ceiling[seed]
            gains[seed] = gain, gain / gap if gap > 0 else None
    return gains


def at_best(rows):
    """{(arm, T): key of `ends`}: each arm at α = 1 and the rate that text.py takes along."""
    from text import ARMS, best_rates
    best, found = best_rates(rows), ends(rows)
    return {(arm, T): (arm, T, alpha, rate) for arm in ARMS for (a, T, alpha, rate) in found
            if a == arm and alpha in ("", "1.0") and rate in ("", str(best.get(arm)))}


def text_rates(rows):
    """Bits at every rate of g, T = 2 and 5, seed 0."""
    found = ends(having(rows, seed="0"))
    rates = sorted({row["rate"] for row in rows if row["rate"]}, key=float, reverse=True)
    lines = []
    for T in ("2", "5"):
        plain = [f"{TEXT[arm]} {bits_of(found[arm, T, '', ''])['0']:.3f}" for arm in ("bptt", "full")]
        lines.append([f"**T = {T}**: {', '.join(plain)}", *[""] * len(rates)])
        for arm in TEXT:
            mine = [found.get((arm, T, "1.0", rate), {}).get("0") for rate in rates]
            if any(mine):
                lines.append([TEXT[arm], *(row and f"{float(row['bits']):.3f} ({float(row['r2']):+.3f})" or ""
                                           for row in mine)])
    return ("Bits per character, and in brackets R² with g's own targets in the last fifth. One seed.\n\n"
            + table(["g, its learning rate:", *rates], lines))


def text_lengths(rows, keys):
    """Bits, gain and share for each T and arm; keys: of `at_best`."""
    found, lines = ends(rows), []
    for T in sorted({T for _, T in keys}, key=int):
        for arm in TEXT:
            key = keys.get((arm, T))
            if key not in found:
                continue
            its, gains = found[key], given_back(found, key)
            line = [T, TEXT[arm], key[3] or "-", len(its), spread(list(bits_of(its).values()), 3, "")]
            if arm == "bptt" or not gains:
                line += ["", ""]
            else:
                line.append(spread([gain for gain, _ in gains.values()], 3, ""))
                shares = [share for _, share in gains.values()]
                line.append("" if arm == "full" or None in shares else spread(shares, alone=""))
            of_g = key[3] and [spread(numbers(its.values(), name), 3, "") for name in ("cosine", "r2")]
            lines.append(line + (of_g or ["", ""]))
    return table(["T", "", "rate of g", "seeds", "bits", "fewer than truncated BPTT, same seed",
                  "share of the ceiling's", "cosine with target", "R²"], lines)


def text_alphas(rows, search):
    """Gain over truncated BPTT for each α, at the rates that the rows `search` say are best."""
    from text import best_rates
    best, found, lines = best_rates(search), ends(rows), []
    alphas = ("0.1", "0.9", "1.0")
    for T in ("2", "5"):
        for arm in ("linear", "mlp", "neuron"):
            keys = [(arm, T, alpha, str(best.get(arm))) for alpha in alphas]
            if all(key in found for key in keys):
                gains = [{seed: gain for seed, (gain, _) in given_back(found, key).items()} for key in keys]
                seeds = set.intersection(*map(set, gains))
                lines.append([T, TEXT[arm], len(seeds),
                              *(spread([g[seed] for seed in sorted(seeds)], 3, "") for g in gains)])
    return table(["T", "", "seeds", *(f"α = {alpha}" for alpha in alphas)], lines) if lines else ""


def characters(rows):
    best, others = at_best(rows), [row for row in rows if row["seed"] != "0"]
    parts = [text_rates(rows), "Each g at its best rate, α = 1, on seeds that were not used to find it.\n\n"
             + text_lengths(others, best)]
    alphas = text_alphas(others, rows)
    if alphas:
        parts.append("The discount α: fewer bits than truncated BPTT, same seeds.\n\n" + alphas)
    return "\n".join(parts)


def words(rows):
    keys = {key[:2]: key for key in ends(rows)}
    return "Bits per word.\n\n" + text_lengths(rows, keys)


def taught_text(rows):
    """R² of each g with the true gradient, by the borders it has learned from, at its best rate."""
    lines, counts = [], sorted({row["borders"] for row in rows}, key=int)
    for (arm,), mine in groups(rows, "arm").items():
        last = groups(having(mine, borders=counts[-1]), "rate")
        (best,) = max(last, key=lambda rate: statistics.mean(numbers(last[rate], "r2")))
        mine = having(mine, rate=best)
        lines.append([TEXT[arm], best, *(spread(numbers(having(mine, borders=n), "r2"), 4) for n in counts)])
    return ("R² with the true gradient, of predictions made before learning from it, by the number of "
            "borders that g has learned from, each stream's counted; at the rate that is best in the end.\n\n"
            + table(["", "rate of g", *(f"{int(n):,}" for n in counts)], lines))


def finals(rows):
    """Of recall.py, the rows of the search, and {(counts, arm, borders): rows} of the other seeds.

    They are those at the rate that the search found, and, in a third part, those at other rates.
    """
    from recall import SEARCH_SEEDS, best_rate
    search, found, others = [], {}, {}
    for row in rows:
        case = row["counts"], row["arm"], row["borders"]
        if int(row["seed"]) in SEARCH_SEEDS:
            search.append(row)
        else:
            found.setdefault(case, []).append(row)
    for case, its in found.items():
        best = best_rate(search, *case)
        found[case] = [row for row in its if not best or row["rate"] == str(best)]
        others[case] = [row for row in its if best and row["rate"] != str(best)]
    return search, found, others


def recall(rows):
    search, found, others = finals(rows)
    borders, lines, agreement = sorted({b for *_, b in found}), [], []
    for counts in ("all", "answers"):
        for arm in sorted({arm for its, arm, _ in found if its == counts}, key=ORDER.index):
            line, of_g = [counts, NAMES[arm]], [counts, NAMES[arm]]
            for b in borders:
                mine = list(groups(found.get((counts, arm, b), []), "seed").values())
                rate = mine and mine[0][-1]["rate"]
                cell = accuracy_of([its[-1] for its in mine]) if mine else ""
                line.append(cell + (f" (rate {rate})" if rate else ""))
                for name in ("true_cosine", "target_r2"):
                    means = [statistics.mean(numbers(its, name)) for its in mine]
                    of_g.append(f"{statistics.median(means):+.3f}" if means else "")
            lines.append(line)
            if rate:
                agreement.append(of_g)
    updates = max(int(row["updates"]) for row in rows)
    text = (f"Accuracy of the answer after {updates:,} updates, median [quartiles] over the seeds (chance: "
            "0.25), how many of the runs ended above 0.9, and the rate of g.\n\n"
            + table(["counted", "arm", *map(borders_of, borders)], lines)
            + "\nDoes g learn? Cosine of its predictions with the true future gradient, and R² with its own "
              "targets in training; means over the tests of a run, medians over seeds.\n\n"
            + table(["counted", "arm", *(f"{borders_of(b)}: {of_what}" for b in borders
                                         for of_what in ("cosine, true", "R², target"))], agreement))
    lines = [[counts, NAMES[arm], b, rate, accuracy_of(last_of(mine, "seed"))]
             for (counts, arm, b), its in others.items() for (rate,), mine in groups(its, "rate").items()]
    if lines:
        text += ("\nThe same at another rate.\n\n"
                 + table(["counted", "arm", "borders", "rate", "accuracy"], lines))
    if search:
        rates = sorted({row["rate"] for row in search}, key=float, reverse=True)
        lines = [[counts, NAMES[arm], b, *(mean_accuracy(having(its, rate=rate)) for rate in rates)]
                 for (counts, arm, b), its in groups(search, "counts", "arm", "borders").items()]
        lines.sort(key=lambda line: (line[0], list(NAMES.values()).index(line[1]), line[2]))
        text += ("\nThe search: mean accuracy of two seeds of its own.\n\n"
                 + table(["counted", "arm", "borders", *(f"rate {rate}" for rate in rates)], lines))
    return text


def mean_accuracy(rows):
    return f"{statistics.mean(numbers(last_of(rows, 'seed'), 'accuracy')):.2f}" if rows else ""


def accuracy_of(last):
    accuracy = numbers(last, "accuracy")
    low, middle, high = quartiles(accuracy)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}], {sum(a > 0.9 for a in accuracy)}/{len(accuracy)}"


def taught(rows):
    """R² and cosine of each interface with the true gradient, medians over seeds."""
    columns = sorted(groups(rows, "loss", "updates", "borders"),
                     key=lambda column: (column[0] == "all", *map(int, column[1:])))
    columns = [dict(zip(("loss", "updates", "borders"), column)) for column in columns]

    def median(those, name):
        return f"{statistics.median(numbers(those, name)):.2f}"
    lines = []
    for arm in sorted({row["arm"] for row in rows}, key=ORDER.index):
        mine = [having(rows, arm=arm, **column) for column in columns]
        lines.append([NAMES[arm], *(f"{median(those, 'r2')}, {median(those, 'cosine')}" for those in mine)])
    accuracy = [median(having(rows, **column), "accuracy") for column in columns]
    lines.append(["accuracy of the model", *accuracy])
    head = [f"{c['loss']}, {c['updates']} updates, {borders_of(c['borders'])}" for c in columns]
    return ("A model trained with full credit, frozen; each interface taught its true gradients. R² and "
            "cosine of predictions made before learning from them, medians over the seeds.\n\n"
            + table(["interface", *head], lines) + f"\n{len({row['seed'] for row in rows})} seeds.\n")


def by_method(rows):
    """{method: (test perplexities, their differences from its counterpart's, the trainings' last rows)}.

    A training is compared with that of its counterpart (COUNTERPART) that has the same seed.
    """
    ends_of, found = groups(last_of(rows, "method", "seed"), "method"), {}
    tests = {method: dict(zip((row["seed"] for row in last), numbers(last, "test_perplexity")))
             for (method,), last in ends_of.items()}
    for method in (name for name in NAMES if name in tests):
        other = tests.get(COUNTERPART.get(method), {})
        less = [value - other[seed] for seed, value in tests[method].items() if seed in other]
        found[method] = list(tests[method].values()), less, ends_of[method,]
    return found


def minutes(last):
    return f"{statistics.median(numbers(last, 'seconds')) / 60:.0f}"


def methods(logs):
    """The paper's methods, a table for each of the logs [rows]."""
    text = []
    for rows in filter(None, logs):
        data, lines = rows[0]["data"], []
        for method, (tests, less, last) in by_method(rows).items():
            mine = groups(having(rows, method=method), "seed").values()
            valid = [min(float(row["valid_perplexity"]) for row in its if float(row["epoch"]).is_integer())
                     for its in mine]                                   # only their models are tested
            lines.append([NAMES[method], PUBLISHED.get((data, method), "-"), len(last),
                          spread(tests, alone=""),
                          f"{NAMES[COUNTERPART[method]]}: {spread(less, alone='')}" if less else "",
                          spread(valid, alone=""), minutes(last)])
        text.append(f"**{data}**, {last[-1]['epoch']} epochs\n\n" + table(
            ["method", "test: the paper", "seeds", "test: here", "difference from, same seed",
             "best validation at an epoch's end", "minutes"], lines))
    return "\n".join(text)


def searched(rows):
    """The best validation perplexity of each case of search.py."""
    from search import SHARED, dropout
    four, usual, lines = dropout(0, 0, 0, 0), {name: str(value) for name, value in SHARED.items()}, []

    def shared(case):
        dropouts = "dropouts " + ", ".join(case[name] for name in four)
        return [dropouts, *(f"{name} {case[name]}" for name in SHARED if name not in four)]
    for its in groups(rows, "data", "method", "epochs", "lr", "e_base", "eta_max", "seed",
                      *SHARED).values():
        best = min(its, key=lambda row: float(row["valid_perplexity"]))
        besides = [f"{name} {best[name]}" for name in ("e_base", "eta_max") if best[name]]
        besides += [f"seed {best['seed']}"] * (best["seed"] != "42")
        besides += [what for what in shared(best) if what not in shared(usual)]
        lines.append([best["data"], best["epochs"], NAMES[best["method"]], best["lr"], ", ".join(besides),
                      *(f"{float(best[name]):.2f}" for name in ("valid_perplexity", "train_perplexity"))])
    lines.sort(key=lambda line: (line[0], int(line[1]), list(NAMES.values()).index(line[2]), float(line[5])))
    return ("Perplexity of validation and training text (the latter with dropout) at the best epoch. Where "
            f"nothing else is said: seed 42, {', '.join(shared(usual))}. (Dropouts: of the last output, "
            "between layers, of embedded words, of whole words.)\n\n"
            + table(["text", "epochs", "method", "rate", "besides", "validation", "training"], lines))


def readme_tables(logs):
    """The tables of README.md, {name: text}."""
    tables = {"methods": methods_table(logs[METHODS[0]], logs[METHODS[1]]), "text": gains_table(logs["text"])}
    return {name: text.replace(" ± ", "±") for name, text in tables.items()}               # to be narrow


def gains_table(rows):
    """Bits saved against truncated BPTT for each T, on seeds that were not used to find the rates."""
    found, keys = ends([row for row in rows if row["seed"] != "0"]), at_best(rows)
    lengths, lines = sorted({T for _, T, _, _ in found}, key=int), []
    for arm in ("full", "twice", "linear", "mlp", "neuron"):
        of = [keys.get((arm, T)) for T in lengths]
        gains = [[gain for gain, _ in given_back(found, key).values()] if key in found else [] for key in of]
        lines.append([TEXT[arm], *(spread(g, 3, "") if g else "" for g in gains)])
    return table(["bits saved per character", *(f"T = {T}" for T in lengths)], lines)


def methods_table(ptb, wt2):
    """The paper's methods and `cosine`, from the rows of reproduce.py at scale small; "-": not run."""
    found, other, lines = by_method(ptb), by_method(wt2), []
    for method in ("bptt", *COUNTERPART):
        tests, less, last = found.get(method, ([], [], []))
        beside = f"{spread(less, alone='')} from {NAMES[COUNTERPART[method]]}" if less else ""
        lines.append([NAMES[method], *(PUBLISHED.get((data, method), "-") for data in ("ptb", "wt2")),
                      spread(tests, alone="") if tests else "-", beside, minutes(last) if last else "-",
                      spread(other[method][0], alone="") if method in other else "-"])
    return table(["test perplexity", "paper: PTB", "paper: WT2", "here: PTB", "difference, same seed",
                  "minutes", "here: WT2"], lines)


# ---------------------------------------------------------------------------------------------------- figures

def figure_text(plt, rows):
    """Bits, share of the gap and R² against T, each arm at its best rate."""
    found, keys = ends([row for row in rows if row["seed"] != "0"]), at_best(rows)
    lengths = sorted({T for _, T, _, _ in found}, key=int)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))
    for arm in ("bptt", "full", "twice", "linear", "mlp", "neuron", "line"):
        look = dict(color=COLOURS[arm], label=TEXT[arm], marker="o", markersize=4, capsize=2)
        mine = [keys[arm, T] for T in lengths if keys.get((arm, T)) in found]
        if not mine:
            continue

        def draw(axis, values):
            """values: a list a T."""
            axis.errorbar([int(key[1]) for key in mine], [statistics.mean(v) for v in values],
                          [statistics.stdev(v) if len(v) > 1 else 0 for v in values], **look)
        draw(left, [list(bits_of(found[key]).values()) for key in mine])
        if arm not in ("bptt", "full"):
            draw(middle, [[share for _, share in given_back(found, key).values()] for key in mine])
        if keys[arm, lengths[0]][3]:                                    # it has a g
            draw(right, [numbers(found[key].values(), "r2") for key in mine])
    left.set(ylabel="bits per character", title="validation text")
    middle.set(ylabel="share", title="share of the truncation gap given back")
    right.set(ylabel="R²", title="R² of g with its targets")
    middle.axhline(0, color="0.35", linewidth=0.8)
    right.axhline(0, color="0.35", linewidth=0.8)
    for axis in (left, middle, right):
        axis.set_xscale("log")
        axis.set_xticks([int(T) for T in lengths], lengths)
        axis.minorticks_off()
        axis.set(xlabel="T, characters of a chunk")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=7)
    return figure


def figure_recall(plt, rows):
    """A row of panels for what is counted, a panel for each number of borders."""
    _, found, _ = finals(rows)
    borders, counts = sorted({b for *_, b in found}), sorted({counts for counts, *_ in found})
    figure, axes = plt.subplots(len(counts), len(borders), sharex=True, sharey=True, squeeze=False,
                                figsize=(4 * len(borders), 0.6 + 2.6 * len(counts)))
    for what, line in zip(counts, axes):
        line[0].set_ylabel({"all": "every word counts", "answers": "answers alone count"}[what]
                           + "\naccuracy of the answer")
        for axis, b in zip(line, borders):
            for arm in ("bptt", "full", "linear", "layer", "neuron"):
                steps = groups(found[what, arm, b], "updates")
                low, middle, high = zip(*(quartiles(numbers(step, "accuracy")) for step in steps.values()))
                updates = [int(u) for u, in steps]
                axis.plot(updates, middle, color=COLOURS[arm], label=NAMES[arm])
                axis.fill_between(updates, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
            axis.axhline(0.25, color="0.7", linewidth=0.8, linestyle=":")
    for top, bottom, b in zip(axes[0], axes[-1], borders):
        top.set_title(f"{borders_of(b)} between symbol and answer")
        bottom.set_xlabel("updates")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def figure_curves(plt, rows):
    """Validation perplexity of the methods, a line a seed: PTB (Figure 2), below it WT2 (Figure 3)."""
    from reproduce import EPOCHS, arguments, settings
    panels = {"without restarts": ("bptt", "dni", "cosine"),
              "with a restart (dotted; shaded: alternating is synthetic)":
                  ("restart", "dni-restart", "alternating")}
    corpora = groups(rows, "data")
    figure, axes = plt.subplots(len(corpora), 2, figsize=(9, 3.2 * len(corpora)), sharey="row", squeeze=False)
    for line, ((data,), its) in zip(axes, corpora.items()):
        s = settings(arguments("small", data, "alternating", EPOCHS["small", data]))
        for axis, (title, methods) in zip(line, panels.items()):
            for method in methods:
                for i, curve in enumerate(groups(having(its, method=method), "seed").values()):
                    axis.plot(numbers(curve, "epoch"), numbers(curve, "valid_perplexity"), linewidth=0.8,
                              color=COLOURS[method], label=None if i else NAMES[method])
            axis.set(xlabel="epoch", xlim=(0, s.epochs))
            axis.set_title(f"{data.upper()}, {title}", fontsize=10)
            axis.legend(fontsize=7, loc="upper right")
        line[1].axvline(s.e_base, color="0.35", linewidth=0.8, linestyle=":")
        line[1].axvspan(s.e_base, s.epochs, color=COLOURS["alternating"], alpha=0.1, linewidth=0)
        best = min(numbers(its, "valid_perplexity"))
        line[0].set(ylabel="validation perplexity", ylim=(0.95 * best, 2 * best))
    return figure


# -------------------------------------------------------------------------------------------------------- all

def results(logs):
    """The text of results.md. logs: {name: rows}."""
    text = ["# Results\n\nWritten by `python experiments/report.py` out of `experiments/logs/`. "
            "± is the standard deviation over seeds.\n"]

    def section(title, body, rows, *names, picture=None):
        there = [name for name in names if logs[name]]
        text.append(f"\n## {title}\n")
        if not there:
            text.append("Not run yet.\n")
            return
        shown = [f"![{title}]({picture})\n"] if picture else []
        text.append("\n".join([*shown, body(rows), *(made_by(study.LOGS / f"{name}.csv") for name in there)]))

    section("Does it help on text? `text.py`", characters, logs["text"], "text", picture="text.png")
    section("On words. `text.py --study words`", words, logs["text-words"], "text-words")
    section("What could be known on text: `taught.py --data ptb-chars`", taught_text,
            logs["taught-ptb-chars"], "taught-ptb-chars")
    section("Is credit carried? `recall.py`", recall, logs["recall"], "recall", picture="recall.png")
    section("What could be known: `taught.py`", taught, logs["taught"], "taught")
    section("Which settings suit which method? `search.py`", searched, logs["search"], "search")
    section("The paper's methods. `reproduce.py`", methods, [logs[name] for name in METHODS], *METHODS,
            picture="curves.png")
    text.append("\n## Size of the interface\n")
    text.append("For the paper's model (layers of 1550, 1550, 1550, 400): "
                f"neuron-wise {parameters(NeuronDNI()):,} parameters, "
                f"layer-wise {parameters(LayerDNI([1550] * 3 + [400])):,}.\n")
    return "\n".join(wrapped(line) for line in "\n".join(text).split("\n"))


def wrapped(line):
    """A line of prose in lines of at most 108 columns; a row of a table as it is."""
    return line if line.startswith(("|", "!")) else textwrap.fill(line, 108, break_on_hyphens=False)


def with_tables(readme, tables):
    """The text of README.md with these tables between their markers: <!-- table NAME -->, <!-- end -->."""
    return re.sub(r"(<!-- table (\w+).*?-->\n).*?(<!-- end -->)",
                  lambda marks: marks[1] + tables[marks[2]] + marks[3], readme, flags=re.S)


def main():
    logs = {name: study.read(study.LOGS / f"{name}.csv") for name in LOGS}
    (OUT / "results.md").write_text(results(logs))
    readme = study.ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(), readme_tables(logs)))
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
        if rows:
            figure = draw(plt, rows)
            figure.savefig(OUT / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
