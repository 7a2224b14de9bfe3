"""Tables and a figure of alternate.py, for report.py. Bits are those of the test text."""

import statistics

import numpy as np

import alternate
from alternate import CONTROLS, MAIN, NEURON, NOISY_ALTERNATION, OTHERS, REPEATED_ARMS, T5_ARMS, Arm
from tables import groups, half_width, having, interval, markdown_table, numbers, spread

EIGHT = (
    "RRR",
    "SRR",
    "RSR",
    "SSR",
    "RRS",
    "SRS",
    "RSS",
    "SSS",
)  # by the share of synthetic updates
NAMES = {
    "bptt": "truncated BPTT",
    "twice": "BPTT through two chunks",
    "linear": "linear g",
    "neuron": "neuron-wise g",
    "kept": "linear g, δ^ reaches θ alone",
    "sign": "the same, random signs",
    "shuffled": "the same, streams of δ^ shuffled",
}


# -------------------------------------------------------------------------- numbers out of the rows


def arm_of(pattern, T=2, text="once", g="linear"):
    """The Arm of a pattern: one without an S has no g."""
    return Arm(g if "S" in pattern else "bptt", pattern, T, text)


def scores(rows, arm):
    """{seed: bits of the test text} of an arm at its best peak; empty if it was not trained."""
    peak = alternate.best_peak(rows, arm)
    mine = alternate.of_arm(rows, arm)
    return {
        int(row["seed"]): float(row["test_bits"])
        for row in mine
        if row["test_bits"] and float(row["peak"]) == peak
    }


def contrast(of, *terms):
    """The weighted sum of bits, a list, one a seed. of: {arm: scores}; terms: (weight, arm)."""
    seeds = set.intersection(*(set(of[arm]) for _, arm in terms))
    return [sum(weight * of[arm][seed] for weight, arm in terms) for seed in sorted(seeds)]


def minus(of, arm, other):
    """arm's bits - other's, a number a seed."""
    return contrast(of, (1, arm), (-1, other))


def of_patterns(rows):
    """{pattern: scores} of the eight patterns at T = 2, without those that were not trained."""
    found = {pattern: scores(rows, arm_of(pattern)) for pattern in EIGHT}
    return {pattern: its for pattern, its in found.items() if its}


def share(pattern):
    """The share of synthetic updates: run i has 2^i of 2^n - 1 parts."""
    return sum(2**i for i, kind in enumerate(pattern) if kind == "S") / (2 ** len(pattern) - 1)


def changes(pattern):
    """At how many restarts the kind of gradient changes."""
    return sum(a != b for a, b in zip(pattern, pattern[1:]))


# ------------------------------------------------------------------------------------------- tables


def alternate_claims(rows):
    """The paper's claim, and alternation as such, wherever the four patterns were trained."""
    lines = []
    for name, n, T, text, g in (
        ("T = 2, linear g", 3, 2, "once", "linear"),
        ("T = 5, linear g", 3, 5, "once", "linear"),
        ("T = 2, linear g, a text that repeats, five runs", 5, 2, "repeated", "linear"),
        ("T = 2, neuron-wise g", 3, 2, "once", "neuron"),
        ("T = 2, δ^ with random signs", 3, 2, "once", "sign"),
        ("T = 2, δ^ with shuffled streams", 3, 2, "once", "shuffled"),
    ):
        real = arm_of("R" * n, T, text, g)
        synthetic = arm_of("S" * n, T, text, g)
        first = arm_of(("RS" * n)[:n], T, text, g)
        second = arm_of(("SR" * n)[:n], T, text, g)
        of = {arm: scores(rows, arm) for arm in (real, synthetic, first, second)}
        seeds = sorted(set(of[first]) & set(of[real]) & set(of[synthetic]))
        claim = [of[first][seed] - min(of[real][seed], of[synthetic][seed]) for seed in seeds]
        if not claim:
            continue
        as_such = contrast(of, (0.5, first), (0.5, second), (-0.5, real), (-0.5, synthetic))
        lines.append(
            [
                name,
                len(seeds),
                interval(minus(of, first, real)),
                interval(minus(of, first, synthetic)),
                interval(claim),
                interval(as_such),
            ]
        )
    return markdown_table(
        [
            "",
            "seeds",
            "alternating (RSR) - real (RRR)",
            "alternating (RSR) - synthetic (SSS)",
            "1. RSR - min(RRR, SSS)",
            "2. (RSR + SRS - RRR - SSS) / 2",
        ],
        lines,
    )


