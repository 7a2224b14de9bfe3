"""Make results.md, the tables of README.md and the figure of results.md from the logs.

    python experiments/report.py      the figure needs matplotlib (pip install matplotlib)

Only the figures of the paper are typed in here. All others are computed from experiments/logs/. A
log's row is {column: string}. Logs may be older than the studies: a column that a row lacks leaves
its place in a table blank.
"""

import re
import statistics
import sys
import textwrap

import study

import report_alternate
import reproduce
from recall import SEARCH_SEEDS, best_rate
from tables import groups, half_width, having, interval, markdown_table, numbers, spread
from text import REACH, best_rates

LOGS = (
    "text",
    "text-words",
    "text-longer",
    "alternate",
    "alternate-cost",
    "injected",
    "authors",
    "recall",
    "recall-cells",
    "recall-neuron",
    "recall-places",
    "search",
    "methods-small-ptb",
    "methods-small-wt2",
    "methods-small-ptb-e-base",
    "methods-paper-ptb",
    "methods-paper-wt2",
)
# Each method: its name, and the test perplexities of the paper's Tables 1 and 2 on PTB and WT2.
PAPER = {
    "bptt": ("truncated BPTT", 62.78, 72.6),
    "dni": ("neuron-wise DNI", 62.42, 72.37),
    "cosine": ("BPTT, one cosine", "-", "-"),
    "restart": ("BPTT with restart", 64.44, 73.97),
    "dni-restart": ("DNI with restart", 64.71, 73.42),
    "alternating": ("alternating", 63.76, 73.35),
}
# What stands above a table of the methods.
METHODS_HEAD = {
    "small": "Test perplexity. The paper: 4 layers of 1550, 320 epochs, one seed. Here: layers of "
    "512 and 256. On PTB 15 epochs; the methods with restarts have three of them, and products in "
    "float32, the others have products in bf16. On WT2 2 epochs, one restart, products in bf16.\n",
    "paper": "Test perplexity at the paper's size, 320 epochs.\n",
}
# What is compared: the first method minus the second.
COMPARED = (
    ("dni", "bptt"),
    ("dni-restart", "restart"),
    ("alternating", "restart"),
    ("alternating", "dni-restart"),
    ("restart", "cosine"),
    ("cosine", "bptt"),
)
# The names of the arms of recall.py, and of those of text.py.
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


def main():
    logs = {name: study.read_log(study.LOGS / f"{name}.csv") for name in LOGS}
    (study.HERE / "results.md").write_text(results(logs))
    readme = study.ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(), logs))
    try:
        import matplotlib
    except ImportError:
        sys.exit("report.py: results.md is written; for the figure, pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    look = {
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
    }
    plt.rcParams.update(look)
    figure = differences_figure(plt, logs["methods-small-ptb"])
    figure.savefig(study.HERE / "differences.png", dpi=130)
    gain_figure(plt, logs["text"]).savefig(study.HERE / "gain.png", dpi=130)
    if report_alternate.of_patterns(logs["alternate"]):
        figure = report_alternate.patterns_figure(plt, logs["alternate"])
        figure.savefig(study.HERE / "patterns.png", dpi=130)


def results(logs):
    """The text of results.md. logs: {name: rows}."""
    parts = [
        "# Results\n\n"
        "Written by `python experiments/report.py` from [logs/](logs/README.md), which says what "
        "made them. ± is the standard deviation over seeds."
    ]
    for title, body in sections(logs):
        parts.append(f"\n## {title}\n\n{body}")
    lines = "\n".join(parts).split("\n")
    return "\n".join(wrapped(line) for line in lines)


