"""What the studies share: cases, each worked once, several at a time, in a log that grows by whole cases.

A log is a CSV file. Its first columns name a case, and the rows of a case are written when it has ended; so a
study that was stopped can be gone on with. Beside it, the JSON file of the same name says what machine and
command it comes from.
"""

import concurrent.futures
import csv
import datetime
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "experiments" / "logs"
sys.path.insert(0, str(ROOT))
from harness import checkpoints, machine                                # noqa: E402


def processor():
    """The processor's name, and whether it multiplies bf16 natively: then train.py does by default."""
    try:
        lines = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = lines[0].split(":")[1].strip()
    except (OSError, IndexError):
        name = platform.processor()
    with machine.pick_autocast("auto", "cpu"):
        return f"{name} {'with' if torch.is_autocast_enabled('cpu') else 'without'} bf16"


def read(path):
    """The rows of a log as dictionaries of strings; none where there is no log."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    lines = [rows[0], *(row.values() for row in rows)]
    with checkpoints.replacing(path) as file:
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())


def run(log, function, cases, jobs, **facts):
    """Call function(case) -> rows for each case that `log` lacks, in `jobs` processes.

    Cases and rows are dictionaries; a row begins with its case. facts: what else the JSON file is to say; a
    log is not gone on with where a fact that it tells has changed. A case that fails is told, and tried
    again the next time; the exit status is then 1.
    """
    rows, about, failed = read(log), log.with_suffix(".json"), 0
    history = json.loads(about.read_text()) if about.exists() else []
    changed = [f"{name} {entry[name]}, now {value}" for entry in history
               for name, value in facts.items() if entry.get(name, value) != value]
    if changed:
        sys.exit(f"{log} holds cases made with {'; '.join(changed)}: move it away first")
    done = {tuple(row[name] for name in cases[0]) for row in rows}
    cases = [case for case in cases if tuple(map(str, case.values())) not in done]
    print(f"{log.name}: {len(cases)} runs to do, {jobs} at a time", flush=True)
    started, threads = time.monotonic(), max(1, torch.get_num_threads() // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    command = " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])
    facts = {"command": command, "torch": torch.__version__, "python": platform.python_version(),
             "machine": f"{processor()}, {jobs} runs at a time, {threads} threads each", **facts}
    if torch.cuda.is_available():
        facts["machine"] = f"{torch.cuda.get_device_name()}, {jobs} runs at a time"
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            under_way = {pool.submit(function, case): case for case in cases}
            for n, future in enumerate(concurrent.futures.as_completed(under_way), 1):
                if future.exception():
                    failed += 1
                    print(f"{under_way[future]} failed: {future.exception()}", file=sys.stderr, flush=True)
                    continue
                rows += future.result()
                log.parent.mkdir(parents=True, exist_ok=True)
                write(log, rows)
                told = history + [facts] * (facts not in history)
                about.write_text(json.dumps(told, indent=1) + "\n")
                left = datetime.timedelta(seconds=int((len(cases) - n) * (time.monotonic() - started) / n))
                last = (f"{name} {value}" for name, value in rows[-1].items())
                print(f"{n}/{len(cases)}, {left} left:", *last, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit("stopped; the same command goes on")
    if failed:
        sys.exit(f"{failed} of {len(cases)} cases failed; the same command tries them again")


def train_run(case, arguments, folder):
    """train.py with `arguments` in `folder`, or going on there; it refuses if the arguments were others.

    Returns the rows of its log, each with its case and the test perplexity.
    """
    where = ["--out", folder]
    if checkpoints.begun(folder):
        where = ["--resume", folder]
        if arguments[0] == "--preset":                                  # which a checkpoint knows
            arguments = arguments[2:]
    command = [sys.executable, ROOT / "train.py", *map(str, [*arguments, *where])]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{case}: {process.stderr.strip()[-500:]}")
    tested = process.stdout.split()[-1]
    return [{**case, **row, "test_perplexity": tested} for row in read(folder / "log.csv")]
