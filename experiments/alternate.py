"""Does it help to alternate real and synthetic gradients, where a synthetic one does something?

    python experiments/alternate.py                     all studies but cost, in this order
    python experiments/alternate.py --study peaks       which peak rate suits each main arm?
    python experiments/alternate.py --study patterns    all eight patterns of R and S, and two
                                                        methods without a g, at their best peaks
    python experiments/alternate.py --study controls    δ^ that is noise, or that reaches θ alone
    python experiments/alternate.py --study T5          four patterns at T = 5
    python experiments/alternate.py --study repeated    a short text that is read 16 times
    python experiments/alternate.py --study neuron      the paper's neuron-wise g
    python experiments/alternate.py --study cost        milliseconds an update; let nothing else run

The paper trains with warm restarts and alternates the gradient: runs 0, 2, 4, .. of SGDR are
real, runs 1, 3, 5, .. are synthetic (sections 2.3 and 3.2). Here a pattern names each run's kind
by a letter, R or S. A training makes three runs, of 800, 1600 and 3200 updates, so the paper's
pattern is RSR. A real run is truncated BPTT. In a synthetic run a synthetic gradient crosses each
border. g learns in both.

What is claimed, written before the trainings. bits(P) is bits per character of pattern P, at its
own best peak rate. Every difference is taken seed by seed. Its interval is the 95% interval of
Student's t over the seeds.

    1. The paper's claim: alternation ends below both of its counterparts.
           bits(RSR) - min(bits(RRR), bits(SSS)) < 0, the minimum of each seed
       The claim holds where the whole interval is below 0, and is refuted where it is above 0.

    2. Alternation as such. An order such as RRR, RSR, SRS, SSS might only say how many updates were
       synthetic (0, 2/7, 5/7, all), or which kind was last. If each run added its own amount,
       whatever the other runs are, then this difference would be 0:
           (bits(RSR) + bits(SRS) - bits(RRR) - bits(SSS)) / 2
       In both pairs each run is once R and once S. So the difference holds interactions alone: of
       run 0 with run 1, and of run 1 with run 2. Below 0, alternation helps beyond the share of
       synthetic updates and the kind of the last run. (Added after the trainings, November 2026: it
       is also below 0 where gains have diminishing returns, so it proves no benefit of switching.)

    3. All eight patterns give the effect of each run's kind and all interactions. They also give a
       regression of bits on the share of synthetic updates, the kind of the last run and the number
       of changes of kind.

The model, the text and the update are those of text.py: characters of PTB, an embedding of 64,
one QRNN layer of 256, B = 32, α = 1, clip 1, Adam, float32. SGDR sets the rate of the model's
Adam at each update, from a peak down to 0. The rate of g's Adam is constant, the one that text.py
found for its g. The arms:

    bptt        truncated BPTT, T = 2; T = 4 makes half the updates over the same text; no g
    twice       BPTT through two chunks: a chunk's loss also goes back through the chunk before it
    linear      a layer-wise g, one linear map 256 -> 256
    neuron      the paper's g: neuron-wise, with a memory
    kept        linear g; δ^ reaches θ alone. g is taught the T true steps, as in a real chunk
    sign        as kept, but δ^ times a random sign for each stream, neuron and chunk
                (its norm stays)
    shuffled    as kept, but the streams of δ^ in another order, drawn for each chunk (each neuron's
                mean stays)

Peaks are chosen on seeds 0, 1 and 2, by bits of the validation text at the end. Where the best
peak is the highest or the lowest tried, the search goes on beyond it. Seeds 3 to 7 are reported,
on the test text, which no search reads. A text that repeats takes long: its peaks are chosen on
seed 0 alone, and seeds 3 and 4 are reported. Of the neuron-wise g, seeds 3 to 5 are reported.

A text that repeats: the first 100,000 characters, and five runs of 800 to 12,800 updates: 16
passes. As in train.py, a pass begins with a zero state, and nothing is injected after its last
chunk.
"""

import argparse
import copy
import functools
import math
import statistics
import time
from typing import NamedTuple

import study

import torch

import data
import text
import train
from dni import compare
from sgdr import SGDR

LOG = study.LOGS / "alternate.csv"
COST_LOG = study.LOGS / "alternate-cost.csv"
BASE = {2: 800, 4: 400, 5: 800}  # updates of the first run, by T
PEAKS = (2e-3, 4e-3, 8e-3, 1.6e-2)
SEARCH_SEEDS = (0, 1, 2)
FINAL_SEEDS = (3, 4, 5, 6, 7)
REPEATED_CHARACTERS = 100_000  # of the text that repeats
VALID = 200_001  # characters of validation text, as in text.py


