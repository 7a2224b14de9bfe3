"""Train the QRNN language model with real gradients, synthetic gradients, or both in turn.

Paper: Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language Modeling".
Numbers in brackets are its sections; with a name before them those of AWD (arXiv 1708.02182) or of
DNI (1608.05343). The "authors' code" was published with the paper. Departures from the paper and
from this code have the numbers of experiments/departures.md.

Why alternate? The paper cites a finding of others: models that were trained with synthetic
gradients have other inner representations than models that were trained with real ones. The authors
hope that alternating the two lets the optimiser see more of the loss surface than either kind
alone. The learning rate restarts at each change, so that the weights can leave a minimum for a
better one (1, 2.3). Two things depend on the mode:

    mode           what enters a chunk's backward pass at its end           learning rate
    bptt           nothing: truncated backpropagation through time          constant
    dni            a synthetic gradient at its last state, from the second  constant
                   epoch on (in the first, g only learns)
    restart        nothing; with --gradient synthetic, as in mode dni       SGDR
    alternating    nothing in even runs, synthetic gradients in odd runs    SGDR: a restart at each
                                                                            change

"Real" is the paper's word for truncated backpropagation, in which no gradient crosses a border.

Glossary
    chunk      (T, B) twice   inputs and targets, T steps of B streams; a border lies between two
                              chunks
    state      [(c, x_prev)]  what crosses border k: c (B, H) and x_prev of each layer; s_k: the c's
    dni        g, h_g         the Interface of dni.py: a network g and its memory h_g
    gradient   -              "synthetic" if g's gradient enters a chunk at its end, else "real"
    run        i              of SGDR: from one restart of the learning rate to the next

Not here: fine-tuning, dynamic evaluation, several processes, checkpoints within an epoch. On
Windows, and between machines that share a folder, two trainings in one folder are not noticed.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import io
import math
import os
import random
import re
import shlex
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import torch

from data import CORPORA, Corpus, UserError, describe, load_corpus, streams
from dni import Interface, LayerDNI, NeuronDNI, agreement, crossing
from qrnn import LanguageModel
from sgdr import SGDR, per_run

# -------------------------------------------------------------------------- what the mode decides


def with_dni(settings):
    """Whether there is a g at all."""
    if settings.mode == "restart":
        return settings.gradient == "synthetic"
    return settings.mode in ("dni", "alternating")


def gradient_at(settings, run, epoch):
    """The kind of a chunk: "synthetic" if g's gradient enters it at its end, else "real".

    run: of SGDR.
    epoch: how many epochs have passed, a fraction.
    In a real chunk g goes on learning. Its target is then the gradient of this chunk's loss alone
    (departures 11, 38).
    """
    if settings.mode == "alternating":
        return "real" if run % 2 == 0 else "synthetic"  # 2.3, 3.2
    if with_dni(settings) and epoch >= settings.dni_warmup:
        return "synthetic"
    return "real"


def make_schedule(settings, optimizer):
    """SGDR. In the modes with a constant rate it is one run without end, whose rate never falls."""
    if settings.mode in ("bptt", "dni"):
        return SGDR(optimizer, math.inf)
    eta_max = settings.eta_max or None  # None: the optimiser's own rate, settings.lr
    return SGDR(optimizer, settings.e_base, settings.mult, settings.eta_min, eta_max)


# -------------------------------------------------------------- one step, an epoch, an evaluation


def detach_state(state):
    """The state to begin a chunk with: a copy without a history, whose c's collect a gradient."""
    copy = []
    for c, x_prev in state:
        copy.append((c.detach().clone().requires_grad_(), x_prev.detach().clone()))
    return copy


