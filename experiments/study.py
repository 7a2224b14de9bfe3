"""What the studies share: logs, the best rate of a search, a small model, BPTT through many chunks.

A log is a CSV file. The rows of a case are written together, when the case has ended. So a study
that was stopped can be resumed: a case that is in the log is not done again. A JSON file beside the
log says which commands wrote it, and on which machines.

A script imports this file first: it puts the folder above on the module path.
"""

import contextlib
import csv
import datetime
import json
import platform
import re
import signal
import statistics
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
from data import UserError  # noqa: E402
from qrnn import QRNN  # noqa: E402

# -------------------------------------------------------------------------------------------- logs


def read_log(path):
    """The rows of a log, [{column: string}]; an empty list where there is no log."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_log(path, rows):
    """Write rows, [{column: value}], to a new file, which then replaces the old log at once.

    The columns are those of all rows; a row may lack some.
    """
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def holds(rows, case):
    """Whether one of the rows of a log, whose values are strings, is of this case."""
    return any(all(row[name] == str(value) for name, value in case.items()) for row in rows)


def machine():
    """The name of the GPU; without a GPU that of the processor, and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor()
    if sys.platform == "linux":
        found = re.search(r"^model name\t: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            name = found[1]
    return f"{name}, {torch.get_num_threads()} threads"


def add_origin(log):
    """Add this command, torch and machine to the JSON file beside the log, unless it has them."""
    origin = {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "machine": machine(),
    }
    path = log.with_suffix(".json")
    origins = []
    if path.exists():
        origins = json.loads(path.read_text())
    if origin not in origins:
        path.write_text(json.dumps([*origins, origin], indent=1) + "\n")


def do_cases(log, function, cases):
    """Do each case that the log lacks, add its rows to the log, and print how much time is left.

    log: path of the CSV file.
    function: function(case) returns rows, [{column: value}], that begin with the case's columns.
    cases: [{column: value}].
    """
    rows = read_log(log)
    left = [case for case in cases if not holds(rows, case)]
    print(f"{log.name}: {len(left)} of {len(cases)} cases to do", flush=True)
    began = time.monotonic()
    for n, case in enumerate(left, 1):
        rows += function(case)
        write_log(log, rows)
        add_origin(log)
        seconds_a_case = (time.monotonic() - began) / n
        time_left = datetime.timedelta(seconds=int(seconds_a_case * (len(left) - n)))
        print(f"{n} of {len(left)}, {time_left} left:", *rows[-1].values())


def run(main):
    """Run the main of a study. What a user can mend ends it in one line, with exit status 2.

    SIGTERM ends it as Ctrl-C does. So a train.py that it waits for in subprocess.run ends, too.
    """
    script = Path(sys.argv[0]).name
    before = signal.signal(signal.SIGTERM, train.terminate)
    try:
        main()
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted; the same command does what is left", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def best_rate(rows, column, best, times):
    """The rate whose rows have the best mean of a column; "" where there is none.

    rows: of a log, all of one kind, with a column `rate`.
    best: max or min.
    times: how many rows a rate must have. A rate with another number has not been tried in full.
    """
    values = {}  # {rate: its values}
    for row in rows:
        values.setdefault(row["rate"], []).append(float(row[column]))
    means = {rate: statistics.mean(its) for rate, its in values.items() if len(its) == times}
    if not means:
        return ""
    return float(best(means, key=means.get))


# ------------------------------------------------------- a model, and gradients that cross borders


class Reader(nn.Module):
    """Embedding -> one QRNN layer -> decoder, called as a LanguageModel is.

    forget: added to the biases of the forget gates. With 2 the gates begin at about sigmoid(2).
    """

    def __init__(self, vocabulary_size, embedding_size, hidden_size, forget=0.0):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.rnn = QRNN(embedding_size, hidden_size)
        self.decoder = nn.Linear(hidden_size, vocabulary_size)
        with torch.no_grad():
            self.rnn.layers[0].bias[hidden_size : 2 * hidden_size] += forget

    def logits(self, tokens, state=None):
        """tokens: (T, B) of int64. Returns the logits, (T, B, vocabulary_size), and the state."""
        h, state = self.rnn(self.embedding(tokens), state)
        return self.decoder(h).to(h.dtype), state

    def forward(self, tokens, targets, state=None):
        """Returns (nll, 0.0, state): the loss, no penalty, and the state after the last token.

        tokens: (T, B) of int64.
        targets: (T', B) of int64, those of the last T' tokens; -100 for a token that is not scored.

        nll is a sum over the targets that are scored, divided by T' B. dni.py counts in this unit.
        """
        logits, state = self.logits(tokens, state)
        logits = logits[-len(targets) :].flatten(0, 1)  # (T' B, vocabulary_size)
        nll = F.cross_entropy(logits, targets.flatten(), reduction="sum") / targets.numel()
        return nll, 0.0, state


def full_update(model, optimizer, recent, clip, autocast=contextlib.nullcontext()):
    """One update from the loss of the last chunk, backpropagated through all the recent chunks.

    recent: [(inputs, targets, state before)] of successive chunks; inputs and targets are (T, B).
        The chunks are read again, as one.
    clip: the largest norm of the gradient.

    Returns the state after the last chunk, as train.detach_state does.
    """
    tokens = torch.cat([inputs for inputs, _, _ in recent])
    _, targets, _ = recent[-1]
    _, _, state = recent[0]
    optimizer.zero_grad(set_to_none=True)
    with autocast:
        nll, _, state = model(tokens, targets, state)
    nll.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return train.detach_state(state)
