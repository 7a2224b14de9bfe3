"""The paper's five methods, at equal budget, the learning rate of each searched over the same grid.

    python experiments/reproduce.py --scale small                  PTB, sized for two CPU cores; resumable
    python experiments/reproduce.py --scale small --data wt2 --seeds 42 --rates 3e-3 1e-2
    python experiments/reproduce.py --scale paper --data ptb       the paper's configuration, for a GPU

The first seed is trained at every rate of the grid; the others at the rate that was best for their method on
validation text.

Scale small: two layers of 256 and 128, T = 70, 3 epochs of PTB or 1 of WT2, no dropout. E_base is a fifteenth
of that, so that runs 0 to 3 end after 1, 3, 7 and 15 fifteenths: training ends, as the paper's does at epoch
315 of 320, at the low rate of a long synthetic run. A DNI is used after the first fifteenth, with an alpha
that carried credit in recall.py.

Scale paper: `--preset paper`, the paper's rate only, and its Eq. 1, which has no alpha.
"""

import argparse

import study

METHODS = {"bptt": ["--mode", "bptt"],
           "dni": ["--mode", "dni"],
           "restart": ["--mode", "restart"],
           "dni-restart": ["--mode", "restart", "--gradient", "synthetic"],
           "alternating": ["--mode", "alternating"]}
EPOCHS = {"ptb": 3, "wt2": 1}                                          # at scale small
RATES = {"small": (1e-3, 3e-3, 1e-2, 3e-2), "paper": (1e-3,)}
ALPHA = {"small": 0.9, "paper": 1.0}
DNI_RATE = {"small": 1e-3, "paper": 1e-4}                               # of g
SEEDS = {"small": (42, 43, 44), "paper": (42,)}


def e_base(scale, data):
    return EPOCHS[data] / 15 if scale == "small" else 5.0


def size(scale, data, method=None):
    """Options of train.py that all methods share, or those of one method: --dni-warmup is for two of them."""
    if scale == "paper":
        return ["--preset", "paper"]
    warmup = ["--dni-warmup", e_base(scale, data)] if method in (None, "dni", "dni-restart") else []
    return ["--embedding-size", 128, "--hidden-size", 256, "--epochs", EPOCHS[data], *warmup,
            *study.UNREGULARISED]


class One:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, case):
        scale, data, method = self.scale, case["data"], case["method"]
        arguments = [*size(scale, data, method), "--compile", "--data", data, *METHODS[method],
                     "--lr", case["lr"], "--seed", case["seed"]]
        if method not in ("bptt", "restart"):
            arguments += ["--dni-alpha", ALPHA[scale], "--dni-lr", DNI_RATE[scale]]
        if method not in ("bptt", "dni"):
            arguments += ["--e-base", e_base(scale, data)]
        folder = study.ROOT / "trainings" / f"reproduce-{scale}" / "-".join(map(str, case.values()))
        return study.train_run(case, arguments, folder)


def best_rate(rows, data, method, seed):
    """The rate with the lowest validation perplexity at any epoch, as a string; None where there is none."""
    rows = [row for row in rows if (row["data"], row["method"], row["seed"]) == (data, method, str(seed))]
    return min(rows, key=lambda row: float(row["valid_perplexity"]))["lr"] if rows else None


def main():
    parser = argparse.ArgumentParser(description="The paper's five methods at equal budget.")
    parser.add_argument("--scale", choices=RATES, required=True)
    parser.add_argument("--data", choices=("ptb", "wt2"), default="ptb")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, help="42 43 44 at scale small, 42 at scale paper")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates of the grid; "
                        "0.001 0.003 0.01 0.03 at scale small, 0.001 at scale paper")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time [%(default)s]")
    a = parser.parse_args()
    seeds, rates = a.seeds or SEEDS[a.scale], a.rates or RATES[a.scale]
    log = study.LOGS / f"reproduce-{a.scale}-{a.data}.csv"
    facts = dict(settings=" ".join(map(str, size(a.scale, a.data))), alpha=ALPHA[a.scale],
                 e_base=e_base(a.scale, a.data))

    def train(choices):
        cases = [dict(data=a.data, method=m, lr=lr, seed=seed) for m, lr, seed in choices]
        study.run(log, One(a.scale), cases, a.jobs, **facts)
    train([(m, lr, seeds[0]) for lr in rates for m in a.methods])
    best = {m: best_rate(study.read(log), a.data, m, seeds[0]) for m in a.methods}
    if seeds[1:]:
        train([(m, float(best[m]), seed) for seed in seeds[1:] for m in a.methods])


if __name__ == "__main__":
    main()