def train_step(
    model,
    optimizer,
    dni,
    inputs,
    targets,
    state,
    synthetic,
    clip,
    autocast=contextlib.nullcontext(),
):
    """Learn from one chunk (2.1 and 2.2). Returns its mean nll, and the state of the next chunk.

    dni: an Interface, or None where there is no g.
    inputs, targets: (T, B) of int64.
    state: from `detach_state`, or None where a text begins.
    synthetic: whether g's gradient crosses the border at the end of this chunk.
    clip: the largest norm of the model's gradient.
    autocast: a torch.autocast for the matrix products.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast:
        # 1. Forward: chunk k, from s_k to s_{k+1}. L_k includes the penalties (departure 20).
        nll, penalty, new_state = model(inputs, targets, state)
        loss = nll + penalty

        # 2. Synthesise: g is asked for δ^_k, which 4 corrects. In a synthetic chunk it is also
        #    asked for δ^_{k+1}, and the loss gets a term with the derivative α δ^_{k+1} / (T B) in
        #    s_{k+1}. In a real chunk nothing is injected: the term is zero.
        if dni:
            s = None if state is None else [c for c, _ in state]
            s_next = [c for c, _ in new_state]
            loss = loss + dni.credit(s, s_next, inputs.numel(), synthetic)

    # 3. Backward: θ gets D_k / (T B), where D_k is Eq. 1, and s_k.grad is target_k / (T B)
    # (dni.py).
    loss.backward()

    # 4. Regress: a step of Adam for φ, on the mean of (δ^_k - target_k)². Real chunks do it too.
    if dni:
        dni.learn()

    # 5. Update θ.
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return nll.detach(), detach_state(new_state)


def chunk_borders(length, settings, epoch=0):
    """Yield (start, stop) of the chunks of a text of `length` steps.

    With jitter they depend on seed and epoch alone.
    """
    draw = random.Random(f"{settings.seed} {epoch}")
    start = 0
    while start < length:
        T = settings.chunk
        if settings.jitter:  # AWD 4.1 (departure 13)
            mean = T if draw.random() < 0.95 else T / 2
            T = max(5, int(draw.gauss(mean, 5)))
        yield start, min(start + T, length)
        start += T


def train_epoch(
    model,
    optimizer,
    schedule,
    dni,
    text,
    epoch,
    settings,
    autocast=contextlib.nullcontext(),
):
    """One pass over the training text. Returns what a row of log.csv says of it, {column: value}.

    These are the perplexity of all chunks, and run, gradient and learning rate at the end.

    text: inputs and targets, (L, B) each.
    epoch: how many are finished.
    Raises FloatingPointError for a loss that is not finite: on a CPU at once, elsewhere at the end.
    """
    # The random numbers of an epoch depend on seed and epoch alone. So a training can be resumed.
    torch.manual_seed(random.Random(f"{settings.seed} {epoch}").getrandbits(63))
    inputs, targets = text
    length = len(inputs)
    progress = Progress(epoch, settings.epochs, length)
    state = None
    losses = []
    model.train()
    if dni:
        dni.reset()
    for start, stop in chunk_borders(length, settings, epoch):
        moment = epoch + start / length  # in epochs
        schedule.step(moment)
        run = schedule.run.index
        [rate] = schedule.get_last_lr()
        if settings.jitter:
            # The rate is proportional to the chunk's length (AWD 4.1). At the next chunk the
            # schedule sets it anew.
            share = (stop - start) / settings.chunk
            optimizer.param_groups[0]["lr"] = rate * share
        gradient = gradient_at(settings, run, moment)
        synthetic = gradient == "synthetic" and stop < length  # no chunk follows the last one
        x = inputs[start:stop]
        y = targets[start:stop]
        nll, state = train_step(
            model, optimizer, dni, x, y, state, synthetic, settings.clip, autocast
        )
        losses.append(nll * (stop - start))  # stays on the device
        if nll.device.type == "cpu" and not math.isfinite(nll):
            break
        progress.show(stop, nll)
    nll = (sum(losses) / stop).item()
    if not math.isfinite(nll):
        raise FloatingPointError(
            f"the loss is not finite at step {stop} of {length} in epoch {epoch + 1} "
            f"({gradient} gradients, run {run}, rate {rate:.2e})"
        )
    return dict(
        epoch=epoch + 1,
        run=run,
        gradient=gradient,
        learning_rate=rate,
        train_perplexity=perplexity(nll),
    )


@torch.no_grad()
def evaluate(model, tokens, batch_size, autocast=contextlib.nullcontext(), chunk=200):
    """Mean nll in nats of a text, tokens (n,), as streams: state carried, no dropout.

    (Departure 16: the authors' code divides by one token too many.)
    """
    was_training = model.training
    model.eval()
    inputs, targets = streams(tokens, batch_size)
    losses = []
    state = None
    for x, y in zip(inputs.split(chunk), targets.split(chunk)):
        with autocast:
            nll, _, state = model.forward(x, y, state)  # not model(..), which may be compiled
        losses.append(nll * len(x))
    model.train(was_training)
    return (sum(losses) / len(inputs)).item()


def read_chunks(model, inputs, targets, T, state=None, autocast=contextlib.nullcontext()):
    """Read a text in chunks of T steps, each with a graph of its own, and without a penalty.

    inputs, targets: (L, B).
    state: from `detach_state`, or None where a text begins.
    Returns what dni.py measures, [(s, s_next, loss)], and the state that a next chunk begins with.
    """
    chunks = []
    for x, y in zip(inputs.split(T), targets.split(T)):
        with autocast:
            nll, _, new_state = model.forward(x, y, state)
        s = None if state is None else [c for c, _ in state]
        s_next = [c for c, _ in new_state]
        chunks.append((s, s_next, nll))
        state = detach_state(new_state)
    return chunks, state


def measure(model, g, tokens, settings, autocast=contextlib.nullcontext()):
    """How right g is on validation text, tokens (n,), and how much it does: {column: value}.

    dni_cosine, dni_r2: of its predictions with the true gradients (`agreement` in dni.py).
    dni_injected, dni_lost: the norm of the gradient of θ that g injects, and of the one that is
        lost at the borders, both divided by that of the truncated gradient (`crossing` in dni.py).

    Four chunks of B / 4 streams are read, without dropout. So a "true" gradient is that of the
    three next chunks at most. h_g begins at zero. All of this takes as long as one and a
    half training steps.
    """
    was_training = model.training
    model.eval()
    inputs, targets = streams(tokens, max(1, settings.batch_size // 4))
    T = max(1, min(settings.chunk, len(inputs) // 4))
    chunks, _ = read_chunks(model, inputs[: 4 * T], targets[: 4 * T], T, autocast=autocast)
    model.train(was_training)

    tokens_per_chunk = T * inputs.shape[1]
    cosine, r2 = agreement(g, chunks, tokens_per_chunk)
    theta = list(model.parameters())
    truncated, lost, injected = crossing(g, chunks, tokens_per_chunk, theta, settings.dni_alpha)
    return dict(
        dni_cosine=cosine,
        dni_r2=r2,
        dni_injected=(injected.norm() / truncated.norm()).item(),
        dni_lost=(lost.norm() / truncated.norm()).item(),
    )


def perplexity(nll):
    """exp(nll), at most exp(700)."""
    return math.exp(min(nll, 700.0))


# --------------------------------------------------------------------------------------- settings


def setting(default, values, text):
    """A field of Settings.

    values: the names that it may be, or its range in words; "" is anything.
    text: for --help, with unit and source.
    """
    return dataclasses.field(default=default, metadata=dict(text=text, values=values))


# fmt: off
@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a training. Defaults are those of preset small; see `preset`.

    "paper" and "code" say what the paper and its authors' code have.
    """
    mode: str = setting("alternating", "bptt dni restart alternating", "gradients and rate")
    data: str = setting("pydoc", "", f"{', '.join(CORPORA)}, or a folder of your own three texts")
    min_count: int = setting(1, "at least 1", "words seen fewer times in your train.txt are <unk>")
    gradient: str = setting("real", "real synthetic", "of mode restart: as in bptt, or as in dni")
    epochs: int = setting(15, "at least 1", "passes over the training text; paper: 320 (3.2)")
    seed: int = setting(42, "from 0 to 2^63 - 1", "of all random numbers; code: 42")
    embedding_size: int = setting(256, "at least 1", "E, also H of the last layer; code: 400")
    hidden_size: int = setting(512, "at least 1", "H of the other layers; paper: 1550 (3)")
    num_layers: int = setting(2, "at least 1", "QRNN layers; paper: 4 (3)")
    dropout_output: float = setting(0.3, "in [0, 1)", "on the last output, locked; code: 0.4")
    dropout_hidden: float = setting(0.1, "in [0, 1)", "between layers, locked; code: 0.3, WT2 0.2")
    dropout_input: float = setting(0.1, "in [0, 1)", "on embedded words, locked; code: 0.4")
    dropout_embedding: float = setting(0.0, "in [0, 1)", "of whole words (AWD 4.3); code: 0.1")
    dropout_weight: float = setting(0.0, "in [0, 1)", "on the gates' weights (AWD 2); code: 0.1")
    lr: float = setting(1e-2, "above 0", "Adam's rate; with restarts, that at the start of a run; "
                        "modes bptt and dni: 4e-3; code: 1e-3")
    l2: float = setting(5e-6, "0 or more", "weight decay, added to the gradient; code: 1.2e-6")
    clip: float = setting(0.25, "above 0, or inf for none", "largest norm of the gradient; "
                          "code: 0.2, WT2 0.25")
    batch_size: int = setting(20, "at least 1", "B, parallel streams of training text; code: 20")
    chunk: int = setting(70, "at least 1", "T, steps of a chunk; paper: 200 (3)")
    jitter: bool = setting(False, "", "T from N(chunk, 5), one in twenty from N(chunk/2, 5), "
                           "and the rate times T/chunk (AWD 4.1); code: yes")
    e_base: float = setting(1.0, "above 0", "E_base, epochs of run 0 (searched, 3.2); code: 5")
    mult: float = setting(2.0, "at least 1", "run i lasts mult^i E_base epochs (3.2)")
    eta_min: tuple = setting((0.0,), "0 or more", "rate at a run's end, for all or each (2.1)")
    eta_max: tuple = setting((), "above 0", "rate at a run's start, likewise; none: lr")
    dni_kind: str = setting("neuron", "neuron layer linear", "g is neuron-wise (2.2), layer-wise "
                            "(DNI), or one matrix a layer")
    dni_alpha: float = setting(0.9, "0 or more", "α, a factor on δ^; paper: 1, code: 0.1")
    dni_lr: float = setting(1e-4, "above 0", "Adam's rate for g (text.py); code: 1e-3")
    dni_borders: int = setting(1, "at least 1", "borders through which g's error goes back")
    dni_warmup: float = setting(1.0, "0 or more", "epochs in which g learns, unused; code: 1")
    device: str = setting("auto", "auto cpu cuda mps", "where to compute")
    precision: str = setting("auto", "auto fp32 bf16", "of products; auto: bf16 where it is native")
    compile: bool = setting(False, "", "torch.compile: equal to rounding, faster after a minute")
    data_dir: str = setting("", "", "folder of PTB and WT2; default $QRNN_DATA, else corpora/")
# fmt: on


# What may change when a training is resumed. (A corpus is known by its words, not by its place.)
MAY_CHANGE = ("epochs", "data", "device", "precision", "compile", "data_dir")


def preset(name, mode, data):
    """The settings to start from, which flags change: "small", for two CPU cores, or "paper"."""
    if name == "small":
        constant_rate = mode in ("bptt", "dni")
        return Settings(mode=mode, data=data, lr=4e-3 if constant_rate else 1e-2)
    wt2 = data == "wt2"
    return Settings(
        mode=mode,
        data=data,
        epochs=320,
        embedding_size=400,
        hidden_size=1550,
        num_layers=4,
        dropout_output=0.4,
        dropout_hidden=0.2 if wt2 else 0.3,
        dropout_input=0.4,
        dropout_embedding=0.1,
        dropout_weight=0.1,
        lr=1e-3,
        l2=1.2e-6,
        clip=0.25 if wt2 else 0.2,
        chunk=200,
        jitter=True,
        e_base=5.0,
        dni_alpha=1.0,
    )


# ------------------------------------------------------------------------------- the command line


def flag(name):
    return "--" + name.replace("_", "-")


def expanded(text):
    """A path of the command line. ~ is home: no shell sees it in --out=~/runs."""
    return Path(os.path.expanduser(text))


def resume_flag(folder):
    """The flag that resumes the training in a folder, to be pasted into a shell."""
    name = str(folder)
    if name.startswith("-"):
        name = os.path.join(os.curdir, name)
    return f"--resume {shlex.quote(name)}"


def make_parser():
    """argparse's parser: a flag for each setting, and three of its own."""
    parser = argparse.ArgumentParser(
        "train.py",
        "train.py [FLAGS]",
        description='In brackets the default. "paper" and "code" say what the paper and its '
        "authors' code have.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--preset",
        choices=("small", "paper"),
        help="settings to start from; flags change them [small]",
    )
    parser.add_argument(
        "--out", type=expanded, help="folder for log.csv and checkpoint.pt [new, in trainings/]"
    )
    parser.add_argument(
        "--resume", type=expanded, help="go on with the training in this folder, or begin there"
    )
    for field in dataclasses.fields(Settings):
        kind = type(field.default)
        if kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            options = dict(type=float, nargs="*", metavar="X")
        elif kind is str:
            options = dict(choices=field.metadata["values"].split() or None)
        else:
            options = dict(type=kind, metavar="X")
        text = f"{field.metadata['text']} [{field.default}]".replace("%", "%%")
        parser.add_argument(flag(field.name), help=text, **options)
    return parser


def parse(argv):
    """Command line -> (settings, folder of the training, checkpoint to go on from or None)."""
    flags = vars(make_parser().parse_args(argv))
    preset_name = flags.pop("preset", None)
    out = flags.pop("out", None)
    resume = flags.pop("resume", None)
    for name, value in flags.items():
        if isinstance(value, list):
            flags[name] = tuple(value)
    # Folders of data are kept whole, to resume from anywhere.
    data = flags.get("data", "pydoc")
    if data not in CORPORA and expanded(data).is_dir():
        flags["data"] = str(expanded(data).resolve())
    if flags.get("data_dir"):
        flags["data_dir"] = str(expanded(flags["data_dir"]).resolve())
    check_folders(out, resume)

    old = {}
    checkpoint = None
    if resume and (resume / "checkpoint.pt").exists():
        checkpoint = load_checkpoint(resume / "checkpoint.pt")
        old = checkpoint["settings"]
    base = {**vars(Settings()), **old, **flags}
    start = preset(preset_name or "small", base["mode"], base["data"])
    given = flags
    if preset_name:  # its settings count as flags given
        given = {**vars(start), **flags}
    for name in old:
        if name in given and name not in MAY_CHANGE and old[name] != given[name]:
            raise UserError(
                f"{resume} holds a training with {flag(name)} {old[name]}, not {given[name]}"
            )
    settings = dataclasses.replace(start, **{**old, **given})
    check_ranges(settings)
    check_effects(settings, flags)
    when = time.strftime("%m%d-%H%M%S")
    new = f"{Path(settings.data).name}-{settings.mode}-{when}-{os.getpid()}"
    if resume and not checkpoint:
        note = f"no checkpoint in {resume}: a new training begins there"
        print(f"train.py: {note}", file=sys.stderr)
    return settings, resume or out or Path("trainings", new), checkpoint


def check_folders(out, resume):
    """Raise UserError where a folder is no folder, or holds something else than is asked for."""
    for name, folder in (("--out", out), ("--resume", resume)):
        if folder and folder.is_file():
            a_folder = "a folder"
            if name == "--resume":
                a_folder = f"its folder, {resume_flag(folder.parent)}"
            raise UserError(f"{name} {folder} is a file; give {a_folder}")
    if out and resume and out.resolve() != resume.resolve():
        raise UserError(
            "--out and --resume must name one folder: copy the old one, resume the copy"
        )
    if out and not resume:
        if (out / "log.csv").exists() or (out / "checkpoint.pt").exists():
            raise UserError(
                f"{out} already holds a training: go on with {resume_flag(out)}, "
                "or name another --out"
            )
    if resume and (resume / "log.csv").exists() and not (resume / "checkpoint.pt").exists():
        raise UserError(
            f"{resume} holds a log.csv without a checkpoint.pt: there is nothing to go on from; "
            "name another folder"
        )


LEAST = math.nextafter(0, 1)  # the smallest number above 0
FINITE = sys.float_info.max
RANGES = {  # both bounds are taken
    "at least 1": (1, FINITE),
    "0 or more": (0, FINITE),
    "above 0": (LEAST, FINITE),
    "above 0, or inf for none": (LEAST, math.inf),
    "in [0, 1)": (0, math.nextafter(1, 0)),
    "from 0 to 2^63 - 1": (0, 2**63 - 1),
}


def check_ranges(settings):
    """Raise UserError for a value out of its range."""
    for field in dataclasses.fields(settings):
        words = field.metadata["values"]
        if words not in RANGES:
            continue
        low, high = RANGES[words]
        value = getattr(settings, field.name)
        for x in value if isinstance(value, tuple) else (value,):
            if not low <= x <= high:
                finite = " and finite" if x == math.inf else ""
                raise UserError(f"{flag(field.name)} must be {words}{finite}, got {x}")
    eta_min = settings.eta_min
    eta_max = settings.eta_max or (settings.lr,)
    if not eta_min:
        raise UserError("--eta-min needs at least one number")
    for i in range(max(len(eta_min), len(eta_max))):
        if per_run(eta_min, i) > per_run(eta_max, i):
            raise UserError(
                f"--eta-min, {eta_min}, must be at most --eta-max, or else --lr, {eta_max}, "
                "in each run"
            )


def check_effects(settings, given):
    """Raise UserError for a setting that was given and has no effect beside the others."""
    sgdr = settings.mode in ("restart", "alternating")
    dni = with_dni(settings)
    neuron_wise = dni and settings.dni_kind == "neuron"
    warm_up = dni and settings.mode != "alternating"
    own_text = settings.data not in CORPORA
    files = settings.data in ("ptb", "ptb-chars", "wt2")
    for names, has_effect, needed in (
        ("gradient", settings.mode == "restart", "--mode restart"),
        ("lr", not (sgdr and settings.eta_max), "a training without --eta-max"),
        ("e_base mult eta_min eta_max", sgdr, "--mode restart or alternating"),
        ("dni_kind dni_alpha dni_lr", dni, "a mode with synthetic gradients"),
        ("dni_borders", neuron_wise, "the DNI of --dni-kind neuron"),
        ("dni_warmup", warm_up, "--mode dni or --gradient synthetic"),
        ("min_count", own_text, "a folder with your own text"),
        ("data_dir", files, "--data ptb, ptb-chars or wt2"),
    ):
        for name in names.split():
            if name in given and not has_effect:
                raise UserError(f"{flag(name)} has no effect here: it needs {needed}")


# ------------------------------------------------------------------------------------ a training

VALID_STREAMS = 10  # validation text is read as so many (authors' code), test text as one


def train(settings, folder, checkpoint, claim):
    """Train, and test the best model. Raises UserError, OSError and FloatingPointError.

    claim: makes the folder this training's own, see `surroundings`.
    """
    training = set_up(settings, folder, checkpoint, claim)
    for epoch in range(len(training.rows), settings.epochs):
        row = train_epoch(
            training.model,
            training.optimizer,
            training.schedule,
            training.dni,
            training.text,
            epoch,
            settings,
            training.autocast,
        )
        row |= validate(training, settings)
        training.rows.append(row)
        save(training, settings, folder)
        columns = [f"{name} {value}" for name, value in as_text(row).items()]
        print(start_of_line() + "  ".join(columns), flush=True)

    training.model.load_state_dict(training.best["model"])
    nll = evaluate(training.model, training.test, 1, training.autocast)
    print(*describe(training.corpus)[1:], sep="\n")
    print(f"bits per token {nll / math.log(2):.4f}")
    print(f"test perplexity {perplexity(nll):.2f}")


def validate(training, settings):
    """What a row says of validation text, {column: value}. The best model so far is kept.

    Raises FloatingPointError for a loss or a weight that is not finite.
    """
    model = training.model
    dni = training.dni
    nll = evaluate(model, training.valid, VALID_STREAMS, training.autocast)
    if not math.isfinite(nll) or not all(w.isfinite().all() for w in training.weights()):
        epoch = len(training.rows) + 1
        raise FloatingPointError(
            f"the validation loss or a weight is not finite after epoch {epoch}"
        )
    columns = {}
    if dni:
        columns |= measure(model, dni.g, training.valid, settings, training.autocast)
    columns["valid_perplexity"] = perplexity(nll)
    columns["seconds"] = time.monotonic() - training.began
    if nll < training.best["nll"]:
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        training.best = dict(nll=nll, model=weights)
    return columns


@dataclasses.dataclass
class Training:
    """What a training is made of."""

    corpus: Corpus
    text: tuple  # inputs and targets of the training text, (L, B) each
    valid: torch.Tensor  # validation text, (n,)
    test: torch.Tensor  # (n,)
    device: str
    autocast: torch.autocast
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    schedule: SGDR
    dni: Interface  # or None
    rows: list  # of log.csv, one an epoch: {column: value}
    best: dict  # of the epoch with the lowest validation loss: "nll", and "model", its weights
    began: float  # seconds, by a clock; a training that was resumed began earlier
    saved: float  # when the last checkpoint was made

    def networks(self):
        return [self.model, self.dni.g] if self.dni else [self.model]

    def weights(self):
        return [weight for network in self.networks() for weight in network.parameters()]

    def learners(self):
        """All that a checkpoint must have, in its order."""
        learners = [*self.networks(), self.optimizer, self.schedule]
        if self.dni:
            learners.append(self.dni.optimizer)
        return learners


def check_lengths(corpus, settings):
    """Raise UserError for a text that is too short to be read as streams."""
    B = settings.batch_size
    T = settings.chunk
    needs = {"train": (B * T, f"--batch-size {B} times --chunk {T}")}
    needs["valid"] = (VALID_STREAMS, f"{VALID_STREAMS} streams")
    if with_dni(settings) and B // 4 > VALID_STREAMS:  # see `measure`
        needs["valid"] = (B // 4, f"{B // 4} streams, a quarter of --batch-size {B}")
    needs["test"] = (1, "one stream")
    for split, (inputs, why) in needs.items():
        length = len(getattr(corpus, split))
        if length < inputs + 1:
            raise UserError(
                f"the {split} text has {length} tokens and needs {inputs + 1}: {why}, "
                "and a last target"
            )


def corpus_of(settings):
    """The Corpus that these settings name."""
    delay = settings.chunk + 10  # of the corpus recall: no chunk holds a symbol and its query
    return load_corpus(settings.data, settings.data_dir or None, delay, settings.min_count)


def set_up(settings, folder, checkpoint, claim):
    """A Training, new or as the checkpoint has it. Makes its folder, and prints its facts."""
    keep_freed_memory()
    device, autocast = pick_device(settings.device, settings.precision)
    corpus = corpus_of(settings)
    check_lengths(corpus, settings)
    text = streams(corpus.train.to(device), settings.batch_size, settings.chunk)
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder)
    model, optimizer, dni = build(settings, len(corpus.vocabulary), device)
    training = Training(
        corpus=corpus,
        text=text,
        valid=corpus.valid.to(device),
        test=corpus.test.to(device),
        device=device,
        autocast=autocast,
        model=model,
        optimizer=optimizer,
        schedule=make_schedule(settings, optimizer),
        dni=dni,
        rows=[],
        best=dict(nll=math.inf),
        began=0.0,
        saved=0.0,
    )
    seconds_before = 0.0
    if checkpoint:
        if checkpoint["fingerprint"] != corpus.fingerprint():
            raise UserError(f"{folder} was trained on another text than --data {settings.data}")
        try:
            for learner, learned in zip(training.learners(), checkpoint["learners"], strict=True):
                learner.load_state_dict(learned)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"the checkpoint in {folder} is of another version of train.py: its parts do not "
                f"fit ({type(error).__name__})"
            ) from None
        training.rows = checkpoint["rows"]
        training.best = checkpoint["best"]
        seconds_before = training.rows[-1]["seconds"]
        write_checkpoint(folder, checkpoint)  # so that log.csv has its rows
    if settings.compile:
        compile_modules(training.networks())
    with autocast:
        product = torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)
    parameters = sum(weight.numel() for weight in training.weights())
    print(*describe(corpus), sep="\n")
    print(
        f"{parameters:,} parameters; {product.dtype} products on {device}; "
        f"{torch.get_num_threads()} threads; in {folder}",
        flush=True,
    )
    training.began = time.monotonic() - seconds_before
    return training


