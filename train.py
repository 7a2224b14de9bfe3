"""Train the QRNN language model with real gradients, synthetic ones, or both in turn.

Paper
    Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language Modeling". Sources in the
    settings are its sections, those of AWD (arXiv 1708.02182), QRNN (1611.01576) and DNI (1608.05343), and
    the "authors' code" published with the paper, where its text says nothing or something else.

Why alternate? Networks trained with synthetic and with real gradients come to hold different representations.
The paper hopes that the two in turn show the optimiser more of the landscape, and that a restart of the
learning rate at each turn lets it leave a minimum for a better one (sections 1 and 2.3).

The four modes decide two things, in `gradient_source` and `make_schedule` below (and a default of --lr):

    mode           what a chunk learns from the chunks after it             learning rate
    bptt           nothing: truncated backpropagation through time          constant
    dni            a synthetic gradient at its last state, after a warm-up  constant
    restart        nothing; with --gradient synthetic, as in mode dni       SGDR
    alternating    nothing in even runs, synthetic in odd ones              SGDR; they switch at a restart

Glossary
    name       symbol     shape          meaning
    chunk      -          (T, B) twice   inputs and targets, T steps of B streams; a border lies between two
    state      -          [(c, x_prev)]  what crosses a border: of each layer c (B, H) and x_prev (qrnn.py)
    cells      s_k        [c]            its c's: what an interface sees, and dni.py calls s
    dni        g, h_g     -              the interface of dni.py: a network g and its memory h_g
    run        i          -              of SGDR: from one restart of the learning rate to the next

Not here: fine-tuning, dynamic evaluation. What keeps a long training alive: harness/ (`keeper` below).

`python train.py` trains on the corpus inside Python; `torchrun --nproc-per-node N train.py` in N processes.
"""

import contextlib
import dataclasses
import math
import random
from pathlib import Path

import torch

from data import CORPORA, CorpusError, describe, load_corpus, streams
from dni import Interface, LayerDNI, NeuronDNI
from harness import checkpoints, command_line, machine, processes
from harness.command_line import (ABOVE_0, COUNT, FROM_0, NUMBERS, POSITIVE, RISING, SEED, SHARE, UserError,
                                  setting)
from harness.keeper import Keeper, sample
from qrnn import LanguageModel
from sgdr import SGDR, per_run


# ------------------------------------------------------------------------------------- what the mode decides

SGDR_MODES = ("restart", "alternating")


def uses_synthetic(s):
    """Whether the settings s need an interface at all."""
    return s.mode in ("dni", "alternating") or (s.mode, s.gradient) == ("restart", "synthetic")


def gradient_source(settings, run, epoch):
    """At that run and epoch: 'real', the chunk's own gradient, or 'synthetic', which adds g's.

    'real' is truncated BPTT. There g goes on learning, from the T true steps alone (departure 21).
    """
    if settings.mode == "alternating":                                  # they take turns (2.3, 3.2)
        other = "synthetic" if settings.first == "real" else "real"
        return settings.first if run % 2 == 0 else other
    return "synthetic" if uses_synthetic(settings) and epoch >= settings.dni_warmup else "real"


def make_schedule(settings, optimizer):
    """The SGDR schedule of the modes with restarts; None for those with a constant rate."""
    if settings.mode in SGDR_MODES:
        return SGDR(optimizer, settings.e_base, 2, settings.eta_min, settings.eta_max or None,
                    settings.restarts, fractional=settings.sgdr_step == "batch")


# --------------------------------------------------------------------------------------------------- one step

def cells(state):
    """[c], a (B, H_l) of every layer, of a state [(c, x_prev)]; None where the state is None."""
    return state and [c for c, _ in state]


def cut(state):
    """A copy of the state to begin a chunk with: same values, no history; the c's collect a gradient."""
    return [(c.detach().clone().requires_grad_(), x_prev.detach().clone()) for c, x_prev in state]


