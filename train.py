"""Train the QRNN language model with real gradients, synthetic ones, or both in turn.

Paper
    Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language Modeling". A source in the settings
    below is a section of that paper, or of AWD (arXiv 1708.02182), QRNN (1611.01576), DNI (1608.05343), SGDR (1608.03983),
    or "authors' code" where the code published with the paper differs from its text.

The four modes decide two things only, and both in `gradient_source` and `make_schedule` below:

    mode           what crosses the border between two chunks            learning rate
    bptt           nothing: truncated backpropagation through time       constant
    dni            synthetic gradients, after a warm-up                  constant
    restart        nothing, or synthetic with --gradient synthetic       SGDR
    alternating    nothing in even runs, synthetic in odd ones           SGDR, the switch falls on a restart
                   (the other way round with --first synthetic)

Glossary
    name       symbol     shape          meaning
    chunk      -          (T, B) twice   inputs and targets, T steps of B streams
    state      s_k        a pair a layer the QRNN's state on entering chunk k; its c's are leaves that require grad
    memory     h_g        ((N, 50), ..)  the DNI's own state, zero at the beginning of an epoch as s_0 is
    predicted  delta^_k   as s_k         what g says the gradient of s_k will be
    target     delta_k    as s_k         what it turned out to be, bootstrapped
    run        i          -              between two restarts

Not here: parameters divided among processes, mixed-precision loss scaling, fine-tuning after training, dynamic evaluation.

Run `python train.py` with no argument for the small alternating run on the corpus built into Python, or
`torchrun --nproc-per-node N train.py` to divide the B streams among N processes.
"""

import argparse
import atexit
import contextlib
import csv
import ctypes
import dataclasses
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

if os.name == "posix":
    import fcntl
else:
    import msvcrt

from data import CorpusError, load_corpus, streams, unigram_perplexity
from dni import Agreement, LayerDNI, NeuronDNI, inject, regress
from qrnn import LanguageModel
from sgdr import SGDR, per_run

# ----------------------------------------------------------------------------------------------------------- settings


def setting(default, text, valid=None, where=None, choices=None, may_change=False):
    """A field of Settings. valid: which values can be; where: in which settings it has an effect, else everywhere; both as
    (test, words). may_change: whether a resumed run may have another value."""
    return dataclasses.field(default=default, metadata=dict(help=text, valid=valid, where=where, choices=choices, may_change=may_change))


AT_LEAST_1 = (lambda x: x >= 1, "at least 1")
NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "0 or more")
POSITIVE = (lambda x: 0 < x < math.inf, "above 0")
PROBABILITY = (lambda x: 0 <= x < 1, "in [0, 1)")
RATES = (lambda xs: all(0 <= x < math.inf for x in xs), "0 or more")


def uses_synthetic(s):
    """Whether these settings need an interface at all."""
    return s.mode in ("dni", "alternating") or (s.mode == "restart" and s.gradient == "synthetic")