class Arm(NamedTuple):
    """What is compared. Its fields are columns of the log."""

    arm: str
    pattern: str
    T: int = 2
    text: str = "once"  # or "repeated"


MAIN = (
    Arm("bptt", "RRR"),
    Arm("linear", "SSS"),
    Arm("linear", "RSR"),
    Arm("linear", "SRS"),
    Arm("twice", "RRR"),
    Arm("bptt", "RRR", 4),
)
OTHERS = tuple(Arm("linear", pattern) for pattern in ("RRS", "SRR", "RSS", "SSR"))
CONTROLS = tuple(Arm(arm, "SSS") for arm in ("kept", "sign", "shuffled"))
NOISY_ALTERNATION = (Arm("sign", "RSR"), Arm("shuffled", "RSR"))
T5_ARMS = (
    Arm("bptt", "RRR", 5),
    Arm("linear", "SSS", 5),
    Arm("linear", "RSR", 5),
    Arm("linear", "SRS", 5),
)
REPEATED_ARMS = (
    Arm("bptt", "RRRRR", 2, "repeated"),
    Arm("linear", "SSSSS", 2, "repeated"),
    Arm("linear", "RSRSR", 2, "repeated"),
    Arm("linear", "SRSRS", 2, "repeated"),
)
NEURON = (Arm("neuron", "SSS"), Arm("neuron", "RSR"))


# ------------------------------------------------------------------------------------- the controls


def keep(predicted, generator):
    """δ^ as it is."""
    return predicted


def random_sign(predicted, generator):
    """δ^ (B, H) times +1 or -1, drawn for each number. Every absolute value stays."""
    coins = torch.randint(2, predicted.shape, generator=generator)
    return predicted * (2 * coins - 1)


def shuffle_streams(predicted, generator):
    """δ^ (B, H) with its rows, the streams, in another order. The mean of each neuron stays."""
    order = torch.randperm(len(predicted), generator=generator)
    return predicted[order]


DISTURB = {"kept": keep, "sign": random_sign, "shuffled": shuffle_streams}


def control_step(model, optimizer, dni, inputs, targets, state, clip, disturb, generator):
    """A synthetic chunk of train.train_step, but for two things.

    disturb(δ^) is injected, not δ^ itself. And it reaches θ alone: s_k.grad, from which g learns,
    holds the T true steps, as in a real chunk.

    Returns the state that the next chunk begins with.
    """
    optimizer.zero_grad(set_to_none=True)
    nll, _, new_state = model(inputs, targets, state)
    s = None if state is None else [c for c, _ in state]
    s_next = [c for c, _ in new_state]
    tokens = inputs.numel()
    loss = nll + dni.credit(s, s_next, tokens, synthetic=False)
    future = [disturb(predicted, generator) for predicted in dni.synthesize(s_next)]
    injected = dni.alpha / tokens * sum((d * c).sum() for d, c in zip(future, s_next))

    loss.backward(retain_graph=True)
    injected.backward(inputs=list(model.parameters()))
    dni.learn()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return train.detach_state(new_state)