def train_step(model, optimizer, dni, inputs, targets, state, synthetic, settings,
               mixed=contextlib.nullcontext()):
    """Learn from one chunk (2.1 and 2.2). Returns its nll and the state that the next one begins with.

    inputs, targets: (T, B). state: from `cut`, or None where a text begins. dni: None where there is no
    g. synthetic: whether g's gradient crosses the border ahead. mixed: an autocast, for the matrix products.
    """
    optimizer.zero_grad(set_to_none=True)
    with mixed:
        # 1. Forward: chunk k, from s_k to s_{k+1}. L_k is the loss with its penalties (departure 20).
        nll, penalty, new_state = model.loss(inputs, targets, state, settings.activation, settings.temporal)
        loss = nll + penalty

        # 2. Synthesise: ask g for δ^_k, to be corrected in 4, and in synthetic turns for δ^_{k+1}. What is
        #    added to the loss has the derivative α δ^_{k+1} / (T B) in s_{k+1}; it is 0 in real turns.
        if dni:
            loss = loss + dni.credit(cells(state), cells(new_state), inputs.numel(), inject=synthetic)

    # 3. Backward: θ gets dL_k/dθ + (ds_{k+1}/dθ)ᵀ α δ^_{k+1} / (T B), and s_k.grad target_k / (T B).
    #    This is Eq. 1 as dni.py has it, over T B: there losses are sums, here they are means.
    loss.backward()

    # 4. Regress: a step of Adam for φ, on the mean of (δ^_k - target_k)².
    if dni:
        dni.learn()

    # 5. Update θ.
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizer.step()
    return nll.detach(), cut(new_state)


# --------------------------------------------------------------------------------------------------- an epoch

@dataclasses.dataclass
class Place:
    """Where a training is."""
    epoch: int = 0                     # how many epochs are done
    start: int = 0                     # steps read of the epoch under way: where its next chunk starts
    total: float | torch.Tensor = 0.0  # nll of these steps, their sum
    run: int = 0                       # the SGDR run of the last chunk,
    source: str = "real"               # its gradient source,
    rate: float = 0.0                  # its learning rate,
    state: list | None = None          # and the state that it left

    def __str__(self):
        return (f"time step {self.start} of epoch {self.epoch + 1} (run {self.run}, {self.source} gradients, "
                f"rate {self.rate:.2e}, perplexity {perplexity(self.total / max(self.start, 1)):.1f})")


def chunk_borders(length, settings, epoch=0):
    """Yield (start, stop) of the chunks of `length` steps. Jitter depends on seed and epoch alone."""
    draw, stop = random.Random(f"{settings.seed} {epoch}"), 0
    while stop < length:
        start, steps = stop, settings.bptt
        if settings.jitter:                                                  # departure 13: the authors' code
            steps = max(5, int(draw.gauss(steps if draw.random() < 0.95 else steps / 2, 5)))
        stop = min(start + steps, length)
        yield start, stop


def train_epoch(place, model, optimizer, schedule, dni, text, settings, mixed=contextlib.nullcontext()):
    """Train on what is left of an epoch. Moves `place` on and yields after each chunk, for the keeper.

    text: inputs and targets, (L, B) each. No chunk follows the last one, so nothing is injected there.
    """
    inputs, targets = text
    model.train()
    if place.start == 0:                                                # a text begins: nothing is remembered
        place.total, place.state = 0.0, None
        if dni:
            dni.reset()
            dni.agreement.reset()
    state = place.state and cut(place.state)                            # a checkpoint has values alone
    for start, stop in chunk_borders(len(inputs), settings, place.epoch):
        if start < place.start:                                         # read before an interruption
            continue
        now, previous_run = place.epoch + start / len(inputs), place.run          # now: in epochs
        if schedule:
            schedule.step(now)
            place.run = schedule.run.index
            if settings.reset_optimizer and place.run != previous_run:
                optimizer.state.clear()
        place.rate = schedule.get_last_lr()[0] if schedule else settings.lr
        share = (stop - start) / settings.bptt if settings.jitter else 1
        optimizer.param_groups[0]["lr"] = place.rate * share
        place.source = gradient_source(settings, place.run, now)
        synthetic = place.source == "synthetic" and stop < len(inputs)
        nll, state = train_step(model, optimizer, dni, inputs[start:stop], targets[start:stop], state,
                                synthetic, settings, mixed)
        place.start, place.state, place.total = stop, state, place.total + nll * (stop - start)
        yield


