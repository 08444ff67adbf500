"""Text -> tokens -> samples of eight objectives -> packed batches (Birdie, arXiv 2411.01030).

    a sample:  tokens  = prefix + [GEN] + label[:-1]       len(prefix) + len(label) positions;
               targets = -100 * len(prefix) + label        causal from GEN on

    class                     prefix -> label (section 3.2, A.2, A.5; table 1)                arms
    next_token_prediction     nothing -> the text                                                1
    prefix_lm                 the first three quarters of the text -> its rest                   1
    selective_copying         what stands around 1-4 spans, and a context -> the spans          16
    copying                   text -> text                                                       2
    deshuffling               text with half or all of its tokens moved -> text                  4
    infilling                 text with numbered masks for spans -> mask, span, mask, span ...  36
    autoencoding              text with masks for spans -> the whole text                       18
    autoencoding_deshuffling  the same, what is left between the masks shuffled -> the text     18

Symbols: B rows of T tokens are a batch; an arm is one configuration of one class (96 in all); an
action is a probability for every arm; n is a number of tokens of text.

Run it:  python objectives.py    a sentence through every class, one packed row, packing's speed

Our choices, where the paper is silent or we differ
    labels      all but next token prediction's end with DONE, so that decoding knows when to stop;
                infilling's are mask, span, where the paper writes span, mask
    paradigm    one token names the class; UL2's kinds of infilling share it (UL2 has R, X, S)
    lengths     scale with T / 2048; next token prediction fills what is left of its row, at least
                T / 8; prefix LM is split at three quarters, as in UL2
    selective   a delimiter is lengthened until its question has exactly one answer; what questions
    copying     take beyond the usual is cut off the ends of the context; the spans are at most half
                of it, so in short contexts they are shorter than the paper's 4 to 32 tokens
    a shuffle   is one random cycle: every token that is to move does move
"""
import atexit
import base64
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import zlib
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import tiktoken
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

RESET_FORWARD, RESET_REVERSE = 1, 2     # bits of `reset`, which model.py reads (section A.4)
IGNORE = -100                           # a target without loss
# seconds between two states of a bar; outside a terminal each is a line of a log
progress_bar = partial(tqdm, mininterval=0.1 if sys.stderr.isatty() else 30)


# ---- text to tokens ----------------------------------------------------------------------------

# GPT-2's pattern, but a digit is always its own token: numbers are copied digit by digit
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BPE2048 = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "bpe2048.tiktoken")


class Tokenizer:
    """Text to token ids and back; special tokens have the ids above those of text.

    name: bpe2048 (2,048 tokens of Python source and English, in assets/), bytes (256), an
    encoding of tiktoken's such as gpt2 (downloaded once) or the path of a .tiktoken file;
    unusable ones raise ValueError. n_masks: numbered masks for infilling; T // 8 is enough, see
    `n_masked`. A lone surrogate, which cannot be written, becomes U+FFFD; any other text survives
    exactly. `arguments` make it again, even where the file is gone: they hold its content.
    """

    def __init__(self, name: str = "bpe2048", n_masks: int = 256, classes=None, vocabulary=None):
        self.name, self.n_masks = name, n_masks
        self.encoding, vocabulary = find_encoding(name, vocabulary)
        self.arguments = dict(name=name, n_masks=n_masks, classes=list(CLASSES),
                              vocabulary=vocabulary)
        if classes not in (None, self.arguments["classes"]):
            raise ValueError(f"the checkpoint has the classes {', '.join(classes)}, and here they "
                             f"are {', '.join(CLASSES)}: its special tokens are others, train anew")
        self.n_text, self.fingerprint = self.encoding.n_vocab, self.encoding.name
        names = ["PAD", "GEN", "DONE", "END_OF_TEXT", "COPY", "START", "END", "CONTEXT", "MASK"]
        (self.PAD, self.GEN, self.DONE, self.END_OF_TEXT, self.COPY, self.START, self.END,
         self.CONTEXT, self.MASK) = range(self.n_text, self.n_text + len(names))
        self.paradigm = {cls: self.n_text + len(names) + i for i, cls in enumerate(CLASSES[1:])}
        names += [cls.upper() for cls in CLASSES[1:]]
        # Numbered masks come last: the other ids do not depend on how many there are.
        self.MASKS = self.n_text + len(names) + np.arange(n_masks)
        self.special_names = [f"<{s}>" for s in names] + [f"<MASK_{i}>" for i in range(n_masks)]
        self.vocab_size = self.n_text + len(self.special_names)

    def encode(self, text: str) -> np.ndarray:
        """(n,) int64. What looks like a special token is text."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def decode(self, ids) -> str:
        """Special tokens are shown by name, such as <GEN>."""
        written = []
        for i in np.asarray(ids).tolist():
            if i >= self.n_text:
                written.append(self.special_names[i - self.n_text].encode())
            else:
                with contextlib.suppress(KeyError):         # cl100k_base has ids without text
                    written.append(self.encoding.decode_single_token_bytes(i))
        return b"".join(written).decode("utf-8", "replace")


def find_encoding(name: str, vocabulary=None):
    """-> (a tiktoken.Encoding, the content of its .tiktoken file or None)."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,64}", special_tokens={},
                                 mergeable_ranks={bytes([i]): i for i in range(256)}), None
    if name in tiktoken.list_encoding_names():
        try:
            return tiktoken.get_encoding(name), None
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer {name!r} cannot be downloaded ({type(error).__name__}); "
                             f"pass --tokenizer=bpe2048, or a .tiktoken file") from None
    path = BPE2048 if name == "bpe2048" else name
    if not vocabulary and not os.path.isfile(path):
        raise ValueError(f"tokenizer {name!r} is unknown; pass bpe2048, bytes, a .tiktoken file or "
                         f"one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        vocabulary = vocabulary or Path(path).read_text()
        lines = (line.split() for line in vocabulary.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        ranks = {}
    all_bytes = sum(len(token) == 1 for token in ranks) == 256
    if not all_bytes or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path} is no .tiktoken file: it needs a token in base64 and its rank on "
                         f"each line, all 256 single bytes, and ranks 0, 1, 2 ... once each")
    digest = hashlib.sha256(vocabulary.encode()).hexdigest()
    return tiktoken.Encoding(f"file-{digest}", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={}), vocabulary


