"""The paper's five methods, and the one that it lacks, at equal budget, each with the recipe of its mode.

    python experiments/reproduce.py                              PTB, 15 epochs, three seeds: 13 hours
    python experiments/reproduce.py --data wt2 --seeds 42        WT2, 2 epochs: 3 hours
    python experiments/reproduce.py --scale paper                the paper's configuration, for a GPU
    python experiments/reproduce.py --search                     which learning rate suits which method?

On PTB at scale small a training is `python train.py --mode MODE --data ptb --compile` and no more. With
another number of epochs, the restarts and the first use of a DNI come at the same share of the training. All
is resumable: each training has a folder in trainings/. The search judges by validation perplexity.

`cosine` is the method that the paper lacks: one run of SGDR, as long as the training. Its rate falls once and
never restarts. So it tells apart what restarts do and what any falling rate does.
"""

import argparse
import functools
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
# (corpus, method, epochs, seeds, rates)
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
    """The Settings that train.py makes of these options."""
    return train.parse(list(map(str, options)))[0]


def epochs_of(scale, data):
    return 320 if scale == "paper" else 2 if data == "wt2" else 15


def arguments(scale, data, method, epochs):
    """Options of train.py for a method that has so many epochs."""
    chosen = ["--preset", scale, *METHODS[method], "--data", data]
    usual = settings_of(chosen)
    share = epochs / usual.epochs
    if share != 1:
        chosen += ["--epochs", epochs]
    if method == "cosine":
        chosen += ["--e-base", epochs]
    elif share != 1 and method not in ("bptt", "dni"):
        chosen += ["--e-base", round(usual.e_base * share, 4)]
    if share != 1 and method in ("dni", "dni-restart"):
        chosen += ["--dni-warmup", round(usual.dni_warmup * share, 4)]
    return chosen


def one(scale, case):
    """train.py in a folder of its own, resumed if it has begun. Returns the rows of its log.csv.

    A case of the search also says how many epochs, and the rate.
    """
    data, method = case["data"], case["method"]
    options = arguments(scale, data, method, case.get("epochs", epochs_of(scale, data)))
    if "lr" in case:
        options += ["--lr", case["lr"]]
    folder = study.ROOT / "trainings" / "-".join(map(str, ["reproduce", scale, *case.values()]))
    command = [
        sys.executable,
        study.ROOT / "train.py",
        *options,
        "--seed",
        case["seed"],
        "--compile",
        "--resume",
        folder,
    ]
    process = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(
            f"{case}: train.py ended with status {process.returncode}; the same command goes on"
        )
    tested = process.stdout.split()[-1]
    return [
        {**case, **row, "test_perplexity": tested} for row in study.read_log(folder / "log.csv")
    ]


def main():
    parser = argparse.ArgumentParser(description="The paper's methods at equal budget.")
    parser.add_argument("--search", action="store_true", help="the search of rates, at scale small")
    parser.add_argument("--scale", choices=("small", "paper"), default="small")
    parser.add_argument("--data", choices=("ptb", "wt2", "pydoc"), default="ptb")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="42 43 44 at scale small, 42 at scale paper"
    )
    a = parser.parse_args()
    if a.search:
        cases = [
            dict(data=data, method=method, epochs=epochs, lr=rate, seed=seed)
            for data, method, epochs, seeds, rates in SEARCH
            for seed in seeds
            for rate in rates
            if data == a.data and method in a.methods
        ]
        study.do_cases(study.LOGS / "search.csv", functools.partial(one, "small"), cases)
    else:
        seeds = a.seeds or ((42, 43, 44) if a.scale == "small" else (42,))
        cases = [
            dict(data=a.data, method=method, seed=seed) for seed in seeds for method in a.methods
        ]
        study.do_cases(
            study.LOGS / f"methods-{a.scale}-{a.data}.csv", functools.partial(one, a.scale), cases
        )


if __name__ == "__main__":
    main()