def sections(logs):
    """[(title, body)] of results.md."""
    words = logs["text-words"]
    # On words each arm has one rate, which was found on characters.
    every_key = {(arm, T): (arm, T, alpha, rate) for arm, T, alpha, rate in last_rows(words)}
    words_table = "Bits per word.\n\n" + lengths_table(words, every_key)
    methods = ["![differences](differences.png)\n"]
    for scale in ("small", "paper"):
        ptb = logs[f"methods-{scale}-ptb"]
        if ptb:
            methods.append(METHODS_HEAD[scale])
            methods.append(methods_table(ptb, logs[f"methods-{scale}-wt2"], scale))
            methods.append(differences_table(ptb))
            methods.append(validation_differences_table(ptb))
            methods.append(methods_injected_table(ptb))
    found = [
        ("Does it help on text? `text.py`", characters_tables(logs["text"])),
        ("Does it help to alternate? `alternate.py`", alternate_tables(logs)),
        ("How much is injected, and lost? `injected.py`", injected_table(logs["injected"])),
        ("How much does the authors' g inject? `authors.py`", authors_table(logs["authors"])),
        ("On words. `text.py --study words`", words_table),
        ("On words, for longer. `text.py --study longer`", longer_table(logs["text-longer"])),
        ("Is credit carried? `recall.py`", recall_table(logs["recall"])),
        ("With a GRU or an LSTM? `recall.py --cells`", cells_table(logs["recall-cells"])),
        (
            "And the neuron-wise g at a rate of 1e-4? `recall.py --neuron`",
            neuron_table(logs["recall-neuron"]),
        ),
        (
            "What does a g need in order to learn? `recall.py --places`",
            places_table(logs["recall-places"]),
        ),
        ("Which rate suits which method? `reproduce.py --search`", search_table(logs["search"])),
        ("The paper's methods. `reproduce.py`", "\n".join(methods)),
    ]
    found.append(("And with one restart? `reproduce.py --e-base 5`", e_base_tables(logs)))
    for path in [study.LOGS / "speed.txt", *sorted(study.LOGS.glob("gpu/*.txt"))]:
        found.append((f"How fast? {path.relative_to(study.LOGS)}", path.read_text()))
    return [(title, body) for title, body in found if body]


def alternate_tables(logs):
    """The section of alternate.py; "" before its patterns were trained."""
    if not report_alternate.of_patterns(logs["alternate"]):
        return ""
    return report_alternate.alternating(logs["alternate"], logs["alternate-cost"])


def wrapped(line):
    """Prose in lines of at most 108 columns; the row of a table and an image as they are."""
    if line.startswith(("|", "!")):
        return line
    return textwrap.fill(line, 108, break_on_hyphens=False)


def with_tables(readme, logs):
    """The text of README.md with its tables as the logs say.

    A table stands between the markers <!-- table NAME, .. --> and <!-- end -->.
    """
    ptb = logs["methods-small-ptb"]
    methods = methods_table(ptb, logs["methods-small-wt2"])
    tables = {
        "methods": methods + "\n" + differences_table(ptb),
        "text": gains_table(logs["text"]),
    }

    def filled(markers):
        table = tables[markers["name"]].replace(" ± ", "±")
        return markers["begin"] + table + markers["end"]

    pattern = r"(?P<begin><!-- table (?P<name>\w+).*?-->\n).*?(?P<end><!-- end -->)"
    return re.sub(pattern, filled, readme, flags=re.S)


# --------------------------------------------------------------------------------------- text.py


def last_rows(rows):
    """{(arm, T, alpha, rate): {seed: the row at the end of the training}}"""
    found = {}
    for row in rows:
        key = row["arm"], row["T"], row["alpha"], row["rate"]
        found.setdefault(key, {})[row["seed"]] = row
    return found


def at_best(rows):
    """{(arm, T): key of `last_rows`}: each arm at α = 1 and the rate that text.py takes along."""
    best = best_rates(rows)
    keys = {}
    for arm, T, alpha, rate in last_rows(rows):
        without_g = rate == ""
        if without_g or (alpha == "1.0" and rate == str(best.get(arm))):
            keys[arm, T] = arm, T, alpha, rate
    return keys


def gains(found, key):
    """What an arm gains on truncated BPTT of the same seed: (bits fewer, shares), a number a seed.

    found, key: as of `last_rows`. A share is of the bits that longer BPTT gains. Where it gains
    nothing on one of the seeds, there are no shares.
    """
    _, T, _, _ = key
    truncated = found.get(("bptt", T, "", ""), {})
    longer = found.get(("full", T, "", ""), {})
    fewer = []
    shares = []
    for seed, row in found.get(key, {}).items():
        if seed not in truncated or seed not in longer:
            continue
        most = float(truncated[seed]["bits"])
        gain = most - float(row["bits"])
        ceiling = most - float(longer[seed]["bits"])
        fewer.append(gain)
        if ceiling > 0:
            shares.append(gain / ceiling)
    if len(shares) < len(fewer):
        shares = []
    return fewer, shares