# ----------------------------------------------------------------------------- evaluation, and the whole loop

@torch.no_grad()
def evaluate(model, tokens, batch_size, mixed=contextlib.nullcontext(), bptt=200):
    """Mean nll in nats of a text, tokens (n,), as streams: state carried, no dropout. (Departure 16.)"""
    was_training, total, state = model.training, 0.0, None
    model.eval()
    inputs, targets = streams(tokens, batch_size)
    for x, y in zip(inputs.split(bptt), targets.split(bptt)):
        with mixed:
            nll, _, state = model.loss(x, y, state)
        total += nll.item() * x.numel()
    model.train(was_training)
    return total / inputs.numel()


def perplexity(nll):
    """exp(nll), at most exp(700)."""
    return math.exp(min(float(nll), 700.0))


def train(place, model, optimizer, schedule, dni, text, valid_tokens, settings, mixed, keeper):
    """Epoch after epoch, from `place` on. The keeper counts them in place.epoch, and may end the training."""
    def validate():
        """The validation nll, and a row of log.csv."""
        keeper.average_sums()
        valid = evaluate(model, valid_tokens, settings.valid_batch_size, mixed)
        cosine, r2 = dni.agreement.result() if dni else (math.nan, math.nan)
        return valid, dict(
            epoch=f"{place.epoch + place.start / len(text[0]):.6g}", run=place.run, gradient=place.source,
            learning_rate=float(f"{place.rate:.4e}"),
            train_perplexity=round(perplexity(place.total / place.start), 3),
            valid_perplexity=round(perplexity(valid), 3), dni_cosine=round(cosine, 5), dni_r2=round(r2, 5))
    every = settings.validate_every * len(text[0])                      # in steps
    for _ in range(place.epoch, settings.epochs):
        done = place.start // every
        for _ in train_epoch(place, model, optimizer, schedule, dni, text, settings, mixed):
            if place.start // every > done and place.start < len(text[0]):
                done = place.start // every
                keeper.log(validate()[1])
            keeper.step_done()
            if keeper.enough:                                           # --max-steps
                break
        keeper.epoch_done(*validate())
        if keeper.enough:
            break


# ------------------------------------------------------------------------------------------------------- main

def build(s, vocabulary, device):
    """Everything that learns: (model, optimizer, dni or None), the same initial model in every mode."""
    torch.manual_seed(s.seed)
    dropouts = {name: value for name, value in vars(s).items() if name.startswith("dropout")}
    model = LanguageModel(vocabulary, s.embedding_size, s.hidden_size, s.num_layers, window=s.window,
                          zoneout=s.zoneout, compile=s.compile, **dropouts).to(device)
    fused = {"fused": True} if device in ("cpu", "cuda") else {}
    optimizer = torch.optim.Adam(model.parameters(), s.lr, (0.9, s.beta2), weight_decay=s.l2, **fused)
    if not uses_synthetic(s):
        return model, optimizer, None
    # Every mode draws the same dropout masks: g leaves torch's generator as it was, and has its own.
    before, own = machine.random_state(device), torch.Generator(device).manual_seed(s.seed)
    options = dict(hidden_size=0 if s.dni == "linear" else s.dni_hidden, noise=s.dni_noise,
                   last_layer=s.dni_last_layer, generator=own)          # 0: one linear map
    if s.dni == "neuron":
        g = NeuronDNI(window=s.dni_window, zoneout=s.dni_zoneout, compile=s.compile, **options)
    else:
        g = LayerDNI([layer.hidden_size for layer in model.rnn.layers], **options)
    machine.set_random_state(before, device)
    g_optimizer = torch.optim.Adam(g.to(device).parameters(), s.dni_lr, weight_decay=s.dni_l2, **fused)
    return model, optimizer, Interface(g, g_optimizer, s.dni_alpha, s.dni_bptt)


