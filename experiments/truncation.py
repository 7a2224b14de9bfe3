"""Where does a synthetic gradient matter? Penn Treebank, perplexity against the length T of a chunk.

    python experiments/truncation.py           T = 5 to 200, three arms, three seeds; resumable
    python experiments/truncation.py --seeds 42 --lengths 5 200

The shorter the chunks, the more of the gradient truncation cuts off, so the more there is for a DNI to give
back. Jaderberg et al. (DNI, 3.1) saw it help most at the shortest and no more by T = 40. The tokens read are
the same for all T, and the updates are not: an epoch is 9,296 at T = 5 and 233 at T = 200, of g as of the
model. So compare the arms of a T, not one T with another.

Each training is `train.py --data ptb` at a size below the preset `small`, one epoch at a constant rate and
without dropout, the same for all arms of a T. g is used from the first step.
"""

import argparse

import study

ARMS = {"bptt": ["--mode", "bptt"],
        "neuron": ["--mode", "dni", "--dni-warmup", 0],
        "layer": ["--mode", "dni", "--dni-warmup", 0, "--dni", "layer"]}
SIZE = ["--data", "ptb", "--embedding-size", 128, "--hidden-size", 256, "--epochs", 1, "--compile",
        *study.UNREGULARISED]


def one(case):
    alpha = ["--dni-alpha", case["alpha"]] if case["alpha"] != "" else []
    arguments = [*ARMS[case["arm"]], *alpha, *SIZE, "--bptt", case["T"], "--seed", case["seed"]]
    folder = study.ROOT / "trainings" / "truncation" / "-".join(map(str, case.values()))
    return study.train_run(case, arguments, folder)


def main():
    parser = argparse.ArgumentParser(
        description="Perplexity against the length of a chunk: BPTT, neuron-wise and layer-wise DNI.")
    parser.add_argument("--lengths", nargs="+", type=int, default=(5, 10, 20, 50, 200))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--alpha", type=float, default=0.9, help="of the DNIs [%(default)s]")
    parser.add_argument("--seeds", nargs="+", type=int, default=(42, 43, 44))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time [%(default)s]")
    a = parser.parse_args()
    cases = [dict(T=T, arm=arm, alpha="" if arm == "bptt" else a.alpha, seed=seed)
             for seed in a.seeds for T in a.lengths for arm in a.arms]
    study.run(study.LOGS / "truncation.csv", one, cases, a.jobs, settings=" ".join(map(str, SIZE)))


if __name__ == "__main__":
    main()
