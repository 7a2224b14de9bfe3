"""SGDR: a learning rate that falls along a cosine and restarts warm, in runs of doubling length.

With a high rate the weights move far. With a low one they settle near a minimum of the loss. Each run has
first the one and then the other. A restart is warm: it raises the rate again and keeps the weights, so that
training may leave the minimum it has found and look for another from there.

Papers
    SGDR         Loshchilov, Hutter 2016, "SGDR: Stochastic Gradient Descent with Warm Restarts",
                 arXiv 1608.03983, Eq. 5
    Alternating  Shang, Zhang 2019, "Alternating Synthetic and Real Gradients for Neural Language
                 Modeling", section 2.1

Glossary
    name       symbol       unit       meaning
    index      i            -          of the run: 0 before the first restart, then 1, 2, ...
    elapsed    E_cur        epochs     since the last restart
    length     E_i          epochs     of run i: mult^i * base
    base       E_base       epochs     length of run 0
    eta_min    eta_min_i    -          learning rate at the end of run i
    eta_max    eta_max_i    -          learning rate at its beginning

    eta = eta_min_i + 1/2 (eta_max_i - eta_min_i) (1 + cos(pi E_cur / E_i))

Not here: momentum schedules, warm-up, averaging of the weights at the end of a run.

Run `python sgdr.py` to see the paper's schedule with E_base = 5.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler


class Run(NamedTuple):
    index: int  # i
    elapsed: float  # E_cur, epochs
    length: float  # E_i, epochs


def run_at(epoch, base=1, mult=2):
    """The run that a moment lies in, how long it has lasted, and how long it is: Run(i, E_cur, E_i).

    epoch: epochs since the beginning of training, >= 0, fractional or whole.
    base, mult: run i lasts base * mult^i epochs, so that base 5 restarts at 5, 15, 35, 75, 155, 315.
    A moment that differs from a restart by rounding alone counts as the restart. (For base 0.1 run 2 begins
    at 0.3, computed as 0.1 + 0.2 = 0.30000000000000004.)
    Raises ValueError for a negative epoch, base <= 0 or mult < 1.
    """
    if not 0 <= epoch < math.inf or base <= 0 or mult < 1:
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

    eta_min: a number, or a sequence with one a run (the last serves all later runs).
    eta_max: likewise; None takes each parameter group's own learning rate. Not checked to be above eta_min.
    base, mult: as in `run_at`. A base of math.inf is one run without end: the rate never falls.
    last_epoch: as in PyTorch's schedulers.

    step() adds 1 to the clock; step(epoch) sets it, say to epoch + batch / batches before each batch. Where
    step() is called after each batch, as Lightning does, the clock and base count batches. With one rate for
    all runs, and mult 1 or 2, the values equal torch.optim.lr_scheduler.CosineAnnealingWarmRestarts to the
    last bit, and to rounding where step() goes on from a fraction. To resume, make SGDR first, then load the
    optimiser's state_dict and SGDR's. The alternation of gradients reads `run.index`.
    """

    def __init__(self, optimizer, base=1, mult=2, eta_min=0.0, eta_max=None, last_epoch=-1):
        self.base, self.mult = base, mult
        self.eta_min, self.eta_max = eta_min, eta_max
        super().__init__(optimizer, last_epoch)

    @property
    def run(self):
        """The Run of the last step."""
        return run_at(self.last_epoch, self.base, self.mult)

    def get_lr(self):
        return self.rates_at(self.run)

    def rates_at(self, run):
        i, elapsed, length = run
        rates = []
        for group_rate in self.base_lrs:
            low = per_run(self.eta_min, i)
            high = float(group_rate) if self.eta_max is None else per_run(self.eta_max, i)
            # eta = eta_min_i + (eta_max_i - eta_min_i) (1 + cos(pi E_cur / E_i)) / 2
            rates.append(low + (high - low) * (1 + math.cos(math.pi * elapsed / length)) / 2)
        return rates

    def step(self, epoch=None):
        """Set the rates for `epoch`, fractional or whole, >= 0. Without `epoch`: one epoch further."""
        epoch = self.last_epoch + 1 if epoch is None else epoch
        rates = self.rates_at(run_at(epoch, self.base, self.mult))
        groups = self.optimizer.param_groups
        if len(rates) != len(groups):
            raise ValueError(
                f"the optimiser has {len(groups)} groups, and SGDR was made for {len(rates)}"
            )
        self.last_epoch, self._last_lr = epoch, rates  # now that nothing can be refused
        for group, rate in zip(groups, rates):
            if torch.is_tensor(group["lr"]):  # a captured CUDA graph reads it
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def per_run(bound, i):
    """The bound of run i, from one number for all runs or a sequence whose last serves the later runs."""
    return float(bound if torch.as_tensor(bound).dim() == 0 else bound[min(i, len(bound) - 1)])


if __name__ == "__main__":
    print(
        "E_base = 5: run i lasts 5 * 2^i epochs. A warm restart raises the rate and keeps the weights.\n"
        "Rate from 1e-3 to 0, one line an epoch; the gradients are those of --mode alternating:"
    )
    schedule = SGDR(torch.optim.SGD([torch.zeros(1)], lr=1e-3), base=5)
    for epoch in range(36):
        schedule.step(epoch)
        (i, elapsed, length), [eta] = schedule.run, schedule.get_last_lr()
        gradient = "synthetic" if i % 2 else "real"
        print(
            f"{epoch:3d}  run {i}, {gradient:9}  {elapsed:2.0f} of {length:2.0f} epochs  {eta:.6f}  "
            + "#" * round(eta * 5e4)
        )
