"""What the studies share: logs that grow by whole cases, a small model, and gradients that cross borders.

A log is a CSV file. Its first columns name a case, and the rows of a case are written when it has ended. So a
study that was stopped can be resumed: a case that is in the log is not done again. Beside the log, a JSON
file of the same name says which commands and machines it comes from.

Glossary
    recent    [(inputs, targets, state)]   the last chunks of a text, (T, B) each, and the state before each
    borders   [(s, δ)]                     at each border the state, and the gradient of all loss to come
"""

import contextlib
import csv
import datetime
import json
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "experiments"
LOGS = HERE / "logs"
sys.path.insert(0, str(ROOT))
import train                                                            # noqa: E402
from qrnn import QRNN                                                   # noqa: E402


# ----------------------------------------------------------------------------------------------------- a log

def read(path):
    """The rows of a log, {column: string}; none where there is no log."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    """Write a log beside the old one and rename it over. The columns are those of the first row, by name."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def run(log, function, cases):
    """Call function(case) -> rows for each case that the log lacks, and say how much is left.

    A case is {column: value}. Each row begins with the columns of its case.
    """
    rows, began = read(log), time.monotonic()
    done = {tuple(row[name] for name in case) for case in cases[:1] for row in rows}
    left = [case for case in cases if tuple(map(str, case.values())) not in done]
    print(f"{log.name}: {len(left)} of {len(cases)} cases to do", flush=True)
    for n, case in enumerate(left, 1):
        rows += function(case)
        write(log, rows)
        note_origin(log.with_suffix(".json"))
        seconds = (time.monotonic() - began) / n * (len(left) - n)
        last = (f"{name} {value}" for name, value in rows[-1].items())
        print(f"{n} of {len(left)}, {datetime.timedelta(seconds=int(seconds))} left:", *last, flush=True)


def note_origin(path):
    """Add this command and this machine to the JSON file of a log."""
    notes = json.loads(path.read_text()) if path.exists() else []
    command = " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])
    note = {"command": command, "torch": torch.__version__, "python": platform.python_version(),
            "machine": f"{machine()}, {torch.get_num_threads()} threads"}
    if note not in notes:
        path.write_text(json.dumps([*notes, note], indent=1) + "\n")


def machine():
    """The GPU's name, or the processor's and whether it multiplies bf16 natively: then train.py does."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo, name = Path("/proc/cpuinfo"), platform.processor()
    if cpuinfo.exists() and "model name" in cpuinfo.read_text():
        name = cpuinfo.read_text().split("model name")[1].split("\n")[0].strip("\t :")
    with train.pick_device("cpu", "auto")[1]:
        return f"{name} {'with' if torch.is_autocast_enabled('cpu') else 'without'} bf16"


# ---------------------------------------------------------------------- a model, and gradients across borders

class Reader(nn.Module):
    """Embedding -> one QRNN layer -> decoder, called as a LanguageModel is.

    forget: added to the biases of the forget gates; with 2 they begin at about sigmoid(2).
    """

    def __init__(self, vocabulary_size, embedding_size, hidden_size, forget=0.0):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.rnn = QRNN(embedding_size, hidden_size)
        self.decoder = nn.Linear(hidden_size, vocabulary_size)
        with torch.no_grad():
            self.rnn.layers[0].bias[hidden_size:2 * hidden_size] += forget

    def forward(self, tokens, targets, state=None):
        """Returns (nll, 0.0, state). The loss is that of the last len(targets) tokens.

        nll is a sum over the targets that are not -100, divided by T B: the unit of dni.py.
        """
        h, state = self.rnn(self.embedding(tokens), state)
        logits = self.decoder(h[-len(targets):]).to(h.dtype).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum") / targets.numel(), 0.0, state


def full_update(model, optimizer, recent, clip, autocast=contextlib.nullcontext()):
    """An update from the loss of the last of the `recent` chunks, backpropagated through all of them.

    Returns the state after it. The chunks before the last are read again, with the weights of today.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast:
        nll, _, state = model(torch.cat([x for x, _, _ in recent]), recent[-1][1], recent[0][2])
    nll.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return train.detach_state(state)


def future_gradients(model, inputs, targets, T):
    """The borders of a text in chunks of T, [(s, δ)]: lists of (B, H), by backpropagation without a cut.

    δ is the gradient of one stream's summed loss, from the border to the end of the text.
    """
    state, loss, borders = None, 0.0, []
    for x, y in zip(inputs.split(T), targets.split(T)):
        if state:
            borders.append([c for c, _ in state])
            for c in borders[-1]:
                c.retain_grad()
        nll, _, state = model(x, y, state)
        loss = loss + nll * x.numel()
    loss.backward()
    return [([c.detach() for c in s], [c.grad for c in s]) for s in borders]
