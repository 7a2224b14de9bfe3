"""The files of a training: whole at every moment, checked when read, and never another training's.

A folder holds settings.json, written first; log.csv; best.pt, the best model so far; last.pt, the newest
checkpoint, and previous.pt, the one before it; and lock, held while a training is at work there.
"""

import contextlib
import dataclasses
import json
import os
import sys
import zipfile
from pathlib import Path

import torch

from harness.command_line import UserError

if os.name == "posix":
    import fcntl
else:
    import msvcrt


@contextlib.contextmanager
def replacing(path, keep=None):
    """Gives a binary file to write beside `path`; then it is flushed to the disk and takes the name `path`.

    So `path` is whole at every moment, whatever breaks off in between. keep: a name for what `path` was
    before.
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
    if os.name == "posix":                                              # the names, too, outlive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save(content, path, keep=None):
    """Write a checkpoint. Its numbers lie in a zip file, which has a checksum of each of its parts."""
    try:
        with replacing(path, keep) as file:
            torch.save(content, file)
    except RuntimeError as error:                                       # what torch makes of a full disk
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be written ({reason}); what was there before is unharmed") from None


def read(path):
    """What `save` wrote, as plain numbers and tensors: nothing in the file can run code. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()                                    # reads all and compares the checksums
        if damaged:
            raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is not there: nothing to resume") from None
    except Exception as error:                                          # torch.load raises half a dozen kinds
        raise UserError(f"{path} cannot be read as a checkpoint: damaged, or another kind of file "
                        f"({type(error).__name__})") from None
    if not isinstance(content, dict) or "settings" not in content:
        raise UserError(f"{path} is not a checkpoint of this version of train.py")
    return content


def read_newest(folder, settings, say=True):
    """The folder's last.pt or, where that is damaged, lost, or another training's, the one before it, saying
    so.

    settings: an instance of the settings class, which says what may differ from settings.json.
    """
    try:
        content = read(folder / "last.pt")
        if not set(content["settings"]) <= set(vars(settings)):
            raise UserError(f"{folder / 'last.pt'} is not a checkpoint of this version of train.py")
        try:
            written = json.loads((folder / "settings.json").read_text())
        except (OSError, ValueError):
            written = {}                                                # lost: nothing to compare with
        if any(json.dumps(content["settings"][name]) != json.dumps(value) for name, value in written.items()
               if name in content["settings"] and name not in settings.MAY_CHANGE):
            raise UserError(f"{folder / 'last.pt'} is of another training than {folder / 'settings.json'}")
        return content
    except UserError as error:
        if not (folder / "previous.pt").exists():
            raise
        content = read(folder / "previous.pt")
        if say:
            print(f"train.py: {error}; going on from {folder / 'previous.pt'}", file=sys.stderr)
        return content


def begun(folder):
    """Whether the training in `folder` has come to its first checkpoint."""
    return any((folder / name).exists() for name in ("last.pt", "previous.pt"))


def read_settings(folder, settings):
    """The settings of the training in `folder`: its newest checkpoint's or, before that, settings.json's."""
    file = folder / "settings.json"
    if begun(folder) or not file.exists() or (folder / "log.csv").exists():
        return read_newest(folder, settings)["settings"]
    try:
        written = {name: tuple(value) if isinstance(value, list) else value
                   for name, value in json.loads(file.read_text()).items()}
        right = {name: type(value) for name, value in written.items()} == {
            f.name: type(f.default) for f in dataclasses.fields(settings)}
    except (OSError, ValueError, AttributeError):
        right = False
    if not right:
        raise UserError(f"{file} cannot be read as the settings of this version of train.py, "
                        "and there is no checkpoint beside it")
    return written


def write_settings(folder, settings):
    with replacing(folder / "settings.json") as file:
        file.write((json.dumps(dataclasses.asdict(settings), indent=1) + "\n").encode())


def restore(parts, checkpoint, path):
    """Put the state_dicts of a checkpoint into `parts`, {name: object}. UserError where they do not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is a checkpoint of another model or corpus: {reason[:160]}") from None


def lock(folder):
    """Keep every other training out of `folder` while the file returned is open, at most until the end."""
    file = open(folder / "lock", "w")
    try:
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        raise UserError(f"another training is at work in {folder}; name another --out, or wait") from None
    return file


def output_folder(out, name):
    """The folder `out`, if no training is in it; for None a new one, trainings/NAME, numbered if need be."""
    if out is None:
        n, out = 1, Path("trainings") / name
        while out.exists():
            n += 1
            out = Path("trainings") / f"{name}-{n}"
    elif any((out / name).exists() for name in ("log.csv", "last.pt", "previous.pt")):
        raise UserError(f"{out} already holds a training: go on with --resume {out}, or name another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out