def lengths_table(rows, keys):
    """Bits per token, gain and share for each T and arm. keys: as of `at_best`."""
    found = last_rows(rows)
    lines = []
    for T in sorted({T for _, T in keys}, key=int):
        for arm in TEXT:
            key = keys.get((arm, T))
            if key not in found:
                continue
            its_rows = list(found[key].values())
            fewer, shares = gains(found, key)
            name = TEXT[arm]
            if arm == "full" and int(T) > REACH:
                name = TEXT["twice"]
            line = [T, name, key[3] or "-", len(its_rows)]
            line.append(spread(numbers(its_rows, "bits"), 3))
            line.append("" if arm == "bptt" else spread(fewer, 3))
            line.append("" if arm in ("bptt", "full") else spread(shares))
            for column in ("own_cosine", "own_r2"):  # of old logs; nan without a g
                measured = [row for row in its_rows if row["rate"] and row.get(column)]
                line.append(spread(numbers(measured, column), 3))
            lines.append(line)
    head = [
        "T",
        "",
        "rate of g",
        "seeds",
        "bits",
        "fewer than truncated BPTT, same seed",
        "share of the ceiling's",
        "cosine with its own targets",
        "R² with them",
    ]
    return markdown_table(head, lines)


def rates_table(rows):
    """Bits per character of each g by its rate, seed 0; in brackets R², where the row has it."""
    found = last_rows(having(rows, seed="0"))
    rates = sorted({row["rate"] for row in rows if row["rate"]}, key=float, reverse=True)
    lines = []
    for T in ("2", "5"):
        for arm in ("linear", "mlp", "neuron", "neuron4"):
            cells = []
            for rate in rates:
                row = found.get((arm, T, "1.0", rate), {}).get("0")
                cells.append(bits_and_r2(row) if row else "")
            if any(cells):
                lines.append([T, TEXT[arm], *cells])
    return markdown_table(["T", "", *rates], lines)


def bits_and_r2(row):
    """As in 2.545 (-1.906)."""
    bits = f"{float(row['bits']):.3f}"
    if not row.get("own_r2"):
        return bits
    return f"{bits} ({float(row['own_r2']):+.3f})"


def discounts_table(rows):
    """Bits per character fewer than truncated BPTT, by the discount α, on seeds 1 and 2."""
    found = last_rows([row for row in rows if row["seed"] in ("1", "2")])
    best = at_best(rows)
    discounts = ("0.1", "0.9", "1.0")
    lines = []
    for T in ("2", "5"):
        for arm in ("linear", "mlp"):
            if (arm, T) not in best:
                continue
            _, _, _, rate = best[arm, T]
            fewer = [gains(found, (arm, T, alpha, rate))[0] for alpha in discounts]
            lines.append([T, TEXT[arm], *(spread(values, 3) for values in fewer)])
    return markdown_table(["T", "", *(f"α = {alpha}" for alpha in discounts)], lines)


def characters_tables(rows):
    """The three tables of text.py on characters: by rate, by T, and by discount."""
    not_searched = [row for row in rows if row["seed"] != "0"]
    return (
        "Bits per character, and in brackets R² with g's own targets in the last fifth, by the "
        "rate of g. One seed.\n\n"
        + rates_table(rows)
        + "\nEach g at its best rate, α = 1, on seeds that were not used to find it.\n\n"
        + lengths_table(not_searched, at_best(rows))
        + "\nThe discount α: fewer bits than truncated BPTT, same seed; two seeds.\n\n"
        + discounts_table(rows)
    )


def longer_table(rows):
    """Two chunks beside truncated BPTT on words, epoch by epoch; "" where there are no rows."""

    def bits_of(rows, arm):
        return {row["seed"]: float(row["bits"]) for row in having(rows, arm=arm)}

    lines = []
    for (updates,), its_rows in groups(rows, "updates").items():
        truncated = bits_of(its_rows, "bptt")
        twice = bits_of(its_rows, "twice")
        fewer = [truncated[seed] - twice[seed] for seed in twice if seed in truncated]
        means = [spread(list(bits.values()), 3) for bits in (truncated, twice)]
        lines.append([updates, *means, ", ".join(f"{gain:+.4f}" for gain in fewer)])
    if not lines:
        return ""
    head = ["updates", "truncated BPTT", "BPTT through two chunks", "fewer bits, each seed"]
    return (
        "Bits per word of validation text, T = 70: a row for each time that the text of PTB was "
        "read.\n\n" + markdown_table(head, lines)
    )


