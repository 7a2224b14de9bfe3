"""SGDR: a learning rate that falls along a cosine and restarts warm, in runs of growing length.

With a high rate the weights move far. With a low one they settle near a minimum of the loss. The
time from one restart to the next is called a run. In each run the rate falls from high to low. A
restart is warm: it raises the rate again and keeps the weights. So training may leave the minimum
that it has found, and look for another from there.

Papers
    SGDR         Loshchilov, Hutter 2016, "SGDR: Stochastic Gradient Descent with Warm Restarts",
                 arXiv 1608.03983, Eq. 5
    Alternating  Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language
                 Modeling", section 2.1

Glossary
    name       symbol       unit       meaning
    run        -            -          the time from the start, or a restart, to the next restart
    index      i            -          of the run: 0 before the first restart, then 1, 2, ...
    elapsed    E_cur        epochs     since the run began
    length     E_i          epochs     of run i: mult^i * base
    base       E_base       epochs     length of run 0
    eta_max    eta_max_i    -          learning rate at the beginning of run i
    eta_min    eta_min_i    -          learning rate at its end

    eta = eta_min_i + 1/2 (eta_max_i - eta_min_i) (1 + cos(pi E_cur / E_i))

Not here: momentum schedules, warm-up, averaging of the weights at the end of a run.

Run `python sgdr.py` to see the schedule for E_base = 5, as in the authors' code. (The paper
searched for E_base.)
"""

import itertools
import math
import signal
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler


class Run(NamedTuple):
    """A moment of a training, by the run that it lies in."""

    index: int  # i
    elapsed: float  # E_cur, epochs
    length: float  # E_i, epochs


def run_at(epoch, base=1, mult=2):
    """A moment as Run(index, elapsed, length): in which run, how long since it began, its length.

    epoch: epochs since the beginning of training, >= 0, fractional or whole.
    base: length of run 0 in epochs, above 0.
    mult: run i lasts base * mult^i epochs; at least 1. With mult 2, as in the paper, and base 5
        the restarts are at 5, 15, 35, 75, 155, 315.
    A moment that differs from a restart by rounding alone counts as the restart. (For base 0.1 run
    2 begins at 0.3, computed as 0.1 + 0.2 = 0.30000000000000004.) Give Python's floats, because
    float32 has larger rounding errors. Runs are counted one by one, so a moment after very many
    runs takes long.
    Raises ValueError for a number out of its range.
    """
    if not (0 <= epoch < math.inf and base > 0 and mult >= 1):  # nan is in no range
        raise ValueError(
            f"epoch >= 0, base > 0 and mult >= 1 are needed, got {epoch}, {base}, {mult}"
        )
    start = 0
    length = base
    for i in itertools.count():  # leave run 0 behind, then run 1, ...
        end = start + length
        if epoch < end and not math.isclose(epoch, end, rel_tol=1e-12):
            return Run(i, max(epoch - start, 0), length)
        start = end
        length = length * mult


