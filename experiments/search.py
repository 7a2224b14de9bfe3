"""Which settings suit which method? At most what 15 epochs of preset small cost, or a third of it.

    python experiments/search.py                      every case below that its log lacks
    python experiments/search.py --methods cosine     those of one method

A case is a method of reproduce.py, a number of epochs, a learning rate, a seed, and what else is searched.
It is judged by its best validation perplexity at the end of an epoch; where there are three seeds, by their
mean. With fewer epochs the restarts, and the first use of a DNI, come at the same share of the training.
"""

import argparse

import reproduce
import study

SHARED = dict(bptt=70, beta2=0.999, dropout_output=0.4, dropout_hidden=0.2, dropout_input=0.2,
              dropout_embedding=0.0, num_layers=2, l2=1.2e-6, embedding_size=256, hidden_size=512,
              dropout_weight=0.0, zoneout=0.0, batch_size=20)


def case(method, lr, epochs=5, data="ptb", e_base="", eta_max="", seed=42, **changes):
    """e_base: epochs of run 0; "": all of them, where the method is `cosine`, or the rate constant.

    eta_max: the rate that each run begins with, "0.01 0.005"; "": lr.
    """
    return dict(data=data, method=method, epochs=epochs, lr=lr, e_base=e_base, eta_max=eta_max,
                seed=seed, **{**SHARED, **changes})


def dropout(output, hidden, input, embedding):
    return dict(dropout_output=output, dropout_hidden=hidden, dropout_input=input,
                dropout_embedding=embedding)


# What all methods share is searched with `cosine`, one change at a time.
CASES = [case("cosine", 6e-3, bptt=35), case("cosine", 6e-3), case("cosine", 1e-2, bptt=35),
         case("cosine", 6e-3, bptt=35, beta2=0.99), case("cosine", 3e-3, bptt=35),
         case("cosine", 4e-3, bptt=35), case("cosine", 6e-3, bptt=35, num_layers=3),
         case("cosine", 6e-3, bptt=35, l2=1e-5)]
# How much dropout is best depends on the number of epochs: so these are whole.
CASES += [case("cosine", 6e-3, 15, bptt=35, **dropout(*rates)) for rates in (
    (0.5, 0.3, 0.4, 0.1), (0.4, 0.3, 0.3, 0.05), (0.4, 0.2, 0.2, 0.0), (0.3, 0.1, 0.1, 0.0))]
# So are other sizes, with fewer epochs in the same time, and other regularisation.
LIGHT = dropout(0.3, 0.1, 0.1, 0.0)
CASES += [case("cosine", 6e-3, 15, **LIGHT, l2=1e-5),
          case("cosine", 6e-3, 8, bptt=35, embedding_size=400, hidden_size=800),
          case("cosine", 6e-3, 15, **LIGHT, l2=3e-5),
          case("cosine", 6e-3, 8, embedding_size=400, hidden_size=800, l2=2e-5),
          case("cosine", 6e-3, 15, **LIGHT, l2=1e-5, zoneout=0.1),
          case("cosine", 6e-3, 15, **dropout(0.3, 0.1, 0.1, 0.1), l2=1e-5),
          case("cosine", 6e-3, 15, **LIGHT, l2=5e-6), case("cosine", 6e-3, 15, l2=5e-6)]
# What `python train.py` does.
CASES += [case("alternating", 3e-3, 15, "pydoc", 1.0), case("alternating", 6e-3, 15, "pydoc", 1.0, bptt=35),
          case("alternating", 6e-3, 15, "pydoc", 5.0, bptt=35),
          case("alternating", 6e-3, 15, "pydoc", 5.0, bptt=35, **LIGHT),
          case("alternating", 6e-3, 15, "pydoc", 5.0, l2=1e-5),
          case("alternating", 6e-3, 15, "pydoc", 5.0, **LIGHT, l2=1e-5)]
CASES += [case("bptt", rate, bptt=35) for rate in (2e-3, 3e-3)]
# The rate of each method. E_base is a third or a seventh of the epochs: two runs, or three.
RECIPE = dict(LIGHT, l2=5e-6)
CASES += [case("bptt", 3e-3, **RECIPE), case("restart", 6e-3, e_base=1.6667, **RECIPE),
          case("bptt", 2e-3, **RECIPE), case("restart", 6e-3, e_base=0.7143, **RECIPE),
          case("bptt", 4e-3, **RECIPE), case("restart", 4e-3, e_base=1.6667, **RECIPE),
          case("bptt", 6e-3, **RECIPE), case("restart", 1e-2, e_base=1.6667, **RECIPE)]
# Whole trainings, for five epochs may rank the rates otherwise.
CASES += [case("cosine", 6e-3, 15, **RECIPE, dropout_weight=0.2), case("bptt", 3e-3, 15, **RECIPE),
          case("restart", 1e-2, 15, e_base=5.0, **RECIPE), case("cosine", 1e-2, 15, **RECIPE),
          case("restart", 1.5e-2, 15, e_base=5.0, **RECIPE), case("bptt", 4e-3, 15, **RECIPE),
          case("bptt", 6e-3, 15, **RECIPE)]
CASES += [case(method, rate, e_base=1.6667, **RECIPE) for rate in (6e-3, 1e-2, 1.5e-2, 4e-3)
          for method in ("alternating", "dni-restart")]
# Rates above the best, chunks between those tried, and restarts that begin lower from run to run.
CASES += [case("cosine", 1.5e-2, 15, **RECIPE), case("restart", 1.5e-2, e_base=1.6667, **RECIPE),
          case("cosine", 2e-2, 15, **RECIPE), case("restart", 1e-2, e_base=1.6667, bptt=50, **RECIPE),
          case("restart", "", e_base=1.6667, eta_max="0.01 0.006", **RECIPE)]
CASES += [case("dni", rate, **RECIPE) for rate in (4e-3, 3e-3, 6e-3, 2e-3)]
CASES += [case("alternating", rate, 15, "pydoc", 5.0, **RECIPE) for rate in (6e-3, 1e-2)]
# One seed prefers 1.5e-2 for one cosine, by 0.2; three prefer 1e-2, by 0.2.
CASES += [case("cosine", rate, 15, seed=seed, **RECIPE) for rate in (1e-2, 1.5e-2) for seed in (43, 44)]


def arguments(case):
    """Options of train.py."""
    chosen = reproduce.arguments("small", case["data"], case["method"], case["epochs"])
    chosen += ["--compile", "--seed", case["seed"]]
    if case["e_base"]:
        chosen += ["--e-base", case["e_base"]]
    chosen += ["--eta-max", *case["eta_max"].split()] if case["eta_max"] else ["--lr", case["lr"]]
    for name in SHARED:
        chosen += ["--" + name.replace("_", "-"), case[name]]
    return chosen


def one(case):
    folder = study.ROOT / "trainings" / "search" / "-".join(map(str, case.values()))
    return study.train_run(case, arguments(case), folder)


def main():
    parser = argparse.ArgumentParser(description="Which settings suit which method?")
    parser.add_argument("--methods", nargs="+", choices=reproduce.METHODS, default=list(reproduce.METHODS))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time [%(default)s]")
    a = parser.parse_args()
    cases = [case for case in CASES if case["method"] in a.methods]
    study.run(study.LOGS / "search.csv", one, cases, a.jobs)


if __name__ == "__main__":
    main()