def build(settings, vocabulary_size, device):
    """(model, optimizer, dni or None). The model's first weights are the same in every mode."""
    torch.manual_seed(settings.seed)
    model = LanguageModel(
        vocabulary_size,
        settings.embedding_size,
        settings.hidden_size,
        settings.num_layers,
        dropout_embedding=settings.dropout_embedding,
        dropout_input=settings.dropout_input,
        dropout_hidden=settings.dropout_hidden,
        dropout_output=settings.dropout_output,
        dropout_weight=settings.dropout_weight,
    ).to(device)
    optimizer = torch.optim.Adam(
        model.parameters(), settings.lr, weight_decay=settings.l2, fused=True
    )
    if not with_dni(settings):
        return model, optimizer, None
    sizes = [layer.hidden_size for layer in model.rnn.layers]
    if settings.dni_kind == "neuron":
        g = NeuronDNI()
    elif settings.dni_kind == "layer":
        g = LayerDNI(sizes)
    else:
        g = LayerDNI(sizes, hidden_size=0)  # one linear map a layer
    g_optimizer = torch.optim.Adam(g.to(device).parameters(), settings.dni_lr, fused=True)
    dni = Interface(g, g_optimizer, settings.dni_alpha, settings.dni_borders)
    return model, optimizer, dni