SGDR_MODES = ("restart", "alternating")
IN_SGDR = (lambda s: s.mode in SGDR_MODES, "--mode restart or alternating")
WITH_DNI = (uses_synthetic, "--mode dni, alternating, or restart --gradient synthetic")
WITH_NEURON_DNI = (lambda s: uses_synthetic(s) and s.dni == "neuron", f"--dni neuron, in {WITH_DNI[1]}")
IN_RECALL = (lambda s: s.data == "recall", "--data recall")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting, with its unit and source; the defaults are the preset `small`, sized for two CPU cores."""
    mode: str = setting("alternating", "which gradients, which learning rate", choices=("bptt", "dni", "restart", "alternating"))
    data: str = setting("pydoc", "corpus: pydoc, ptb, wt2, recall, or a folder with train.txt, valid.txt, test.txt")
    gradient: str = setting("real", "gradients across borders in mode restart (paper, Table 2)", choices=("real", "synthetic"),
                            where=(lambda s: s.mode == "restart", "--mode restart"))
    first: str = setting("real", "what run 0 of mode alternating is (2.1); authors' WT2 commands: synthetic", choices=("real", "synthetic"),
                         where=(lambda s: s.mode == "alternating", "--mode alternating"))
    dni: str = setting("neuron", "interface: neuron-wise (2.2), or layer-wise (DNI) as a control", where=WITH_DNI, choices=("neuron", "layer"))
    epochs: int = setting(15, "passes over the training text; the paper: 320", AT_LEAST_1, may_change=True)
    seed: int = setting(42, "of all random numbers (authors' code)", (lambda x: 0 <= x < 2 ** 63, "a whole number from 0 to 2^63 - 1"))
    # model
    embedding_size: int = setting(256, "E, also the size of the last layer; the paper: 400 (AWD)", AT_LEAST_1)
    hidden_size: int = setting(512, "H of the other layers; the paper: 1550 (3)", AT_LEAST_1)
    num_layers: int = setting(2, "QRNN layers; the paper: 4 (3)", AT_LEAST_1)
    window: int = setting(2, "words the first QRNN layer sees, the others see 1 (AWD's QRNN)", AT_LEAST_1)
    dropout_output: float = setting(0.4, "on the last layer's output, locked over time; the paper: 0.4 (AWD 4.2)", PROBABILITY)
    dropout_hidden: float = setting(0.2, "between layers, locked; the paper: 0.3 on PTB, 0.2 on WT2 (AWD 4.2)", PROBABILITY)
    dropout_input: float = setting(0.2, "on the embedded words, locked; the paper: 0.4 (AWD 4.2)", PROBABILITY)
    dropout_embedding: float = setting(0.0, "of whole words from the embedding; the paper: 0.1 (AWD 4.3)", PROBABILITY)
    dropout_weight: float = setting(0.0, "on the gates' weights; the paper: 0.1 (AWD 2)", PROBABILITY)
    zoneout: float = setting(0.0, "probability that a neuron keeps its value (QRNN 2.1)", PROBABILITY)
    activation: float = setting(2.0, "weight of activation regularisation, alpha in AWD 4.6", NOT_NEGATIVE)
    temporal: float = setting(1.0, "weight of temporal activation regularisation, beta in AWD 4.6", NOT_NEGATIVE)
    # optimisation
    lr: float = setting(3e-3, "Adam's learning rate; with restarts, the one each run begins with; the paper: 1e-3 (3)", POSITIVE,
                        (lambda s: s.mode not in SGDR_MODES or not s.eta_max, "no --eta-max"))
    l2: float = setting(1.2e-6, "weight decay added to the gradient (AWD's code)", NOT_NEGATIVE)
    clip: float = setting(0.25, "largest norm of the model's gradient; the paper: 0.2 on PTB, 0.25 on WT2", (lambda x: x > 0, "above 0"))
    batch_size: int = setting(20, "B, parallel streams of training text (3)", AT_LEAST_1)
    bptt: int = setting(70, "T, steps of a chunk; the paper: 200 (3)", AT_LEAST_1)
    jitter: bool = setting(False, "draw T from N(bptt, 5), with probability 0.05 N(bptt/2, 5), and scale the rate by T/bptt "
                                  "(AWD 4.1, authors' code); on in preset paper")
    # restarts
    e_base: float = setting(1.0, "E_base, epochs of run 0; run i lasts 2^i times as long (2.1); the paper: 5",
                            (lambda x: 1e-6 <= x < math.inf, "at least 1e-6"),
                            (lambda s: s.mode in SGDR_MODES and not s.restarts, f"{IN_SGDR[1]}, without --restarts"))
    restarts: tuple[float, ...] = setting((), "restart at these epochs instead; authors' code: 5 10 20 40 80 160 320",
                                          (lambda xs: all(a < b < math.inf for a, b in zip((0, *xs), xs)), "rising epochs above 0"), IN_SGDR)
    eta_min: tuple[float, ...] = setting((0.0,), "learning rate at the end of a run, one for all runs or one a run (2.1)",
                                         (lambda xs: xs and RATES[0](xs), "at least one number, 0 or more"), IN_SGDR)
    eta_max: tuple[float, ...] = setting((), "learning rate at its beginning, likewise; none: lr (2.1)", RATES, IN_SGDR)
    sgdr_step: str = setting("batch", "E_cur moves with each batch, or each epoch (authors' code)", where=IN_SGDR, choices=("batch", "epoch"))
    reset_optimizer: bool = setting(False, "forget Adam's moments at a restart", where=IN_SGDR)
    # the interface
    dni_alpha: float = setting(0.9, "alpha, factor on injected gradients; the paper's Eq. 1 has none: 1, authors' code: 0.1",
                               NOT_NEGATIVE, WITH_DNI)
    dni_hidden: int = setting(50, "neurons of g (2.2)", AT_LEAST_1, WITH_DNI)
    dni_lr: float = setting(1e-3, "Adam's learning rate for g", POSITIVE, WITH_DNI)
    dni_l2: float = setting(0.0, "weight decay of g; authors' code: 1.2e-6", NOT_NEGATIVE, WITH_DNI)
    dni_window: int = setting(1, "window of g's QRNN layer, neuron-wise only; authors' code: 2", AT_LEAST_1, WITH_NEURON_DNI)
    dni_zoneout: float = setting(0.0, "zoneout of g's QRNN layer, neuron-wise only; authors' code: 0.1", PROBABILITY, WITH_NEURON_DNI)
    dni_noise: float = setting(0.0, "standard deviation of multiplicative noise on g's input; authors' code: 0.5", NOT_NEGATIVE, WITH_DNI)
    dni_last_layer: float = setting(0.0, "g's last layer starts in U(-b, b), 0 after DNI; authors' code: 0.1", NOT_NEGATIVE, WITH_DNI)
    dni_warmup: float = setting(1.0, "epochs in which g learns before it is used (authors' code)", NOT_NEGATIVE,
                                (lambda s: uses_synthetic(s) and s.mode != "alternating", "--mode dni, or restart --gradient synthetic"))
    # evaluation and limits
    valid_batch_size: int = setting(10, "streams of validation text (authors' code); the test text is one stream", AT_LEAST_1)
    max_steps: int = setting(0, "stop after so many training steps, 0: never; to try a configuration out", NOT_NEGATIVE, may_change=True)
    recall_delay: int = setting(80, "fillers between symbol and answer in the corpus recall; above bptt to cross a border", AT_LEAST_1, IN_RECALL)
    recall_symbols: int = setting(4, "symbols of the corpus recall", AT_LEAST_1, IN_RECALL)
    # machine
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"), may_change=True)
    precision: str = setting("auto", "of matrix products; auto: bf16 where the processor multiplies it natively. State, "
                                     "gates, loss and optimiser are float32 always; fp32 on a GPU is TF32",
                             choices=("auto", "fp32", "bf16"), may_change=True)
    checkpoint_every: float = setting(10.0, "minutes between checkpoints within an epoch, 0: after every step; there is one after each epoch",
                                      NOT_NEGATIVE, may_change=True)
    compile: bool = setting(False, "torch.compile of model and g: the same numbers to rounding, faster after a minute of compiling", may_change=True)
    data_dir: str = setting("", "folder of the PTB and WT2 files; default $QRNN_DATA, else corpora/, where they are downloaded",
                            where=(lambda s: s.data in ("ptb", "wt2"), "--data ptb or wt2"), may_change=True)


SMALL = Settings()
PAPER = dataclasses.replace(
    SMALL, epochs=320, embedding_size=400, hidden_size=1550, num_layers=4, dropout_output=0.4, dropout_hidden=0.3,
    dropout_input=0.4, dropout_embedding=0.1, dropout_weight=0.1, lr=1e-3, clip=0.2, bptt=200, jitter=True, e_base=5.0,
    dni_alpha=1.0, recall_delay=250)
PAPER_WT2 = dataclasses.replace(PAPER, dropout_hidden=0.2, clip=0.25)
MAY_CHANGE = [f.name for f in dataclasses.fields(Settings) if f.metadata["may_change"]]           # when a run is resumed


class UserError(Exception):
    """Something only the user can put right; ends the program with its one line and status 2."""


class NotFinite(Exception):
    """The loss or its gradient is not a number any more."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists what there is)")


