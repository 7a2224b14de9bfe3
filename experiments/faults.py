"""What can go wrong, on purpose: a training is killed, its files are damaged, its disk is filled.

    python experiments/faults.py             everything; ends in a table
    python experiments/faults.py --kills 3   fewer kills, all the rest

A kill or a damage is SURVIVED if the training, resumed, ends in the log and the weights of one that nothing
happened to, bit for bit. A full disk must be told in one line, and leave the files before it whole. The exit
status is 1 if anything was not survived. POSIX systems only.
"""

import argparse
import concurrent.futures
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
MODES = (["bptt"], ["dni"], ["restart", "--gradient", "synthetic"], ["alternating", "--e-base", 1])
SMALL = ["--hidden-size", 24, "--embedding-size", 16, "--batch-size", 4, "--bptt", 10, "--jitter",
         "--valid-batch-size", 2, "--epochs", 7, "--checkpoint-every", 0.005, "--device", "cpu"]


def start(*arguments, processes=1, limit=None):
    """train.py at work, in one process or several.

    limit: the largest file it may write, in bytes, in place of a full disk.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), TRAIN, *map(str, arguments)]
    limited = limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=limited)


def train(*arguments, **options):
    """train.py to its end."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def result(folder):
    """What a training came to: its log without the seconds, and its last weights."""
    log = [line.rsplit(",", 1)[0] for line in (folder / "log.csv").read_text().splitlines()]
    return log, torch.load(folder / "last.pt", weights_only=True)["model"]


def same(folder, other):
    (log, weights), (other_log, other_weights) = result(folder), result(other)
    return log == other_log and all(torch.equal(w, other_weights[name]) for name, w in weights.items())


def one_line(status, err):
    """Whether train.py ended as at a user's mistake."""
    return status == 2 and err.count("\n") == 1 and err.startswith("train.py: error: ")


def make_corpus(folder):
    """A text of 1,230 words to train on, which obeys a rule."""
    folder.mkdir()
    for split, lines in (("train", 30), ("valid", 4), ("test", 4)):
        text = [" ".join(f"w{(i * i + j) % 23}" for j in range(41)) + "\n" for i in range(lines)]
        (folder / f"{split}.txt").write_text("".join(text))
    return folder


# ------------------------------------------------------------------------------------------------- the faults

def mode_of(i, processes):
    """The mode of the i-th training to be killed, and what belongs to it."""
    return MODES[i % len(MODES)] if processes == 1 else MODES[-1]


def kill(work, corpus, i, number, processes=1):
    """A training killed by signal `number` at a random moment, and resumed. None, or what was wrong.

    Of several processes SIGKILL hits one; the other signals go to torchrun, which hands them on.
    """
    draw, mode = random.Random(1000 * number + i), mode_of(i, processes)
    whole = work / (mode[0] if processes == 1 else "two")
    folder = work / f"killed{number}-{processes}-{i}"
    fresh = ["--data", corpus, "--mode", *mode, *SMALL, "--out", folder]
    process = start(*fresh, processes=processes)
    # After a part of what the undisturbed training took.
    moment = draw.uniform(0.4, 1.0) * float((whole / "took").read_text())
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        victims = [process.pid]
        if processes > 1 and number == signal.SIGKILL:
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
            victims = children.stdout.split() or victims
        os.kill(int(draw.choice(victims)), number)
        process.communicate()
    if processes == 1 and process.returncode not in (0, -number, 128 + number):
        return f"status {process.returncode}"
    begun = (folder / "settings.json").exists()
    again = train(*(["--resume", folder] if begun else fresh), processes=processes)
    if again.returncode:
        return again.stderr
    return None if same(folder, whole) else "another end"