def check_controls():
    """Raise AssertionError where a control is not what the head says of it."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(text.B, text.HIDDEN)
    signed = random_sign(predicted, generator)
    assert torch.equal(signed.abs(), predicted.abs())
    assert not torch.equal(signed, predicted)
    cosine, _ = compare([signed], [predicted])
    assert abs(cosine) < 0.05
    shuffled = shuffle_streams(predicted, generator)
    assert torch.equal(shuffled.sort(0).values, predicted.sort(0).values)
    assert not torch.equal(shuffled, predicted)

    # After 50 updates g predicts something. Then three steps from the same place.
    case = dict(arm="linear", pattern="SSS", T=2, rate=1e-3, peak=4e-3, seed=0)
    training = Training(case, vocabulary_size=50)
    for arm in DISTURB:
        g = Training({**case, "arm": arm}, vocabulary_size=50).dni.g
        assert str(g) == str(training.dni.g)
    tokens = torch.randint(50, (51 * 2, text.B))
    for n in range(50):
        chunk = tokens[2 * n : 2 * n + 2]
        training.update(chunk, chunk.roll(1, 0), synthetic=True)
    chunk = tokens[100:]
    begun = {}
    for kind in ("synthetic", "real", "kept"):
        begun[kind] = copy.deepcopy(training)
        begun[kind].case["arm"] = "kept" if kind == "kept" else "linear"
        begun[kind].update(chunk, chunk.roll(1, 0), synthetic=kind != "real")
    weights = {kind: its.model.rnn.layers[0].weight for kind, its in begun.items()}
    maps = {kind: its.dni.g.mlps[0][0].weight for kind, its in begun.items()}
    # Undisturbed, θ gets the step of a synthetic chunk, and g the step of a real one.
    assert torch.allclose(weights["kept"], weights["synthetic"], atol=1e-6)
    assert not torch.allclose(weights["kept"], weights["real"], atol=1e-4)
    assert torch.equal(maps["kept"], maps["real"])
    assert not torch.equal(maps["kept"], maps["synthetic"])


# --------------------------------------------------------------------------------------- a training


class Training:
    """All that learns, and the state at the border that was reached."""

    def __init__(self, case, vocabulary_size):
        self.case = dict(case)
        settings = {**case, "alpha": 1.0}
        if case["arm"] in DISTURB:
            settings["arm"] = "linear"
        self.model, self.optimizer, self.dni = text.build(settings, vocabulary_size)
        self.schedule = SGDR(self.optimizer, base=BASE[case["T"]], eta_max=case["peak"])
        self.generator = torch.Generator().manual_seed(case["seed"])
        self.begin()

    def begin(self):
        """Begin a text."""
        self.state = None
        self.recent = []
        if self.dni:
            self.dni.reset()

    def update(self, inputs, targets, synthetic):
        """Learn from a chunk, (T, B) twice."""
        arm = self.case["arm"]
        if arm == "twice":
            self.recent = [*self.recent, (inputs, targets, self.state)][-2:]
            self.state = study.full_update(self.model, self.optimizer, self.recent, text.CLIP)
        elif arm in DISTURB and synthetic:
            self.state = control_step(
                self.model,
                self.optimizer,
                self.dni,
                inputs,
                targets,
                self.state,
                text.CLIP,
                DISTURB[arm],
                self.generator,
            )
        else:
            _, self.state = train.train_step(
                self.model,
                self.optimizer,
                self.dni,
                inputs,
                targets,
                self.state,
                synthetic,
                text.CLIP,
            )


@functools.cache
def corpus():
    return data.load_corpus("ptb-chars")


def one(case):
    """Train. Returns one row. The test text is read for the seeds that choose nothing."""
    train.keep_freed_memory()
    T = case["T"]
    pattern = case["pattern"]
    began = time.monotonic()
    tokens = corpus().train[:REPEATED_CHARACTERS] if case["text"] == "repeated" else corpus().train
    inputs, targets = data.streams(tokens, text.B)
    chunks = len(inputs) // T  # of a pass
    updates = BASE[T] * (2 ** len(pattern) - 1)
    training = Training(case, len(corpus().vocabulary))
    for n in range(updates):
        place = n % chunks
        if place == 0:
            training.begin()
        training.schedule.step(n)
        run = training.schedule.run.index
        synthetic = pattern[run] == "S" and place < chunks - 1
        start = place * T
        training.update(inputs[start : start + T], targets[start : start + T], synthetic)
    row = {**case, "updates": updates, "bits": bits(training.model, corpus().valid[:VALID])}
    row["test_bits"] = ""
    if case["seed"] not in SEARCH_SEEDS:
        row["test_bits"] = bits(training.model, corpus().test)
    row["seconds"] = round(time.monotonic() - began, 1)
    return [row]


def bits(model, tokens):
    """Bits per character."""
    return round(train.evaluate(model, tokens, text.B) / math.log(2), 5)


# ----------------------------------------------------------------------- which cases, at which peak


def of_arm(rows, arm):
    """The rows of an Arm."""
    wanted = tuple(map(str, arm))
    return [row for row in rows if tuple(row[name] for name in Arm._fields) == wanted]


def by_peak(rows, arm):
    """{peak: {seed: validation bits}} of the search of an arm, by rising peak."""
    found = {}
    for row in of_arm(rows, arm):
        if int(row["seed"]) in SEARCH_SEEDS:
            found.setdefault(float(row["peak"]), {})[int(row["seed"])] = float(row["bits"])
    return dict(sorted(found.items()))


def best_peak(rows, arm):
    """The peak with the fewest bits, by the mean over the seeds that all peaks have, or None."""
    found = by_peak(rows, arm)
    if len(found) < len(PEAKS):
        return None
    shared = set.intersection(*(set(its) for its in found.values()))
    if not shared:
        return None
    means = {peak: statistics.mean(its[seed] for seed in shared) for peak, its in found.items()}
    return min(means, key=means.get)


def as_case(arm, peak, seed):
    """The case of a training, {column: value}; the rate of g is empty for an arm without a g."""
    best_rates = text.best_rates(study.read_log(study.LOGS / "text.csv"))
    rate = ""
    if arm.arm not in text.WITHOUT_G:
        rate = best_rates["neuron" if arm.arm == "neuron" else "linear"]
    return dict(**arm._asdict(), rate=rate, peak=peak, seed=seed)


def search(arms, seeds):
    """Train each arm at each peak, and beyond the highest or lowest one while that is the best."""
    peaks = {arm: list(PEAKS) for arm in arms}
    tried = None
    while peaks != tried:
        tried = peaks
        cases = [as_case(arm, peak, seed) for seed in seeds for arm in arms for peak in peaks[arm]]
        study.do_cases(LOG, one, cases)
        rows = study.read_log(LOG)
        peaks = {arm: widened(rows, arm) for arm in arms}


def widened(rows, arm):
    """The peaks that were tried, and the next one beyond the edge where the best is at the edge."""
    tried = list(by_peak(rows, arm))
    best = best_peak(rows, arm)
    if best == tried[0]:
        return [best / 2, *tried]
    if best == tried[-1]:
        return [*tried, 2 * best]
    return tried


def final(arms, seeds=FINAL_SEEDS):
    """Train each arm at its best peak, on seeds that chose nothing."""
    rows = study.read_log(LOG)
    peaks = {arm: best_peak(rows, arm) for arm in arms}
    cases = [as_case(arm, peaks[arm], seed) for seed in seeds for arm in arms]
    study.do_cases(LOG, one, cases)


def do(which):
    """A study."""
    if which == "peaks":
        search(MAIN, SEARCH_SEEDS)
    elif which == "patterns":
        search(MAIN + OTHERS, SEARCH_SEEDS)
        final(MAIN + OTHERS)
    elif which == "controls":
        check_controls()
        search(CONTROLS + NOISY_ALTERNATION, SEARCH_SEEDS)
        final(CONTROLS + NOISY_ALTERNATION)
    elif which == "T5":
        search(T5_ARMS, SEARCH_SEEDS)
        final(T5_ARMS)
    elif which == "repeated":
        search(REPEATED_ARMS, SEARCH_SEEDS[:1])
        final(REPEATED_ARMS, FINAL_SEEDS[:2])
    elif which == "neuron":
        search(NEURON, SEARCH_SEEDS)
        final(NEURON, FINAL_SEEDS[:3])
    elif which == "cost":
        study.do_cases(COST_LOG, cost, [dict(repeat=n) for n in range(5)])


# ------------------------------------------------------------------------------------ what it costs

# Each with the kind of its chunks. "linear" in real chunks: g learns and is not used.
COSTS = (
    ("bptt", "R", 2),
    ("bptt", "R", 4),
    ("twice", "R", 2),
    ("linear", "R", 2),
    ("linear", "S", 2),
    ("neuron", "R", 2),
    ("neuron", "S", 2),
    ("bptt", "R", 5),
    ("twice", "R", 5),
    ("linear", "R", 5),
    ("linear", "S", 5),
)


def cost(case, rounds=20, updates=25):
    """Milliseconds an update of each arm: the median of `rounds` turns, in which they take part."""
    train.keep_freed_memory()
    inputs, targets = data.streams(corpus().train, text.B)
    trainings = {}
    for arm, kind, T in COSTS:
        settings = as_case(Arm(arm, kind, T), 4e-3, case["repeat"])
        trainings[arm, kind, T] = Training(settings, len(corpus().vocabulary))
    turns = {key: [] for key in trainings}
    for turn in range(rounds + 1):
        for key, training in trainings.items():
            _, kind, T = key
            began = time.perf_counter()
            for n in range(turn * updates, (turn + 1) * updates):
                start = n * T
                training.update(inputs[start : start + T], targets[start : start + T], kind == "S")
            if turn:  # the first turn warms up
                turns[key].append((time.perf_counter() - began) / updates * 1000)
    return [
        {**case, "arm": arm, "kind": kind, "T": T, "ms": round(statistics.median(its), 4)}
        for (arm, kind, T), its in turns.items()
    ]


STUDIES = ("peaks", "patterns", "controls", "T5", "repeated", "neuron", "cost")


def main():
    parser = argparse.ArgumentParser(description="Does it help to alternate gradients?")
    parser.add_argument("--study", choices=STUDIES, help="one study; without it, all but cost")
    wanted = parser.parse_args().study
    for which in (wanted,) if wanted else STUDIES[:-1]:
        do(which)


if __name__ == "__main__":
    study.run(main)