def gains_table(rows):
    """README's table of text, on seeds that found no rate."""
    found = last_rows([row for row in rows if row["seed"] != "0"])
    best = at_best(rows)
    lengths = sorted({T for _, T, _, _ in found}, key=int)
    lines = []
    for arm in ("full", "twice", "linear", "mlp", "neuron"):
        line = [TEXT[arm]]
        for T in lengths:
            fewer = []
            if (arm, T) in best:
                fewer, _ = gains(found, best[arm, T])
            line.append(spread(fewer, 3))
        lines.append(line)
    head = ["gain over truncated BPTT, bits per character", *(f"T = {T}" for T in lengths)]
    return markdown_table(head, lines)


# ------------------------------------------------------------------------- recall.py, reproduce.py


def above(accuracies, least=0.9):
    """How many of them, as in 7/10."""
    return f"{sum(accuracy > least for accuracy in accuracies)}/{len(accuracies)}"


def quartiles(values):
    """median [first quartile, third quartile]"""
    if len(values) == 1:
        values = [*values, *values]  # quantiles() needs two
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def recall_table(rows):
    """Accuracy of recall.py's arms, on seeds that found no rate."""
    final = [row for row in rows if int(row["seed"]) not in SEARCH_SEEDS]
    lines = []
    for case, its_rows in groups(final, "counts", "arm", "borders", "rate").items():
        counts, arm, borders, rate = case
        accuracies = numbers(its_rows, "accuracy")
        told = rate or "-"
        if rate != str(best_rate(rows, counts, arm, borders)):
            told = f"{rate}, tried afterwards"
        line = [counts, borders, RECALL[arm], told, quartiles(accuracies), above(accuracies)]
        lines.append(line)
    names = list(RECALL.values())

    def order(line):
        counts, borders, name, *_ = line
        return counts, borders, names.index(name)

    lines.sort(key=order)
    head = ["scored", "borders", "", "rate of g", "accuracy", "above 0.9"]
    return (
        "Accuracy of the answer at the end, median [quartiles] over the seeds (chance: 0.25), and "
        "how many trainings ended above 0.9. The rates of g were found on two other seeds.\n\n"
        + markdown_table(head, lines)
    )


def cells_table(rows):
    """Accuracy of recall.py --cells, and the mean size of the last state."""
    lines = []
    for (cell, arm, penalty), its_rows in groups(rows, "cell", "arm", "penalty").items():
        name = RECALL[arm]
        if arm == "bptt":
            name = "no g"
            penalty = "-"
        accuracies = numbers(its_rows, "accuracy")
        accuracy = statistics.median(accuracies)
        size = statistics.median(numbers(its_rows, "size"))
        lines.append([cell, name, penalty, f"{accuracy:.2f}", above(accuracies), f"{size:,.2f}"])
    head = ["network", "g", "penalty", "accuracy", "above 0.9", "size"]
    return (
        "One border, answers scored, α = 1, g's rate 1e-4, 1,500 updates. Medians. Size: mean |c| "
        "at the end.\n\n" + markdown_table(head, lines)
    )


def neuron_table(rows):
    """Accuracy of recall.py --neuron; "" where there are no rows."""
    if not rows:
        return ""
    lines = []
    for case, its_rows in groups(rows, "borders", "updates", "alpha").items():
        accuracies = numbers(its_rows, "accuracy")
        lines.append([*case, quartiles(accuracies), above(accuracies)])
    head = ["borders", "updates", "α", "accuracy", "above 0.9"]
    return "Answers scored. Median [quartiles] over the seeds.\n\n" + markdown_table(head, lines)


def places_table(rows):
    """Accuracy of recall.py --places; "" where there are no rows."""
    if not rows:
        return ""
    lines = []
    names = ("cell", "layers", "delay", "places", "updates", "arm")
    for case, its_rows in groups(rows, *names).items():
        accuracies = numbers(its_rows, "accuracy")
        *settings, arm = case
        lines.append([*settings, RECALL[arm], quartiles(accuracies), above(accuracies)])
    head = ["network", "layers", "delay", "streams", "updates", "", "accuracy", "above 0.9"]
    return (
        "Answers scored, α = 1, g's rate 1e-4. Median [quartiles] over the seeds. The head of "
        "recall.py says what `spread` and `same` are. With a delay of 17 there are one or two "
        "borders between symbol and answer if the streams are spread, and always one if not.\n\n"
        + markdown_table(head, lines)
    )


