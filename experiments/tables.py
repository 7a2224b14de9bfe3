"""Rows of a log, and tables of them: what report.py and report_alternate.py share.

A row is {column: string}, as study.read_log reads it. An interval is the 95% interval of the mean,
by Student's t.
"""

import statistics

# The 97.5% quantile of Student's t, by the number of values.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def groups(rows, *names):
    """{values of the columns `names`: [rows]}, in the order of the log."""
    found = {}
    for row in rows:
        values = tuple(row[name] for name in names)
        found.setdefault(values, []).append(row)
    return found


def having(rows, **values):
    """The rows with these values in these columns."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def numbers(rows, name):
    """The numbers in a column."""
    return [float(row[name]) for row in rows]


def spread(values, digits=2):
    """mean ± standard deviation where there are several values; "" for none."""
    if not values:
        return ""
    mean = round(statistics.mean(values), digits) + 0  # + 0: no -0.000
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def markdown_table(head, rows):
    """head: the names of the columns. rows: lists of cells."""
    rule = ["---"] * len(head)
    lines = ["|" + "|".join(map(str, cells)) + "|\n" for cells in [head, rule, *rows]]
    return "".join(lines)


def half_width(values):
    """Half of the 95% interval of the mean."""
    return T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def interval(values, digits=4):
    """mean [low, high], the 95% interval; the mean alone of one value; "" of none."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:+.{digits}f}"
    half = half_width(values)
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