# ---- text --------------------------------------------------------------------------------------

CHUNK = 1 << 17     # characters of a piece of text
NO_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
# What requirements.txt brings, in a fixed order, so that equal versions give equal text
PACKAGES = """numpy tqdm tiktoken regex requests urllib3 certifi charset-normalizer idna pytest
    pluggy iniconfig packaging pygments torch sympy mpmath networkx jinja2 markupsafe fsspec
    filelock typing_extensions setuptools""".split()
PACKAGE_TEXT = {".py", ".pyi", ".h", ".hpp", ".csv", ".md", ".txt", ".rst", ".json"}
JSON_LINES = {".jsonl", ".ndjson"}
MARKUP = {".csv", ".tsv", ".json", ".html", ".xml", ".ipynb"}   # read as it stands


def package_files() -> list[Path]:
    """The text of what pip installed beside us."""
    files = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.distribution(name).files or []
            kept = [f for f in found if f.suffix in PACKAGE_TEXT or f.name == "RECORD"]
            files += [Path(f.locate()) for f in sorted(kept, key=str)]
    return files


def tables(copies=15) -> list[Path]:
    """numpy's tables so many times, every hexadecimal digit drawn anew: what stands there can be
    neither guessed nor learnt by heart, only looked up. (0.2% of the numbers are in capitals, and
    stay.)"""
    files = sorted(Path(np.__file__).parent.rglob("*.csv"))
    if not files:
        return []

    def write(folder):
        text = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8).copy()
        places = np.concatenate([np.arange(*found.span(1)) for found in
                                 re.finditer(b"0x([0-9a-f]+)", text.tobytes())])
        rng, digits = np.random.default_rng(1), np.frombuffer(b"0123456789abcdef", np.uint8)
        with open(folder / "tables.txt", "wb") as file:
            for _ in range(copies):
                text[places] = digits[rng.integers(16, size=len(places))]
                file.write(text.tobytes())
    return [cached(content(files, "tables", copies), write) / "tables.txt"]


def find_files(data: str) -> list[Path]:
    path = Path(os.path.expanduser(data))
    if "," in data and not os.path.exists(path):
        return [file for part in data.split(",") for file in find_files(part)]
    if (path / "train.bin").is_file():
        raise ValueError(f"{data} holds tokens, which cannot stand beside text in --data; pass the "
                         f"text that they were made from")
    if data == "packages":
        files = package_files()
    elif data == "tables":
        files = tables()
    elif data == "stdlib":
        path = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in sorted(path.rglob("*.py"))
                 if not NO_SOURCE & set(f.relative_to(path).parts)]
    else:                               # of a folder, hidden files and folders are left out
        files = [path] if path.is_file() else [
            f for f in sorted(path.rglob("*")) if "/." not in f"/{f.relative_to(path).as_posix()}"]
        if markup := sorted({f.suffix for f in files} & MARKUP):
            print(f"text     {', '.join(markup)} is read as plain text, marks and all; JSON lines "
                  f"with a `text` ({', '.join(sorted(JSON_LINES))}) are taken apart")
    files = [f for f in files if f.is_file()]
    if not (data and files):
        raise FileNotFoundError(
            f"no file at {data!r}: --data takes a text file, a folder, a .jsonl file, a nanoGPT "
            f"folder, tables (of numbers), stdlib (Python's) or packages (what pip installed)")
    return files


