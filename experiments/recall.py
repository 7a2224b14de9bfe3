"""Is credit carried across a border? The language `recall`, its delay longer than a chunk, so that truncation cuts every link.

    python experiments/recall.py                   all arms, borders and seeds; resumable; see --help for parts of it
    python experiments/recall.py --seeds 1 --arms bptt full --borders 1       a first look

An episode shows one of K symbols, then D fillers, a query and the symbol again (data.py). With D = b T - 1 the answer comes
exactly b chunks of T after the symbol, whatever the phase: b borders lie between. Arms, at equal updates and equal tokens:

    bptt      truncated: nothing crosses a border
    full      the loss of the last chunk, backpropagated through that chunk and the b before it: all the credit there is
    neuron    the neuron-wise DNI (paper, 2.2)
    layer     the layer-wise DNI (Jaderberg et al. 2017), which knows which neuron is which

An update is `train_step` of train.py, without dropout and regularisation, on a text that never repeats. Every so often the model is
tested on a text of its own: accuracy of the answer (chance: 1 / K), perplexity (the floor is known), and for a DNI
cosine and R^2 of its predictions with the TRUE future gradient, found by backpropagation through the whole test text without a
cut, beside those with its bootstrapped targets, found in training.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import math
import multiprocessing
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train                                                                                       # noqa: E402
from data import recall, streams                                                                   # noqa: E402
from dni import Agreement                                                                          # noqa: E402
from qrnn import QRNN                                                                      # noqa: E402

T, B, NEURONS, SYMBOLS, FILLERS = 10, 32, 64, 4, 8
ARMS = ("bptt", "full", "neuron", "layer")
SETTINGS = train.Settings(
    mode="dni", embedding_size=NEURONS, hidden_size=NEURONS, num_layers=1, window=1, dropout_output=0.0, dropout_hidden=0.0,
    dropout_input=0.0, activation=0.0, temporal=0.0, l2=0.0, clip=1.0, batch_size=B, bptt=T, lr=3e-3)
COLUMNS = ("arm", "variant", "borders", "seed", "updates", "accuracy", "perplexity", "floor", "true_cosine", "true_r2", "cosine", "r2", "seconds")


class Reader(torch.nn.Module):
    """Embedding -> one QRNN layer -> decoder, called as a LanguageModel is, with PyTorch's own initialisation."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embedding, self.rnn = torch.nn.Embedding(vocabulary, NEURONS), QRNN(NEURONS, NEURONS)
        self.decoder = torch.nn.Linear(NEURONS, vocabulary)

    def forward(self, tokens, state=None):
        h, state = self.rnn(self.embedding(tokens), state)
        return self.decoder(h), state

    def loss(self, tokens, targets, state=None, *_):
        logits, state = self(tokens, state)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), 0.0, state