def search_table(rows):
    """Perplexity of each training of reproduce.py --search at its best epoch."""

    def order(line):
        data, epochs, name, _, _, valid, _ = line
        return data, int(epochs), name, float(valid)

    lines = []
    for case, its_rows in groups(rows, "data", "method", "epochs", "lr", "seed").items():
        data, method, epochs, rate, seed = case
        name, *_ = PAPER[method]
        best = best_epoch(its_rows)
        valid = f"{float(best['valid_perplexity']):.2f}"
        training = f"{float(best['train_perplexity']):.2f}"
        lines.append([data, epochs, name, rate, seed, valid, training])
    lines.sort(key=order)
    head = ["text", "epochs", "method", "rate", "seed", "validation", "training"]
    return (
        "Perplexity of validation and training text (the latter with dropout) at the best epoch, "
        "with the settings of preset `small`. On PTB five epochs of truncated BPTT, with and "
        "without restart, have products in float32, and so has pydoc. The others have products in "
        "bf16. A method with a restart had one, after a third of the training.\n\n"
        + markdown_table(head, lines)
    )


def methods_table(ptb, wt2, scale="small"):
    """README's table of methods. ptb, wt2: the rows of the two texts. "-": not run."""
    last_ptb = last_epochs(ptb)
    last_wt2 = last_epochs(wt2)
    lines = []
    for method, (name, paper_ptb, paper_wt2) in PAPER.items():
        of_ptb = having(last_ptb.values(), method=method)
        of_wt2 = having(last_wt2.values(), method=method)
        found_ptb = spread(numbers(of_ptb, "test_perplexity")) or "-"
        found_wt2 = spread(numbers(of_wt2, "test_perplexity")) or "-"
        options = f"`{options_of(scale, method)}`"
        lines.append([name, paper_ptb, paper_wt2, found_ptb, found_wt2, options])
    head = ["method", "paper, PTB", "paper, WT2", "here, PTB", "here, WT2"]
    return markdown_table([*head, "options of train.py"], lines)


def options_of(scale, method):
    """The options of train.py with which a method is trained on PTB, but for its seed."""
    options = reproduce.arguments(scale, "ptb", method, reproduce.epochs_of(scale, "ptb"))
    if scale == "small":
        options = options[2:]  # without --preset small, which is the default
    return " ".join(map(str, options))


def differences(ptb, column="test_perplexity"):
    """[(what is compared, the paper's difference or None, ours)]; ours: a number for each seed.

    The first method of COMPARED minus the second, both at their best epochs, whose models are the
    ones that were tested. The paper's are of the test perplexity.
    """
    best = best_epochs(ptb)
    found = []
    for method, other in COMPARED:
        name, paper, _ = PAPER[method]
        other_name, other_paper, _ = PAPER[other]
        of_paper = None
        if "-" not in (paper, other_paper):
            of_paper = paper - other_paper
        ours = []
        for row in having(best.values(), method=method):
            beside = best.get((other, row["seed"]))
            if beside:
                ours.append(float(row[column]) - float(beside[column]))
        found.append((f"{name} - {other_name}", of_paper, ours))
    return found


def differences_table(ptb):
    """Differences of test perplexity on PTB, seed by seed, beside those of the paper's one seed.

    Two methods that were trained on no seed together are left out, here and below.
    """
    lines = []
    for what, of_paper, ours in differences(ptb):
        if not ours:
            continue
        paper = "-" if of_paper is None else f"{of_paper:+.2f}"
        lines.append([what, paper, interval(ours, 2), len(ours)])
    head = ["difference, PTB", "paper, one seed", "here, mean [95% interval]", "seeds"]
    return markdown_table(head, lines)


def validation_differences_table(ptb):
    """The same differences on validation text, which chose the rates."""
    lines = []
    for what, _, ours in differences(ptb, "valid_perplexity"):
        if not ours:
            continue
        lines.append([what, interval(ours, 2), len(ours)])
    head = ["difference on validation text, PTB", "mean [95% interval]", "seeds"]
    return markdown_table(head, lines)