def parse(argv):
    """Command line -> (settings, output folder or None, folder to resume from or None)."""
    parser = Parser(prog="train.py", description="Train a QRNN language model with real, synthetic or alternating gradients.",
                    formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=("small", "paper"),
                        help="small, the default: two CPU cores; paper: the paper's size and settings for the corpus")
    parser.add_argument("--out", metavar="FOLDER", help="where log.csv and the checkpoints go; default runs/DATA-MODE, or the folder resumed from")
    parser.add_argument("--resume", metavar="FOLDER",
                        help="go on with the run in FOLDER, with its settings, from its newest checkpoint or, before the first, from the "
                             f"beginning; may be changed: {', '.join(MAY_CHANGE)}")
    for f in dataclasses.fields(Settings):
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        options = dict(dest=f.name, default=argparse.SUPPRESS, help=f"{f.metadata['help']} [{default}]".replace("%", "%%"))
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            options.update(type=float, nargs="*", metavar="X")
        elif f.metadata["choices"]:
            options["choices"] = f.metadata["choices"]
        else:
            options.update(type=f.type, metavar={int: "N", float: "X", str: "NAME"}[f.type])
        parser.add_argument(f"--{f.name.replace('_', '-')}", **options)
    given = vars(parser.parse_args(argv))
    preset, out, resume = given.pop("preset"), given.pop("out"), given.pop("resume")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if resume is not None:
        if preset:
            raise UserError("--resume goes on with its own settings: leave --preset away")
        before = read_settings(Path(resume))
        changed = [f"--{name.replace('_', '-')} (was {before.get(name)}, now {value})" for name, value in given.items()
                   if name not in MAY_CHANGE and before.get(name) != value]
        if changed:
            raise UserError(f"{resume} holds a run with other settings: {', '.join(changed)}; start a new run instead")
        settings = dataclasses.replace(SMALL, **{**before, **given})
    else:
        base = {"paper": PAPER_WT2 if given.get("data") == "wt2" else PAPER}.get(preset, SMALL)
        settings = dataclasses.replace(base, **given)
    check(settings, given)
    if Path(settings.data).is_dir() and settings.data not in ("pydoc", "ptb", "wt2", "recall"):
        settings = dataclasses.replace(settings, data=str(Path(settings.data).resolve()))          # to resume from anywhere
    return settings, *(folder and Path(folder) for folder in (out or resume, resume))


def check(s, given=()):
    """Raise UserError for a setting that cannot be, or that was given and has no effect beside the others."""
    for f in dataclasses.fields(Settings):
        flag, value = f"--{f.name.replace('_', '-')}", getattr(s, f.name)
        possible, what = f.metadata["valid"] or (lambda _: True, "")
        effective, where = f.metadata["where"] or (lambda _: True, "")
        if not possible(value):
            raise UserError(f"{flag} must be {what}, got {value}")
        if f.name in given and not effective(s):
            raise UserError(f"{flag} has an effect with {where} only")
    for i in range(max(len(s.eta_min), len(s.eta_max))):
        low, high = per_run(s.eta_min, i), per_run(s.eta_max or s.lr, i)
        if low > high:
            raise UserError(f"--eta-min of run {i} must be at most {high}, the rate the run begins with, got {low}")


# ------------------------------------------------------------------------------------------- what the mode decides

def gradient_source(settings, run, epoch):
    """'real' or 'synthetic': which gradient crosses the borders in run `run`, `epoch` epochs into training.

    In real runs of a configuration with an interface, g goes on learning, from the T true steps alone.
    """
    if settings.mode == "alternating":
        return ("real", "synthetic")[(run + (settings.first == "synthetic")) % 2]                  # they take turns (2.1)
    return "synthetic" if uses_synthetic(settings) and epoch >= settings.dni_warmup else "real"


def make_schedule(settings, optimizer):
    """The SGDR schedule of the modes with restarts, None for those with a constant rate."""
    if settings.mode not in SGDR_MODES:
        return None
    return SGDR(optimizer, settings.e_base, 2, settings.eta_min, settings.eta_max or None, settings.restarts,
                fractional=settings.sgdr_step == "batch")


# ------------------------------------------------------------------------------------------------------------ one step

class Interface(NamedTuple):
    g: torch.nn.Module
    optimizer: torch.optim.Optimizer
    agreement: Agreement


def border(state):
    """Of a model state [(c, x_prev)], the part an interface looks at: [c], one (B, H_l) a layer."""
    return [c for c, _ in state]


def cut(state):
    """The state as the next chunk gets it: same values, no history; the c's are leaves that collect a gradient.

    (A copy, lest the views c_T and x_T keep the whole chunk's buffers alive.)
    """
    return [(c.detach().clone().requires_grad_(), x_prev.detach().clone()) for c, x_prev in state]