# -------------------------------------------------------------------------- what keeps a training
#
# A checkpoint is made between two epochs and nowhere else. There a training has no state, no memory
# h_g and no sum that is half done: an epoch begins without, and with random numbers of its own.


CHECKPOINT = ("settings", "vocabulary", "fingerprint", "rows", "best", "learners")


def load_checkpoint(path):
    """What `save` made. It is tensors and plain values: nothing in it can run code."""
    try:
        with open(path, "rb") as file:
            damaged = zipfile.ZipFile(file).testzip()  # torch.load compares no checksums
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if damaged or set(checkpoint) != set(CHECKPOINT):
            raise ValueError
        if set(checkpoint["settings"]) != set(vars(Settings())):
            raise ValueError
    except Exception as error:  # torch.load raises half a dozen kinds
        raise UserError(
            f"{path} cannot be read as a checkpoint: damaged, or of another version of train.py "
            f"({type(error).__name__})"
        ) from None
    return checkpoint


def save(training, settings, folder):
    """Make a checkpoint. On a GPU, whose epochs may last a second, once a minute and at the end."""
    now = time.monotonic()
    if training.device != "cpu" and len(training.rows) < settings.epochs:
        if now - training.saved < 60:
            return
    checkpoint = dict(
        settings=vars(settings),
        vocabulary=training.corpus.vocabulary,
        fingerprint=training.corpus.fingerprint(),
        rows=training.rows,
        best=training.best,
        learners=[learner.state_dict() for learner in training.learners()],
    )
    write_checkpoint(folder, checkpoint)
    training.saved = now