def alternate_patterns(rows):
    """Bits by pattern, T = 2."""
    of = of_patterns(rows)
    lines = []
    for pattern, its in of.items():
        lines.append(
            [
                pattern,
                f"{7 * share(pattern):.0f}/7",
                changes(pattern),
                alternate.best_peak(rows, arm_of(pattern)),
                len(its),
                spread(list(its.values()), 4),
                "" if pattern == "RRR" else interval(minus(of, pattern, "RRR")),
            ]
        )
    return markdown_table(
        [
            "runs",
            "synthetic updates",
            "changes of kind",
            "peak",
            "seeds",
            "bits, test",
            "from RRR [95%]",
        ],
        lines,
    )


def alternate_effects(rows):
    """The effect of each run's kind, and the interactions; "" before all eight are there."""
    of = of_patterns(rows)
    if len(of) < len(EIGHT):
        return ""
    lines = []
    for name, runs in (
        ("run 0 synthetic, not real", (0,)),
        ("run 1 synthetic, not real", (1,)),
        ("run 2 synthetic, not real", (2,)),
        ("runs 0 and 1 of one kind, not of two", (0, 1)),
        ("runs 1 and 2 of one kind, not of two", (1, 2)),
        ("runs 0 and 2 of one kind, not of two", (0, 2)),
        ("one or three runs synthetic, not none or two", (0, 1, 2)),
    ):
        terms = [(effect_sign(pattern, runs) / 4, pattern) for pattern in EIGHT]
        lines.append([name, interval(contrast(of, *terms))])
    return markdown_table(["mean of four patterns - mean of the other four", "bits [95%]"], lines)


def alternate_questions(rows):
    """Contrasts that were looked at after the trainings; "" before all eight are there."""
    of = of_patterns(rows)
    if len(of) < len(EIGHT):
        return ""
    half = 0.5
    asked = (
        (
            "a synthetic run 1 before a real run 2: (RSR + SSR - RRR - SRR) / 2",
            ((half, "RSR"), (half, "SSR"), (-half, "RRR"), (-half, "SRR")),
        ),
        (
            "a synthetic run 1 before a synthetic run 2: (RSS + SSS - RRS - SRS) / 2",
            ((half, "RSS"), (half, "SSS"), (-half, "RRS"), (-half, "SRS")),
        ),
        (
            "two changes of kind, not one: (RSR + SRS - RRS - SSR) / 2",
            ((half, "RSR"), (half, "SRS"), (-half, "RRS"), (-half, "SSR")),
        ),
    )
    lines = [[name, interval(contrast(of, *terms))] for name, terms in asked]
    _, sign, shuffled = CONTROLS
    noise = {arm: scores(rows, arm) for arm in (sign, shuffled)}
    if all(noise.values()):
        lines.append(
            ["δ^ of other streams, not random signs", interval(minus(noise, shuffled, sign))]
        )
    return markdown_table(["looked at afterwards", "bits [95%]"], lines)


def effect_sign(pattern, runs):
    """The product over these runs of +1 for S and -1 for R."""
    sign = 1
    for run in runs:
        sign *= 1 if pattern[run] == "S" else -1
    return sign


def alternate_regression(rows):
    """Bits of the eight patterns, fitted for each seed by share, last run and changes of kind."""
    of = of_patterns(rows)
    if len(of) < len(EIGHT):
        return ""
    columns = {
        "share of synthetic updates, from 0 to 1": [share(pattern) for pattern in EIGHT],
        "the last run is synthetic": [float(pattern[-1] == "S") for pattern in EIGHT],
        "each change of kind": [changes(pattern) for pattern in EIGHT],
    }
    seeds = sorted(set.intersection(*map(set, of.values())))
    bits = np.array([[of[pattern][seed] for seed in seeds] for pattern in EIGHT])  # (8, seeds)
    lines = []
    for n, name in enumerate(columns):
        some = np.array([np.ones(8), *list(columns.values())[: n + 1]]).T
        every = np.array([np.ones(8), *columns.values()]).T
        weights = np.linalg.lstsq(every, bits, rcond=None)[0][n + 1]  # one a seed
        mean = bits.mean(1)
        rest = mean - some @ np.linalg.lstsq(some, mean, rcond=None)[0]
        explained = 1 - (rest**2).sum() / ((mean - mean.mean()) ** 2).sum()
        lines.append([name, interval(weights.tolist()), f"{explained:.3f}"])
    return markdown_table(
        ["", "bits, all three fitted together [95%]", "R² of the eight means, up to this line"],
        lines,
    )