def methods_injected_table(ptb):
    """How much g injects in each method, by log.csv; "" where no training has these columns."""

    def measured(rows):
        return [row for row in rows if row.get("dni_injected")]

    lines = []
    for (method,), its_rows in groups(ptb, "method").items():
        last = measured(last_epochs(its_rows).values())
        if not last:
            continue
        name, *_ = PAPER[method]
        injected = spread(numbers(last, "dni_injected"), 4)
        largest = max(numbers(measured(its_rows), "dni_injected"))
        lost = spread(numbers(last, "dni_lost"), 3)
        lines.append([name, len(last), injected, f"{largest:.4f}", lost])
    if not lines:
        return ""
    head = ["method, PTB", "seeds", "injected, last epoch", "largest of any epoch"]
    head.append("lost, last epoch")
    return (
        "How much g injects, or would inject in a real run, and how much is lost at the borders: "
        "norms of gradients of θ, over that of the truncated gradient. They are `dni_injected` and "
        "`dni_lost` of log.csv, from four chunks of validation text.\n\n"
        + markdown_table(head, lines)
    )


def e_base_tables(logs):
    """Methods with a restart, with another E_base than the usual one; "" where there is none.

    Then the differences between the methods with the other E_base, and one cosine beside them. The
    validation perplexity is that of the model that was tested.
    """
    others = logs["methods-small-ptb-e-base"]
    if not others:
        return ""
    usual = best_epochs(logs["methods-small-ptb"])
    beside_cosine = others + having(logs["methods-small-ptb"], method="cosine")
    lines = []
    for (method, e_base), its_rows in groups(others, "method", "e_base").items():
        best = list(best_epochs(its_rows).values())
        beside = [usual[method, row["seed"]] for row in best if (method, row["seed"]) in usual]
        name, *_ = PAPER[method]
        cells = [name, f"{float(e_base):g}", len(best)]
        for column in ("valid_perplexity", "test_perplexity"):
            cells.append(spread(numbers(best, column)))
            cells.append(spread(numbers(beside, column)))
        lines.append(cells)
    head = [
        "method",
        "E_base",
        "seeds",
        "validation",
        "validation, E_base = 1",
        "test",
        "test, E_base = 1",
    ]
    tables = [
        "Perplexity on PTB, 15 epochs. Products are in bf16, but with E_base = 1 in float32.\n",
        markdown_table(head, lines),
        differences_table(beside_cosine),
        validation_differences_table(beside_cosine),
    ]
    return "\n".join(tables)


def last_epochs(rows):
    """{(method, seed): the row of the last epoch}"""
    return {case: its_rows[-1] for case, its_rows in groups(rows, "method", "seed").items()}


def best_epochs(rows):
    """{(method, seed): the row of the epoch with the lowest validation perplexity}"""
    return {case: best_epoch(its_rows) for case, its_rows in groups(rows, "method", "seed").items()}


def best_epoch(rows):
    """The row with the lowest validation perplexity. train.py tests the model of this epoch."""
    return min(rows, key=lambda row: float(row["valid_perplexity"]))


# --------------------------------------------------------------------- injected.py and authors.py


def injected_table(rows):
    """Sizes and cosines of what is injected and of what is lost; "" where there are no rows."""
    lines = []
    for (what, g, T), its_rows in groups(rows, "what", "g", "T").items():
        cells = [what, g, T, len(its_rows)]
        for column in ("injected", "lost", "cosine", "across", "placebo_cosine"):
            values = numbers(its_rows, column)
            cells.append(spread(values, 3) if len(values) > 1 else f"{values[0]:.2g}")
        for column in ("halves_injected", "halves_lost", "delta_r2"):
            cells.append(spread(numbers(its_rows, column), 2))
        lines.append(cells)
    if not lines:
        return ""
    head = ["model", "g", "T", "seeds", "injected", "lost", "cosine of the two", "across halves"]
    head += ["placebo's cosine", "halves of injected", "halves of lost", "R² of δ^"]
    return (
        "Gradients of θ, summed over windows of text: the sizes are those of the sums, over the "
        "size of the truncated one. The head of injected.py says what the columns mean, and what "
        "they cannot tell. Models of `characters` go on learning meanwhile. The other models are "
        "those of trainings that had ended.\n\n" + markdown_table(head, lines)
    )