def damages(good, other):
    """(name, bytes in place of a good checkpoint): some of it, another model's, a pickle with code in it."""
    class Code:
        def __reduce__(self):
            return os.mkdir, ("executed",)
    spots = random.Random(5)
    for part in (0.0, 0.01, 0.25, 0.5, 0.75, 0.999):
        yield f"cut to {part:.1%}", good[:int(part * len(good))]
    for _ in range(10):
        spot = spots.randrange(len(good) // 20, len(good) * 9 // 10)
        yield f"byte {spot} flipped", good[:spot] + bytes([good[spot] ^ 0xFF]) + good[spot + 1:]
    yield "zeros", bytes(len(good))
    yield "a text", b"not a checkpoint\n"
    yield "a pickle with code", pickle.dumps(Code())
    yield "another model's", other


def damage(work, name, content):
    """The newest checkpoint replaced by `content`: the one before is used, which leads to the same end."""
    folder = work / f"damaged, {name}"
    shutil.copytree(work / "alternating", folder)
    (folder / "last.pt").write_bytes(content)
    again = train("--resume", folder)
    if again.returncode or "going on from" not in again.stderr or Path("executed").exists():
        return again.stderr or "damage not noticed"
    return None if same(folder, work / "alternating") else "another end"


def full_disk(work, corpus, limit):
    """No file may grow beyond `limit` bytes: one line, and what was there before is whole.

    With room again, the same end.
    """
    folder = work / f"full-{limit}"
    train("--data", corpus, "--mode", *MODES[-1], *SMALL, "--out", folder, "--max-steps", 50)
    before = (folder / "last.pt").read_bytes()
    again = train("--resume", folder, limit=limit)
    unharmed = (folder / "last.pt").read_bytes() == before and not list(folder.glob("*.partial"))
    if not (one_line(again.returncode, again.stderr) and unharmed):
        return again.stderr or "not noticed"
    again = train("--resume", folder, "--max-steps", 0)
    well = again.returncode == 0 and same(folder, work / "alternating")
    return None if well else again.stderr or "another end"


# -------------------------------------------------------------------------------------------------------- all

def undisturbed(corpus, mode, out, processes=1):
    """A training that nothing happens to, saved between epochs only; the file `took` says its seconds."""
    started = time.monotonic()
    process = train("--data", corpus, "--mode", *mode, *SMALL, "--checkpoint-every", 60, "--out", out,
                    processes=processes)
    if process.returncode:
        sys.exit(process.stderr)
    (out / "took").write_text(str(time.monotonic() - started))


def tell(title, name, wrong):
    outcome = "survived" if wrong is None else "NOT SURVIVED: " + " ".join(wrong.split())[-300:]
    print(f"{title}: {name}: {outcome}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Kill, damage and fill; does the training survive?")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table, survived = [], True
    with tempfile.TemporaryDirectory() as work, concurrent.futures.ThreadPoolExecutor(2) as pool:
        work = Path(work)
        corpus = make_corpus(work / "corpus")
        os.chdir(work)
        list(pool.map(lambda mode: undisturbed(corpus, mode, work / mode[0]), MODES))
        undisturbed(corpus, MODES[-1], work / "two", 2)
        other = work / "other"
        train("--data", corpus, *SMALL, "--hidden-size", 12, "--epochs", 1, "--out", other)

        def each(title, function, cases):
            """function(*case) -> None or what was wrong, for each (name, case)."""
            nonlocal survived
            cases, failures = list(cases), 0
            for (name, _), wrong in zip(cases, pool.map(lambda case: function(*case[1]), cases)):
                tell(title, name, wrong)
                failures += wrong is not None
            table.append((title, len(cases), len(cases) - failures))
            survived = survived and not failures

        def kills(title, number, tries, processes=1):
            each(title, kill, [(f"{i}, {mode_of(i, processes)[0]}", (work, corpus, i, number, processes))
                               for i in tries])

        tries = range(arguments.seed, arguments.seed + arguments.kills)
        kills("killed (SIGKILL)", signal.SIGKILL, tries)
        kills("asked to stop (SIGTERM)", signal.SIGTERM, range(4))
        kills("interrupted (SIGINT)", signal.SIGINT, range(4))
        kills("one of two processes killed", signal.SIGKILL, range(max(1, arguments.kills // 10)), 2)
        kills("two processes asked to stop", signal.SIGTERM, range(1), 2)
        good, stranger = ((folder / "last.pt").read_bytes() for folder in (work / "alternating", other))
        each("newest checkpoint damaged", damage,
             [(name, (work, name, content)) for name, content in damages(good, stranger)])
        each("disk full", full_disk,
             [(f"at {limit:,} bytes", (work, corpus, limit)) for limit in (100, 20_000)])
        os.chdir("/")
    print("\n| fault | times | survived |\n|---|---|---|")
    for line in table:
        print("| {} | {} | {} |".format(*line))
    return 0 if survived else 1


if __name__ == "__main__":
    sys.exit(main())
