"""Flags out of a settings class, and what a user can put right told in one line."""

import argparse
import dataclasses
import math
import os
import sys
import warnings
from pathlib import Path

import torch.distributed as dist


class UserError(Exception):
    """Something only the user can put right. Ends the program with this one line and exit status 2."""


class NotFinite(Exception):
    """The loss or a weight is not a number any more. Ends the program with one line and exit status 1."""


class Interrupted(Exception):
    """A signal has asked the training to stop, and it is saved: (message, 128 + the signal).

    Ends the program with the message and that exit status.
    """


def setting(default, text, valid=None, where=None):
    """A field of a settings class.

    text: help, with unit and source. valid: which values can be, as (test, words), or all of them, by name.
    where: beside which other settings it has an effect, as (test of the settings, words); None: all.
    """
    return dataclasses.field(default=default, metadata=dict(help=text, valid=valid, where=where))


def choices(f):
    """The values of a field that has names for them, or None."""
    return f.metadata["valid"] if f.metadata["valid"] and isinstance(f.metadata["valid"][0], str) else None


SEED = (lambda x: 0 <= x < 2 ** 63, "a whole number from 0 to 2^63 - 1")
ABOVE_0 = (lambda x: x > 0, "above 0")                                  # or infinite
COUNT = (lambda x: x >= 1, "at least 1")
FROM_0 = (lambda x: 0 <= x < math.inf, "0 or more")
POSITIVE = (lambda x: 0 < x < math.inf, "above 0")
SHARE = (lambda x: 0 <= x < 1, "in [0, 1)")
NUMBERS = (lambda xs: all(0 <= x < math.inf for x in xs), "0 or more")
RISING = (lambda xs: all(a < b < math.inf for a, b in zip((0, *xs), xs)), "rising numbers above 0")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists what there is)")


def flag(name):
    return f"--{name.replace('_', '-')}"


def parse(argv, presets, read_settings, description):
    """Command line -> (settings, output folder or None, folder to resume from or None). Raises UserError.

    presets: {name: settings that the flags given are put on}, the first by default; one of its own for a
    corpus or a mode is named "NAME --data CORPUS" or "NAME --mode MODE". read_settings(folder, settings):
    those of the training in a folder, as a dictionary. The settings class has fields made by `setting`, data
    and mode among them, a tuple MAY_CHANGE of those that may change when a training is resumed, and a method
    check, which raises UserError where its fields contradict each other.
    """
    plain, names = next(iter(presets.values())), [name for name in presets if " " not in name]
    fields = dataclasses.fields(plain)
    parser = Parser(description=description.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=names, help="\n".join(
        [f"settings to begin with [{names[0]}]", *(
            f"{name}: {differences(settings, presets[name.split()[0]])}"
            for name, settings in presets.items() if name not in names)]))
    parser.add_argument("--out", metavar="FOLDER",
                        help="for log.csv and the checkpoints; default: a new one, or the one resumed from")
    parser.add_argument("--resume", metavar="FOLDER",
                        help="go on with the training there, with its settings, from its newest checkpoint,\n"
                             "or, before the first, from the beginning; these settings may be changed:\n"
                             + ", ".join(plain.MAY_CHANGE))
    for f in fields:
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        options = dict(dest=f.name, default=argparse.SUPPRESS,
                       help=f"{f.metadata['help']} [{default}]".replace("%", "%%"))
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            options.update(type=float, nargs="*", metavar="X")
        elif choices(f):
            options["choices"] = choices(f)
        else:
            options.update(type=f.type, metavar={int: "N", float: "X", str: "NAME"}[f.type])
        parser.add_argument(flag(f.name), **options)
    given = vars(parser.parse_args(argv))
    name, out, resume = given.pop("preset"), given.pop("out"), given.pop("resume")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if resume is None:
        name = name or names[0]
        special = (f"{name} --{by} {given.get(by)}" for by in ("data", "mode"))
        preset = next((presets[own] for own in special if own in presets), presets[name])
        settings = dataclasses.replace(preset, **given)
    else:
        if name:
            raise UserError("--resume goes on with its own settings: leave --preset away")
        settings = resumed(plain, read_settings(Path(resume), plain), given, resume)
    check(settings, given)
    return settings, *(folder and Path(folder) for folder in (out or resume, resume))


def differences(settings, others):
    """The flags that make `settings` out of `others`."""
    return " ".join(f"{flag(f.name)} {getattr(settings, f.name)}" for f in dataclasses.fields(settings)
                    if getattr(settings, f.name) != getattr(others, f.name))


def resumed(settings, before, given, folder):
    """`settings` with the values of the training in `folder`, and those given that may change."""
    changed = [f"{flag(name)} (was {before.get(name)}, now {value})" for name, value in given.items()
               if name not in settings.MAY_CHANGE and before.get(name) != value]
    if changed:
        raise UserError(f"{folder} holds a training with other settings: {', '.join(changed)}; "
                        "start a new one instead")
    return dataclasses.replace(settings, **{**before, **given})


def check(settings, given=()):
    """Raise UserError for a setting that cannot be, or that was given and has no effect beside the others."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        possible, what = (not choices(f) and f.metadata["valid"]) or (lambda _: True, "")
        effective, where = f.metadata["where"] or (lambda _: True, "")
        if not possible(value):
            raise UserError(f"{flag(f.name)} must be {what}, got {value}")
        if f.name in given and not effective(settings):
            raise UserError(f"{flag(f.name)} has an effect with {where} only")
    settings.check()


def run(main, argv, mistakes=(), memory_hint=""):
    """main(argv), with what a user can cause or cure told in one line on stderr. Returns the exit status.

    mistakes: further classes of errors that are the user's. memory_hint: what to try where memory is short.
    One of several processes ends here: now and then gloo's threads abort it while Python takes itself apart.
    """
    status = told(main, argv, mistakes, memory_hint)
    if dist.is_initialized():
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    return status


def told(main, argv, mistakes, memory_hint):
    rank = int(os.environ.get("RANK", 0))
    me = f"train.py, process {rank}" if rank else "train.py"
    warnings.showwarning = lambda message, *_: print(f"train.py: {message}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                        # a word that the terminal cannot show
    try:
        return main(argv)
    except (UserError, OSError, *mistakes) as error:
        print(f"{me}: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        message, status = interrupted.args
        print(f"\n{message}", flush=True)
        return status
    except NotFinite as error:
        print(f"{me}: stopped: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:                     # torch's out-of-memory is a RuntimeError
        reason = " ".join(str(error).split())[:160]
        if isinstance(error, dist.DistError) or "gloo" in reason:
            print(f"{me}: stopped: another process does not answer ({reason}); go on with --resume",
                  file=sys.stderr)
            return 1
        if isinstance(error, RuntimeError) and "memory" not in reason:
            raise
        print(f"{me}: error: out of memory ({reason}); {memory_hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