def write_checkpoint(folder, checkpoint):
    """Write checkpoint.pt beside the old one, and rename it when it is whole and on the disk.

    Then write log.csv.
    """
    partial = folder / "checkpoint.pt.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / "checkpoint.pt")
    finally:
        partial.unlink(missing_ok=True)  # give a full disk its room back
    rows = [as_text(row) for row in checkpoint["rows"]]
    lines = [",".join(rows[0])]
    for row in rows:
        lines.append(",".join(row.values()))
    (folder / "log.csv").write_text("\n".join(lines) + "\n")


# Decimals of the columns of log.csv.
DECIMALS = dict(
    train_perplexity=3,
    valid_perplexity=3,
    dni_cosine=5,
    dni_r2=5,
    dni_injected=6,
    dni_lost=6,
    seconds=1,
)


def as_text(row):
    """A row as log.csv and the screen have it, {column: text}."""
    text = {}
    for name, value in row.items():
        if name in DECIMALS:
            text[name] = str(round(value, DECIMALS[name]))
        elif name == "learning_rate":
            text[name] = f"{value:.5g}"
        else:
            text[name] = str(value)
    return text


class Progress:
    """One line on a terminal within an epoch: how far, how well, how long to go."""

    def __init__(self, epoch, epochs, length):
        self.epoch = epoch
        self.epochs = epochs
        self.length = length
        self.began = time.monotonic()
        self.shown = 0.0

    def show(self, stop, nll):
        """Print the line, at most twice a second: nll.item() makes a GPU wait."""
        if not start_of_line() or time.monotonic() - self.shown < 0.5:
            return
        self.shown = time.monotonic()
        done = stop / self.length  # epochs, since this one began
        seconds_an_epoch = (self.shown - self.began) / done
        minutes_left = seconds_an_epoch * (self.epochs - self.epoch - done) / 60
        print(
            f"{start_of_line()}epoch {self.epoch + done:.2f} of {self.epochs}, "
            f"perplexity {perplexity(nll.item()):.3f}, {minutes_left:.0f} min left",
            end="",
            flush=True,
        )


