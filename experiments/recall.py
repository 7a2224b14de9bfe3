"""Is credit carried across a border? The text is `recall` of data.py, with a delay of many steps.

    python experiments/recall.py              about three hours; resumable
    python experiments/recall.py --cells      a QRNN, a GRU and an LSTM, half an hour
    python experiments/recall.py --neuron     more of the neuron-wise DNI, half an hour
    python experiments/recall.py --places     what a g needs in order to learn, ten minutes

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

With `--places` an episode has 2 T steps, and g is one linear map at 1e-4 with α = 1. `spread`: the
streams are at different places of their episodes, as in all other studies. So at each border some
streams have just been shown their symbol, and others are about to be asked for it. `same`: all
streams begin an episode where a chunk begins, so the border always lies in the middle of an
episode. Beside it, with the episodes of `--cells`, a GRU of two layers, with more and more updates.
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
    """nn.GRU or nn.LSTM, called as a QRNN is.

    Its state is a list of pairs (c, x_prev): for each layer a GRU's h; an LSTM's h for each layer,
    then its c for each layer. c is (B, NEURONS); x_prev is empty, (0, B, NEURONS).
    """

    def __init__(self, kind, layers=1):
        super().__init__()
        self.rnn = kind(NEURONS, NEURONS, layers)
        if kind is nn.LSTM:
            with torch.no_grad():  # the forget gates begin at about sigmoid(2)
                self.rnn.bias_ih_l0[NEURONS : 2 * NEURONS] = 2.0

    def forward(self, x, state=None):
        """x: (T, B, NEURONS). Returns the outputs, of the same shape, and the state."""
        is_lstm = isinstance(self.rnn, nn.LSTM)
        before = None
        if state is not None:
            before = torch.stack([c for c, _ in state])
            if is_lstm:
                before = before.chunk(2)  # h and c, (layers, B, NEURONS) each
        outputs, after = self.rnn(x, before)
        if is_lstm:
            after = torch.cat(after)
        return outputs, [(c, x[:0]) for c in after]


def build_g(arm, kind, layers):
    """The g of an arm, for a network of this kind: nn.GRU, nn.LSTM, or None for a QRNN."""
    if arm == "neuron":
        return NeuronDNI()
    sizes = [NEURONS] * layers
    if kind is nn.LSTM:
        sizes = 2 * sizes  # h and c
    if arm == "layer":
        return LayerDNI(sizes, 50)
    return LayerDNI(sizes, 0)  # no hidden layer


def build(case, alpha):
    """(model, optimizer, the arm's Interface or None)"""
    kind = CELLS[case.get("cell", "qrnn")]
    layers = case.get("layers", 1)
    dni = None
    if case["arm"] in WITH_G:
        torch.manual_seed(case["seed"])
        g = build_g(case["arm"], kind, layers)
        g_optimizer = torch.optim.Adam(g.parameters(), case["rate"])
        dni = Interface(g, g_optimizer, alpha, penalty=case.get("penalty", 0.0))
    torch.manual_seed(case["seed"])  # the same model for all arms
    model = study.Reader(QUERY + 1, NEURONS, NEURONS, forget=2.0)
    if kind is not None:
        model.rnn = Cell(kind, layers)
    return model, torch.optim.Adam(model.parameters(), 3e-3), dni


# ------------------------------------------------------------------------------------- one training


def at_one_place(inputs, targets, period):
    """episodes() without its first `period` steps or fewer in each stream: all begin an episode.

    Stream b is b steps further in its episode than stream 0.
    """
    steps = len(inputs) - period
    begins = [-b % period for b in range(inputs.shape[1])]

    def shifted(tokens):
        return torch.stack([tokens[n : n + steps, b] for b, n in enumerate(begins)], 1)

    return shifted(inputs), shifted(targets)


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
        too, and their rows `size`, the mean |c| at the end of the training. Those of --places have
        "delay", "places" and "layers".
    """
    train.keep_freed_memory()
    b = case["borders"]
    seed = case["seed"]
    delay = case.get("delay", b * T - 1)
    answers = case["counts"] == "answers"
    batch_size = B
    if answers:
        batch_size = 2 * (delay + 3)  # two streams for each place in an episode
    period = delay + 3
    if case.get("places") == "same":
        text = episodes(delay, updates * T + period, batch_size, seed, answers)
        inputs, targets = at_one_place(*text, period)
    else:
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
    if "penalty" in case:
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


def one_of_the_places(case):
    return one(case, case["updates"], alpha=1.0)


def cases_of_the_places(seeds):
    cases = []
    for seed in seeds:
        linear = dict(counts="answers", arm="linear", rate=1e-4, borders=1, seed=seed)
        others = [{**linear, "arm": arm, "rate": ""} for arm in ("bptt", "full")]
        for cell in ("qrnn", "gru"):
            for places in ("spread", "same"):
                its = dict(cell=cell, layers=1, delay=2 * T - 3, places=places, updates=1500)
                cases += [{**case, **its} for case in (*others, linear)]
        for layers, updates in ((1, 1500), (2, 1500), (2, 3000)):
            its = dict(cell="gru", layers=layers, delay=T - 1, places="spread", updates=updates)
            cases.append({**linear, **its})
    return cases


def main():
    parser = argparse.ArgumentParser(description="Is credit carried across a border?")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(10))
    parser.add_argument("--cells", action="store_true", help="compare recurrent networks")
    parser.add_argument("--neuron", action="store_true", help="more of the neuron-wise DNI")
    parser.add_argument("--places", action="store_true", help="what a g needs in order to learn")
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
    if args.places:
        cases = cases_of_the_places(args.seeds)
        study.do_cases(study.LOGS / "recall-places.csv", one_of_the_places, cases)
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
    study.run(main)
