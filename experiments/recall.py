"""Is credit carried across a border? The text is `recall` of data.py, with a delay of many steps.

    python experiments/recall.py              about three hours; resumable
    python experiments/recall.py --cells      a QRNN, a GRU and an LSTM, half an hour
    python experiments/recall.py --neuron     more of the neuron-wise DNI, half an hour

An episode shows a symbol, then fillers, then a query; the answer is the symbol. With b T - 1
fillers, b borders lie between symbol and query, and truncated BPTT cannot connect them. The arms:

    bptt      truncated: no gradient crosses a border
    full      the loss of a chunk goes back through it and the b chunks before it, to the symbol
    linear    the layer-wise DNI (DNI, 2.1) as one linear map
    layer     the same as an MLP with 50 hidden units
    neuron    the neuron-wise DNI (paper, 2.2)

The column `counts` says what is scored in training: every word (`all`), or the answers alone
(`answers`). For each number of borders, the rate of a g is the best of four by accuracy, on two
seeds that are used for nothing else. The text never repeats. After a training the model is tested
on another text.

With `--cells` there is one border, the answers alone are scored, and α and g's rate are dni.py's
defaults. For the LSTM, each g is tried with and without the penalty on the LSTM's c.

With `--neuron` the neuron-wise DNI has a rate of 1e-4, and the answers alone are scored. Two
questions: does this rate, which was tried after the search, carry credit across two and three
borders? And what do fewer updates and an α of 1, the settings of `--cells`, do across one?
"""

import argparse
import collections
import functools
import time

import study

import torch
from torch import nn

import train
from data import episodes
from dni import Interface, LayerDNI, NeuronDNI

T = 10  # steps of a chunk
B = 32  # streams where every word is scored
NEURONS = 64
CLIP = 1.0
QUERY = 12  # its token; the 4 symbols and 8 fillers are the tokens before it
UPDATES = 2400
ALPHA = 0.9
RATES = (1e-2, 1e-3, 1e-4, 1e-5)  # of Adam for g
SEARCH_SEEDS = (100, 101)  # of the search for g's rate
PENALTY = Interface(NeuronDNI()).penalty  # dni.py's default
WITH_G = ("linear", "layer", "neuron")
ARMS = ("bptt", "full", *WITH_G)
CELLS = {"qrnn": None, "gru": nn.GRU, "lstm": nn.LSTM}


# --------------------------------------------------------------------------------------- the models


class Cell(nn.Module):
    """nn.GRU or nn.LSTM of one layer, called as a QRNN is.

    Its state is a list of pairs (c, x_prev): one of them for a GRU's h, two for an LSTM's h and c.
    c is (B, NEURONS); x_prev is empty, (0, B, NEURONS).
    """

    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(NEURONS, NEURONS)
        if kind is nn.LSTM:
            with torch.no_grad():  # the forget gates begin at about sigmoid(2)
                self.rnn.bias_ih_l0[NEURONS : 2 * NEURONS] = 2.0

    def forward(self, x, state=None):
        """x: (T, B, NEURONS). Returns the outputs, of the same shape, and the state."""
        before = None
        if state is not None:
            before = tuple(c[None] for c, _ in state)  # (1, B, NEURONS) each, as torch has them
            if isinstance(self.rnn, nn.GRU):
                (before,) = before
        outputs, after = self.rnn(x, before)
        if isinstance(self.rnn, nn.GRU):
            after = (after,)
        return outputs, [(c[0], x[:0]) for c in after]


def build_g(arm, kind):
    """The g of an arm, for a network of this kind: nn.GRU, nn.LSTM, or None for a QRNN."""
    if arm == "neuron":
        return NeuronDNI()
    sizes = [NEURONS]
    if kind is nn.LSTM:
        sizes = [NEURONS, NEURONS]  # h and c
    if arm == "layer":
        return LayerDNI(sizes, 50)
    return LayerDNI(sizes, 0)  # no hidden layer


def build(case, alpha):
    """(model, optimizer, the arm's Interface or None)"""
    kind = CELLS[case.get("cell", "qrnn")]
    dni = None
    if case["arm"] in WITH_G:
        torch.manual_seed(case["seed"])
        g = build_g(case["arm"], kind)
        g_optimizer = torch.optim.Adam(g.parameters(), case["rate"])
        dni = Interface(g, g_optimizer, alpha, penalty=case.get("penalty", 0.0))
    torch.manual_seed(case["seed"])  # the same model for all arms
    model = study.Reader(QUERY + 1, NEURONS, NEURONS, forget=2.0)
    if kind is not None:
        model.rnn = Cell(kind)
    return model, torch.optim.Adam(model.parameters(), 3e-3), dni


# ------------------------------------------------------------------------------------- one training


@torch.no_grad()
def accuracy(model, inputs, targets):
    """The share of right answers, the first quarter of the text left out."""
    logits, _ = model.logits(inputs)
    right = logits.argmax(-1) == targets
    begin = len(inputs) // 4
    asked = inputs[begin:] == QUERY
    return right[begin:][asked].double().mean().item()


