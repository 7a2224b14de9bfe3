"""Train the QRNN language model with real gradients, synthetic ones, or both in turn.

Paper: Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language Modeling". Numbers in
brackets are its sections, or those of AWD (arXiv 1708.02182) and DNI (1608.05343). The "authors' code" was
published with it; departures from both are numbered as in experiments/departures.md.

Why alternate? Others found, says the paper, that synthetic and real gradients lead to different
representations. It hopes that by alternating them the optimiser sees more of the loss, and that a restart of
the learning rate at each change lets it leave a minimum for a better one (1, 2.3). Two things depend on the
mode:

    mode           what a chunk learns from the chunks after it             learning rate
    bptt           nothing: truncated backpropagation through time          constant
    dni            a synthetic gradient at its last state, after a warm-up  constant
    restart        nothing; with --gradient synthetic, as in mode dni       SGDR
    alternating    nothing in even runs, synthetic in odd ones              SGDR; they switch at a restart

Glossary
    chunk      (T, B) twice   inputs and targets, T steps of B streams; a border lies between two chunks
    state      [(c, x_prev)]  what crosses border k: of each layer c (B, H) and x_prev; s_k is its c's alone
    dni        g, h_g         the interface of dni.py: a network g and its memory h_g
    run        i              of SGDR: from one restart of the learning rate to the next

Not here: fine-tuning, dynamic evaluation, several processes, checkpoints within an epoch.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import math
import os
import random
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch

from data import CORPORA, UserError, describe, load_corpus, streams
from dni import Interface, LayerDNI, NeuronDNI, agreement
from qrnn import LanguageModel
from sgdr import SGDR, per_run


# ------------------------------------------------------------------------------------- what the mode decides


def with_dni(settings):
    """Whether these settings need an interface at all."""
    dni_restart = settings.mode == "restart" and settings.gradient == "synthetic"
    return dni_restart or settings.mode in ("dni", "alternating")


def gradient_at(settings, run, epoch):
    """'synthetic' where g's gradient crosses the border ahead, 'real' where none does. run: of SGDR. epoch:
    how many have passed, a fraction. (In real chunks g learns from their T steps alone: departure 21.)"""
    if settings.mode == "alternating":  # run by run (2.3, 3.2)
        return "real" if run % 2 == 0 else "synthetic"
    return "synthetic" if with_dni(settings) and epoch >= settings.dni_warmup else "real"


def make_schedule(settings, optimizer):
    """SGDR; in the modes with a constant rate it is one run without end, whose rate never falls."""
    if settings.mode in ("bptt", "dni"):
        return SGDR(optimizer, math.inf)
    return SGDR(
        optimizer, settings.e_base, settings.mult, settings.eta_min, settings.eta_max or None
    )


# ------------------------------------------------------------------------- one step, an epoch, an evaluation


def detach_state(state):
    """A copy of the state to begin a chunk with: same values, no history; the c's collect a gradient."""
    return [(c.detach().clone().requires_grad_(), x_prev.detach().clone()) for c, x_prev in state]


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
    """Learn from one chunk (2.1 and 2.2). Returns its mean nll, and the state that the next one begins with.

    dni: an Interface, or None where there is no g.
    inputs, targets: (T, B) of int64.
    state: from `detach_state`, or None where a text begins.
    synthetic: whether g's gradient crosses the border ahead.
    clip: the largest norm of the model's gradient.
    autocast: a torch.autocast for the matrix products.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast:
        # 1. Forward: chunk k, from s_k to s_{k+1}. L_k is the loss with its penalties (departure 20).
        nll, penalty, new_state = model(inputs, targets, state)
        loss = nll + penalty

        # 2. Synthesise: ask g for δ^_k, to be corrected in 4, and in synthetic chunks for δ^_{k+1}. The
        #    loss then gets a term whose derivative in s_{k+1} is α δ^_{k+1} / (T B).
        if dni:
            s = None if state is None else [c for c, _ in state]
            loss = loss + dni.credit(s, [c for c, _ in new_state], inputs.numel(), synthetic)

    # 3. Backward: θ gets dL_k/dθ + (ds_{k+1}/dθ)ᵀ α δ^_{k+1} / (T B), and s_k.grad target_k / (T B).
    #    These are the two lines of dni.py, divided by T B.
    loss.backward()

    # 4. Regress: a step of Adam for φ, on the mean of (δ^_k - target_k)².
    if dni:
        dni.learn()

    # 5. Update θ.
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return nll.detach(), detach_state(new_state)


def chunk_borders(length, settings, epoch=0):
    """Yield (start, stop) of the chunks of `length` steps. Jitter depends on seed and epoch alone."""
    draw, start = random.Random(f"{settings.seed} {epoch}"), 0
    while start < length:
        steps = settings.chunk
        if settings.jitter:  # AWD 4.1 (departure 13)
            steps = max(5, int(draw.gauss(steps if draw.random() < 0.95 else steps / 2, 5)))
        yield start, min(start + steps, length)
        start += steps


def train_epoch(
    model, optimizer, schedule, dni, text, epoch, settings, autocast=contextlib.nullcontext()
):
    """One pass over the training text. Returns what a row of log.csv says of it, {column: value}: the
    perplexity of all chunks, and the run, the kind of gradient and the learning rate at the end.

    text: inputs and targets, (L, B) each. No chunk follows the last one, so nothing is injected there.
    epoch: how many are done.
    Raises FloatingPointError for a loss that is not finite: on a CPU at once, elsewhere at the end.
    """
    # The random numbers of an epoch depend on the seed and the epoch alone: so a training can be resumed.
    torch.manual_seed(random.Random(f"{settings.seed} {epoch}").getrandbits(63))
    (inputs, targets), length = text, text[0].shape[0]
    state, losses, began, looked, ask = None, [], time.monotonic(), 0.0, None
    model.train()
    if dni:
        dni.reset()
    for start, stop in chunk_borders(length, settings, epoch):
        now = epoch + start / length  # in epochs
        schedule.step(now)
        run, [rate] = schedule.run.index, schedule.get_last_lr()
        share = (stop - start) / settings.chunk if settings.jitter else 1  # AWD 4.1
        optimizer.param_groups[0]["lr"] = rate * share
        source = gradient_at(settings, run, now)
        synthetic = source == "synthetic" and stop < length
        nll, state = train_step(
            model,
            optimizer,
            dni,
            inputs[start:stop],
            targets[start:stop],
            state,
            synthetic,
            settings.clip,
            autocast,
        )
        losses.append(nll * (stop - start))  # stays on the device
        if nll.device.type == "cpu" and not math.isfinite(nll):
            break
        if sys.stdout.isatty() and time.monotonic() - looked > 0.5:  # progress, twice a second
            looked, ask = time.monotonic(), ask or fetch(nll)
            if (value := ask()) is not None:
                left = (looked - began) * (length / stop * (settings.epochs - epoch) - 1) / 60
                print(
                    f"\r\033[Kepoch {epoch + stop / length:.2f} of {settings.epochs}, perplexity "
                    f"{perplexity(value)}, {left:.0f} min left",
                    end="",
                    flush=True,
                )
                ask = None
    nll = (sum(losses) / stop).item()
    if not math.isfinite(nll):
        raise FloatingPointError(
            f"the loss is not finite at step {stop} of {length} in epoch {epoch + 1} "
            f"({source} gradients, run {run}, rate {rate:.2e})"
        )
    return dict(
        epoch=epoch + 1,
        run=run,
        gradient=source,
        learning_rate=float(f"{rate:.4e}"),
        train_perplexity=perplexity(nll),
    )


def fetch(loss):
    """A function that gives the loss as a number, or None while a GPU is still behind. (.item() waits.)"""
    copy, event = (
        loss.to("cpu", non_blocking=loss.is_cuda),
        torch.cuda.Event() if loss.is_cuda else None,
    )
    if event:
        event.record()
    return lambda: copy.item() if event is None or event.query() else None


@torch.no_grad()
def evaluate(model, tokens, batch_size, autocast=contextlib.nullcontext(), chunk=200):
    """Mean nll in nats of a text, tokens (n,), as streams: state carried, no dropout. (Departure 16.)"""
    was_training, losses, state = model.training, [], None
    model.eval()
    inputs, targets = streams(tokens, batch_size)
    for x, y in zip(inputs.split(chunk), targets.split(chunk)):
        with autocast:
            nll, _, state = model.forward(x, y, state)  # (model(..) may be a compiled form)
        losses.append(nll * len(x))
    model.train(was_training)
    return (sum(losses) / len(inputs)).item()


def true_agreement(model, g, tokens, settings, autocast=contextlib.nullcontext()):
    """Cosine and R² of g's predictions with the true gradients of validation text, tokens (n,).

    Four chunks, of a quarter of the streams, are read in one graph without dropout: about a step's work.
    """
    inputs, targets = streams(tokens, max(1, settings.batch_size // 4))
    steps, states, losses, state = max(1, min(settings.chunk, len(inputs) // 4)), [], [], None
    model.eval()
    for x, y in list(zip(inputs.split(steps), targets.split(steps)))[:4]:
        with autocast:
            nll, _, state = model.forward(x, y, state)
        losses.append(nll)
        states.append([c for c, _ in state])
    return agreement(g, states[:-1], losses, steps * inputs.shape[1])


def perplexity(nll):
    """exp(nll), at most exp(700), to three decimals."""
    return round(math.exp(min(nll, 700.0)), 3)


# --------------------------------------------------------------------------------------------------- settings


def setting(default, text, values=""):
    """A field of Settings. text: help, with unit and source. values: its names, or a range in words."""
    return dataclasses.field(default=default, metadata=dict(text=text, values=values))


# fmt: off
@dataclasses.dataclass(frozen=True)
class Settings:
    mode: str = setting("alternating", "gradients and rate", "bptt dni restart alternating")
    data: str = setting("pydoc", f"{', '.join(CORPORA)}, or a folder of train.txt, valid.txt, test.txt")
    min_count: int = setting(1, "words that your own train.txt has less often are <unk>", "at least 1")
    gradient: str = setting("real", "of mode restart: as in bptt, or as in dni (Table 2)", "real synthetic")
    epochs: int = setting(15, "passes over the training text; the paper: 320 (3.2)", "at least 1")
    seed: int = setting(42, "of all random numbers (authors' code)", "from 0 to 2^63 - 1")
    embedding_size: int = setting(256, "E, and the size of the last layer; authors' code: 400", "at least 1")
    hidden_size: int = setting(512, "H of the other layers; the paper: 1550 (3)", "at least 1")
    num_layers: int = setting(2, "QRNN layers; the paper: 4 (3)", "at least 1")
    dropout_output: float = setting(0.3, "on the last output, locked; authors' code: 0.4", "in [0, 1)")
    dropout_hidden: float = setting(0.1, "between layers, locked; authors' code: 0.3, WT2 0.2", "in [0, 1)")
    dropout_input: float = setting(0.1, "on embedded words, locked; authors' code: 0.4", "in [0, 1)")
    dropout_embedding: float = setting(0.0, "of whole words; authors' code: 0.1 (AWD 4.3)", "in [0, 1)")
    dropout_weight: float = setting(0.0, "on the gates' weights; authors' code: 0.1 (AWD 2)", "in [0, 1)")
    lr: float = setting(1e-2, "Adam's rate; with restarts a run's first; authors' code: 1e-3", "above 0")
    l2: float = setting(5e-6, "weight decay added to the gradient; authors' code: 1.2e-6", "0 or more")
    clip: float = setting(0.25, "largest norm of the gradient; authors' code: 0.2, WT2 0.25", "above 0")
    batch_size: int = setting(20, "B, parallel streams of training text (authors' code)", "at least 1")
    chunk: int = setting(70, "T, steps of a chunk; the paper: 200 (3)", "at least 1")
    jitter: bool = setting(False, "T from N(chunk, 5), 1 in 20 N(chunk/2, 5), the rate to scale (AWD 4.1)")
    e_base: float = setting(5.0, "E_base, epochs of run 0 (3.2)", "above 0")
    mult: float = setting(2.0, "run i lasts mult^i E_base epochs (3.2); authors' README also: 1", "at least 1")
    eta_min: tuple = setting((0.0,), "rate at a run's end, one for all or one a run (2.1)", "0 or more")
    eta_max: tuple = setting((), "rate at a run's beginning; none: lr (2.1)", "above 0")
    dni_kind: str = setting("neuron", "neuron-wise (2.2), layer-wise (DNI), a matrix", "neuron layer linear")
    dni_alpha: float = setting(0.9, "discount α; the paper: 1, authors' code: 0.1", "0 or more")
    dni_lr: float = setting(1e-4, "Adam's rate for g (text.py); authors' code: 1e-3", "above 0")
    dni_borders: int = setting(1, "borders through which g's error goes back", "at least 1")
    dni_warmup: float = setting(1.0, "epochs in which g learns, unused (authors' code)", "0 or more")
    device: str = setting("auto", "where to compute", "auto cpu cuda mps")
    precision: str = setting("auto", "of products; auto: bf16 where it is native", "auto fp32 bf16")
    compile: bool = setting(False, "torch.compile: the same numbers to rounding, faster after a minute")
    data_dir: str = setting("", "folder of PTB and WT2; default $QRNN_DATA, else corpora/")
# fmt: on


# When a training is resumed. (A corpus is known by its words, not by its place.)
MAY_CHANGE = ("epochs", "data", "device", "precision", "compile", "data_dir")


def preset(name, mode, data):
    """The settings that flags are put on: 'small', for two CPU cores, or 'paper', for a GPU."""
    if name == "small":
        return Settings(mode=mode, data=data, lr=4e-3 if mode in ("bptt", "dni") else 1e-2)
    return Settings(
        mode=mode,
        data=data,
        epochs=320,
        embedding_size=400,
        hidden_size=1550,
        num_layers=4,
        dropout_output=0.4,
        dropout_hidden=0.2 if data == "wt2" else 0.3,
        dropout_input=0.4,
        dropout_embedding=0.1,
        dropout_weight=0.1,
        lr=1e-3,
        l2=1.2e-6,
        clip=0.25 if data == "wt2" else 0.2,
        chunk=200,
        jitter=True,
        dni_alpha=1.0,
    )


def flag(name):
    return "--" + name.replace("_", "-")


def check(settings, given):
    """Raise UserError for what cannot be, and for a setting given that has no effect beside the others."""
    ranges = {
        "at least 1": (1, math.inf),
        "0 or more": (0, math.inf),
        "above 0": (5e-324, math.inf),
        "in [0, 1)": (0, 1),
        "from 0 to 2^63 - 1": (0, 2**63),
    }
    for field in dataclasses.fields(settings):
        value, words = getattr(settings, field.name), field.metadata["values"]
        for x in value if isinstance(value, tuple) else (value,):
            if words in ranges and not ranges[words][0] <= x < ranges[words][1]:
                raise UserError(f"{flag(field.name)} must be {words}, got {x}")
    low, high = settings.eta_min, settings.eta_max or (settings.lr,)
    if not low or any(per_run(low, i) > per_run(high, i) for i in range(max(len(low), len(high)))):
        raise UserError(
            f"--eta-min, {low}, must be at most --eta-max, or else --lr, {high}, in each run"
        )
    sgdr, dni = settings.mode in ("restart", "alternating"), with_dni(settings)
    for names, has_effect, needed in (
        ("gradient", settings.mode == "restart", "--mode restart"),
        ("lr", not (sgdr and settings.eta_max), "a training without --eta-max"),
        ("e_base mult eta_min eta_max", sgdr, "--mode restart or alternating"),
        ("dni_kind dni_alpha dni_lr", dni, "a mode with synthetic gradients"),
        ("dni_borders", dni and settings.dni_kind == "neuron", "the DNI of --dni-kind neuron"),
        (
            "dni_warmup",
            dni and settings.mode != "alternating",
            "--mode dni or --gradient synthetic",
        ),
        ("min_count", settings.data not in CORPORA, "a folder with your own text"),
        ("data_dir", settings.data in ("ptb", "ptb-chars", "wt2"), "--data ptb, ptb-chars or wt2"),
    ):
        for name in set(names.split()) & set(given):
            if not has_effect:
                raise UserError(f"{flag(name)} has no effect here: it needs {needed}")


def parse(argv):
    """Command line -> (settings, folder of the training, checkpoint there to go on from or None)."""
    parser = argparse.ArgumentParser(
        "train.py", "train.py [FLAGS]", argument_default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--preset", choices=("small", "paper"), help="settings that flags are put on [small]"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for log.csv and checkpoint.pt [new, in trainings/]"
    )
    parser.add_argument(
        "--resume", type=Path, help="go on with the training in this folder, or begin there"
    )
    for field in dataclasses.fields(Settings):
        kind, values = type(field.default), field.metadata["values"]
        options = {
            bool: dict(action=argparse.BooleanOptionalAction),
            tuple: dict(type=float, nargs="*", metavar="X"),
            str: dict(choices=values.split() or None),
        }.get(kind, dict(type=kind, metavar="X"))
        text = f"{field.metadata['text']} [{field.default}]".replace("%", "%%")
        parser.add_argument(flag(field.name), help=text, **options)
    flags = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(argv)).items()
    }
    preset_name, out, resume = (flags.pop(name, None) for name in ("preset", "out", "resume"))
    if flags.get("data", "pydoc") not in CORPORA and Path(flags["data"]).is_dir():
        flags["data"] = str(Path(flags["data"]).resolve())  # to resume from anywhere
    if out and resume and out.resolve() != resume.resolve():
        raise UserError(
            "--out and --resume must name one folder: copy the old one and resume the copy"
        )
    if out and not resume and any((out / name).exists() for name in ("log.csv", "checkpoint.pt")):
        raise UserError(
            f"{out} already holds a training: go on with --resume {out}, or name another --out"
        )
    old, checkpoint = {}, None
    if resume and (resume / "checkpoint.pt").exists():
        checkpoint = load_checkpoint(resume / "checkpoint.pt")
        old = checkpoint["settings"]
    base = {**vars(Settings()), **old, **flags}
    start = preset(preset_name or "small", base["mode"], base["data"])
    given = (
        {**vars(start), **flags} if preset_name else flags
    )  # a preset given counts as flags given
    for name in set(old) & set(given) - set(MAY_CHANGE):
        if old[name] != given[name]:
            raise UserError(
                f"{resume} holds a training with {flag(name)} {old[name]}, not {given[name]}"
            )
    settings = dataclasses.replace(start, **{**old, **given})
    check(settings, flags)
    new = f"{Path(settings.data).name}-{settings.mode}-{time.strftime('%m%d-%H%M%S')}-{os.getpid()}"
    return settings, resume or out or Path("trainings", new), checkpoint


# ------------------------------------------------------------------------------------ what keeps a training

# A checkpoint is made between two epochs and nowhere else. There a training has no state, no memory h_g and
# no sum that is half done: an epoch begins without, and with random numbers of its own.


def load_checkpoint(path):
    """What `save_checkpoint` wrote: tensors and plain values, for nothing in the file can run code."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load compares no checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if damaged or set(checkpoint["settings"]) != set(vars(Settings())):
            raise ValueError
    except Exception as error:  # torch.load raises half a dozen kinds
        raise UserError(
            f"{path} cannot be read as a checkpoint: damaged, or of another version of train.py "
            f"({type(error).__name__})"
        ) from None
    return checkpoint