def train_step(model, optimizer, interface, inputs, targets, state, memory, synthetic, settings, product=torch.float32):
    """Learn from one chunk (2.1 and 2.2). Returns (nll, state, memory): the chunk's loss and what the next one gets.

    inputs, targets: (T, B). state: s_k from `cut`, or None at the beginning of a text. memory: h_g or None.
    interface: None where no g is to be trained. synthetic: whether g's gradient crosses the border ahead.
    product: the type of matrix products. Raises NotFinite before the model's weights are touched; on a GPU, which would have to be
    waited for, it returns a loss that is not a number instead.
    """
    T_B = inputs.numel()
    mixed = torch.autocast(inputs.device.type, product, product != torch.float32)
    predicted = None

    # 1. forward:  L_k, s_{k+1} = model(chunk_k, s_k)
    optimizer.zero_grad(set_to_none=True)                               # here already, to free their memory
    with mixed:
        loss, penalty, new_state = model.loss(inputs, targets, state, settings.activation, settings.temporal)

    # 2. synthesise:  delta^_{k+1} = g(s_{k+1}, h_g; phi), without a graph. h_g has to see s_k first; that forward,
    #    which has a graph, is the prediction delta^_k that step 4 corrects. g learns one border at a time: h_g is detached.
    with mixed:
        if interface and state:
            predicted, memory = interface.g([c.detach() for c in border(state)], memory)
            memory = tuple(m.detach() for m in memory) if memory else None
        if synthetic:
            with torch.no_grad():
                future, _ = interface.g(border(new_state), memory)                                 # delta^_{k+1}

    # 3. backward:  dL/dtheta = dL_k/dtheta + (ds_{k+1}/dtheta)^T (alpha / T B) delta^_{k+1}  (Eq. 1),  L_k = loss + penalty
    if synthetic:
        inject(loss + penalty, border(new_state), future, settings.dni_alpha / T_B)
    else:
        (loss + penalty).backward()
    nll = loss.detach().clone()
    average([nll, *(p.grad for p in model.parameters())])               # over the processes, where there are several
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    nll = nll + 0 * norm                                                # not a number where one of them is not finite
    if not nll.is_cuda and not torch.isfinite(nll):
        raise NotFinite(f"loss {nll.item()}, gradient norm {norm.item()}; try a lower --lr or --dni-alpha")

    # 4. regress:  phi <- phi - Adam(d/dphi mean (delta^_k - delta_k)^2),  delta_k = T B s_k.grad, left by step 3
    if predicted:
        target = [T_B * c.grad for c in border(state)]
        interface.agreement.update(predicted, target)
        error = regress(interface.optimizer, predicted, target)
        average([error, interface.agreement.sums])                      # and g's gradient, before its step: see `Training`
        nll = nll + 0 * error
        if not nll.is_cuda and not torch.isfinite(error):
            raise NotFinite(f"loss {nll.item()}, squared error of the DNI {error.item()}; try a lower --dni-lr")

    # 5. step
    optimizer.step()
    return nll, cut(new_state), memory


def chunk_borders(length, settings, epoch=0):
    """Yield (start, stop) of the chunks of a text of `length` steps; the last one is what is left.

    With jitter, the lengths follow from seed and epoch alone: the same in every mode, process, and run that goes on.
    """
    draw, start = random.Random(f"{settings.seed} {epoch}"), 0
    while start < length:
        steps = settings.bptt
        if settings.jitter:                                                                        # authors' code
            steps = max(5, int(draw.gauss(steps if draw.random() < 0.95 else steps / 2, 5)))
        stop = min(start + steps, length)
        yield start, stop
        start = stop


@torch.no_grad()
def evaluate(model, tokens, batch_size, product=torch.float32, bptt=200):
    """Mean nll in nats over the predictions of a whole text, tokens (n,), as streams, the state carried through, no dropout.

    (Departure: the authors' code divides by the number of tokens, one more than there are predictions.)
    """
    was_training, total, state = model.training, 0.0, None
    model.eval()
    inputs, targets = streams(tokens, batch_size)
    for start in range(0, len(inputs), bptt):
        chunk = slice(start, start + bptt)
        with torch.autocast(tokens.device.type, product, product != torch.float32):
            nll, _, state = model.loss(inputs[chunk], targets[chunk], state)
        total += nll.item() * inputs[chunk].numel()
    model.train(was_training)
    return total / inputs.numel()