def start_of_line():
    """What takes the place of the progress line, on a terminal."""
    on_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it is closed
    return "\r\033[K" if on_terminal else ""


def pick_device(name, precision):
    """(device, torch.autocast) as asked.

    "auto" is a GPU where there is one, and bf16 where the device computes in it.
    """
    there = []
    if torch.cuda.is_available():
        there.append("cuda")
    if torch.backends.mps.is_available():
        there.append("mps")
    there.append("cpu")
    if name not in ("auto", *there):
        raise UserError(
            f"--device {name}: PyTorch sees no such device here; there is {', '.join(there)}"
        )
    device = there[0] if name == "auto" else name
    native = False
    if device == "cpu":
        can = torch.cpu.get_capabilities()
        native = any(can.get(x) for x in ("avx512_bf16", "amx_bf16", "bf16"))
    elif device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
        torch.set_float32_matmul_precision("high")  # TF32 in products not in bf16
    bf16 = native if precision == "auto" else precision == "bf16"
    return device, torch.autocast(device, torch.bfloat16, bf16)


def keep_freed_memory():
    """Ask glibc to keep the memory that a step frees.

    By default it gives large tensors back to the kernel. The kernel clears and maps their pages of
    4 KB one by one when the next step takes the same memory again.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every libc has it
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX


def compile_modules(modules):
    """Use torch.compile's form of the modules, for all T and B.

    Where there is no compiler, one line says so, and the plain form goes on.
    """
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except Exception as error:
        reason = repr(str(error)[:200])
        print(f"train.py: no --compile here, the plain form goes on: {reason}", file=sys.stderr)
        return
    for module in modules:
        module.compile(dynamic=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


def terminate(*_):
    raise Terminated


@contextlib.contextmanager
def surroundings():
    """Bear with what the program runs in, and leave it as it was. Yields claim(folder), a lock.

    Raises UserError under torchrun.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a training is one process, and torchrun starts more: use python train.py")
    with contextlib.ExitStack() as at_end:
        out = sys.stdout
        if isinstance(out, io.TextIOWrapper) and out.errors == "strict":
            # A letter that its encoding lacks is written as a number.
            at_end.callback(out.reconfigure, errors="strict")
            out.reconfigure(errors="backslashreplace")
        if threading.current_thread() is threading.main_thread():  # no other may catch signals
            before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
            at_end.callback(signal.signal, signal.SIGTERM, before)
            signal.signal(signal.SIGTERM, terminate)

        def claim(folder):
            """Lock the folder until the end, also the end by a kill: the lock is no file."""
            try:
                import fcntl
            except ImportError:  # Windows
                return
            number = os.open(folder, os.O_RDONLY)
            at_end.callback(os.close, number)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another training runs in {folder}") from None
            except OSError:  # a file system without locks
                pass

        yield claim