def alternate_peaks(rows):
    """Validation bits over peak, on the seeds of the search."""
    arms = (*MAIN, *OTHERS, *CONTROLS, *NOISY_ALTERNATION, *T5_ARMS, *REPEATED_ARMS, *NEURON)
    found = {arm: alternate.by_peak(rows, arm) for arm in arms}
    peaks = sorted({peak for its in found.values() for peak in its})
    lines = []
    for arm, its in found.items():
        if its:
            best = alternate.best_peak(rows, arm)
            cells = []
            for peak in peaks:
                bits = spread(list(its.get(peak, {}).values()), 3)
                cells.append(f"**{bits}**" if peak == best else bits)
            seeds = max(len(values) for values in its.values())
            text = "16 passes" if arm.text == "repeated" else ""
            lines.append([NAMES[arm.arm], arm.pattern, arm.T, text, seeds, *cells])
    return markdown_table(["", "runs", "T", "", "seeds", *peaks], lines)


def alternate_arms(rows, arms):
    """Bits of these arms, and their differences from real and from synthetic runs of the same T."""
    lines = []
    for arm in arms:
        its = scores(rows, arm)
        if not its:
            continue
        n = len(arm.pattern)
        T = 2 if arm.T == 4 else arm.T
        real = arm_of("R" * n, T, arm.text)
        synthetic = arm_of("S" * n, T, arm.text)
        of = {other: scores(rows, other) for other in (arm, real, synthetic)}
        lines.append(
            [
                NAMES[arm.arm],
                arm.pattern,
                arm.T,
                alternate.best_peak(rows, arm),
                len(its),
                spread(list(its.values()), 4),
                "" if arm == real else interval(minus(of, arm, real)),
                "" if arm == synthetic else interval(minus(of, arm, synthetic)),
            ]
        )
    return markdown_table(
        ["", "runs", "T", "peak", "seeds", "bits, test", "from real [95%]", "from synthetic [95%]"],
        lines,
    )


def alternate_controls(rows):
    beside = (MAIN[0], MAIN[1], *CONTROLS, MAIN[2], *NOISY_ALTERNATION, MAIN[4], MAIN[5])
    return alternate_arms(rows, beside)


def alternate_others(rows):
    """T = 5, the text that repeats, and the neuron-wise g; "" before one of them was trained."""
    arms = [arm for arm in (*T5_ARMS, *REPEATED_ARMS, *NEURON) if scores(rows, arm)]
    if not arms:
        return ""
    return (
        "\nT = 5, the text that repeats (five runs, 16 passes), and the neuron-wise g.\n\n"
        + alternate_arms(rows, arms)
    )


def alternate_cost(rows):
    """Milliseconds an update; rows: of alternate-cost.csv. Ratios are taken repeat by repeat."""
    truncated = having(rows, arm="bptt", kind="R", T="2")
    base = {row["repeat"]: float(row["ms"]) for row in truncated}
    lines = []
    for (arm, kind, T), its in groups(rows, "arm", "kind", "T").items():
        use = {"R": "g learns, unused", "S": "g learns and is used"}[kind]
        same_text = [float(row["ms"]) * 2 / int(T) / base[row["repeat"]] for row in its]
        lines.append(
            [
                NAMES[arm],
                use if arm in ("linear", "neuron") else "",
                T,
                spread(numbers(its, "ms")),
                spread(same_text),
            ]
        )
    return markdown_table(
        ["", "", "T", "ms an update", "time for the same text (truncated BPTT, T = 2: 1)"], lines
    )