def pieces(path: Path):
    """(does a document begin here, text): a file's chunks, or the `text` of its JSON lines."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix not in JSON_LINES:
            chunks = iter(lambda: file.read(CHUNK) + file.readline(CHUNK), "")
            yield from ((k == 0, chunk) for k, chunk in enumerate(chunks))
            return
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"] + "" if line.strip() else ""
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f'{path} line {number} is not like {{"text": "..."}}: mend it, or '
                                 f"pass --data without this file") from None
            if text:
                yield True, text


def tokenise(files: list[Path], tok: Tokenizer, folder: Path, dtype: str) -> None:
    """Write train.bin and val.bin: documents, END_OF_TEXT before each.

    Validation is the twentieth of the pieces whose text hashes to it, so that copies stay on one
    side. Where few or uneven pieces make that under 1% or over 20%, it is the last of all tokens.
    """
    def readable():
        for path in files:
            try:
                yield from pieces(path)
            except UnicodeDecodeError:
                not_text.append(path)
            bar.update(path.stat().st_size)

    not_text = []
    size = sum(path.stat().st_size for path in files)
    bar = progress_bar(total=size, desc="tokenising", unit="B", unit_scale=True,
                       disable=size < 10_000_000)
    text, paths = readable(), (folder / "train.bin", folder / "val.bin")
    with open(paths[0], "wb") as train, open(paths[1], "wb") as val, ThreadPoolExecutor() as pool:
        while ahead := list(itertools.islice(text, 4 * (os.cpu_count() or 1))):
            encoded = pool.map(tok.encode, [piece for _, piece in ahead])
            for (first, piece), ids in zip(ahead, encoded):
                in_train = zlib.crc32(piece.encode("utf-8", "surrogatepass")) % 20
                ids = np.append(tok.END_OF_TEXT, ids) if first else ids
                (train if in_train else val).write(ids.astype(dtype).tobytes())
    bar.close()
    if not_text:
        (folder / "left_out.txt").write_text(
            f"text     {len(not_text)} of {len(files)} files are not UTF-8 throughout, and left "
            f"out from there on, such as {not_text[0]}", "utf-8", "backslashreplace")
    n_train, n_val = (os.path.getsize(path) // np.dtype(dtype).itemsize for path in paths)
    n = n_train + n_val
    if n < 2:
        raise ValueError(f"no text in UTF-8 in {len(files)} files such as {files[0]}; convert "
                         f"them, or pass other --data")
    if not 0.01 * n < n_val < 0.2 * n:
        ids = np.concatenate([np.fromfile(path, dtype) for path in paths])
        ids[:n - max(1, n // 20)].tofile(paths[0])
        ids[n - max(1, n // 20):].tofile(paths[1])


def content(paths, *key) -> str:
    """A digest of what stands in these files, and of the key."""
    digest = hashlib.sha256(json.dumps(key).encode())
    size = sum(path.stat().st_size for path in paths)
    with progress_bar(total=size, desc="reading", unit="B", unit_scale=True,
                      disable=size < 1e9) as bar:
        for path in paths:
            digest.update(f"{path.suffix} {path.stat().st_size} ".encode("utf-8", "replace"))
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    bar.update(len(block))
    return digest.hexdigest()[:24]


def cached(name: str, make: Callable) -> Path:
    """The cache's folder `name`; where it is missing make(folder) fills it, all or nothing."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path(tempfile.gettempdir() if home.startswith("~") else home, "birdie")     # no home
    folder = cache / name
    try:
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as temp:
                make(Path(temp))
                os.chmod(temp, cache.stat().st_mode & 0o777)    # others may read it, as there
                os.replace(temp, folder)
    except OSError as error:
        if not folder.is_dir():                     # else another process was faster
            raise ValueError(f"{error.filename or cache} cannot be used ({error.strerror}); "
                             f"change that, or set XDG_CACHE_HOME to another folder") from None
    return folder


@lru_cache
def mapped(path: str, dtype: str) -> np.memmap:
    return np.memmap(path, dtype, "r")  # each process maps the file; no token is sent to a worker


