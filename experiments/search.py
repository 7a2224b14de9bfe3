"""Which settings suit which method? At a third of preset small's budget: 5 epochs of Penn Treebank, one seed.

    python experiments/search.py                      every case below that its log lacks
    python experiments/search.py --methods cosine     those of one method

A case is a method, a learning rate, and other options of train.py. It is judged by its best validation
perplexity at the end of an epoch. The methods are the paper's five, and `cosine`: one run of SGDR, so that
the rate falls once and never restarts. A third of the budget is a scaled copy of the whole: restarts, and the
first use of a DNI, come at the same share of the training.
"""

import argparse

import reproduce
import study

EPOCHS, WHOLE, SEED = 5, 15, 42
METHODS = {"cosine": ["--mode", "restart"], **reproduce.METHODS}
# What all methods share is searched with `cosine`, one change at a time.
CHANGES = ("", "--bptt 35", "--bptt 50", "--beta2 0.99", "--dropout-output 0.5", "--dropout-hidden 0.3",
           "--dropout-input 0.3")
CASES = [dict(method="cosine", lr=6e-3, options=options) for options in CHANGES]


def arguments(method, epochs=EPOCHS):
    """Options of train.py for a method that has so many epochs."""
    chosen = ["--data", "ptb", "--epochs", epochs, "--compile", *METHODS[method]]
    if method in ("dni", "dni-restart"):
        chosen += ["--dni-warmup", round(epochs / WHOLE, 4)]
    if method not in ("bptt", "dni"):
        chosen += ["--e-base", epochs if method == "cosine" else round(epochs / WHOLE, 4)]
    return chosen


def one(case):
    options = case["options"].split()
    folder = study.ROOT / "trainings" / "search" / "-".join([case["method"], str(case["lr"]), *options])
    return study.train_run(case, [*arguments(case["method"]), "--seed", SEED, "--lr", case["lr"], *options],
                           folder)


def main():
    parser = argparse.ArgumentParser(description="Which settings suit which method?")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time [%(default)s]")
    a = parser.parse_args()
    study.run(study.LOGS / "search.csv", one, [case for case in CASES if case["method"] in a.methods], a.jobs,
              epochs=EPOCHS, seed=SEED)


if __name__ == "__main__":
    main()