def authors_table(rows):
    """What the two neuron-wise g inject as they learn; "" where there are no rows."""
    lines = []
    for (chunks,), its_rows in groups(rows, "chunks").items():
        theirs = having(its_rows, g="authors")
        ours = having(its_rows, g="dni.py")
        cells = [chunks, len(theirs)]
        for mine in (theirs, ours):
            injected = statistics.mean(numbers(mine, "injected"))
            r2 = statistics.mean(numbers(mine, "delta_r2"))
            cells += [f"{injected:.2g}", f"{r2:.2g}"]
        cells.append(spread(numbers(theirs, "lost"), 3))
        lines.append(cells)
    if not lines:
        return ""
    head = ["chunks read", "seeds", "authors' g: injected", "its R²", "g of dni.py: injected"]
    head += ["its R²", "lost"]
    return (
        "PTB, the model of preset small, trained with real gradients. Both g learn beside it, and "
        "are not used. An epoch has 664 chunks.\n\n" + markdown_table(head, lines)
    )


# ---------------------------------------------------------------------------------------- figures


def differences_figure(plt, ptb):
    """Each difference of `differences`, with its seeds and its interval, beside the paper's."""
    rows = differences(ptb)[:-1]  # the last one is so large that the others would not be seen
    figure, axis = plt.subplots(figsize=(8.2, 3.0))
    for place, (_, of_paper, ours) in enumerate(rows):
        axis.plot(ours, [place + 0.2] * len(ours), ".", color="0.5")
        if len(ours) > 1:
            mean = statistics.mean(ours)
            half = half_width(ours)
            axis.errorbar(mean, place, xerr=half, fmt="o", color="black", capsize=3)
        if of_paper is not None:
            axis.plot(of_paper, place, "D", color="#d62728", fillstyle="none")
    axis.axvline(0, color="0.35", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [what.replace(" - ", "\nminus ") for what, _, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("difference of test perplexity on PTB (left of 0: the first is better)")
    axis.set_title(
        "Black: mean of the seeds here and its 95% interval. Grey: each seed.\n"
        "Red: the paper's difference, of one training each, at its own size.",
        fontsize=9,
        loc="left",
    )
    return figure


def gain_figure(plt, rows):
    """What each g and longer BPTT save over truncated BPTT, by T; rows: of text.csv."""
    final = [row for row in rows if row["seed"] != "0"]
    found = last_rows(final)
    keys = at_best(rows)
    lengths = ("2", "5", "10", "20")
    figure, axis = plt.subplots(figsize=(7.0, 4.0))
    for n, (arm, name, colour, marker) in enumerate(
        (
            ("full", "BPTT through the last 40 steps", "black", "_"),
            ("twice", "BPTT through two chunks", "#2ca02c", "s"),
            ("linear", "layer-wise g, one linear map", "#1f77b4", "o"),
            ("mlp", "layer-wise g, MLP", "#ff7f0e", "^"),
            ("neuron", "neuron-wise g, the paper's", "#d62728", "D"),
        )
    ):
        saved = []
        for T in lengths:
            fewer = []
            if (arm, T) in keys:
                fewer, _ = gains(found, keys[arm, T])
            saved.append(fewer)
        places = [place + 0.09 * (n - 2) for place, its in enumerate(saved) if len(its) > 1]
        means = [statistics.mean(its) for its in saved if len(its) > 1]
        halves = [half_width(its) for its in saved if len(its) > 1]
        axis.errorbar(
            places,
            means,
            yerr=halves,
            fmt=marker,
            color=colour,
            capsize=3,
            markersize=9 if arm == "full" else 5,
            label=name,
        )
    axis.axhline(0, color="0.35", linewidth=0.8)
    axis.text(-0.3, -0.006, "truncated BPTT", fontsize=8, color="0.35", va="top")
    axis.set_xlim(-0.35, 3.4)
    axis.set_xticks(range(len(lengths)), [f"T = {T}" for T in lengths])
    axis.set_ylabel("bits per character saved")
    axis.set_title(
        "Bits per character saved, compared with truncated BPTT in chunks of T steps.\n"
        "Characters of PTB. Means of 3 to 5 seeds and their 95% intervals. Higher is better.",
        fontsize=9,
        loc="left",
    )
    axis.legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    main()