def main(argv):
    """Train, test the best model, return the exit status. Raises CorpusError and those of command_line.py."""
    s, out, resume = command_line.parse(argv, PRESETS, checkpoints.read_settings, __doc__)
    if s.data not in CORPORA and Path(s.data).is_dir():
        s = dataclasses.replace(s, data=str(Path(s.data).resolve()))    # to resume from anywhere
    device, mixed = machine.prepare(s.device, s.precision)
    processes.join(device)
    with processes.first_process_first():                               # it may have to download
        corpus = load_corpus(s.data, s.data_dir or None, delay=s.bptt + 10)  # recall: beyond a chunk
    text = streams(corpus.train.to(device), s.batch_size, s.bptt)       # (L, B) twice
    valid_tokens, test_tokens = corpus.valid.to(device), corpus.test.to(device)
    streams(valid_tokens, s.valid_batch_size), streams(test_tokens, 1)  # raise where there is too little
    model, optimizer, dni = build(s, len(corpus.vocabulary), device)
    schedule, place = make_schedule(s, optimizer), Place()
    parts, generators = {"model": model, "optimizer": optimizer}, []
    divided, sums = [(place, "state")], [(place, "total")]              # what is divided among processes
    if dni:
        parts, generators = {**parts, "dni": dni.g, "dni_optimizer": dni.optimizer}, [dni.g.generator]
        divided, sums = [*divided, (dni, "memory"), (dni, "past")], [*sums, (dni.agreement, "sums")]
    text = processes.own_streams(text, s.seed, generators)              # (L, B / processes) twice
    keeper = Keeper(s, place, parts, divided, sums, generators, device, len(text[0]), corpus.fingerprint(),
                    hint="try a lower --lr or --dni-alpha, or with a DNI a lower --dni-lr")
    keeper.open(out, resume, f"{Path(s.data).name}-{s.mode}")
    its_dni = f", {s.dni} DNI of {machine.parameters(dni.g):,}" if dni else ""
    print(*describe(corpus), f"model of {machine.parameters(model):,} parameters{its_dni}; "
          f"{machine.describe(device, mixed)}; in {keeper.folder}", sep="\n", flush=True)
    with keeper:
        train(place, model, optimizer, schedule, dni, text, valid_tokens, s, mixed, keeper)
    if keeper.rank == 0:
        keeper.load_best()
        print("sampled:", *sample(model, corpus.vocabulary), sep="\n  ")
        loss = evaluate(model, test_tokens, 1, mixed)
        print(*describe(corpus)[1:], f"bits per token {loss / math.log(2):.4f}",
              f"test perplexity {perplexity(loss):.2f}", sep="\n")
    return 0


def command(argv=None):
    """`main`, with what a user can put right told in one line. Returns the exit status."""
    return command_line.run(main, argv, [CorpusError], "try a lower --batch-size, --bptt or --hidden-size")


# --------------------------------------------------------------------------------------------------- settings