def one(case, updates=UPDATES, alpha=ALPHA):
    """Train and test. Returns one row in a list.

    case: {"counts", "arm", "rate", "borders", "seed"}; those of --cells have "cell" and "penalty"
        too, and their rows `size`, the mean |c| at the end of the training.
    """
    train.keep_freed_memory()
    b = case["borders"]
    seed = case["seed"]
    delay = b * T - 1
    answers = case["counts"] == "answers"
    batch_size = B
    if answers:
        batch_size = 2 * (delay + 3)  # two streams for each place in an episode
    inputs, targets = episodes(delay, updates * T, batch_size, seed, answers)
    test_text = episodes(delay, 24 * T, 4 * (delay + 3), seed + 1000, answers)
    model, optimizer, dni = build(case, alpha)
    recent = collections.deque(maxlen=b + 1)  # chunks that `full` goes back through
    state = None
    began = time.monotonic()
    for x, y in zip(inputs.split(T), targets.split(T)):
        if case["arm"] == "full":
            recent.append((x, y, state))
            state = study.full_update(model, optimizer, recent, CLIP)
        else:
            synthetic = dni is not None
            _, state = train.train_step(model, optimizer, dni, x, y, state, synthetic, CLIP)
    row = {**case, "accuracy": round(accuracy(model, *test_text), 4)}
    if "cell" in case:
        c, _ = state[-1]
        row["size"] = round(c.abs().mean().item(), 3)
    row["seconds"] = round(time.monotonic() - began, 1)
    return [row]


# ---------------------------------------------------------------------------------------- the cases


def best_rate(rows, counts, arm, b):
    """The rate with the best accuracy, a mean over the seeds of the search; "" without a g.

    rows: of the log recall.csv. b: number of borders.
    """
    searched = [
        row
        for row in rows
        if (row["counts"], row["arm"], row["borders"]) == (counts, arm, str(b))
        and row["rate"]
        and int(row["seed"]) in SEARCH_SEEDS
    ]
    return study.best_rate(searched, "accuracy", max, times=len(SEARCH_SEEDS))


def cases_of_the_cells(seeds):
    cases = []
    for seed in seeds:
        for cell in CELLS:
            for arm in ("bptt", *WITH_G):
                penalties = (0.0,)
                if cell == "lstm" and arm in WITH_G:
                    penalties = (0.0, PENALTY)
                fixed = dict(counts="answers", arm=arm, rate=1e-4, borders=1, seed=seed, cell=cell)
                cases += [{**fixed, "penalty": penalty} for penalty in penalties]
    return cases


def cases_of_the_neuron(seeds):
    """Across one border with the settings of `main`, those of --cells, and a mixture of both."""
    settings = [(1, updates, alpha) for updates in (UPDATES, 1500) for alpha in (ALPHA, 1.0)]
    settings += [(2, UPDATES, ALPHA), (3, UPDATES, ALPHA)]
    return [
        dict(
            counts="answers",
            arm="neuron",
            rate=1e-4,
            borders=borders,
            seed=seed,
            updates=updates,
            alpha=alpha,
        )
        for seed in seeds
        for borders, updates, alpha in settings
    ]


def one_of_the_neuron(case):
    return one(case, case["updates"], case["alpha"])


def main():
    parser = argparse.ArgumentParser(description="Is credit carried across a border?")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(10))
    parser.add_argument("--cells", action="store_true", help="compare recurrent networks")
    parser.add_argument("--neuron", action="store_true", help="more of the neuron-wise DNI")
    args = parser.parse_args()
    if args.cells:
        function = functools.partial(one, updates=1500, alpha=1.0)
        cases = cases_of_the_cells(args.seeds)
        study.do_cases(study.LOGS / "recall-cells.csv", function, cases)
        return
    if args.neuron:
        cases = cases_of_the_neuron(args.seeds)
        study.do_cases(study.LOGS / "recall-neuron.csv", one_of_the_neuron, cases)
        return

    # First the search for g's rates, then, with the best of them, the other seeds.
    log = study.LOGS / "recall.csv"
    kinds = [(counts, arm, b) for b in (1, 2, 3) for counts in ("all", "answers") for arm in ARMS]
    search = [
        dict(counts=counts, arm=arm, rate=rate, borders=b, seed=seed)
        for seed in SEARCH_SEEDS
        for counts, arm, b in kinds
        for rate in RATES
        if arm in WITH_G
    ]
    study.do_cases(log, one, search)
    rows = study.read_log(log)
    best = {kind: best_rate(rows, *kind) for kind in kinds}
    final = [
        dict(counts=counts, arm=arm, rate=best[counts, arm, b], borders=b, seed=seed)
        for seed in args.seeds
        for counts, arm, b in kinds
    ]
    study.do_cases(log, one, final)


if __name__ == "__main__":
    main()
