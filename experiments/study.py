"""What the studies share: logs that grow by whole cases, a small model, and gradients that cross borders.

A log is a CSV file. The rows of a case are written when it has ended. So a study that was stopped can be
resumed: a case that is in the log is not done again. A JSON file beside it says what made it.
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
import train  # noqa: E402
from qrnn import QRNN  # noqa: E402


def read_log(path):
    """The rows of a log, {column: string}; none where there is no log."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_log(path, rows):
    """Write a log beside the old one and rename it over. Its columns are those of all rows, by name."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def do_cases(log, function, cases):
    """Call function(case) -> rows for each case that the log lacks, and say how much is left.

    A case is {column: value}. Each row begins with the columns of its case.
    """
    rows, note, began = read_log(log), log.with_suffix(".json"), time.monotonic()
    done = {tuple(row[name] for name in case) for case in cases[:1] for row in rows}
    left = [case for case in cases if tuple(map(str, case.values())) not in done]
    print(f"{log.name}: {len(left)} of {len(cases)} cases to do", flush=True)
    origin = {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "machine": machine(),
    }
    for n, case in enumerate(left, 1):
        rows += function(case)
        write_log(log, rows)
        origins = json.loads(note.read_text()) if note.exists() else []
        if origin not in origins:
            note.write_text(json.dumps([*origins, origin], indent=1) + "\n")
        seconds = int((time.monotonic() - began) / n * (len(left) - n))
        print(
            f"{n} of {len(left)}, {datetime.timedelta(seconds=seconds)} left:", *rows[-1].values()
        )


def machine():
    """The GPU's name; or the processor's, and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    name = cpuinfo.partition("model name\t: ")[2].partition("\n")[0]
    return f"{name or platform.processor()}, {torch.get_num_threads()} threads"


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
            self.rnn.layers[0].bias[hidden_size : 2 * hidden_size] += forget

    def logits(self, tokens, state=None):
        h, state = self.rnn(self.embedding(tokens), state)
        return self.decoder(h).to(h.dtype), state

    def forward(self, tokens, targets, state=None):
        """Returns (nll, 0.0, state). The loss is that of the last len(targets) tokens.

        nll is a sum over the targets that are not -100, divided by T B: the unit of dni.py.
        """
        logits, state = self.logits(tokens, state)
        logits = logits[-len(targets) :].flatten(0, 1)
        return (
            F.cross_entropy(logits, targets.flatten(), reduction="sum") / targets.numel(),
            0.0,
            state,
        )


def full_update(model, optimizer, recent, clip, autocast=contextlib.nullcontext()):
    """An update from the loss of the last of the `recent` chunks, [(inputs, targets, the state before)], that
    goes back through all of them: they are read again. Returns the state after the last.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast:
        nll, _, state = model(torch.cat([x for x, _, _ in recent]), recent[-1][1], recent[0][2])
    nll.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return train.detach_state(state)