class SGDR(LRScheduler):
    """The schedule above as a PyTorch scheduler.

    base, mult: as in `run_at`. With base = math.inf there is one run without end, whose rate stays
        at eta_max.
    eta_min: a number, 0 or more, for all runs, or a sequence with one number a run, whose last
        serves all later runs. All parameter groups get the same.
    eta_max: likewise. None takes each parameter group's own learning rate (its `initial_lr`, if a
        scheduler was there before). No check asks whether it is above eta_min.
    last_epoch: as in PyTorch's schedulers.
    Numbers may be those of numpy or torch. They are kept as floats, so that torch.load's default
    reads a checkpoint of the state_dict.
    Raises ValueError for base and mult out of their range, and for bounds that are negative or not
    finite.

    step(epoch) sets the clock. To follow the cosine within an epoch, call

        schedule.step(epoch + batch / batches)

    before each batch. step() adds 1 to the clock. If it is called once a batch (by Lightning with
    interval="step", say), the clock and base are in batches.

    With one eta_max and one eta_min for all runs, and mult 1 or 2, the rates equal those of
    torch.optim.lr_scheduler.CosineAnnealingWarmRestarts to the last bit. (If step() follows a
    step(epoch) with a fraction, the rates agree to rounding only.)

    To resume, make SGDR first. Then load the optimiser's state_dict, and SGDR's.

    `run.index` tells which run it is. To alternate, train.py takes real gradients in even runs and
    synthetic ones in odd runs.
    """

    def __init__(self, optimizer, base=1, mult=2, eta_min=0.0, eta_max=None, last_epoch=-1):
        self.base = float(base)
        self.mult = float(mult)
        self.eta_min = floats("eta_min", eta_min)
        self.eta_max = None if eta_max is None else floats("eta_max", eta_max)
        super().__init__(optimizer, last_epoch)
        self.base_lrs = [float(rate) for rate in self.base_lrs]

    @property
    def run(self):
        """The Run of the last step. (Within a SequentialLR there is none before SGDR's turn.)"""
        return run_at(self.last_epoch, self.base, self.mult)

    def get_lr(self):
        """The rates of the last step, one a parameter group. PyTorch's base class calls this."""
        return self.rates_at(self.run)

    def rates_at(self, run):
        """The rates at a moment of a Run, one a parameter group."""
        i, elapsed, length = run
        rates = []
        for group_rate in self.base_lrs:
            low = per_run(self.eta_min, i)
            high = float(group_rate) if self.eta_max is None else per_run(self.eta_max, i)
            # eta = eta_min_i + (eta_max_i - eta_min_i) (1 + cos(pi E_cur / E_i)) / 2
            rates.append(low + (high - low) * (1 + math.cos(math.pi * elapsed / length)) / 2)
        return rates

    def step(self, epoch=None):
        """Set the rates for `epoch`, fractional or whole, >= 0. Without `epoch`: one epoch further.

        Raises ValueError, and changes nothing, for a negative epoch, or if the optimiser has got
        more parameter groups than it had.
        """
        epoch = float(self.last_epoch + 1 if epoch is None else epoch)
        rates = self.rates_at(run_at(epoch, self.base, self.mult))
        groups = self.optimizer.param_groups
        if len(rates) != len(groups):
            raise ValueError(
                f"the optimiser has {len(groups)} groups, and SGDR was made for {len(rates)}"
            )
        self.last_epoch = epoch
        self._last_lr = rates  # what get_last_lr() returns
        for group, rate in zip(groups, rates):
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(rate)  # in place, for a captured CUDA graph reads this tensor
            else:
                group["lr"] = rate


def floats(name, bound):
    """A bound as a float, or as a list of floats with one a run. `name` is for the error."""
    numbers = torch.as_tensor(bound, dtype=torch.float64, device="cpu")
    right = (numbers >= 0) & numbers.isfinite()
    if numbers.dim() > 1 or numbers.numel() == 0 or not right.all():
        raise ValueError(
            f"{name}: a finite number, 0 or more, or one for each run, please; got {bound}"
        )
    return numbers.tolist()


def per_run(bound, i):
    """The bound of run i, from one number for all runs or from a sequence with one a run."""
    if torch.as_tensor(bound).dim() == 0:
        return float(bound)
    last = len(bound) - 1
    return float(bound[min(i, last)])


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # end quietly where nobody reads on: python sgdr.py | head -1
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print("E_base = 5: run i lasts 5 * 2^i epochs. A warm restart keeps the weights.")
    print("The rate falls from 1e-3 to 0 in each run. One line an epoch:")
    schedule = SGDR(torch.optim.SGD([torch.zeros(1)], lr=1e-3), base=5)
    for epoch in range(36):
        schedule.step(epoch)
        i, elapsed, length = schedule.run
        [eta] = schedule.get_last_lr()
        bar = "#" * round(eta * 5e4)
        print(f"{epoch:3d}  run {i}  {elapsed:2.0f} of {length:2.0f} epochs  {eta:.6f}  {bar}")