@torch.no_grad()
def sample(model, vocabulary, sentences=3, longest=30, end="<eos>"):
    """A few sentences drawn word by word from the model's own predictions, each a string. Without dropout."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    token = torch.tensor([[vocabulary.index(end) if end in vocabulary else 0]], device=device)
    state, texts = None, []
    for _ in range(sentences):
        words = []
        while len(words) < longest:
            logits, state = model(token, state)
            token = torch.distributions.Categorical(logits=logits[-1]).sample()[None]
            word = vocabulary[token.item()]
            if word == end:
                break
            words.append(word)
        texts.append(" ".join(words))
    model.train(was_training)
    return texts


# ---------------------------------------------------------------------------------------------------------- the machine

def pick_device(name):
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if there[d])
    if not there[name]:
        raise UserError(f"--device {name}: PyTorch sees no such device here; there is {', '.join(d for d in there if there[d])}")
    return name


def pick_product(name, device):
    """The type of matrix products: bf16 where asked for, or where auto finds that the processor multiplies it natively."""
    native = False
    if device == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
    elif device == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()                                      # older torch: unknown
        native = any(able.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if name == "bf16" or (name == "auto" and native) else torch.float32


def keep_freed_memory():
    """Ask glibc to keep the memory that a step frees, for the next step takes the same again. Elsewhere, nothing.

    As it comes, every large tensor is a mapping of its own that goes back to the kernel when freed, and whose pages of 4 KB
    are cleared and mapped one by one when it is next wanted. The price is some memory lost in holes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for parameter, value in ((-4, 0), (-1, 2 ** 31 - 1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            mallopt(parameter, value)


# ---------------------------------------------------------------------------------------------------- several processes
#
# Under torchrun, N processes hold the same weights, read B / N of the streams each, and average their gradients: data
# parallelism. A mean over T B tokens is the mean of N means over T B / N, so that a step is what it is for one process, but
# for rounding and dropout masks. Process 0 alone prints and writes. One process meets none of this: the functions leave
# what they are given as it is.

def join_processes(device):
    """Meet the other processes of torchrun, if this one has any. Returns (which process this is, how many there are)."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        local = int(os.environ["LOCAL_RANK"])
        if device == "mps" or (device == "cuda" and local >= torch.cuda.device_count()):
            raise UserError(f"process {local + 1} of this machine finds no device of its own; add --device cpu, or start fewer")
        if device == "cuda":
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if rank:
            sys.stdout = open(os.devnull, "w")
    return rank, processes


def average(tensors):
    """Each tensor becomes its mean over the processes."""
    if dist.is_initialized():
        for under_way in [dist.all_reduce(t, async_op=True) for t in tensors]:
            under_way.wait()
        for t in tensors:
            t /= dist.get_world_size()


def largest(*numbers):
    """Of each number, the largest that any process has."""
    if not dist.is_initialized():
        return numbers
    numbers = torch.tensor(numbers)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def gathered(value):
    """[value of process 0, of process 1, ...], what tensors there are in lists and tuples on the CPU."""
    values = [each(torch.Tensor.cpu, value)]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, values[0])
    return values


def side_by_side(states):
    """Of the states of several processes, the state of all streams. A state: tensors with B in the last dimension but one."""
    first = states[0]
    if isinstance(first, (list, tuple)):
        return type(first)(map(side_by_side, zip(*states)))
    return torch.cat([s.detach() for s in states], -2) if torch.is_tensor(first) else first


def each(function, value):
    """`value` with function(tensor) for each tensor in its lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)(each(function, v) for v in value)
    return function(value) if torch.is_tensor(value) else value


# ---------------------------------------------------------------------------------------------------------- checkpoints

@contextlib.contextmanager
def replacing(path, keep=None):
    """Gives a binary file to write beside `path`; then it is flushed to the disk and takes the name `path`.

    So `path` is whole at every moment, whatever breaks off in between. keep: a name for what `path` was before.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)                                 # give a full disk its room back
        raise
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(partial, path)
    if os.name == "posix":                                              # the names, too, are to outlive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save(content, path, keep=None):
    """Write a checkpoint. Its numbers lie in a zip file, which has a checksum of each of its parts."""
    try:
        with replacing(path, keep) as file:
            torch.save(content, file)
    except RuntimeError as error:                                       # what torch makes of a full disk
        raise UserError(f"{path} cannot be written ({' '.join(str(error).split())[:120]}); what was there before is unharmed") from None


def read_checkpoint(path):
    """What `save` wrote, as plain numbers and tensors: nothing in the file can run code. UserError where it is not that."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()                                    # reads all and compares the checksums
        if damaged:
            raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is not there: nothing to resume") from None
    except Exception as error:                                          # torch.load raises half a dozen kinds
        raise UserError(f"{path} cannot be read as a checkpoint: damaged, or another kind of file ({type(error).__name__})") from None
    known = {f.name for f in dataclasses.fields(Settings)}
    if not isinstance(content, dict) or not set(content.get("settings", [None])) <= known:
        raise UserError(f"{path} is not a checkpoint of this version of train.py")
    return content


def read_newest(folder, say=True):
    """The folder's last.pt, or, where that is damaged, lost, or from another run, the one before it, saying so."""
    try:
        content = read_checkpoint(folder / "last.pt")
        try:
            settings = json.loads((folder / "settings.json").read_text())
        except (OSError, ValueError):
            settings = {}                                               # lost: nothing to compare with
        if any(json.dumps(content["settings"][name]) != json.dumps(value) for name, value in settings.items()
               if name in content["settings"] and name not in MAY_CHANGE):
            raise UserError(f"{folder / 'last.pt'} is of another run than {folder / 'settings.json'}")
        return content
    except UserError as error:
        if not (folder / "previous.pt").exists():
            raise
        content = read_checkpoint(folder / "previous.pt")
        if say:
            print(f"train.py: {error}; going on from {folder / 'previous.pt'}", file=sys.stderr)
        return content


def read_settings(folder):
    """The settings of the run in `folder`, from its newest checkpoint, or from settings.json where it was cut off before the first."""
    file = folder / "settings.json"
    if not file.exists() or any((folder / name).exists() for name in ("last.pt", "previous.pt", "log.csv")):
        return read_newest(folder)["settings"]
    try:
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(file.read_text()).items()}
        right = all(type(settings[f.name]) is type(f.default) for f in dataclasses.fields(Settings)) and len(settings) == len(vars(SMALL))
    except (OSError, ValueError, AttributeError, KeyError):
        right = False
    if not right:
        raise UserError(f"{file} cannot be read as the settings of this version of train.py, and there is no checkpoint beside it")
    return settings


def lock(folder):
    """Keep every other run out of `folder` for as long as the file returned is open, that is, until this process ends."""
    file = open(folder / "lock", "w")
    try:
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        raise UserError(f"another run is at work in {folder}; name another --out, or wait for it") from None
    return file


def restore(parts, checkpoint, path):
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is a checkpoint of another model or corpus: {reason[:160]}") from None


def random_state(device, interface=None):
    """The state of the random generators in use: the CPU's, the device's own, and g's."""
    own = {"cpu": {}, "cuda": {"cuda": torch.cuda}, "mps": {"mps": torch.mps}}[device]
    return {"cpu": torch.get_rng_state(), **{name: module.get_rng_state() for name, module in own.items()},
            **({f"dni {device}": interface.g.generator.get_state()} if interface else {})}


def set_random_state(states, device, interface=None):
    torch.set_rng_state(states["cpu"])
    if device != "cpu" and device in states:                            # a run may go on on another device
        {"cuda": torch.cuda, "mps": torch.mps}[device].set_rng_state(states[device])
    if interface and f"dni {device}" in states:
        interface.g.generator.set_state(states[f"dni {device}"])