def alternating(rows, cost_rows):
    """The section of results.md."""
    return (
        "Bits per character of the test text. The peak rate was chosen on validation text, with "
        "other seeds. Differences are taken seed by seed; below 0 is better. Brackets hold their "
        "95% interval, by Student's t over the seeds. The claims stand in the head of "
        "alternate.py.\n\n"
        + alternate_claims(rows)
        + "\n![the eight patterns](patterns.png)\n\nThe eight patterns, T = 2, linear g.\n\n"
        + alternate_patterns(rows)
        + "\nThe effect of each run's kind, and how the runs act together.\n\n"
        + alternate_effects(rows)
        + "\nWhat share, last run and alternation explain.\n\n"
        + alternate_regression(rows)
        + "\nQuestions that came up after the trainings. The intervals here and above are not "
        "corrected for their number. Claims 1 and 2 were written before.\n\n"
        + alternate_questions(rows)
        + "\nControls. T = 4 makes half the updates over the same text. It is compared with real "
        "and synthetic runs of T = 2.\n\n"
        + alternate_controls(rows)
        + alternate_others(rows)
        + "\nBits of validation text over the peak rate, the best in bold.\n\n"
        + alternate_peaks(rows)
        + ("\nWhat an update costs.\n\n" + alternate_cost(cost_rows) if cost_rows else "")
    )


# ------------------------------------------------------------------------------------------ figures

REAL_LAST = "0.35"
SYNTHETIC_LAST = "#d62728"
CEILING = "#2ca02c"


def patterns_figure(plt, rows):
    """Each pattern's bits minus those of RRR: every seed, their mean, and its 95% interval."""
    of = of_patterns(rows)
    of["twice"] = scores(rows, MAIN[4])
    figure, axis = plt.subplots(figsize=(7.6, 4.2))
    drawn = [key for key in of if key != "RRR" and len(minus(of, key, "RRR")) > 1]
    for y, key in enumerate(drawn):
        less = minus(of, key, "RRR")
        colour = REAL_LAST if key.endswith("R") else SYNTHETIC_LAST
        if key == "twice":
            colour = CEILING
        axis.plot(less, [y + 0.22] * len(less), ".", color=colour, alpha=0.5, markersize=4)
        mean = statistics.mean(less)
        axis.errorbar(mean, y, xerr=half_width(less), fmt="o", color=colour, capsize=3)
        if len(of) == len(EIGHT) + 1 and key != "twice":
            axis.plot(additive(of, key), y, "|", color="black", markersize=14, markeredgewidth=1.5)
    labels = []
    for key in drawn:
        parts = round(7 * share(key)) if key != "twice" else 0
        name = f"{'  '.join(key)}    {parts}/7 synthetic"
        if key == "RSR":
            name = "the paper's:    " + name
        labels.append("BPTT through two chunks" if key == "twice" else name)
    axis.set_yticks(range(len(drawn)), labels)
    axis.invert_yaxis()
    axis.axvline(0, color="0.35", linewidth=0.8)
    axis.set_xlabel("bits per character, minus those of R R R with the same seed  (left is better)")
    figure.suptitle(
        "Three runs of SGDR with real (R) or synthetic (S) gradients: characters of PTB, T = 2\n"
        "Large dot and bar: mean and its 95% interval. Small dots: each seed.\n"
        "Black tick: a fit to all eight patterns in which the effects of runs only add up.",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    axis.text(
        0.94,
        0.04,
        "grey: the last run is real\nred: the last run is synthetic",
        transform=axis.transAxes,
        ha="right",
        fontsize=8,
    )
    return figure


def additive(of, pattern):
    """Where a pattern would be, beside RRR, without any interaction: a mean over the seeds."""
    total = 0.0
    for run, kind in enumerate(pattern):
        if kind == "S":
            terms = [(effect_sign(other, (run,)) / 4, other) for other in EIGHT]
            total += statistics.mean(contrast(of, *terms))
    constant = statistics.mean(contrast(of, *[(1 / 8, other) for other in EIGHT]))
    for run in range(len(pattern)):
        terms = [(effect_sign(other, (run,)) / 4, other) for other in EIGHT]
        constant -= statistics.mean(contrast(of, *terms)) / 2
    return constant + total - statistics.mean(of["RRR"].values())