FOR_RESTARTS = (lambda s: s.mode in SGDR_MODES, "--mode restart or alternating")
FOR_DNI = (uses_synthetic, "--mode dni, alternating, or restart --gradient synthetic")
FOR_NEURON_DNI = (lambda s: uses_synthetic(s) and s.dni == "neuron", f"--dni neuron, in {FOR_DNI[1]}")
FOR_HIDDEN = (lambda s: uses_synthetic(s) and s.dni != "linear", f"--dni neuron or layer, in {FOR_DNI[1]}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting: default; unit and source; which values can be; beside which others it has an effect."""
    mode: str = setting("alternating", "gradients and rate", ("bptt", "dni", "restart", "alternating"))
    data: str = setting("pydoc", "pydoc, ptb, ptb-chars, wt2, recall, or a folder of train, valid, test.txt")
    gradient: str = setting("real", "as in mode bptt, or in mode dni (Table 2)", ("real", "synthetic"),
                            (lambda s: s.mode == "restart", "--mode restart"))
    first: str = setting("real", "in run 0 (3.2); authors' WT2 commands: synthetic", ("real", "synthetic"),
                         (lambda s: s.mode == "alternating", "--mode alternating"))
    dni: str = setting("neuron", "neuron- (2.2) or layer-wise (DNI)", ("neuron", "layer", "linear"), FOR_DNI)
    epochs: int = setting(15, "passes over the training text; the paper: 320 (3.2)", COUNT)
    seed: int = setting(42, "of all random numbers (authors' code)", SEED)
    # The model.
    embedding_size: int = setting(256, "E, also the size of the last layer; authors' code: 400 (AWD)", COUNT)
    hidden_size: int = setting(512, "H of the other layers; the paper: 1550 (3)", COUNT)
    num_layers: int = setting(2, "QRNN layers; the paper: 4 (3)", COUNT)
    window: int = setting(2, "words the first QRNN layer sees, the others see 1 (AWD's QRNN)", COUNT)
    dropout_output: float = setting(0.3, "on the last output, locked; authors' code: 0.4 (AWD 4.2)", SHARE)
    dropout_hidden: float = setting(0.1, "between layers; authors' code: 0.3, WT2 0.2 (AWD 4.2)", SHARE)
    dropout_input: float = setting(0.1, "on embedded words, locked; authors' code: 0.4 (AWD 4.2)", SHARE)
    dropout_embedding: float = setting(0.0, "of whole words; authors' code: 0.1 (AWD 4.3)", SHARE)
    dropout_weight: float = setting(0.0, "on the gates' weights; authors' code: 0.1 (AWD 2)", SHARE)
    zoneout: float = setting(0.0, "probability that a neuron keeps its value (QRNN 2.1)", SHARE)
    activation: float = setting(2.0, "activation regularisation, alpha in AWD 4.6", FROM_0)
    temporal: float = setting(1.0, "temporal activation regularisation, beta in AWD 4.6", FROM_0)
    # Optimisation.
    lr: float = setting(1e-2, "Adam's learning rate; with restarts, where a run begins; authors' code: 1e-3",
                        POSITIVE, (lambda s: s.mode not in SGDR_MODES or not s.eta_max, "no --eta-max"))
    beta2: float = setting(0.999, "of Adam; its β1 is 0.9 (Adam's default)", SHARE)
    l2: float = setting(5e-6, "weight decay added to the gradient; authors' code: 1.2e-6", FROM_0)
    clip: float = setting(0.25, "largest norm of the gradient; authors' code: 0.2, WT2 0.25", ABOVE_0)
    batch_size: int = setting(20, "B, parallel streams of training text (authors' code)", COUNT)
    bptt: int = setting(70, "T, steps of a chunk; the paper: 200 (3)", COUNT)
    jitter: bool = setting(False, "T from N(bptt, 5), 1 in 20 N(bptt/2, 5), the rate to scale (AWD 4.1)")
    # Restarts.
    e_base: float = setting(5.0, "E_base, epochs of run 0; run i lasts 2^i as long (3.2, authors' code)",
                            POSITIVE, (lambda s: s.mode in SGDR_MODES and not s.restarts,
                                       f"{FOR_RESTARTS[1]}, without --restarts"))
    restarts: tuple[float, ...] = setting((), "restart at these epochs; authors' code: 5 10 20 40 80 160 320",
                                          RISING, FOR_RESTARTS)
    eta_min: tuple[float, ...] = setting((0.0,), "rate at the end of a run, one for all or one a run (2.1)",
                                         (lambda xs: xs and NUMBERS[0](xs), "numbers from 0"), FOR_RESTARTS)
    eta_max: tuple[float, ...] = setting((), "rate at its beginning; none: lr (2.1)", NUMBERS, FOR_RESTARTS)
    sgdr_step: str = setting("batch", "moves E_cur; authors' code: epoch", ("batch", "epoch"), FOR_RESTARTS)
    reset_optimizer: bool = setting(False, "forget Adam's moments at a restart", None, FOR_RESTARTS)
    # The interface.
    dni_alpha: float = setting(0.9, "discount α; the paper: none, authors' code: 0.1", FROM_0, FOR_DNI)
    dni_hidden: int = setting(50, "neurons of g (2.2)", COUNT, FOR_HIDDEN)
    dni_lr: float = setting(1e-4, "Adam's learning rate for g (experiments/text.py)", POSITIVE, FOR_DNI)
    dni_bptt: int = setting(1, "K, borders through which g is taught (2.2, text.py)", COUNT, FOR_NEURON_DNI)
    dni_l2: float = setting(0.0, "weight decay of g; authors' code: 1.2e-6", FROM_0, FOR_DNI)
    dni_window: int = setting(1, "window of g's QRNN layer; authors' code: 2", COUNT, FOR_NEURON_DNI)
    dni_zoneout: float = setting(0.0, "zoneout of g's QRNN layer; authors' code: 0.1", SHARE, FOR_NEURON_DNI)
    dni_noise: float = setting(0.0, "deviation of a factor on g's input; authors' code: 0.5", FROM_0, FOR_DNI)
    dni_last_layer: float = setting(0.0, "begins in U(-b, b), b = 0 (DNI); authors: 0.1", FROM_0, FOR_DNI)
    dni_warmup: float = setting(1.0, "epochs in which g learns before it is used (authors' code)", FROM_0,
                                (lambda s: uses_synthetic(s) and s.mode != "alternating",
                                 "--mode dni, or restart --gradient synthetic"))
    # Evaluation and limits.
    valid_batch_size: int = setting(10, "streams of validation text (authors' code); the test is one", COUNT)
    validate_every: float = setting(1.0, "epochs from one row of log.csv to the next",
                                    (lambda x: 0 < x <= 1, "above 0 and at most 1"))
    max_steps: int = setting(0, "stop after so many steps, 0: never; to try settings out", FROM_0)
    # The machine.
    device: str = setting("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "of products; auto: bf16 where it is native", ("auto", "fp32", "bf16"))
    checkpoint_every: float = setting(10.0, "minutes, within an epoch; 0: after every step", FROM_0)
    compile: bool = setting(False, "torch.compile: the same numbers to rounding, faster after a minute")
    data_dir: str = setting("", "folder of PTB and WT2; default $QRNN_DATA, else corpora/", None,
                            (lambda s: s.data in ("ptb", "ptb-chars", "wt2"), "--data ptb, ptb-chars or wt2"))

    MAY_CHANGE = ("epochs", "validate_every", "max_steps", "device", "precision", "checkpoint_every",
                  "compile", "data_dir")

    def check(self):
        """Raise UserError where two settings contradict each other."""
        for i in range(max(len(self.eta_min), len(self.eta_max))):
            if per_run(self.eta_min, i) > per_run(self.eta_max or self.lr, i):
                raise UserError(f"--eta-min must be at most --eta-max, or else --lr, in run {i}")


SMALL, CONSTANT = Settings(), Settings(lr=4e-3)                # for two CPU cores; CONSTANT: no restarts
PAPER = dataclasses.replace(
    SMALL, epochs=320, embedding_size=400, hidden_size=1550, num_layers=4, dropout_output=0.4,
    dropout_hidden=0.3, dropout_input=0.4, dropout_embedding=0.1, dropout_weight=0.1, lr=1e-3, l2=1.2e-6,
    clip=0.2, bptt=200, jitter=True, e_base=5.0, dni_alpha=1.0)
PAPER_WT2 = dataclasses.replace(PAPER, dropout_hidden=0.2, clip=0.25)
PRESETS = {"small": SMALL, "small --mode bptt": CONSTANT, "small --mode dni": CONSTANT,
           "paper": PAPER, "paper --data wt2": PAPER_WT2}


if __name__ == "__main__":
    raise SystemExit(command())