class Corpus:
    """Two streams of token ids, 'train' and 'val', that share no token; memory-mapped.

    data: a text file, a folder, a .jsonl file with a `text` on each line, tables (numpy's, 18
    million tokens), stdlib (Python's source), packages (the text of what pip installed beside us),
    or some of these with commas between them; or a nanoGPT folder (train.bin and val.bin, uint16).
    Text is tokenised once, into nanoGPT's format, in the folder birdie of $XDG_CACHE_HOME or
    ~/.cache.
    size: tokens of each split; fingerprint: a digest of text and vocabulary, wherever they lie.
    Unusable data raise ValueError or FileNotFoundError.
    """

    def __init__(self, data: str, tok: Tokenizer):
        folder, self.dtype = Path(os.path.expanduser(data)), "uint16"
        try:
            if os.path.isfile(folder / "train.bin"):        # False for a name that is too long
                bins = [folder / "train.bin", folder / "val.bin"]
                for path in bins:
                    self.check(path, tok)
                self.fingerprint = content(bins, tok.fingerprint)
            else:
                self.dtype = "uint16" if tok.END_OF_TEXT < 1 << 16 else "uint32"
                files = find_files(data)
                self.fingerprint = content(files, tok.fingerprint)
                folder = cached(self.fingerprint,
                                lambda folder: tokenise(files, tok, folder, self.dtype))
                if (left_out := folder / "left_out.txt").exists():
                    print(left_out.read_text("utf-8"))
        except PermissionError as error:
            raise ValueError(f"{error.filename} cannot be read ({error.strerror}); change that, or "
                             f"pass other --data") from None
        self.paths = {split: str(folder / f"{split}.bin") for split in ("train", "val")}
        self.size = {split: len(mapped(path, self.dtype)) for split, path in self.paths.items()}

    def check(self, path: Path, tok: Tokenizer) -> None:
        """Is this a file of nanoGPT's, of this tokenizer's tokens?"""
        if (path.parent / "meta.pkl").exists():
            raise ValueError(f"{path.parent}/meta.pkl says that these tokens are of a vocabulary "
                             f"of their own; pass the text that they were made from as --data")
        n_bytes = path.stat().st_size if path.is_file() else 0
        if not n_bytes or n_bytes % 2:
            raise ValueError(f"{path} is missing, empty or not uint16; prepare it again")
        ids, size = mapped(str(path), "uint16"), 1 << 24
        parts = (ids[i:i + size] for i in range(0, len(ids), size))
        top = max(int(part[part != tok.END_OF_TEXT].max(initial=0)) for part in parts)
        if top >= tok.n_text:
            raise ValueError(f"{path} holds token {top}, and {tok.name} has {tok.n_text} tokens; "
                             f"pass the --tokenizer that made it, such as gpt2")

    def window(self, split: str, start: int, n: int) -> np.ndarray:
        """n tokens from `start` on, (n,) int64."""
        return mapped(self.paths[split], self.dtype)[start:start + n].astype(np.int64)


# ---- the objectives: (text, rng, tok, its options) -> prefix, label ----------------------------
# text is (n,) token ids. How many positions of a row each takes, at most, stands in OBJECTIVES.
# The paradigm token and the last DONE are added, and counted, by make_sample and positions.

class NotUnique(ValueError):
    """The text repeats itself too much to ask for a span of it."""


def next_token_prediction(text, rng, tok):
    return text[:0], text