def output_folder(out, settings):
    """The folder given, if no run is in it; otherwise runs/DATA-MODE, numbered where that is taken."""
    if out is None:
        kind = settings.mode + ("-synthetic" if settings.mode == "restart" and settings.gradient == "synthetic" else "")
        name, n = f"{Path(settings.data).resolve().name}-{kind}", 1
        out = Path("runs") / name
        while out.exists():
            n += 1
            out = Path("runs") / f"{name}-{n}"
    elif any((out / name).exists() for name in ("log.csv", "last.pt", "previous.pt")):
        raise UserError(f"{out} already holds a run: go on with --resume {out}, or name another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


COLUMNS = ("epoch", "run", "gradient", "learning_rate", "train_perplexity", "valid_perplexity", "dni_cosine", "dni_r2", "seconds")


def write_log(rows, path):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([COLUMNS, *rows])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


# --------------------------------------------------------------------------------------------------------- the training

def perplexity(nll):
    """exp(nll), or at least a number where that is beyond a float."""
    return math.exp(min(nll, 700.0))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


def build(s, vocabulary, device):
    """Everything that learns: (model, optimizer, interface or None), the same initial model in every mode."""
    torch.manual_seed(s.seed)
    fused = {"fused": True} if device in ("cpu", "cuda") else {}
    model = LanguageModel(vocabulary, s.embedding_size, s.hidden_size, s.num_layers, window=s.window,
                          dropout_embedding=s.dropout_embedding, dropout_input=s.dropout_input,
                          dropout_hidden=s.dropout_hidden, dropout_output=s.dropout_output,
                          dropout_weight=s.dropout_weight, zoneout=s.zoneout, compile=s.compile).to(device)
    optimizer = torch.optim.Adam(model.parameters(), s.lr, weight_decay=s.l2, **fused)
    if not uses_synthetic(s):
        return model, optimizer, None
    # Every mode draws the same dropout masks: g's first weights leave torch's generator as it was, its noise has one of its own.
    before, generator = random_state(device), torch.Generator(device).manual_seed(s.seed)
    if s.dni == "neuron":
        g = NeuronDNI(s.dni_hidden, s.dni_window, s.dni_zoneout, s.dni_noise, s.dni_last_layer, s.compile, generator).to(device)
    else:
        sizes = [layer.hidden_size for layer in model.rnn.layers]
        g = LayerDNI(sizes, s.dni_hidden, s.dni_noise, s.dni_last_layer, generator).to(device)
    set_random_state(before, device)
    return model, optimizer, Interface(g, torch.optim.Adam(g.parameters(), s.dni_lr, weight_decay=s.dni_l2, **fused), Agreement())


@dataclasses.dataclass
class Place:
    """Where a run is: with the weights, Adam's moments and the random generators, all that it takes to go on from there."""
    epoch: int = 0                     # epochs done
    start: int = 0                     # of the one under way: time steps read,
    chunks: int = 0                    # in so many chunks,
    total: float | torch.Tensor = 0.0  # with this nll, summed over time steps, dropout on
    run: int = 0                       # SGDR's at the last step, whose gradients and learning rate were
    source: str = "real"
    rate: float = 0.0
    state: list | None = None          # s_k and h_g, as the last step left them
    memory: tuple | None = None
    seconds: float = 0.0               # of training so far
    best: float = math.inf             # validation nll
    rows: list = dataclasses.field(default_factory=list)               # of log.csv


def train_epoch(place, model, optimizer, schedule, interface, inputs, targets, s, product):
    """What is left of one pass over inputs and targets, (L, B) each; yields after each chunk, with `place` moved on.

    The last chunk leaves its state to nobody, so no synthetic gradient is injected there. Raises NotFinite, saying where.
    """
    model.train()
    length, unchecked = len(inputs), None
    if place.start == 0:                                                # a text begins: nothing is remembered
        place.chunks, place.total, place.state, place.memory = 0, 0.0, None, None
        if interface:
            interface.agreement.sums = 0.0
    for start, stop in chunk_borders(length, s, place.epoch):
        if start < place.start:                                         # read before the run was cut off
            continue
        now, run = place.epoch + start / length, place.run                                         # epochs since the beginning
        if schedule:
            schedule.step(now)
            run = schedule.run.run
            if s.reset_optimizer and run != place.run:
                optimizer.state.clear()
        rate = schedule.get_last_lr()[0] if schedule else s.lr
        optimizer.param_groups[0]["lr"] = rate * ((stop - start) / s.bptt if s.jitter else 1)
        source = gradient_source(s, run, now)
        where = (f"step {place.chunks + 1} of epoch {place.epoch + 1} (run {run}, {source} gradients, learning rate {rate:.2e}) "
                 "is not finite")
        try:
            nll, place.state, place.memory = train_step(model, optimizer, interface, inputs[start:stop], targets[start:stop],
                                                        place.state, place.memory, source == "synthetic" and stop < length,
                                                        s, product)
        except NotFinite as error:
            raise NotFinite(f"{where}: {error}") from None
        if nll.is_cuda:                                                 # a GPU is asked one step late, so as not to wait for it
            late, unchecked = unchecked, (nll, where)
            for number, its_place in filter(None, (late, unchecked if stop == length else None)):
                if not torch.isfinite(number):
                    raise NotFinite(f"{its_place}; try a lower --lr or --dni-alpha, or with a DNI a lower --dni-lr")
        place.total = place.total + nll * (stop - start)
        place.start, place.chunks, place.run, place.source, place.rate = stop, place.chunks + 1, run, source, rate
        yield


@contextlib.contextmanager
def stop_signals():
    """Gives a list that Ctrl-C (SIGINT) or SIGTERM puts its number into, for the loop to look at; the next one ends at once."""
    stopped, before = [], {}

    def restore(*_):
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, _):
        stopped.append(number)
        restore()

    before.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield stopped
    finally:
        restore()


class ProgressLine:
    """One line on a terminal that rewrites itself twice a second. place: where this start begins; length, epochs: its end."""

    def __init__(self, place, length, settings):
        self.length, self.settings, self.first = length, settings, place.epoch * length + place.start
        self.started = self.shown = time.monotonic()

    def __call__(self, place):
        now = time.monotonic()
        if now - self.shown > 0.5:
            steps, s = place.epoch * self.length + place.start, self.settings
            speed = (steps - self.first) / (now - self.started)                                    # time steps a second
            print(f"\r\033[Kepoch {place.epoch + 1}/{s.epochs} {place.start / self.length:4.0%}  run {place.run} {place.source}  "
                  f"lr {place.rate:.2e}  perplexity {perplexity(float(place.total) / place.start):.1f}  "
                  f"{speed * s.batch_size:,.0f} tokens/s  {clock((s.epochs * self.length - steps) / speed)} left", end="", flush=True)
            self.shown = now