def save_checkpoint(folder, checkpoint):
    """Write checkpoint.pt beside the old one and rename it when it is whole and on the disk. Then log.csv."""
    partial, rows = folder / "checkpoint.pt.partial", checkpoint["rows"]
    try:
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / "checkpoint.pt")
    finally:
        partial.unlink(missing_ok=True)  # give a full disk its room back
    lines = [",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows))]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")


def pick_device(name, precision):
    """(device, torch.autocast) as asked; "auto" is a GPU where there is one, and bf16 where it is native."""
    there = (
        ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    )
    if name not in ("auto", *there):
        raise UserError(
            f"--device {name}: PyTorch sees no such device here; there is {', '.join(there)}"
        )
    device, native = there[0] if name == "auto" else name, False
    if device == "cpu":
        native = any(
            torch.cpu.get_capabilities().get(x) for x in ("avx512_bf16", "amx_bf16", "bf16")
        )
    elif device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
        torch.set_float32_matmul_precision("high")  # TF32 in products not in bf16
    bf16 = native if precision == "auto" else precision == "bf16"
    return device, torch.autocast(device, torch.bfloat16, bf16)


def keep_freed_memory():
    """Ask glibc to keep the memory that a step frees. As it comes, large tensors go back to the kernel, which
    clears and maps their pages of 4 KB one by one when the next step takes the same memory again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
            mallopt(parameter, value)


def compile_modules(modules):
    """Train with torch.compile's form of them, for all T and B. Where no compiler is, say so, and do not."""
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except Exception as error:
        print(
            f"train.py: no --compile here, the plain form goes on: {str(error)[:200]!r}",
            file=sys.stderr,
        )
        return
    for module in modules:
        module.compile(dynamic=True)