def prefix_lm(text, rng, tok):
    return np.split(text, [len(text) * 3 // 4])


def copying(text, rng, tok):
    return text, text


def deshuffling(text, rng, tok, shuffled):
    return text[shuffle(len(text), len(text) * shuffled // 100, rng)], text


def infilling(text, rng, tok, masked, mean_span):
    gaps, spans = cut_out(text, masked, mean_span, rng)
    masks = tok.MASKS[:len(spans), None]
    return alternate(gaps, masks), alternate(masks, spans)


def autoencoding(text, rng, tok, masked, mean_span, shuffled=False):
    gaps, spans = cut_out(text, masked, mean_span, rng)
    if shuffled:
        gaps = [gaps[i] for i in shuffle(len(gaps), len(gaps), rng)]
    return alternate(gaps, [[tok.MASK]] * len(spans)), text


def shuffle(n: int, n_moved: int, rng) -> np.ndarray:
    """A permutation of n that moves exactly n_moved random positions, in one cycle."""
    order, moved = np.arange(n), rng.permutation(n)[:n_moved]
    order[moved] = np.roll(moved, 1)
    return order


def n_masked(n: int, masked: int, mean_span: int) -> tuple[int, int]:
    """Masked tokens and the number of spans they form: the share masked wins over the mean span.

    s > 1 numbered masks of mean span 3 need masked >= 3s - 1, so (at 50%) n >= 6s - 2, and their
    sample n + 2s + 2 >= 8s positions. As that is at most T, T // 8 numbered masks are enough.
    """
    total = max(1, n * masked // 100)
    return total, max(1, round(total / mean_span))


def cut_out(text, masked, mean_span, rng):
    """The text is gap, span, gap, ..., span, gap -> its gaps, its spans."""
    total, n_spans = n_masked(len(text), masked, mean_span)
    sizes = np.empty(2 * n_spans + 1, int)
    sizes[1::2] = random_sizes(total, n_spans, 1, rng)
    sizes[::2] = random_sizes(len(text) - total, n_spans + 1, 0, rng)
    parts = np.split(text, np.cumsum(sizes)[:-1])
    return parts[::2], parts[1::2]


def random_sizes(total: int, n_parts: int, least: int, rng) -> np.ndarray:
    """n_parts random sizes of at least `least` with this total, each way equally likely."""
    ends = total - n_parts * least + n_parts - 1
    cuts = np.sort(rng.choice(ends, n_parts - 1, replace=False))
    return np.diff(cuts, prepend=-1, append=ends) - 1 + least


def alternate(these, those) -> np.ndarray:
    """these[0], those[0], these[1], ... as one array."""
    pairs = itertools.zip_longest(these, those, fillvalue=np.array([], np.int64))
    return np.concatenate([part for pair in pairs for part in pair])


SPAN = 4, 32            # selective copying: tokens of a span (section 3.2)
DELIMITER = 8           # tokens that a delimiter is drawn to have at most (section 3.2)
LENGTHENED = 16         # and may be lengthened to until it is unique: our choice
USUAL = 10              # what both delimiters of a span usually take


def selective_copying(text, rng, tok, n_spans, query):
    """Spans to be found by the delimiters before and after them (section 3.2, A.5).

    A start delimiter occurs once in the text, and behind it the end delimiter first occurs where
    the span ends: so each question has one answer.
    """
    n, budget = len(text), selective_copying_positions(len(text), n_spans, query)
    for _ in range(64):
        spans = rng.integers(SPAN[0], longest_span(n, n_spans) + 1, n_spans)
        gaps = random_sizes(n - int(spans.sum()), n_spans + 1, 1, rng)
        starts = np.cumsum(gaps[:-1]) + np.cumsum(spans) - spans
        ends = starts + spans
        n_before, n_after = rng.integers(1, DELIMITER + 1, (2, n_spans))    # a delimiter's tokens
        for i, (start, end) in enumerate(zip(starts, ends)):
            n_before[i] = unique_run(text, start, n_before[i], LENGTHENED)
            # the same from the other side: in what is read back to the span's start
            mirrored = text[start:end + DELIMITER][::-1]
            span_end = len(mirrored) - spans[i]
            n_after[i] = unique_run(mirrored, span_end, n_after[i], span_end)
        left = (starts - n_before).min()                        # of the text, not in any question
        right = n - (ends + n_after).max()
        excess = max(0, n + 1 + int((3 + n_before + n_after + spans).sum()) - budget)
        if n_before.all() and n_after.all() and excess <= left + right:
            break
    else:
        raise NotUnique
    cut_left = rng.integers(max(0, excess - right), min(excess, left) + 1)
    context = [[tok.CONTEXT], text[cut_left:n - (excess - cut_left)]]
    question, answers = [[tok.COPY]], []
    for i in rng.permutation(n_spans):
        start, end = starts[i], ends[i]
        question += [[tok.START], text[start - n_before[i]:start]]
        question += [[tok.END], text[end:end + n_after[i]]]
        answers.append(text[start:end])
    prefix = question + context if query == "before" else context + question
    return np.concatenate(prefix), alternate(answers, [[tok.DONE]] * (n_spans - 1))


def longest_span(n: int, n_spans: int) -> int:
    return min(SPAN[1], max(SPAN[0], n // (2 * n_spans)))


def selective_copying_positions(n, n_spans, query):
    """COPY, CONTEXT and the context; for each span START, END, DONE, its delimiters and itself."""
    if n < 6 * n_spans:                 # no room for the shortest spans
        return math.inf
    usual_span = (SPAN[0] + longest_span(n, n_spans)) // 2
    return n + 1 + n_spans * (3 + USUAL + usual_span)


def unique_run(text, end: int, least: int, most: int) -> int:
    """The size, `least` if possible, of a run that ends at `end` and is unique; 0 if none is."""
    most = min(most, end)
    ends = np.flatnonzero(text == text[end - 1]) + 1
    for n in range(1, most + 1):
        ends = ends[ends >= n]
        ends = ends[text[ends - n] == text[end - n]]
        if len(ends) == 1:
            return max(n, min(least, most))
    return 0


def infilling_positions(n, masked, mean_span):
    return n + 2 * n_masked(n, masked, mean_span)[1]


def autoencoding_positions(n, masked, mean_span):
    total, n_spans = n_masked(n, masked, mean_span)
    return 2 * n - total + n_spans


class Objective(NamedTuple):
    make: Callable          # (text, rng, tok, **options) -> prefix, label
    positions: Callable     # (n, **options) -> len(prefix) + len(label), at most
    lengths: tuple          # ranges of n at T = 2048
    options: dict = {}      # name: its values; every combination is an arm


THREE = (192, 384), (384, 768), (768, 1536)
MASKED = dict(masked=(15, 85), mean_span=(3, 8, 32))
OBJECTIVES = {              # table 1; the first has no paradigm token; yours come last
    "next_token_prediction": Objective(next_token_prediction, lambda n: n, ((256, 2048),)),
    "prefix_lm": Objective(prefix_lm, lambda n: n, ((512, 2048),)),
    "selective_copying": Objective(
        selective_copying, selective_copying_positions, ((384, 768), (768, 1536)),
        dict(n_spans=(1, 2, 3, 4), query=("before", "after"))),
    "copying": Objective(copying, lambda n: 2 * n, ((64, 256), (256, 1014))),
    "deshuffling": Objective(deshuffling, lambda n, shuffled: 2 * n, ((128, 256), (512, 1024)),
                             dict(shuffled=(50, 100))),
    "infilling": Objective(
        infilling, infilling_positions, ((128, 256), (256, 512), (512, 1024), (1024, 2048)),
        dict(masked=(5, 15, 50), mean_span=(3, 8, 32))),
    "autoencoding": Objective(autoencoding, autoencoding_positions, THREE, MASKED),
    "autoencoding_deshuffling": Objective(
        partial(autoencoding, shuffled=True), autoencoding_positions, THREE, MASKED),
}
CLASSES = tuple(OBJECTIVES)


# ---- arms and samples --------------------------------------------------------------------------

MIN_BLOCK, MIN_TEXT = 64, 8     # shorter rows and texts hold too little to learn from: our choice


class Arm(NamedTuple):
    """One configuration of one class."""
    cls: str
    shortest: int               # tokens of text
    longest: int
    options: dict = {}

    @property
    def name(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()]
        return "-".join([self.cls, f"{self.shortest}-{self.longest}", *options])


def positions(arm: Arm, n: int) -> float:
    """Tokens of a row that a sample of n tokens of text takes, at most: its prefix and label."""
    bare = OBJECTIVES[arm.cls].positions(n, **arm.options)
    return bare if arm.cls == "next_token_prediction" else bare + 2     # paradigm token, DONE


def longest_text(arm: Arm, size: int) -> int:
    """The longest text of the arm, at least its shortest, whose sample takes at most `size`."""
    longer = range(arm.shortest + 1, arm.longest + 1)
    return arm.shortest + bisect_right(longer, size, key=lambda n: positions(arm, n))


@lru_cache
def arms(block_size: int) -> tuple[Arm, ...]:
    """All arms for rows of block_size tokens: 96 at 2048, where lengths are the paper's.

    A longest text that does not fit is clipped (names show it). An arm whose shortest sample fills
    more than 7/8 of a row, which would end `pack` early, is dropped: that is printed, once.
    """
    if block_size < MIN_BLOCK:
        raise ValueError(f"block_size {block_size} has no room for every class: pass --block_size="
                         f"{MIN_BLOCK} or more")
    kept, dropped = [], []
    for cls, objective in OBJECTIVES.items():
        for bounds, *values in itertools.product(objective.lengths, *objective.options.values()):
            low, high = (max(MIN_TEXT, bound * block_size // 2048) for bound in bounds)
            arm = Arm(cls, low, high, dict(zip(objective.options, values)))
            arm = arm._replace(longest=longest_text(arm, block_size))
            (kept if positions(arm, low) <= 7 * block_size // 8 else dropped).append(arm)
    if dropped:
        classes = ", ".join(sorted({arm.cls for arm in dropped}))
        print(f"arms     {len(dropped)} of {len(kept + dropped)} ({classes}) have no room in rows "
              f"of {block_size} tokens and are left out")
    return tuple(kept)


def make_sample(arm: Arm, text: np.ndarray, rng: np.random.Generator, tok: Tokenizer):
    """text (n,) -> (prefix, label), int64, at most positions(arm, n) together, or NotUnique."""
    prefix, label = OBJECTIVES[arm.cls].make(text, rng, tok, **arm.options)
    if arm.cls != "next_token_prediction":
        place = 0 if rng.random() < 0.5 else len(prefix)                # section A.7
        prefix = np.insert(prefix, place, tok.paradigm[arm.cls])
        label = np.append(label, tok.DONE)
    if (size := len(prefix) + len(label)) > (most := positions(arm, len(text))):
        raise ValueError(f"{arm.name} takes {size} positions for {len(text)} tokens of text, more "
                         f"than the {most} of its line in OBJECTIVES; mend that")
    return prefix, label


def as_prompt(cls: str, text: str, tok: Tokenizer, start: str = "", end: str = ""):
    """(prefix, start of the causal part) for LM.generate, asked as samples of the class are.

    Gaps are written as ___; start, end: what stands around the answer of selective copying.
    """
    if cls == "next_token_prediction":
        return [], [tok.GEN, *tok.encode(text)]
    parts = [tok.encode(part) for part in text.split("___")]
    if len(parts) - 1 > tok.n_masks or (cls == "infilling" and len(parts) == 1):
        raise ValueError(f"the prompt has {len(parts) - 1} gaps; write 1 to {tok.n_masks} as ___")
    masks = tok.MASKS[:, None] if cls == "infilling" else [[tok.MASK]] * tok.n_masks
    prefix = alternate(parts, masks[:len(parts) - 1])
    if cls == "selective_copying":
        question = [tok.COPY, tok.START, *tok.encode(start), tok.END, *tok.encode(end)]
        prefix = [*question, tok.CONTEXT, *prefix]
    return [tok.paradigm[cls], *prefix], [tok.GEN]


# ---- packed batches ----------------------------------------------------------------------------

def pack(n_rows: int, block_size: int, largest: int, draw: Callable) -> list[list]:
    """Rows of drawn things, packed so that nothing drawn is ever dropped.

    draw() -> (thing, wish, minimum): it would like `wish` tokens of a row, and needs `minimum`,
    which is at most `largest`. Each goes to the fullest row with room for the mean of the two, or
    else to the emptiest. Drawing ends when the wishes would fill all rows, or when the largest
    minimum might not find room: that is decided before a thing is drawn, so by Wald's identity the
    shares of what is drawn are, on average, exactly those of `draw`. (A packer that drops what
    does not fit makes long things rarer.) -> [[(thing, wish)]], for Batches.samples to fit.
    """
    rows = [[] for _ in range(n_rows)]
    room, most_room = np.full((2, n_rows), block_size)          # by wishes; by minimums
    while room.sum() > 0 and most_room.max() >= largest:
        thing, wish, minimum = draw()
        possible = most_room >= minimum
        fits = possible & (room >= (wish + minimum) / 2)
        row = np.where(fits, -room, -np.inf).argmax()
        if not fits.any():
            row = np.where(possible, room, -np.inf).argmax()
        rows[row].append((thing, wish))
        room[row] -= wish
        most_room[row] -= minimum
    return rows


def lay_out(rows: list, block_size: int, tok: Tokenizer) -> dict:
    """Rows of samples (arm index, prefix, label) as the arrays of a batch, (B, T) each.

    tokens and targets int64, reset uint8, arm int16 (index into the arms). Padding, at a row's end:
    token PAD, target -100, both reset bits, arm -1.
    """
    shape = len(rows), block_size
    out = {"tokens": np.full(shape, tok.PAD, np.int64), "targets": np.full(shape, IGNORE, np.int64),
           "reset": np.full(shape, RESET_FORWARD | RESET_REVERSE, np.uint8),
           "arm": np.full(shape, -1, np.int16)}
    for samples, tokens, targets, reset, arm in zip(rows, *out.values()):
        start = 0
        for index, prefix, label in samples:
            gen = start + len(prefix)
            end = gen + len(label)
            tokens[start:gen], tokens[gen], tokens[gen + 1:end] = prefix, tok.GEN, label[:-1]
            targets[gen:end] = label
            reset[start:gen], reset[gen:end] = 0, RESET_REVERSE
            reset[start] |= RESET_FORWARD
            arm[start:end] = index
            start = end
    return out


class Batches:
    """Batches as a pure function of (seed, rank, step, action, split): nothing is carried over."""

    def __init__(self, corpus: Corpus, tok: Tokenizer, block_size: int, batch_size: int):
        self.corpus, self.tok = corpus, tok
        self.block_size, self.batch_size = block_size, batch_size
        self.arms = arms(block_size)
        self.low = np.array([positions(arm, arm.shortest) for arm in self.arms])
        self.high = np.array([positions(arm, arm.longest) for arm in self.arms])
        if tok.n_masks < block_size // 8:
            raise ValueError(f"the vocabulary has n_masks={tok.n_masks}, for rows of "
                             f"{8 * tok.n_masks} tokens; pass --block_size={8 * tok.n_masks} or "
                             f"less")
        need = max(arm.longest for arm in self.arms)
        if min(corpus.size.values()) < need:
            raise ValueError(f"a sample takes up to {need} tokens of {corpus.size}; pass more text "
                             f"as --data, or a smaller --block_size")

    def check(self, action) -> np.ndarray:
        action = np.asarray(action, np.float64)
        is_probability = action.min() >= 0 and abs(action.sum() - 1) < 1e-3     # never, if nan
        if action.shape != self.low.shape or not is_probability:
            raise ValueError(f"an action is {len(self.arms)} probabilities, not {action.shape} of "
                             f"sum {action.sum()}")
        return action

    def batch(self, seed: int, rank: int, step: int, action: np.ndarray, split: str) -> dict:
        """(B, T) arrays: tokens, targets, reset, arm; see lay_out."""
        action = self.check(action)
        rng = np.random.default_rng([seed, rank, step, ("train", "val").index(split)])
        up_to = np.cumsum(action)

        def draw():
            k = int(np.searchsorted(up_to, rng.random() * up_to[-1], side="right"))
            whole_row = self.arms[k].cls == "next_token_prediction"
            wish = self.high[k] if whole_row else rng.integers(self.low[k], self.high[k] + 1)
            return k, wish, self.low[k]

        packed = pack(self.batch_size, self.block_size, self.low[action > 0].max(), draw)
        return lay_out([self.samples(row, rng, split) for row in packed], self.block_size, self.tok)

    def samples(self, row: list, rng, split: str) -> list:
        """The samples of a packed row. All move by the same share of what they can, to fill it."""
        arms, sizes = np.array(row, int).reshape(-1, 2).T
        spare = self.block_size - sizes.sum()
        give = self.high[arms] - sizes if spare > 0 else sizes - self.low[arms]
        sizes = sizes + give * np.clip(spare / max(1, give.sum()), -1, 1)
        samples, left_over = [], 0.0    # what a sample leaves of its tokens goes to the next
        for k, size in zip(arms, sizes):
            left_over += size
            prefix, label = self.sample(self.arms[k], left_over, rng, split)
            left_over -= len(prefix) + len(label)
            samples.append((k, prefix, label))
        return samples

    def sample(self, arm: Arm, size: float, rng, split: str):
        """The arm's longest sample in at most `size` tokens, from a random place of the text."""
        n = longest_text(arm, size + 1e-6)          # sizes are sums of floats
        for _ in range(16):
            start = int(rng.integers(self.corpus.size[split] - n + 1))
            text = self.corpus.window(split, start, n)
            with contextlib.suppress(NotUnique):
                return make_sample(arm, text, rng, self.tok)
        tell_once(f"text     it repeats itself: where 16 places are too much alike for {arm.cls}, "
                  f"the text is predicted instead")
        return text[:0], text

    def __getitem__(self, key: tuple) -> dict:
        return self.batch(*key)


STOP_SIGNALS = [number for number in signal.Signals if number.name in
                ("SIGINT", "SIGTERM", "SIGHUP")]        # Ctrl-C, a scheduler, a closed terminal
tell_once = lru_cache(print)


def ignore_signals(worker: int) -> None:
    """They reach the whole process group; the training process decides."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *error: None        # of the thread whose reader may be gone: no word


@atexit.register
def kill_workers() -> None:
    """At exit multiprocessing asks daemons by SIGTERM, which ours ignore, and waits for ever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class Loader:
    """The same batches as torch tensors, made ahead by worker processes that stay alive."""

    def __init__(self, batches, seed: int, workers: int = 0):
        self.seed, self.workers, self.keys = seed, workers, []
        self.make = partial(DataLoader, batches, batch_size=None, sampler=self.keys,
                            worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available())
        self.loader = self.make(num_workers=workers, persistent_workers=workers > 0)

    def steps(self, start: int, stop: int, action):
        """Iterates over the batches of steps start to stop - 1; call again for another action."""
        while start < stop:
            # in place: this list is the DataLoader's sampler
            self.keys[:] = [(self.seed, 0, k, action, "train") for k in range(start, stop)]
            try:
                made = iter(self.loader)
                in_main = threading.current_thread() is threading.main_thread()
                if self.workers and in_main and hasattr(signal, "SIGCHLD"):     # Windows has none
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # torch raises within a step
                for batch in made:
                    yield batch
                    start += 1
            except (EOFError, OSError, RuntimeError) as error:
                if not self.workers:
                    raise
                problem = str(error).split("\n")[0] or type(error).__name__
                tqdm.write(f"workers  one ended ({problem}): batches are made without any from now")
                kill_workers()
                self.workers, self.loader = 0, self.make()


# ---- demonstration -----------------------------------------------------------------------------

def demo() -> None:
    tok = Tokenizer("bytes", n_masks=256)
    text = tok.encode("The bird that sings at dawn is not the bird that sings at dusk.")
    rng, samples = np.random.default_rng(1), []
    for k, (cls, objective) in enumerate(OBJECTIVES.items()):
        arm = Arm(cls, 20, 80, {name: values[0] for name, values in objective.options.items()})
        samples.append((k, *make_sample(arm, text, rng, tok)))
        prefix, label = (tok.decode(part) for part in samples[k][1:])
        print(f"{cls}\n  Input   {prefix}\n  Target  {label}")

    print("\nA row of 20 tokens: prefix LM, next token prediction, padding (F, R: reset bits)\n"
          "  token        target")
    short = [(1, samples[1][1][:6], samples[1][2][-5:]), (0, samples[0][1], samples[0][2][:7])]
    row = lay_out([short], 20, tok)
    for token, target, reset in zip(*(row[key][0] for key in ("tokens", "targets", "reset"))):
        label = "." if target == IGNORE else tok.decode([target])
        print(f"  {tok.decode([token]):12} {label:12} "
              f"{'F' if reset & RESET_FORWARD else '.'}{'R' if reset & RESET_REVERSE else '.'}")

    batches = Batches(Corpus("stdlib", tok), tok, 2048, 8)
    action, begin = np.full(len(batches.arms), 1 / len(batches.arms)), time.perf_counter()
    full = [(batches.batch(0, 0, step, action, "train")["arm"] >= 0).mean() for step in range(50)]
    speed = 50 * 8 * 2048 / (time.perf_counter() - begin)
    print(f"\n50 batches of 8 x 2048 tokens of the standard library, every arm alike: "
          f"{np.mean(full):.1%} full, {speed:,.0f} tokens/s in one thread")


if __name__ == "__main__":
    demo()
