"""The one object that train.py talks to: it saves, resumes, logs, stops, and shows progress.

It knows of the training what it is handed: a `place` that says how far it is, parts with a state_dict, and
which attributes belong to streams or are sums over them. What they mean is none of its business.
"""

import csv
import datetime
import io
import math
import shutil
import signal
import sys
import time

import torch

from harness import checkpoints, machine, processes
from harness.command_line import Interrupted, NotFinite, UserError


class Keeper:
    """Keeps one training alive. `open` its folder first; then train in a with statement, which minds signals.

    settings: has epochs, batch_size, max_steps, checkpoint_every.
    place: its attributes, numbers, are saved. It has epoch (epochs done), start (steps read of the one under
        way) and total (the loss, summed over these steps). str(place) describes it.
    parts: {name: thing with state_dict and load_state_dict}, one of them "model".
    divided: [(object, attribute)], states whose tensors have the streams in the last dimension but one.
    sums: [(object, attribute)], sums over streams. generators: random generators.
    length: steps of an epoch. text: a fingerprint of what is learned from.
    hint: what to try where the loss is not finite.
    """

    def __init__(self, settings, place, parts, divided, sums, generators, device, length, text, hint=""):
        self.settings, self.place, self.parts, self.divided, self.sums = settings, place, parts, divided, sums
        self.generators, self.device, self.length = generators, device, length
        self.text, self.hint = text, hint
        self.rank, self.processes = processes.who()
        self.folder, self.signal, self.steps, self.seen, self.enough = None, 0, 0, 0.0, False
        # In every checkpoint, beside the place: the best validation loss, the rows of log.csv, seconds so
        # far.
        self.best, self.rows, self.seconds = math.inf, [], 0.0
        for module in self.modules().values():
            processes.average_gradients(module)

    def modules(self):
        return {name: part for name, part in self.parts.items() if isinstance(part, torch.nn.Module)}

    # --------------------------------------------------------------------------------- beginning and resuming

    def open(self, out, resume, name):
        """Take the folder `out`, or a new one, `name`; with `resume`, go on from the checkpoint there."""
        if not self.rank:
            out = resume if resume and out == resume else checkpoints.output_folder(out, name)
            self.lock = checkpoints.lock(out)                           # held until the process ends
        if self.processes > 1:
            torch.distributed.barrier()                             # process 0 has the lock: now all may read
        self.folder, begun = out, resume and checkpoints.begun(resume)
        content = self.take_up(resume) if begun else None
        if self.rank:
            return
        if resume and not begun:
            print(f"train.py: {resume} was cut off before its first checkpoint; starting it from the "
                  "beginning", file=sys.stderr)
        checkpoints.write_settings(out, self.settings)
        if begun and out != resume:
            checkpoints.save(content, out / "last.pt")
            if (resume / "best.pt").exists():
                shutil.copyfile(resume / "best.pt", out / "best.pt")
        self.write_log()                                                # it may be ahead of the checkpoint
        if begun and self.place.epoch >= self.settings.epochs:
            print(f"{resume} has done its {self.place.epoch} epochs, so it is only tested; "
                  "ask for more with --epochs", flush=True)

    def take_up(self, folder):
        """Go on from the newest checkpoint in `folder`, which is returned."""
        content = checkpoints.read_newest(folder, self.settings, say=False)
        if content["text"] != self.text:
            raise UserError(f"{folder} was trained on another text than this; start a new training instead")
        checkpoints.restore(self.parts, content, folder / "last.pt")
        vars(self.place).update(content["place"])
        self.best, self.rows, self.seconds = content["best"], content["rows"], content["seconds"]
        for (thing, name), value in zip(self.divided, content["divided"]):
            setattr(thing, name, processes.own_share(value, self.device))
        same = len(content["sums"]) == self.processes                   # else each goes on from the mean
        for i, (thing, name) in enumerate(self.sums):
            values = [sums[i] for sums in content["sums"]]
            value = values[self.rank] if same else sum(values) / len(values)
            setattr(thing, name, processes.each(lambda t: t.to(self.device), value))
        if self.rank < len(content["random"]):                          # there may be more processes now
            machine.set_random_state(content["random"][self.rank], self.device, self.generators)
        return content

    def save(self):
        """Write last.pt: all that `take_up` needs. The processes meet here. May raise NotFinite instead."""
        self.check_weights()
        random = machine.random_state(self.device, self.generators)
        mine = *([getattr(thing, name) for thing, name in them] for them in (self.divided, self.sums)), random
        states, sums, randoms = zip(*processes.gathered(mine))
        apart = [name for thing, name in [*self.divided, *self.sums] if thing is self.place]
        self.keep("last.pt", "previous.pt", random=randoms, divided=processes.side_by_side(states),
                  place={name: value for name, value in vars(self.place).items() if name not in apart},
                  sums=sums, best=self.best, rows=self.rows, seconds=self.elapsed(),
                  **{name: part.state_dict() for name, part in self.parts.items()})
        self.saved = time.monotonic()

    def check_weights(self):
        for name, module in self.modules().items():
            if not all(torch.isfinite(p).all() for p in module.parameters()):
                raise NotFinite(self.not_finite(f"a weight of {name}"))

    def average_sums(self):
        """Doing it twice changes nothing, and one may add to them afterwards: they are sums."""
        for thing, name in self.sums:
            setattr(thing, name, processes.mean(getattr(thing, name)))

    def keep(self, name, previous=None, **content):
        """Write a checkpoint into the folder, from process 0. previous: a name for the one it replaces."""
        if not self.rank:
            checkpoints.save({**content, "settings": vars(self.settings), "text": self.text},
                             self.folder / name, previous and self.folder / previous)

    # --------------------------------------------------------------------------------------- steps and epochs

    def __enter__(self):
        """From now on Ctrl-C (SIGINT) or SIGTERM is noted for step_done to look at; the next ends at once."""
        self.began = self.saved = self.shown = self.logged = time.monotonic()
        self.first = self.logged_steps = self.steps_read()
        signals = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, self.note) for number in signals}
        return self

    def note(self, number, _):
        self.signal = number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def steps_read(self):
        return self.place.epoch * self.length + self.place.start

    def elapsed(self):
        """Seconds of training so far, those before a resumption included."""
        return self.seconds + time.monotonic() - self.began

    def step_done(self):
        """After each step: show, check, save now and then. `enough` says whether --max-steps is reached.

        Raises NotFinite, or Interrupted after a signal. A GPU is asked for its loss one step late, not to
        wait for it.
        """
        self.steps += 1
        self.show()
        self.enough, within = self.steps == self.settings.max_steps, self.place.start < self.length
        due = (time.monotonic() - self.saved) / 60 >= self.settings.checkpoint_every
        late = self.device == "cuda" and within and not (self.signal or due or self.enough)
        bad = not math.isfinite(self.seen if late else self.place.total)
        self.seen = self.place.total
        stop, due, bad = processes.largest(self.signal, due, bad)
        if bad:
            raise NotFinite(self.not_finite("the loss"))
        if stop or ((due or self.enough) and within):
            self.save()
        if stop:
            raise self.interrupted(stop)

    def log(self, row):
        """Note a row {column: value} for log.csv, and show it with the speed since the one before."""
        seconds, steps = max(time.monotonic() - self.logged, 1e-9), self.steps_read() - self.logged_steps
        shown = "  ".join(f"{name} {value}" for name, value in row.items() if value == value)
        print(f"{self.clear()}{shown}  {steps * self.settings.batch_size / seconds:,.0f} tokens/s  "
              f"{seconds:.0f} s", flush=True)
        self.rows.append({**row, "seconds": round(self.elapsed(), 1)})
        self.logged, self.logged_steps = time.monotonic(), self.steps_read()
        self.write_log()

    def epoch_done(self, loss, row):
        """After each epoch: log, keep what is best, save. One that --max-steps ended early does not count.

        loss: of the validation text. row: as for `log`.
        Raises NotFinite, or Interrupted after a signal.
        """
        if not math.isfinite(loss):
            raise NotFinite(self.not_finite("the validation loss"))
        self.check_weights()
        place, whole = self.place, self.place.start == self.length
        self.log(row)
        if loss < self.best and (whole or self.best == math.inf):
            self.keep("best.pt", model=self.parts["model"].state_dict(), epoch=place.epoch + 1)
        if whole:
            self.best = min(self.best, loss)
            place.epoch, place.start = place.epoch + 1, 0
            self.save()
        stop, = processes.largest(self.signal)
        if stop and place.epoch < self.settings.epochs:
            raise self.interrupted(stop)

    def write_log(self):
        text = io.StringIO(newline="")
        if self.rows and not self.rank:
            csv.writer(text).writerows([list(self.rows[0]), *(row.values() for row in self.rows)])
            with checkpoints.replacing(self.folder / "log.csv") as file:
                file.write(text.getvalue().encode())

    def load_best(self):
        """Put the best weights into the model; where best.pt is damaged, say so and leave it as it is."""
        try:
            path = self.folder / "best.pt"
            checkpoints.restore({"model": self.parts["model"]}, checkpoints.read(path), path)
        except UserError as error:
            print(f"train.py: {error}; testing the model as it is now", file=sys.stderr)

    def interrupted(self, number):
        share = self.place.start / self.length
        return Interrupted(f"interrupted after {share:.0%} of epoch {self.place.epoch + 1}; "
                           f"go on with --resume {self.folder}", 128 + number)

    def not_finite(self, what):
        last = self.folder / "last.pt"
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        return f"{what} is not finite after {self.place}; {self.hint}; {kept}"

    # ------------------------------------------------------------------------------------------ on a terminal

    def clear(self):
        return "\r\033[K" if sys.stdout.isatty() else ""

    def show(self):
        """One line on a terminal that rewrites itself twice a second."""
        now = time.monotonic()
        if now - self.shown > 0.5 and sys.stdout.isatty():
            steps = self.steps_read()
            speed = (steps - self.first) / (now - self.began)           # time steps a second
            left = datetime.timedelta(seconds=int((self.settings.epochs * self.length - steps) / speed))
            tokens = f"{speed * self.settings.batch_size:,.0f} tokens/s"
            print(f"{self.clear()}{self.place}  {tokens}  {left} left", end="", flush=True)
            self.shown = now


@torch.no_grad()
def sample(model, vocabulary, sentences=3, longest=30, end="<eos>"):
    """A few sentences drawn word by word from the model's own predictions, as strings. Without dropout."""
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
