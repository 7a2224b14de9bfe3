"""How much does a g inject into the gradient of θ, how much was lost, and do the two agree?

    python experiments/injected.py               models of text.py on characters; resumable
    python experiments/injected.py FOLDER ..     trainings of train.py with a g, as they ended

Four gradients of θ are summed over 200 windows of text, all streams, without dropout. The first
three are those of `crossing` in dni.py:

    truncated    every border cut
    lost         what the chunks of a window would add to it in one graph
    injected     what g adds to it at the borders within a window
    placebo      what δ^ would add if each stream got that of another stream

A model of text.py is trained for 3000 updates with its g. Then it is looked at 200 times, on a
window of four chunks that comes next, and goes on learning for 15 updates each time: so the sums
are not those of one moment of g. A training of train.py has ended. It is looked at on its training
text from the beginning, in windows of two chunks. Where this text is too short, it is read again
from half a chunk further on, where the borders are others.

Columns
    injected, lost, ..    norms of the sums, over the norm of the truncated sum
    cosine                of the injected sum with the lost sum
    placebo_cosine        of the placebo's sum with the lost sum
    across                of the injected sum over even windows with the lost sum over odd ones, and
                          the reverse, a mean: without what sums over the same windows share
    halves_truncated, ..  cosine of the sum over even windows with that over odd ones: near 1 the
                          sum is signal, near 0 it is the noise of single windows
    one_injected, ..      norms of single windows, over those of their truncated gradients, a mean:
                          as in log.csv
    delta_cosine, _r2     of g's predictions with the true gradients of the states, at all borders

What this can tell. At T = 2 text.py knows the answer: the linear g gives back 0.62 of what
truncation costs, the neuron-wise g 0.02. So the cosine carries an argument only if it separates
these two: above zero for the linear g at T = 2 in every seed, and lower for the neuron-wise one,
while halves_lost says that there is a signal. The placebo keeps the mean of δ^ over the streams. A
cosine that is no higher than placebo_cosine comes from this mean, and not from what g reads in a
stream.

What it cannot tell. At one moment of a training, with θ and g fixed, nearly all of what a g injects
is one constant direction, and its cosine carries no argument. So of trainings that have ended
(FOLDER) only the sizes count. Nor can it tell whether a g helps: at T = 5 the linear g helps, too,
whatever its cosine is. A g acts over thousands of updates, through Adam, and each of them changes
what comes after. A ratio of norms depends on the number of windows, for a sum over more of them has
less noise in it. And a large `injected` is no merit, for noise is injected as well.
"""

import argparse
import contextlib
import functools
import time
from pathlib import Path

import study

import torch
import torch.nn.functional as F

import data
import text
import train
from dni import (
    compare,
    constants,
    flatten,
    gradient_of,
    predictions,
    through_borders,
    true_gradients,
)

WINDOWS = 200
UPDATES = 3000  # of a model of text.py, before it is measured
BETWEEN = 15  # updates between two windows
RATE_OF_G = 1e-4  # the best one of text.py --study rates
SEEDS = (1, 2, 3)
NAMES = ("truncated", "lost", "injected", "placebo")


def windows(inputs, targets, steps, count, shift):
    """Yield (inputs, targets, begins) of `count` windows of so many steps.

    begins: whether the text begins with this window.
    A text that is too short is read again, each time `shift` steps further on.
    """
    start = 0
    times_read = 0
    for _ in range(count):
        if start + steps > len(inputs):
            times_read += 1
            start = times_read * shift
        begins = start == times_read * shift
        yield inputs[start : start + steps], targets[start : start + steps], begins
        start += steps


