"""How do the paper's five methods, and one that it lacks, compare after as many epochs each?

    python experiments/reproduce.py                          PTB, 15 epochs, three seeds: 13 hours
    python experiments/reproduce.py --data wt2 --seeds 42    WT2, 2 epochs: 3 hours
    python experiments/reproduce.py --scale paper            the paper's configuration, for a GPU
    python experiments/reproduce.py --search                 which learning rate suits which method?
    python experiments/reproduce.py --e-base 5               one restart in 15 epochs, not three

At scale small, a training on PTB is `python train.py --mode MODE --data ptb --compile` and no more.
A shorter training has one restart, after a third of it, and a DNI is first used after the same
share of it as on PTB. A study can be resumed, and so can each training: it has a folder in
trainings/. The search compares validation perplexities.

The methods:

    bptt           truncated BPTT at a constant rate
    dni            a synthetic gradient at a constant rate
    cosine         truncated BPTT; the rate falls along one cosine that is as long as the training
    restart        truncated BPTT with SGDR
    dni-restart    a synthetic gradient with SGDR
    alternating    real and synthetic gradients in turn, with SGDR

The paper lacks `cosine`: one run of SGDR that never restarts. It tells the effect of the restarts
from that of a rate that falls.
"""

import argparse
import functools
import itertools
import subprocess
import sys

import study

import train

METHODS = {
    "bptt": ["--mode", "bptt"],
    "dni": ["--mode", "dni"],
    "cosine": ["--mode", "restart"],
    "restart": ["--mode", "restart"],
    "dni-restart": ["--mode", "restart", "--gradient", "synthetic"],
    "alternating": ["--mode", "alternating"],
}
WITH_RESTART = ("restart", "dni-restart", "alternating")
# What `--search` tries: (corpus, method, epochs, seeds, learning rates). It came before E_base was
# chosen: its methods with a restart have one, after a third of the training.
SEARCH = [
    ("ptb", "bptt", 5, (42,), (2e-3, 3e-3, 4e-3, 6e-3)),
    ("ptb", "bptt", 15, (42,), (3e-3, 4e-3, 6e-3)),
    ("ptb", "dni", 5, (42,), (2e-3, 3e-3, 4e-3, 6e-3)),
    ("ptb", "cosine", 15, (42,), (6e-3, 1e-2, 1.5e-2, 2e-2)),
    ("ptb", "cosine", 15, (43, 44), (1e-2, 1.5e-2)),
    ("ptb", "restart", 5, (42,), (4e-3, 6e-3, 1e-2, 1.5e-2)),
    ("ptb", "restart", 15, (42,), (1e-2, 1.5e-2)),
    ("ptb", "dni-restart", 5, (42,), (4e-3, 6e-3, 1e-2, 1.5e-2)),
    ("ptb", "alternating", 5, (42,), (4e-3, 6e-3, 1e-2, 1.5e-2)),
    ("pydoc", "alternating", 15, (42,), (6e-3, 1e-2)),
]


def settings_of(options):
    """The train.Settings that train.py makes of these options, a list of strings and numbers."""
    settings, _, _ = train.parse([str(option) for option in options])
    return settings


def epochs_of(scale, data):
    """How many epochs each method has. At scale `small` they are few, for two CPU cores."""
    if scale == "paper":
        return 320
    if data == "wt2":
        return 2
    return 15


def one_restart(epochs):
    """The E_base with which a training has one restart, after a third of it."""
    return round(epochs / 3, 4)


def arguments(scale, data, method, epochs):
    """The options of train.py, a list of strings and numbers, for a method and a number of epochs.

    scale: a preset of train.py. data: a corpus. method: a key of METHODS.
    """
    chosen = ["--preset", scale, *METHODS[method], "--data", data]
    usual = settings_of(chosen)
    share = epochs / usual.epochs
    if share != 1:
        chosen += ["--epochs", epochs]
    if method == "cosine":
        chosen += ["--e-base", epochs]
    elif share != 1 and method in WITH_RESTART:
        chosen += ["--e-base", one_restart(epochs)]
    if share != 1 and method in ("dni", "dni-restart"):
        chosen += ["--dni-warmup", round(usual.dni_warmup * share, 4)]
    return chosen


def one(scale, case):
    """Run train.py, or resume it where its folder exists. Returns the rows of its log.csv.

    case: {"data", "method", "seed"}; a case of the search has "epochs" and "lr" too. With a restart
        a case of the search or of --e-base has "e_base". Each row ends with the test perplexity,
        the same in all.

    Exits with a message where train.py fails.
    """
    data = case["data"]
    epochs = case.get("epochs", epochs_of(scale, data))
    folder = study.ROOT / "trainings" / "-".join(map(str, ["reproduce", scale, *case.values()]))
    command = [sys.executable, study.ROOT / "train.py"]
    command += arguments(scale, data, case["method"], epochs)
    if "lr" in case:
        command += ["--lr", case["lr"]]
    if "e_base" in case:
        command += ["--e-base", case["e_base"]]
    command += ["--seed", case["seed"], "--compile", "--resume", folder]
    process = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    if process.returncode != 0:
        sys.exit(
            f"{case}: train.py ended with status {process.returncode}; the same command resumes it"
        )
    tested = process.stdout.split()[-1]  # the last word that train.py prints
    log = study.read_log(folder / "log.csv")
    return [{**case, **row, "test_perplexity": tested} for row in log]


def search_cases(data, methods):
    """The cases of --search with this corpus and these methods."""
    cases = []
    for its_data, method, epochs, seeds, rates in SEARCH:
        if its_data != data or method not in methods:
            continue
        for seed, rate in itertools.product(seeds, rates):
            case = dict(data=data, method=method, epochs=epochs, lr=rate, seed=seed)
            if method in WITH_RESTART:
                case["e_base"] = one_restart(epochs)
            cases.append(case)
    return cases


def main():
    parser = argparse.ArgumentParser(description="The paper's methods at equal budget.")
    parser.add_argument("--search", action="store_true", help="the search of rates, at scale small")
    parser.add_argument("--scale", choices=("small", "paper"), default="small")
    parser.add_argument("--data", choices=("ptb", "wt2", "pydoc"), default="ptb")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="42 43 44 at scale small, 42 at scale paper"
    )
    parser.add_argument("--e-base", type=float, help="of the three methods with a restart")
    args = parser.parse_args()
    if args.search:
        cases = search_cases(args.data, args.methods)
        study.do_cases(study.LOGS / "search.csv", functools.partial(one, "small"), cases)
        return

    seeds = args.seeds
    if seeds is None:
        seeds = [42, 43, 44] if args.scale == "small" else [42]
    cases = [
        dict(data=args.data, method=method, seed=seed) for seed in seeds for method in args.methods
    ]
    log = study.LOGS / f"methods-{args.scale}-{args.data}.csv"
    if args.e_base:
        cases = [
            {**case, "e_base": args.e_base} for case in cases if case["method"] in WITH_RESTART
        ]
        log = log.with_stem(f"{log.stem}-e-base")
    study.do_cases(log, functools.partial(one, args.scale), cases)


if __name__ == "__main__":
    study.run(main)