def full_step(model, optimizer, chunks, states, s):
    """An update from the loss of the last of `chunks` [(inputs, targets)], backpropagated into the first. Returns its end state."""
    optimizer.zero_grad(set_to_none=True)
    inputs = torch.cat([x for x, _ in chunks])
    logits, new_state = model(inputs, states)
    last = chunks[-1][1]
    torch.nn.functional.cross_entropy(logits[-len(last):].flatten(0, 1), last.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
    optimizer.step()
    return train.cut(new_state)


@torch.no_grad()
def test(model, inputs, targets):
    """(accuracy of the answers, perplexity) on (L, B) streams, from a zero state; the first episodes are left out."""
    model.eval()
    logits, _ = model(inputs)
    model.train()
    warm = len(inputs) // 4
    log_p, answers = logits.log_softmax(-1)[warm:], inputs[warm:] == SYMBOLS + FILLERS             # after "?"
    correct = (log_p.argmax(-1) == targets[warm:])[answers].float().mean().item()
    return correct, math.exp(-log_p.gather(-1, targets[warm:, :, None]).mean().item())


def truth(model, g, inputs, targets):
    """Agreement of g's predictions with the gradient of all the loss that is still to come, in the middle half of the text."""
    state, memory, losses, states, predictions = None, None, [], [], []
    for start in range(0, len(inputs) - T + 1, T):
        if state:
            state = [(c.clone(), x_prev) for c, x_prev in state]
            states.append(train.border(state))
            for c in states[-1]:
                c.retain_grad()
            with torch.no_grad():
                predicted, memory = g(states[-1], memory)
            predictions.append(predicted)
        nll, _, state = model.loss(inputs[start:start + T], targets[start:start + T], state)
        losses.append(nll * inputs[start:start + T].numel())
    sum(losses).backward()                                              # each stream's own summed loss
    agreement, n = Agreement(), len(states)
    for predicted, state in list(zip(predictions, states))[n // 4:n * 3 // 4]:
        agreement.update(predicted, [c.grad for c in state])
    model.zero_grad(set_to_none=True)
    return agreement.result()


def one(arm, variant, borders, seed, updates, every):
    """One run; returns its rows for the log."""
    torch.set_num_threads(1)
    s = dataclasses.replace(SETTINGS, seed=seed, dni="layer" if arm == "layer" else "neuron", mode="dni" if arm in ("neuron", "layer") else "bptt",
                            **{k: v for k, v in VARIANTS[variant].items() if k != "forget"})
    delay = borders * T - 1
    episodes = updates * T * B // (delay + 3) + 10 * B
    corpus = recall(delay, SYMBOLS, FILLERS, episodes, seed)
    inputs, targets = streams(corpus.train, B)
    test_inputs, test_targets = (x[:24 * T] for x in streams(corpus.valid[:24 * T * 64 + 1], 64)) 
    _, _, interface = train.build(s, len(corpus.vocabulary), "cpu")
    model = Reader(len(corpus.vocabulary))
    optimizer = torch.optim.Adam(model.parameters(), s.lr)
    with torch.no_grad():
        model.rnn.layers[0].bias[NEURONS:2 * NEURONS] += VARIANTS[variant].get("forget", 2.0)
    model.train()
    rows, state, memory, started, recent = [], None, None, time.monotonic(), []
    for k in range(updates):
        chunk = inputs[k * T:(k + 1) * T], targets[k * T:(k + 1) * T]
        if arm == "full":
            recent = (recent + [(chunk, state)])[-borders - 1:]
            state = full_step(model, optimizer, [c for c, _ in recent], recent[0][1], s)
        else:
            _, state, memory = train.train_step(model, optimizer, interface, *chunk, state, memory, bool(interface), s)
        if (k + 1) % every == 0:
            accuracy, perplexity = test(model, test_inputs, test_targets)
            agreed = [math.nan] * 4
            if interface:
                agreed = [*truth(model, interface.g, test_inputs, test_targets), *interface.agreement.result()]
                interface.agreement.sums = 0.0
            rows.append([arm, variant, borders, seed, k + 1, round(accuracy, 4), round(perplexity, 4), round(corpus.facts["perplexity floor"], 4),
                         *(round(a, 5) for a in agreed), round(time.monotonic() - started, 1)])
    return rows


VARIANTS = {"alpha 0.1": {}, "alpha 0.5": dict(dni_alpha=0.5), "alpha 0.9": dict(dni_alpha=0.9), "alpha 1": dict(dni_alpha=1.0), "g lr 1e-2": dict(dni_alpha=0.9, dni_lr=1e-2)}


def main():
    parser = argparse.ArgumentParser(description="Is credit carried across the border of truncated backpropagation?")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--borders", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--updates", type=int, default=2400)
    parser.add_argument("--every", type=int, default=200, help="updates from one test to the next")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--log", type=Path, default=ROOT / "experiments" / "logs" / "recall.csv")
    a = parser.parse_args()
    before = list(csv.reader(a.log.open()))[1:] if a.log.exists() else []
    done = {tuple(row[:4]) for row in before}
    cases = [(arm, variant, b, seed) for seed in range(a.seeds) for b in a.borders for variant in a.variants for arm in a.arms]
    cases = [c for c in cases if tuple(map(str, c)) not in done]
    with concurrent.futures.ProcessPoolExecutor(a.jobs, multiprocessing.get_context("spawn")) as pool:
        under_way = {pool.submit(one, *c, a.updates, a.every): c for c in cases}
        for n, future in enumerate(concurrent.futures.as_completed(under_way)):
            before += future.result()
            with train.replacing(a.log) as file:
                file.write("".join(",".join(map(str, row)) + "\n" for row in [COLUMNS, *before]).encode())
            print(f"{n + 1}/{len(cases)}", *future.result()[-1], flush=True)


if __name__ == "__main__":
    main()