def look(model, g, alpha, inputs, targets, T, state, memory, autocast):
    """One window, without dropout.

    state, memory: the model's and g's before the window; None where the text begins.
    Returns what was found, and state and memory after the window. Found are the gradients of θ, in
    the order of NAMES, and as two vectors what g said at the borders within, and the true gradients
    there.
    """
    was_training = model.training
    model.eval()
    chunks, state = train.read_chunks(model, inputs, targets, T, state, autocast)
    model.train(was_training)
    parameters = list(model.parameters())
    tokens_per_chunk = T * inputs.shape[1]
    s = chunks[0][0]
    if s is not None:  # the border before the window: g sees it, and remembers
        with torch.no_grad():
            _, memory = g(constants(s), memory)
    predicted, memory = predictions(g, chunks, memory)
    truth = true_gradients(chunks, tokens_per_chunk)
    of_others = [[d.roll(len(d) // 2, 0) for d in at_border] for at_border in predicted]
    gradients = [
        gradient_of(sum(loss for _, _, loss in chunks), parameters),
        through_borders(truth, chunks, parameters) / tokens_per_chunk,
        through_borders(predicted, chunks, parameters) * alpha / tokens_per_chunk,
        through_borders(of_others, chunks, parameters) * alpha / tokens_per_chunk,
    ]
    found = gradients, flatten(sum(predicted, [])), flatten(sum(truth, []))
    return found, state, memory


def look_on(model, g, alpha, texts, T, state=None, memory=None, autocast=None):
    """Yield what is found in each of the windows `texts`, read one after the other."""
    autocast = autocast or contextlib.nullcontext()
    for inputs, targets, begins in texts:
        if begins:
            state = None
            memory = None
        found, state, memory = look(model, g, alpha, inputs, targets, T, state, memory, autocast)
        yield found


def counted(windows_found, count):
    """Pass on what is found, and say every 20 windows how much time is left: it can be an hour."""
    began = time.monotonic()
    for n, found in enumerate(windows_found, 1):
        yield found
        if n % 20 == 0 and n < count:
            minutes_left = (time.monotonic() - began) / n * (count - n) / 60
            print(f"{n} of {count} windows, {minutes_left:.0f} min left", flush=True)


def summary(windows_found):
    """Sum the gradients over what `look` found in all windows. Returns {column: value}."""
    sums = [[0.0] * len(NAMES), [0.0] * len(NAMES)]  # of even and of odd windows
    ratios = []
    said = []
    true = []
    for n, (gradients, predicted, truth) in enumerate(windows_found):
        sums[n % 2] = [old + new for old, new in zip(sums[n % 2], gradients)]
        ratios.append([part.norm() / gradients[0].norm() for part in gradients])
        said.append(predicted)
        true.append(truth)
    truncated, lost, injected, placebo = (a + b for a, b in zip(*sums))
    even, odd = (dict(zip(NAMES, its)) for its in sums)
    _, one_lost, one_injected, _ = torch.tensor(ratios).mean(0).tolist()
    delta_cosine, delta_r2 = compare(said, true)
    halves = {f"halves_{name}": cosine(even[name], odd[name]) for name in NAMES}
    across = (
        cosine(even["injected"], odd["lost"]),
        cosine(odd["injected"], even["lost"]),
    )
    columns = {
        "injected": (injected.norm() / truncated.norm()).item(),
        "lost": (lost.norm() / truncated.norm()).item(),
        "placebo": (placebo.norm() / truncated.norm()).item(),
        "cosine": cosine(injected, lost),
        "placebo_cosine": cosine(placebo, lost),
        "across": sum(across) / 2,
        **halves,
        "one_injected": one_injected,
        "one_lost": one_lost,
        "delta_cosine": delta_cosine,
        "delta_r2": delta_r2,
    }
    return {name: float(f"{value:.4g}") for name, value in columns.items()}


def cosine(a, b):
    return F.cosine_similarity(a.double(), b.double(), 0).item()


def characters(case):
    """Train a model of text.py with its g, and measure both as they go on. Returns one row."""
    train.keep_freed_memory()
    began = time.monotonic()
    T = case["T"]
    corpus = data.load_corpus("ptb-chars")
    inputs, targets = data.streams(corpus.train, text.B)
    settings = {"arm": case["g"], "seed": case["seed"], "rate": RATE_OF_G, "alpha": 1.0}
    model, optimizer, dni = text.build(settings, len(corpus.vocabulary))

    def learn(start, updates, state):
        for i in range(start, start + updates * T, T):
            x = inputs[i : i + T]
            y = targets[i : i + T]
            _, state = train.train_step(model, optimizer, dni, x, y, state, True, text.CLIP)
        return state

    def windows_found():
        state = learn(0, case["trained"], None)
        steps = case["chunks"] * T
        place = case["trained"] * T
        for _ in range(case["windows"]):
            x = inputs[place : place + steps]
            y = targets[place : place + steps]
            nothing = contextlib.nullcontext()
            found, _, _ = look(model, dni.g, dni.alpha, x, y, T, state, dni.memory, nothing)
            yield found
            state = learn(place, case["between"], state)
            place += case["between"] * T

    found = summary(windows_found())
    return [{**case, **found, "seconds": round(time.monotonic() - began)}]


def training(case, folder, checkpoint):
    """Measure the training of train.py in this folder, as it ended. Returns one row."""
    train.keep_freed_memory()
    began = time.monotonic()
    settings = train.Settings(**checkpoint["settings"])
    _, autocast = train.pick_device("cpu", settings.precision)
    corpus = train.corpus_of(settings)
    if corpus.fingerprint() != checkpoint["fingerprint"]:
        raise data.UserError(f"{folder} was trained on another text than {settings.data}")
    model, _, dni = train.build(settings, len(corpus.vocabulary), "cpu")
    model.load_state_dict(checkpoint["learners"][0])
    dni.g.load_state_dict(checkpoint["learners"][1])
    inputs, targets = data.streams(corpus.train, settings.batch_size)
    T = settings.chunk
    texts = windows(inputs, targets, case["chunks"] * T, case["windows"], T // 2)
    windows_found = look_on(model, dni.g, dni.alpha, texts, T, autocast=autocast)
    found = summary(counted(windows_found, case["windows"]))
    return [{**case, **found, "seconds": round(time.monotonic() - began)}]


def main():
    parser = argparse.ArgumentParser(description="How much does a synthetic gradient inject?")
    parser.add_argument("folders", nargs="*", type=Path, help="of trainings with a g")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    a = parser.parse_args()
    log = study.LOGS / "injected.csv"
    if not a.folders:
        arms = (("linear", 2), ("linear", 5), ("neuron", 2))
        cases = [
            dict(
                what="characters",
                g=g,
                T=T,
                seed=seed,
                trained=UPDATES,
                between=BETWEEN,
                chunks=4,
                windows=a.windows,
            )
            for seed in SEEDS
            for g, T in arms
        ]
        study.do_cases(log, characters, cases)
    for folder in a.folders:
        checkpoint = train.load_checkpoint(folder / "checkpoint.pt")
        settings = train.Settings(**checkpoint["settings"])
        case = dict(
            what=folder.resolve().name,
            g=settings.dni_kind,
            T=settings.chunk,
            seed=settings.seed,
            trained=len(checkpoint["rows"]),
            between=0,
            chunks=2,  # 200 windows of four do not fit into PTB
            windows=a.windows,
        )
        measure = functools.partial(training, folder=folder, checkpoint=checkpoint)
        study.do_cases(log, measure, [case])


if __name__ == "__main__":
    study.run(main)