# How torch tells of too little room: memory of a GPU, of the machine, and room on the disk.
NO_ROOM = "out of memory|allocate memory|not enough memory|ALLOC_FAILED|inline_container"


def give_up_stdout():
    """If stdout takes no more, send the rest nowhere. Else Python complains of it when it ends."""
    if sys.stdout is None:  # it is closed
        return
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def fail(status, message):
    """Say in one line what went wrong. Returns the exit status."""
    give_up_stdout()
    end_of_progress = "\n" if start_of_line() else ""
    print(f"{end_of_progress}train.py: {message}", file=sys.stderr)
    return status


def main(argv=None):
    """Parse, train, and tell in one line what goes wrong. Returns the exit status."""
    folder = None
    try:
        with surroundings() as claim:
            settings, folder, checkpoint = parse(argv)
            train(settings, folder, checkpoint, claim)
    except (UserError, OSError) as error:
        return fail(2, f"error: {error}")
    except FloatingPointError as error:
        return fail(1, f"stopped: {error}; try a lower --lr or --dni-alpha; {folder} is unspoilt")
    except KeyboardInterrupt as interrupt:
        number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
        if folder is None:
            return fail(128 + number, "interrupted before it began")
        return fail(
            128 + number,
            f"interrupted; the same command with {resume_flag(folder)} goes on after the last "
            "whole epoch",
        )
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not re.search(NO_ROOM, str(error)):
            raise
        return fail(2, f"error: no memory, or no disk, left ({str(error)[:120]!r})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