class Training:
    """One run in this process: what it learns from, what learns, its folder, and where it is."""

    def __init__(self, s):
        """Load the corpus and build what learns; nothing is written yet. Raises UserError, CorpusError."""
        self.s, self.place, self.out, self.progress, self.started = s, Place(), None, None, None
        self.device = pick_device(s.device)
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")                  # TF32 in the products that are not in bf16
        self.product = pick_product(s.precision, self.device)
        self.rank, self.processes = join_processes(self.device)
        if self.rank:
            dist.barrier()                                              # process 0 goes first: it may have to download
        self.corpus = corpus = load_corpus(s.data, s.data_dir or None, delay=s.recall_delay, symbols=s.recall_symbols)
        if self.processes > 1 and not self.rank:
            dist.barrier()
        train_tokens, self.valid_tokens, self.test_tokens = (t.to(self.device) for t in (corpus.train, corpus.valid, corpus.test))
        inputs, targets = streams(train_tokens, s.batch_size)                                      # (L, B)
        for tokens, batch_size in ((self.valid_tokens, s.valid_batch_size), (self.test_tokens, 1)):
            streams(tokens, batch_size)                                                            # raises if too short
        if len(inputs) < s.bptt:
            raise UserError(f"{corpus.name}: {len(train_tokens)} tokens in {s.batch_size} streams give {len(inputs)} steps "
                            f"each, less than one chunk of {s.bptt}; lower --batch-size or --bptt")
        if s.batch_size % self.processes:
            raise UserError(f"--batch-size {s.batch_size} cannot be divided evenly among {self.processes} processes")
        self.inputs, self.targets = (x.chunk(self.processes, 1)[self.rank] for x in (inputs, targets))  # (L, B / processes)

        self.model, self.optimizer, self.interface = build(s, len(corpus.vocabulary), self.device)
        if self.rank:
            torch.manual_seed(s.seed + self.rank)                       # dropout masks of its own
            if self.interface:
                self.interface.g.generator.manual_seed(s.seed + self.rank)
        self.schedule = make_schedule(s, self.optimizer)
        self.parts = {"model": self.model, "optimizer": self.optimizer}
        if self.interface:
            g = self.interface.g
            self.parts.update(dni=g, dni_optimizer=self.interface.optimizer)
            if self.processes > 1:
                self.interface.optimizer.register_step_pre_hook(lambda *_: average([p.grad for p in g.parameters()]))

    def open(self, out, resume):
        """Take the folder `out`, or one of its own; with `resume`, a folder too, go on from the newest checkpoint there."""
        if not self.rank:
            out = resume if resume and out == resume else output_folder(out, self.s)
            self.lock = lock(out)                                       # held until the process ends
        if self.processes > 1:
            dist.barrier()                                              # nobody reads a checkpoint before process 0 has the lock
        self.out = out
        begun = resume and any((resume / name).exists() for name in ("last.pt", "previous.pt"))
        checkpoint = self.take_up(resume) if begun else None
        if self.rank:
            return
        if resume and not begun:
            print(f"train.py: {resume} was cut off before its first checkpoint; starting it from the beginning", file=sys.stderr)
        with replacing(out / "settings.json") as file:
            file.write((json.dumps(dataclasses.asdict(self.s), indent=1) + "\n").encode())
        if begun and out != resume:
            save(checkpoint, out / "last.pt")
            if (resume / "best.pt").exists():
                shutil.copyfile(resume / "best.pt", out / "best.pt")
        if begun:
            write_log(self.place.rows, out / "log.csv")                 # it may be ahead of the checkpoint

    def take_up(self, folder):
        """Go on from the newest checkpoint in `folder`, which is returned."""
        checkpoint = read_newest(folder, say=False)
        if checkpoint.get("corpus") != self.corpus.fingerprint():
            raise UserError(f"{folder} was trained on another text than {self.corpus.name} is now; start a new run instead")
        restore(self.parts, checkpoint, folder / "last.pt")
        self.place = place = Place(**checkpoint["place"])
        place.state, place.memory = (each(lambda t: t.chunk(self.processes, -2)[self.rank].clone().to(self.device), x)
                                     for x in (place.state, place.memory))
        for c, _ in place.state or ():
            c.requires_grad_()
        if self.interface:
            self.interface.agreement.sums = each(lambda t: t.to(self.device), checkpoint["agreement"])
        if self.rank < len(checkpoint["random"]):                       # there may be more processes now
            set_random_state(checkpoint["random"][self.rank], self.device, self.interface)
        return checkpoint

    def announce(self):
        s, corpus = self.s, self.corpus
        print(f"{corpus.name}: {len(corpus.train):,} training tokens, vocabulary {len(corpus.vocabulary):,}, "
              f"unigram test perplexity {unigram_perplexity(corpus):.1f}")
        for fact, value in corpus.facts.items():
            print(f"{corpus.name}: {fact} {value:.4f}")
        print(f"model of {parameters(self.model):,} parameters"
              + (f", {s.dni}-wise DNI of {parameters(self.interface.g):,}" if self.interface else "")
              + f"; {self.device}, products in {str(self.product).removeprefix('torch.')}, {torch.get_num_threads()} threads"
              + (f" in each of {self.processes} processes" if self.processes > 1 else "")
              + (", compiled during the first steps" if s.compile else "") + f"; in {self.out}", flush=True)

    def keep(self, name, previous=None, **content):
        """Write a checkpoint of the model, and `content`, into the run's folder."""
        if not self.rank:
            save({"model": self.model.state_dict(), "settings": dataclasses.asdict(self.s), "corpus": self.corpus.fingerprint(), **content},
                 self.out / name, previous and self.out / previous)

    def keep_place(self):
        """Write last.pt: all that `take_up` needs. The processes meet here."""
        place = self.place
        if not math.isfinite(place.total):
            raise NotFinite(f"the loss of epoch {place.epoch + 1} is not finite; try a lower --lr or --dni-alpha, or with a DNI a lower --dni-lr")
        place.seconds = time.monotonic() - self.started
        states, randoms = zip(*gathered(((place.state, place.memory), random_state(self.device, self.interface))))  # of each process
        state, memory = side_by_side(states)
        self.keep("last.pt", "previous.pt", place={**vars(place), "state": state, "memory": memory}, random=randoms,
                  agreement=self.interface and self.interface.agreement.sums, **{name: part.state_dict() for name, part in self.parts.items()})

    def train(self):
        """Epoch after epoch, to the last or to a signal, which is returned (0: none). Raises NotFinite."""
        s, place, length = self.s, self.place, len(self.inputs)
        self.started, chunks, saved, stop = time.monotonic() - place.seconds, 0, time.monotonic(), 0
        self.progress = ProgressLine(place, length, s) if sys.stdout.isatty() else None
        with stop_signals() as stopped:
            while place.epoch < s.epochs and not stop and (not s.max_steps or chunks < s.max_steps):
                epoch_started, epoch_start = time.monotonic(), place.start
                for _ in train_epoch(place, self.model, self.optimizer, self.schedule, self.interface, self.inputs, self.targets, s, self.product):
                    chunks += 1
                    if self.progress:
                        self.progress(place)
                    stop, due = largest(stopped[0] if stopped else 0, time.monotonic() - saved >= 60 * s.checkpoint_every)
                    if stop or chunks == s.max_steps:
                        break
                    if due and place.start < length:
                        self.keep_place()
                        saved = time.monotonic()
                seconds = max(time.monotonic() - epoch_started, 1e-9)
                if stop or place.start < length:
                    self.keep_place()
                if not stop:
                    self.end_epoch((place.start - epoch_start) * s.batch_size / seconds, seconds)
                    saved = time.monotonic()
                    stop, = largest(stopped[0] if stopped else 0)
        return stop

    def end_epoch(self, speed, seconds):
        """Validate, log, keep what is best; an epoch that --max-steps ended early is not counted as done."""
        s, place, whole = self.s, self.place, self.place.start == len(self.inputs)
        valid, train_nll = evaluate(self.model, self.valid_tokens, s.valid_batch_size, self.product), float(place.total) / place.start
        if not math.isfinite(valid):
            raise NotFinite(f"the validation loss after epoch {place.epoch + 1} is not finite; try a lower --lr")
        cosine, r2 = self.interface.agreement.result() if self.interface else (math.nan, math.nan)
        place.rows.append([place.epoch + 1, place.run, place.source, float(f"{place.rate:.4e}"), round(perplexity(train_nll), 3),
                           round(perplexity(valid), 3), round(cosine, 5), round(r2, 5), round(time.monotonic() - self.started, 1)])
        print(("\r\033[K" if self.progress else "") + f"epoch {place.epoch + 1:3d}/{s.epochs}  run {place.run} {place.source:9}  "
              f"lr {place.rate:.2e}  train {perplexity(train_nll):8.2f}  valid {perplexity(valid):8.2f}"
              + (f"  cosine {cosine:+.3f}  R2 {r2:+.3f}" if self.interface else "") + f"  {speed:,.0f} tokens/s  {seconds:.0f} s", flush=True)
        if valid < place.best and (whole or place.best == math.inf):
            self.keep("best.pt", epoch=place.epoch + 1)
        if whole:
            place.best = min(place.best, valid)
            place.epoch, place.start = place.epoch + 1, 0
            self.keep_place()
        if not self.rank:
            write_log(place.rows, self.out / "log.csv")

    def test(self):
        """Sample from the best model and print its test perplexity."""
        try:
            restore({"model": self.model}, read_checkpoint(self.out / "best.pt"), self.out / "best.pt")
        except UserError as error:
            print(f"train.py: {error}; testing the model as it is now", file=sys.stderr)
        print("sampled:")
        for text in sample(self.model, self.corpus.vocabulary):
            print(f"  {text}")
        for fact, value in self.corpus.facts.items():
            print(f"{fact} {value:.4f}")
        print(f"test perplexity {perplexity(evaluate(self.model, self.test_tokens, 1, self.product)):.2f}")