def build(settings, vocabulary_size, device):
    """Everything that learns, (model, optimizer, dni or None), with the same first model in every mode."""
    torch.manual_seed(settings.seed)
    dropouts = {name: value for name, value in vars(settings).items() if name.startswith("dropout")}
    model = LanguageModel(
        vocabulary_size,
        settings.embedding_size,
        settings.hidden_size,
        settings.num_layers,
        **dropouts,
    ).to(device)
    optimizer = torch.optim.Adam(
        model.parameters(), settings.lr, weight_decay=settings.l2, fused=True
    )
    if not with_dni(settings):
        return model, optimizer, None
    g, sizes = NeuronDNI(), [layer.hidden_size for layer in model.rnn.layers]
    if settings.dni_kind != "neuron":
        g = LayerDNI(sizes, hidden_size=50 if settings.dni_kind == "layer" else 0)
    g_optimizer = torch.optim.Adam(g.to(device).parameters(), settings.dni_lr, fused=True)
    return model, optimizer, Interface(g, g_optimizer, settings.dni_alpha, settings.dni_borders)


def train(settings, folder, checkpoint):
    """Train, and test the best model. Raises UserError, OSError and FloatingPointError."""
    keep_freed_memory()
    device, autocast = pick_device(settings.device, settings.precision)
    corpus = load_corpus(
        settings.data, settings.data_dir or None, settings.chunk + 10, settings.min_count
    )
    text = streams(corpus.train.to(device), settings.batch_size, settings.chunk)  # (L, B) twice
    valid_tokens, test_tokens, valid_batch_size = (
        corpus.valid.to(device),
        corpus.test.to(device),
        10,
    )
    streams(valid_tokens, valid_batch_size)  # raises where there is too little
    folder.mkdir(parents=True, exist_ok=True)
    model, optimizer, dni = build(settings, len(corpus.vocabulary), device)
    schedule, rows, best = make_schedule(settings, optimizer), [], dict(nll=math.inf)
    networks = [model] + ([dni.g] if dni else [])
    learners = [*networks, optimizer, schedule] + ([dni.optimizer] if dni else [])
    if checkpoint:
        if checkpoint["fingerprint"] != corpus.fingerprint():
            raise UserError(f"{folder} was trained on another text than --data {settings.data}")
        rows, best = checkpoint["rows"], checkpoint["best"]
        for learner, learned in zip(learners, checkpoint["learners"], strict=True):
            learner.load_state_dict(learned)
        save_checkpoint(folder, checkpoint)  # so that log.csv has its rows
    if settings.compile:
        compile_modules(networks)
    weights = [weight for network in networks for weight in network.parameters()]
    with autocast:
        product = (torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)).dtype
    print(
        *describe(corpus),
        f"{sum(weight.numel() for weight in weights):,} parameters; {product} products "
        f"on {device}; {torch.get_num_threads()} threads; in {folder}",
        sep="\n",
        flush=True,
    )

    began, saved = time.monotonic() - (rows[-1]["seconds"] if rows else 0), 0.0
    for epoch in range(len(rows), settings.epochs):
        row = train_epoch(model, optimizer, schedule, dni, text, epoch, settings, autocast)
        nll = evaluate(model, valid_tokens, valid_batch_size, autocast)
        if not math.isfinite(nll) or not all(weight.isfinite().all() for weight in weights):
            raise FloatingPointError(
                f"the validation loss or a weight is not finite after epoch {epoch + 1}"
            )
        seconds = round(time.monotonic() - began, 1)
        cosine, r2 = (
            true_agreement(model, dni.g, valid_tokens, settings, autocast)
            if dni
            else [math.nan] * 2
        )
        rows.append(
            {
                **row,
                "dni_cosine": round(cosine, 5),
                "dni_r2": round(r2, 5),
                "valid_perplexity": perplexity(nll),
                "seconds": seconds,
            }
        )
        if nll < best["nll"]:
            best = dict(
                nll=nll, model={name: weight.clone() for name, weight in model.state_dict().items()}
            )
        if device == "cpu" or time.monotonic() - saved > 60 or len(rows) == settings.epochs:
            save_checkpoint(
                folder,
                dict(
                    settings=vars(settings),
                    vocabulary=corpus.vocabulary,
                    fingerprint=corpus.fingerprint(),
                    rows=rows,
                    best=best,
                    learners=[learner.state_dict() for learner in learners],
                ),
            )
            saved = time.monotonic()  # (a GPU's epoch may last a second)
        line = "  ".join(f"{name} {value}" for name, value in rows[-1].items() if value == value)
        print(("\r\033[K" if sys.stdout.isatty() else "") + line, flush=True)
    model.load_state_dict(best["model"])
    nll = evaluate(model, test_tokens, 1, autocast)
    print(
        *describe(corpus)[1:],
        f"bits per token {nll / math.log(2):.4f}",
        f"test perplexity {perplexity(nll):.2f}",
        sep="\n",
    )


def main(argv=None):
    """Parse, train, and tell in one line what goes wrong. Returns the exit status."""

    def terminate(*_):
        raise KeyboardInterrupt(signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    folder = None
    try:
        settings, folder, checkpoint = parse(argv)
        train(settings, folder, checkpoint)
        return 0
    except (UserError, OSError) as error:
        message, status = f"error: {error}", 2
    except FloatingPointError as error:
        message, status = (
            f"stopped: {error}; try a lower --lr or --dni-alpha; {folder} is unspoilt",
            1,
        )
    except KeyboardInterrupt as interrupt:
        message = f"interrupted; the same command with --resume {folder} goes on after the last whole epoch"
        status = 128 + (interrupt.args or (signal.SIGINT,))[0]
    except RuntimeError as error:  # how torch tells of too little room
        if "memory" not in str(error) and "inline_container" not in str(error):
            raise
        message, status = f"error: no memory, or no disk, left ({str(error)[:120]!r})", 2
    print("\n" * sys.stdout.isatty() + f"train.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
