"""The paper's five methods, and the one that it lacks, at equal budget, each with the recipe of its mode.

    python experiments/reproduce.py                              PTB, 15 epochs, three seeds; resumable
    python experiments/reproduce.py --data wt2 --seeds 42        WT2, 2 epochs
    python experiments/reproduce.py --scale paper                the paper's configuration, for a GPU

On PTB at scale small a training is `python train.py --mode MODE --data ptb` and no more. (It is compiled, and
validated every quarter of an epoch: neither changes a number beyond rounding.) With another number of epochs
the restarts, and the first use of a DNI, come at the same share of the training.

`cosine` is the method that the paper lacks: one run of SGDR, as long as the training. Its rate falls once and
never restarts. So it tells apart what restarts do and what any falling rate does. (`--mode restart --e-base
15`: of the rates tried, the default is the best on validation text.)

Scale paper is `--preset paper`, 320 epochs.
"""

import argparse
import functools

import study
import train

from harness import checkpoints, command_line

METHODS = {"bptt": ["--mode", "bptt"],
           "dni": ["--mode", "dni"],
           "cosine": ["--mode", "restart"],
           "restart": ["--mode", "restart"],
           "dni-restart": ["--mode", "restart", "--gradient", "synthetic"],
           "alternating": ["--mode", "alternating"]}
EPOCHS = {("small", "ptb"): 15, ("small", "wt2"): 2, ("paper", "ptb"): 320, ("paper", "wt2"): 320}
SEEDS = {"small": (42, 43, 44), "paper": (42,)}


def settings(options):
    """What train.py makes of its options."""
    return command_line.parse(list(map(str, options)), train.PRESETS, checkpoints.read_settings, "")[0]


def arguments(scale, data, method, epochs):
    """Options of train.py for a method that has so many epochs."""
    chosen = ["--preset", scale] if scale != "small" else []
    chosen += [*METHODS[method], "--data", data]
    usual = settings(chosen)
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


def recipe(scale, data, method, epochs):
    """What these options stand for, beside the defaults of train.py, in words."""
    changed = {name: value for name, value in vars(settings(arguments(scale, data, method, epochs))).items()
               if value != getattr(train.SMALL, name) and name not in ("mode", "data", "gradient")}
    return " ".join(f"{name} {value}" for name, value in changed.items()) or "defaults"


def one(scale, case):
    data, method, seed = case.values()
    options = [*arguments(scale, data, method, EPOCHS[scale, data]), "--seed", seed,
               "--compile", "--validate-every", 0.25]
    folder = study.ROOT / "trainings" / f"reproduce-{scale}" / f"{data}-{method}-{seed}"
    return study.train_run(case, options, folder)


def main():
    parser = argparse.ArgumentParser(description="The paper's methods at equal budget.")
    parser.add_argument("--scale", choices=SEEDS, default="small")
    parser.add_argument("--data", choices=("ptb", "wt2"), default="ptb")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, help="42 43 44 at scale small, 42 at scale paper")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time [%(default)s]")
    a = parser.parse_args()
    recipes = {method: recipe(a.scale, a.data, method, EPOCHS[a.scale, a.data]) for method in a.methods}
    cases = [dict(data=a.data, method=method, seed=seed)
             for seed in a.seeds or SEEDS[a.scale] for method in a.methods]
    study.run(study.LOGS / f"methods-{a.scale}-{a.data}.csv", functools.partial(one, a.scale), cases, a.jobs,
              **recipes)


if __name__ == "__main__":
    main()