def main(argv):
    """Train, test the best model, return the exit status. Raises UserError, CorpusError, NotFinite, OSError."""
    s, out, resume = parse(argv)
    keep_freed_memory()
    warnings.showwarning = lambda message, *_: print(f"train.py: {message}", file=sys.stderr)
    run = Training(s)
    run.open(out, resume)
    run.announce()
    place, out = run.place, run.out
    if place.epoch >= s.epochs:
        print(f"{resume} has run its {place.epoch} epochs, so it is only tested; ask for more with --epochs", flush=True)
    try:
        stop = run.train()
    except NotFinite as error:
        if run.rank:
            raise
        kept = f"the last good checkpoint is {out / 'last.pt'}" if (out / "last.pt").exists() else "there is no checkpoint yet"
        raise NotFinite(f"{error}; {kept}") from None
    if stop and place.epoch < s.epochs:
        print(f"\ninterrupted after {place.start / len(run.inputs):.0%} of epoch {place.epoch + 1}; go on with --resume {out}", flush=True)
        return 128 + stop
    if not run.rank:
        run.test()
    return 0


def command(argv):
    """`main` with every failure a user can cause or cure told in one line on stderr. Returns the exit status."""
    rank = int(os.environ.get("RANK", 0))
    me = f"train.py, process {rank}" if rank else "train.py"
    try:
        return main(argv)
    except (UserError, CorpusError, OSError) as error:
        print(f"{me}: error: {error}", file=sys.stderr)
        return 2
    except NotFinite as error:
        print(f"{me}: stopped: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:                        # torch's out-of-memory errors are RuntimeErrors
        reason = " ".join(str(error).split())[:160]
        if isinstance(error, dist.DistError) or "gloo" in reason:
            print(f"{me}: stopped: another process does not answer ({reason}); go on with --resume", file=sys.stderr)
            return 1
        if isinstance(error, RuntimeError) and "memory" not in reason:
            raise
        print(f"{me}: error: out of memory ({reason}); try a lower --batch-size, --bptt or --hidden-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")                            # a sampled word the terminal cannot show
    sys.exit(command(sys.argv[1:]))
