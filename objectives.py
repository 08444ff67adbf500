"""Text -> tokens -> samples of eight objectives -> packed batches (Birdie, arXiv 2411.01030).

    a sample:  tokens  = prefix + [GEN] + label[:-1]       len(prefix) + len(label) positions;
               targets = -100 * len(prefix) + label        causal from GEN on

    class                     prefix -> label (section 3.2, A.2, A.5)                         arms
    next_token_prediction     nothing -> the text                                                1
    prefix_lm                 the first three quarters of the text -> its rest                   1
    selective_copying         what stands around 1-4 spans, and a context -> the spans          16
    copying                   text -> text                                                       2
    deshuffling               text with half or all of its tokens moved -> text                  4
    infilling                 text with numbered masks for spans -> mask, span, mask, ...       36
    autoencoding              text with masks for spans -> the whole text                       18
    autoencoding_deshuffling  the same, what is left between the masks shuffled -> the text     18

Symbols: B rows of T tokens are a batch; an arm is one configuration of one class (96 at T = 2048); an
action is a probability for every arm; n is a number of tokens of text.

    python objectives.py    a sentence through all eight classes, one packed row, then the packing's speed

Our choices, where the paper is silent:
- Every label but next token prediction's ends with DONE, so greedy decoding knows where to stop.
- Next token prediction fills its row, giving way down to T/8 to a sample that shares it. Prefix LM takes
  T/4 tokens and more, split at three quarters, as in UL2.
- Selective copying asks its questions in random order; a delimiter grows until it has one answer.
- A shuffle is one random cycle: every token that is to move does move.
- A batch draws its arms by systematic sampling (see Batches), so that rows fill without a bias.
"""
import glob
import hashlib
import itertools
import json
import os
import shutil
import sysconfig
import tempfile
import time
import zlib
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
import torch
from torch.utils.data import DataLoader

RESET_FORWARD, RESET_REVERSE = 1, 2  # bits of `reset`; scan.py reads them (section A.4)
IGNORE = -100                        # a target without loss

# Table 1: class, lengths at T = 2048, options; every combination is an arm.
_MASKED = dict(masked=(15, 85), mean_span=(3, 8, 32))
CONFIGURATIONS = (
    ("next_token_prediction", ((256, 2048),), {}),
    ("prefix_lm", ((512, 2048),), {}),
    ("selective_copying", ((384, 768), (768, 1536)),
     dict(n_spans=(1, 2, 3, 4), query=("before", "after"))),
    ("copying", ((64, 256), (256, 1014)), {}),
    ("deshuffling", ((128, 256), (512, 1024)), dict(shuffled=(50, 100))),
    ("infilling", ((128, 256), (256, 512), (512, 1024), (1024, 2048)),
     dict(masked=(5, 15, 50), mean_span=(3, 8, 32))),
    ("autoencoding", ((192, 384), (384, 768), (768, 1536)), _MASKED),
    ("autoencoding_deshuffling", ((192, 384), (384, 768), (768, 1536)), _MASKED),
)
CLASSES = tuple(cls for cls, _, _ in CONFIGURATIONS)


# ---------------------------------------------------------------------------------------- tokens
class Tokenizer:
    """Text to token ids and back; special tokens have the ids above those of text.

    name: 'bpe2048' (2,048 tokens of Python source and English, in assets/), 'bytes' (256), a tiktoken
    encoding such as 'gpt2' (downloaded once) or the path of a .tiktoken file. n_masks: numbered masks
    for infilling; T // 8 is enough, see `n_masked`.
    These two rebuild it. NUL is kept; a lone surrogate, which no encoding can write, becomes U+FFFD;
    any other text survives encoding and decoding exactly. Unusable names: ValueError.
    """

    def __init__(self, name: str = "bpe2048", n_masks: int = 256):
        self.name, self.n_masks, self._encoding = name, n_masks, _encoding(name)
        self.n_text, self.fingerprint = self._encoding.n_vocab, self._encoding.name
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
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def decode(self, ids) -> str:
        """Special tokens are shown by name, such as <GEN>; the few ids that some encodings skip, as <?>."""
        def written(i):
            try:
                return self.special_names[i - self.n_text].encode() if i >= self.n_text else (
                    self._encoding.decode_single_token_bytes(i))
            except KeyError:
                return b"<?>"
        return b"".join(map(written, np.asarray(ids).tolist())).decode("utf-8", "replace")


# GPT-2's pattern, but a digit is always its own token: numbers are copied digit by digit. Our choice.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def _encoding(name: str) -> tiktoken.Encoding:
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,64}", special_tokens={},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name in tiktoken.list_encoding_names():
        try:
            return tiktoken.get_encoding(name)
        except (OSError, ValueError) as e:
            raise ValueError(f"tokenizer {name!r} could not be downloaded ({type(e).__name__}): pass "
                             "--tokenizer bpe2048 or a .tiktoken file, or try again with a network") from None
    if name == "bpe2048":
        name = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "bpe2048.tiktoken")
    if not os.path.isfile(name):
        raise ValueError(f"tokenizer {name!r} is neither 'bpe2048' nor 'bytes', nor a .tiktoken file, nor one of "
                         f'{", ".join(tiktoken.list_encoding_names())}: pass one of these')
    digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()  # or tiktoken may read an old copy
    try:
        ranks = tiktoken.load.load_tiktoken_bpe(name, digest)
    except ValueError:
        ranks = {}
    if sum(len(token) == 1 for token in ranks) < 256 or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{name} is no .tiktoken file: it must have a token in base64, a space and a rank "
                         "on each line, all 256 single bytes among them, and ranks 0, 1, 2... once each")
    return tiktoken.Encoding(f"file-{digest}", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


# ---------------------------------------------------------------------------------------- corpus
CHUNK = 1 << 17  # characters tokenised at once: bounded memory, whatever the file
FORMAT = 2       # of the cached tokens: raise it when they change
NO_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


def _files(data: str) -> list[Path]:
    path = Path(data).expanduser()
    if data == "tables":
        path = Path(np.__file__).parent
        files = list(path.rglob("*.csv"))
    elif data == "stdlib":
        path = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in path.rglob("*.py") if not NO_SOURCE & set(f.relative_to(path).parts)]
    elif path.is_dir():  # hidden files and folders are left out
        files = [f for f in path.rglob("*") if not any(p[0] == "." for p in f.relative_to(path).parts)]
    else:
        files = [path] if path.is_file() else [Path(f) for f in glob.glob(str(path), recursive=True)]
    files = sorted(f for f in files if f.is_file())
    if not files:
        raise FileNotFoundError(f"no file at {str(path)!r}: --data takes a text file, a folder, a glob in quotes, a "
                                ".jsonl file, 'tables' for numpy's tables, or 'stdlib' for Python's standard library")
    return files


def _pieces(path: Path):
    """(whether a document begins here, text) through a file."""
    remedy = "or pass a glob in quotes that leaves it out"
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            first = True
            while path.suffix != ".jsonl" and (piece := f.read(CHUNK) + f.readline(CHUNK)):
                yield first, piece
                first = False
            for number, line in enumerate(f, 1):
                try:
                    text = json.loads(line)["text"] if line.strip() else ""
                    pieces = [(i == 0, text[i:i + CHUNK] + "") for i in range(0, len(text), CHUNK)]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f'{path} line {number} is not like {{"text": "..."}}: mend it, '
                                     f"{remedy}") from None
                yield from pieces
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text ({e.reason}): convert it, {remedy}") from None
    except OSError as e:
        raise ValueError(f"{path} cannot be read ({e.strerror}): change that, {remedy}") from None


def _tokenise(files: list[Path], tok: Tokenizer, folder: Path, dtype: str) -> None:
    """Writes train.bin and val.bin: documents, END_OF_TEXT before each.

    Validation is the 5% of documents whose first piece hashes to it, so copies stay on one side. With few
    or uneven documents that may be under 1% or over 20%; then it is the last 5% of all tokens instead.
    """
    train, val = folder / "train.bin", folder / "val.bin"
    with open(train, "wb") as f_train, open(val, "wb") as f_val:
        for first, piece in itertools.chain.from_iterable(map(_pieces, files)):
            ids = tok.encode(piece)
            if first:
                out = f_train if zlib.crc32(piece.encode("utf-8", "surrogatepass")) % 20 else f_val
                ids = np.append(tok.END_OF_TEXT, ids)
            out.write(ids.astype(dtype).tobytes())
    width = np.dtype(dtype).itemsize
    n_val = val.stat().st_size // width
    n = n_val + train.stat().st_size // width
    if n < 2:
        raise ValueError(f"no text in {files[0]} and {len(files) - 1} other files: pass other --data")
    if not 0.01 * n < n_val < 0.2 * n:
        with open(train, "r+b") as f_train, open(val, "r+b") as f_val:
            f_train.seek(0, os.SEEK_END)
            shutil.copyfileobj(f_val, f_train)
            cut = (n - max(1, n // 20)) * width
            f_train.seek(cut)
            f_val.seek(0)
            shutil.copyfileobj(f_train, f_val)
            f_val.truncate()
            f_train.truncate(cut)


@lru_cache
def _open(path: str, dtype: str) -> np.memmap:
    return np.memmap(path, dtype, "r")  # each process maps the file; no token is sent to a worker


def _check_nanogpt(path: Path, tok: Tokenizer) -> None:
    n_bytes = path.stat().st_size if path.is_file() else 0
    if not n_bytes or n_bytes % 2:
        raise ValueError(f"{path} is missing, empty or not whole uint16 numbers ({n_bytes} bytes): "
                         "prepare it again")
    ids = _open(str(path), "uint16")
    top = max(int(ids[i:i + (1 << 24)].max()) for i in range(0, len(ids), 1 << 24))
    if top >= tok.n_text:
        raise ValueError(f"{path} holds token {top}, but tokenizer {tok.name!r} ends at {tok.n_text - 1}: "
                         "pass the one it was prepared with, such as --tokenizer gpt2")


class Corpus:
    """Two streams of token ids, 'train' and 'val', that share no token; memory-mapped.

    data: text file, folder, glob, .jsonl with a `text` on each line, nanoGPT folder (train.bin, val.bin),
    'stdlib' for the source of Python's standard library, or 'tables' for the tables of hexadecimal numbers that
    numpy brings for its own tests: what stands there cannot be guessed, only looked up. Text is tokenised once,
    into the folder birdie of $XDG_CACHE_HOME or ~/.cache; processes may do so at the same time. size: tokens of
    each split. Unusable data: ValueError or FileNotFoundError with one line.
    """

    def __init__(self, data: str, tok: Tokenizer):
        folder, self.dtype = Path(data).expanduser(), "uint16"
        if (folder / "train.bin").is_file():
            _check_nanogpt(folder / "train.bin", tok)
            _check_nanogpt(folder / "val.bin", tok)
        else:
            self.dtype = "uint16" if tok.END_OF_TEXT < 1 << 16 else "uint32"
            folder = self._cached(_files(data), tok)
        self.paths = {split: str(folder / f"{split}.bin") for split in ("train", "val")}
        self.size = {split: len(_open(path, self.dtype)) for split, path in self.paths.items()}

    def _cached(self, files: list[Path], tok: Tokenizer) -> Path:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "birdie"
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        key = json.dumps([FORMAT, tok.fingerprint, stats]).encode("utf-8", "replace")
        folder = cache / hashlib.sha256(key).hexdigest()[:24]
        try:
            if not folder.is_dir():
                cache.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as temp:
                    _tokenise(files, tok, Path(temp), self.dtype)
                    os.replace(temp, folder)  # all or nothing
        except OSError as e:
            if not folder.is_dir():           # else another process was faster
                raise ValueError(f"tokens cannot be written to {cache} ({e.strerror}): free some space, or "
                                 "set XDG_CACHE_HOME to another folder") from None
        return folder

    def window(self, split: str, start: int, n: int) -> np.ndarray:
        """n tokens from `start` on, (n,) int64."""
        return _open(self.paths[split], self.dtype)[start:start + n].astype(np.int64)


# ------------------------------------------------------------------------------------------ arms
MIN_BLOCK, MIN_TEXT = 64, 8  # shorter rows and texts hold too little to learn from: our choice
SPAN = 4, 32                 # selective copying: tokens of a span (section 3.2)
DELIMITER, GROWN = 8, 16     # 1-8 tokens are drawn; a start delimiter may grow to 16: our choice


@dataclass(frozen=True)
class Arm:
    """One configuration of one class. An option that its class does not use is an error."""
    cls: str
    shortest: int       # tokens of text; in selective copying, of the context
    longest: int
    masked: int = 0     # percent
    mean_span: int = 0  # tokens behind one mask
    shuffled: int = 0   # percent
    n_spans: int = 0    # questions of selective copying
    query: str = ""     # 'before' or 'after' the context

    def __post_init__(self):
        options = {cls: options for cls, _, options in CONFIGURATIONS}[self.cls]
        for option in ("masked", "mean_span", "shuffled", "n_spans", "query"):
            if bool(getattr(self, option)) != (option in options):
                raise ValueError(f"{self.cls} with {option}={getattr(self, option)!r}: it needs "
                                 f'{" and ".join(options) or "no options"}')

    @property
    def name(self) -> str:
        if self.cls == "next_token_prediction":
            return self.cls
        options = (self.masked and f"{self.masked}%-span{self.mean_span}", self.shuffled and f"{self.shuffled}%",
                   self.n_spans and f"{self.n_spans}spans-{self.query}")
        return "-".join([self.cls, f"{self.shortest}-{self.longest}", *filter(None, options)])

    @property
    def n_done(self) -> int:
        """How many DONE are in a label, the last one at its end; a decoder stops at this many."""
        return self.n_spans or int(self.cls != "next_token_prediction")

    @property
    def longest_span(self) -> int:
        return min(SPAN[1], self.shortest // (2 * self.n_spans))  # at most half of the context: our choice

    @property
    def room(self) -> int:
        """Tokens that make_sample takes beyond n: by how much usual delimiters and spans of selective
        copying exceed the shortest. 0 for other classes."""
        return self.n_spans and self.n_spans * (11 + (self.longest_span - SPAN[0]) // 2)


def n_masked(arm: Arm, n: int) -> tuple[int, int]:
    """Masked tokens and the number of spans they form: the fraction masked wins over the mean span.

    s > 1 numbered masks of mean span 3 need masked >= 3s - 1, so (at 50%) n >= 6s - 2, and their sample
    n + 2s + 2 >= 8s positions. As that is at most T, T // 8 numbered masks are enough.
    """
    masked = max(1, n * arm.masked // 100)
    return masked, max(1, round(masked / arm.mean_span))


def positions(arm: Arm, n: int) -> int:
    """Tokens of a row that a sample of length n takes, at most: len(prefix) + len(label)."""
    if arm.cls == "next_token_prediction":
        return n
    if arm.cls == "prefix_lm":
        return n + 2                   # the paradigm token and DONE
    if arm.cls in ("copying", "deshuffling"):
        return 2 * n + 2
    if arm.cls == "selective_copying":  # COPY, CONTEXT; per span START, END, DONE, delimiters, span
        return n + arm.room + 3 + arm.n_spans * (3 + 2 + SPAN[0])
    masked, n_spans = n_masked(arm, n)
    return n + 2 * n_spans + 2 if arm.cls == "infilling" else 2 * n - masked + n_spans + 2


@lru_cache
def arms(block_size: int) -> tuple[Arm, ...]:
    """All arms for rows of block_size tokens: 96 at 2048, where lengths are the paper's; they scale.

    A longest text that does not fit is clipped (names show it); an arm without room is dropped, which
    is printed once.
    """
    if block_size < MIN_BLOCK:
        raise ValueError(f"block_size {block_size} has no room for every class: pass --block_size "
                         f"{MIN_BLOCK} or more")
    kept, dropped = [], []
    for cls, ranges, options in CONFIGURATIONS:
        for (low, high), *values in itertools.product(ranges, *options.values()):
            low, high = max(MIN_TEXT, low * block_size // 2048), high * block_size // 2048
            arm = Arm(cls, low, high, **dict(zip(options, values)))
            fits = bisect_right(range(high + 1), block_size, key=lambda n: positions(arm, n)) - 1
            has_room = fits >= low and (not arm.n_spans or arm.longest_span >= SPAN[0])
            (kept if has_room else dropped).append(replace(arm, longest=fits))
    if dropped:
        print(f"block_size {block_size} has no room for {len(dropped)} of the {len(kept + dropped)} arms "
              f'({", ".join(sorted({arm.cls for arm in dropped}))}): they are left out')
    return tuple(kept)


# --------------------------------------------------------------------------------------- samples
class NotUnique(ValueError):
    """The text repeats itself too much to ask for a span of it."""


def make_sample(arm: Arm, text: np.ndarray, rng: np.random.Generator, tok: Tokenizer):
    """(prefix, label): int64 arrays that together take at most positions(arm, n) tokens of a row.

    text: (n + arm.room,) ids with arm.shortest <= n <= arm.longest. NotUnique: try another text.
    """
    n = len(text) - arm.room
    if not arm.shortest <= n <= arm.longest:
        raise ValueError(f"{arm.name} takes {arm.shortest + arm.room} to {arm.longest + arm.room} tokens of "
                         f"text, not {len(text)}")
    if arm.cls == "next_token_prediction":
        return text[:0], text
    if arm.cls == "selective_copying":
        prefix, label = _selective_copying(arm, text, rng, tok)
    elif arm.cls == "prefix_lm":
        prefix, label = text[:n * 3 // 4], np.append(text[n * 3 // 4:], tok.DONE)
    elif arm.cls == "copying":
        prefix, label = text, np.append(text, tok.DONE)
    elif arm.cls == "deshuffling":
        prefix, label = text[_shuffle(n, n * arm.shuffled // 100, rng)], np.append(text, tok.DONE)
    else:
        prefix, label = _masking(arm, text, rng, tok)
    where = 0 if rng.random() < 0.5 else len(prefix)  # section A.7
    return np.insert(prefix, where, tok.paradigm[arm.cls]), label


def _shuffle(n: int, n_moved: int, rng) -> np.ndarray:
    """A permutation of n that moves exactly n_moved random positions, in one cycle."""
    order, moved = np.arange(n), rng.permutation(n)[:n_moved]
    order[moved] = np.roll(moved, 1)
    return order


def _split(total: int, n_parts: int, least: int, rng) -> np.ndarray:
    """n_parts random sizes >= least with this total, each way equally likely."""
    ends = total - n_parts * least + n_parts - 1
    cuts = np.sort(rng.choice(ends, n_parts - 1, replace=False))
    return np.diff(cuts, prepend=-1, append=ends) - 1 + least


def _pick(ids: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """ids[starts[0]:starts[0] + sizes[0]] and so on, joined."""
    return ids[np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())]


def _masking(arm: Arm, text: np.ndarray, rng, tok: Tokenizer):
    """Infilling and both autoencodings: the text is gap, span, gap, ..., gap, and its spans are masked."""
    masked, n_spans = n_masked(arm, len(text))
    spans, gaps = _split(masked, n_spans, 1, rng), _split(len(text) - masked, n_spans + 1, 0, rng)
    starts = np.cumsum(gaps) - gaps + np.append(0, np.cumsum(spans))  # of the gaps
    span_starts = starts[1:] - spans
    if arm.cls == "autoencoding_deshuffling":
        order = _shuffle(n_spans + 1, n_spans + 1, rng)
        starts, gaps = starts[order], gaps[order]
    masks = tok.MASKS[:n_spans] if arm.cls == "infilling" else tok.MASK
    prefix = np.insert(_pick(text, starts, gaps), np.cumsum(gaps)[:-1], masks)
    if arm.cls == "infilling":
        text = np.insert(_pick(text, span_starts, spans), np.cumsum(spans) - spans, masks)
    return prefix, np.append(text, tok.DONE)


def _ends_once(text: np.ndarray, n: int) -> np.ndarray:
    """(len(text),) bool: whether the n tokens before a position stand nowhere else."""
    hashed = np.lib.stride_tricks.sliding_window_view(text, n) @ (3 ** np.arange(2 * n, n, -1))
    _, first, times = np.unique(hashed, return_index=True, return_counts=True)
    once = np.zeros(len(text) + 1, bool)
    once[first[times == 1] + n] = True
    return once


def _delimiter(text: np.ndarray, end: int, least: int, most: int) -> int:
    """Tokens of a run that ends at `end` and occurs once in text: the fewest, or `least` if that is more; 0 if none."""
    ends = np.flatnonzero(text == text[end - 1]) + 1
    for n in range(1, most + 1):
        ends = ends[ends >= n]
        ends = ends[text[ends - n] == text[end - n]]
        if len(ends) == 1:
            return max(n, min(least, most))
    return 0


def _selective_copying(arm: Arm, text: np.ndarray, rng, tok: Tokenizer):
    """Spans to be found by the delimiters before and after them (section 3.2, A.5).

    The longer these come out, the less of the text becomes context: so the size of a sample is known
    before its delimiters are. They and the spans lie in a stretch that is in the context in any case; a
    delimiter that occurs once in the text occurs once in the context.
    """
    k, once = arm.n_spans, _ends_once(text, GROWN)
    stretch = max(arm.shortest, len(text) - arm.room - 8 * k)
    for _ in range(64):
        spans = rng.integers(SPAN[0], arm.longest_span + 1, k)
        first = int(rng.integers(len(text) - stretch + 1))
        slack = stretch - int(spans.sum()) - k - 1  # a token at least around each span
        starts = first + np.arange(1, k + 1) + np.cumsum(spans) - spans
        starts += np.sort(rng.integers(slack + 1, size=k))
        if not once[starts].all():
            continue
        before, after = rng.integers(1, DELIMITER + 1, (2, k))
        for i, (start, end) in enumerate(zip(starts.tolist(), (starts + spans).tolist())):
            before[i] = _delimiter(text, start, before[i], min(GROWN, start - first))
            back = text[start:min(end + DELIMITER, first + stretch)][::-1]  # an answer ends where the end
            size = len(back) - (end - start)                                # delimiter first appears
            after[i] = _delimiter(back, size, after[i], size)
        n = min(arm.longest, len(text) - int((before + after + spans - 2 - SPAN[0]).sum()))
        if before.all() and after.all() and n >= stretch:
            break
    else:
        raise NotUnique(f"{arm.name} finds no span with a unique place in the text")
    start = rng.integers(max(0, first + stretch - n), min(first, len(text) - n) + 1)
    context, query, label = [[tok.CONTEXT], text[start:start + n]], [[tok.COPY]], []
    for i in rng.permutation(k):
        start, end = starts[i], starts[i] + spans[i]
        query += [[tok.START], text[start - before[i]:start], [tok.END], text[end:end + after[i]]]
        label += [text[start:end], [tok.DONE]]
    prefix = query + context if arm.query == "before" else context + query
    return np.concatenate(prefix), np.concatenate(label)


# --------------------------------------------------------------------------------------- batches
def lay_out(rows: list, block_size: int, tok: Tokenizer) -> dict:
    """Rows of samples (arm index, prefix, label) as the arrays of a batch, (B, T) each."""
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
    """Batches as a pure function of (seed, rank, step, action, split): nothing is carried over.

    A packer that keeps what happens to fit changes the bandit's action. This one leaves out nothing:
    1. How many samples a batch has, K, depends on the action alone (`_count`).
    2. K arms are drawn by systematic sampling in order of size (`_choose`): on average arm i comes exactly
       K * action[i] times, and every batch has small and large samples in proportion.
    3. The largest first, each goes to the row with the most room, by its usual size (`_place`).
    4. Each draws its length from its arm's range; then all samples of a row move towards their longest
       (or shortest) by the same share until they fill it (`_row`).
    """

    def __init__(self, corpus: Corpus, tok: Tokenizer, block_size: int, batch_size: int):
        self.corpus, self.tok, self.block_size, self.batch_size = corpus, tok, block_size, batch_size
        self.arms = arms(block_size)
        self.low = np.array([positions(arm, arm.shortest) for arm in self.arms])
        self.high = np.array([positions(arm, arm.longest) for arm in self.arms])
        self.usual = (self.low + self.high) / 2
        self.usual[0] = self.high[0]  # next token prediction
        self.by_size = np.argsort(self.usual, kind="stable")
        if tok.n_masks < block_size // 8:
            raise ValueError(f"a tokenizer with n_masks {tok.n_masks} numbers too few spans for block_size "
                             f"{block_size}: make it with {block_size // 8} or pass a smaller --block_size")
        need = max(arm.longest + arm.room for arm in self.arms)
        if min(corpus.size.values()) < need:
            raise ValueError(f"a sample takes up to {need} tokens, but there are {corpus.size}: pass more "
                             "text as --data or a smaller --block_size")

    def batch(self, seed: int, rank: int, step: int, action: np.ndarray, split: str) -> dict:
        """(B, T) arrays: tokens and targets (int64), reset (uint8), arm (int16, index into self.arms).

        Padding: token PAD, target -100, both reset bits, arm -1.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (len(self.arms),) or not (action >= 0).all() or abs(action.sum() - 1) > 1e-3:
            raise ValueError(f"an action is {len(self.arms)} probabilities, not {action.shape} with sum "
                             f"{action.sum()}")
        rng = np.random.Generator(np.random.PCG64([seed, rank, step, ("train", "val").index(split)]))
        chosen = self._choose(action, self._count(action.tobytes()), rng.random(dtype=np.float32))
        placed = self._place(chosen)
        rows = [self._row(rng.permutation(chosen[placed == b]), rng, split) for b in range(self.batch_size)]
        return lay_out(rows, self.block_size, self.tok)

    def __getitem__(self, key: tuple) -> dict:
        return self.batch(*key)

    def _choose(self, action: np.ndarray, n: int, u: float) -> np.ndarray:
        share = np.cumsum(action[self.by_size])
        return self.by_size[np.searchsorted(share / share[-1], (np.arange(n) + u) / n, side="right")]

    def _place(self, chosen: np.ndarray) -> np.ndarray:
        """The row of each sample, -1 where not even its shortest form has room (_count sees to that)."""
        room, usual_room = (np.full(self.batch_size, float(self.block_size)) for _ in range(2))
        placed = np.full(len(chosen), -1)
        for i, arm in reversed(list(enumerate(chosen))):
            b = np.where(room >= self.low[arm], usual_room, -np.inf).argmax()
            if room[b] >= self.low[arm]:
                placed[i] = b
                room[b] -= self.low[arm]
                usual_room[b] -= self.usual[arm]
        return placed

    @lru_cache(maxsize=256)
    def _count(self, action: bytes) -> int:
        """K: next to B * T / mean size, such that all samples find room and can fill 99% (else the best)."""
        action, best = np.frombuffer(action), (0.0, 1)
        guess = self.batch_size * self.block_size / (action @ self.usual / action.sum())
        candidates = range(max(1, int(guess / 2)), int(guess * 2) + 2, 1 + int(guess / 64))
        for n in sorted(candidates, key=lambda n: abs(n - guess)):
            full = min(self._fullness(self._choose(action, n, u)) for u in (0.1, 0.3, 0.5, 0.7, 0.9))
            if full > best[0]:
                best = full, n
            if full > 0.99:
                break
        return best[1]

    def _fullness(self, chosen: np.ndarray) -> float:
        placed = self._place(chosen)
        if placed.min() < 0:
            return 0.0
        reach = np.bincount(placed, self.high[chosen], self.batch_size)
        return np.minimum(reach, self.block_size).mean() / self.block_size

    def _row(self, members: np.ndarray, rng, split: str) -> list:
        low, high = self.low[members], self.high[members]
        size = low + rng.random(len(members)) * (high - low)
        spare = self.block_size - size.sum()
        give = high - size if spare > 0 else size - low
        size += give * np.clip(spare / max(1, give.sum()), -1, 1)
        samples, spare = [], 0.0
        for index, size in zip(members.tolist(), size.tolist()):
            arm = self.arms[index]
            lengths = range(arm.shortest, arm.longest + 1)
            n = bisect_right(lengths, size + spare + 1e-6, key=lambda n: positions(arm, n)) - 1
            prefix, label = self._sample(arm, lengths[max(0, n)], rng, split)
            spare += size - len(prefix) - len(label)  # what one leaves goes to the next
            samples.append((index, prefix, label))
        return samples

    def _sample(self, arm: Arm, n: int, rng, split: str):
        for _ in range(64):
            start = int(rng.integers(self.corpus.size[split] - n - arm.room + 1))
            try:
                return make_sample(arm, self.corpus.window(split, start, n + arm.room), rng, self.tok)
            except NotUnique as e:
                error = e
        raise ValueError(f"{error}, at 64 places of the {split} split: pass other --data, or a --mixture "
                         "without selective copying")


class Loader:
    """The same batches as torch tensors, made ahead by worker processes of one thread that stay alive."""

    def __init__(self, batches: Batches, seed: int, rank: int = 0, workers: int = 0):
        self.seed, self.rank, self.keys = seed, rank, []
        self.loader = DataLoader(batches, batch_size=None, sampler=self.keys, num_workers=workers,
                                 persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())

    def steps(self, start: int, stop: int, action: np.ndarray, split: str = "train"):
        """Iterates over the batches of steps start to stop - 1; call it again when the action changes."""
        self.keys[:] = [(self.seed, self.rank, step, action, split) for step in range(start, stop)]
        return iter(self.loader)


# --------------------------------------------------------------------------------- demonstration
def demo() -> None:
    tok = Tokenizer("bytes", n_masks=256)
    text = tok.encode("The bird that sings at dawn is not the bird that sings at dusk.")
    rng, samples = np.random.default_rng(1), []
    for cls, _, options in CONFIGURATIONS:
        arm = Arm(cls, 20, 80, **{option: values[-1] for option, values in options.items()})
        arm = replace(arm, **dict(mean_span=8) if arm.mean_span else dict(n_spans=1) if arm.n_spans else {})
        samples.append((CLASSES.index(cls), *make_sample(arm, text, rng, tok)))
        print(f"{cls}\n  Input   {tok.decode(samples[-1][1])}\n  Target  {tok.decode(samples[-1][2])}")

    print("\nA row of 20 tokens: prefix LM, next token prediction, padding (F, R: reset bits)\n  token        target")
    short = [(1, samples[1][1][:6], samples[1][2][-5:]), (0, *(part[:7] for part in samples[0][1:]))]
    row = lay_out([short], 20, tok)
    for token, target, reset in zip(*(row[key][0] for key in ("tokens", "targets", "reset"))):
        print(f"  {tok.decode([token]):12} {'.' if target == IGNORE else tok.decode([target]):12} "
              f"{'F' if reset & RESET_FORWARD else '.'}{'R' if reset & RESET_REVERSE else '.'}")

    batches = Batches(Corpus("stdlib", tok), tok, 2048, 8)
    action, start = np.full(96, 1 / 96), time.perf_counter()
    full = np.mean([(batches.batch(0, 0, step, action, "train")["arm"] >= 0).mean() for step in range(50)])
    print(f"\n50 batches of 8 x 2048 tokens of the standard library, all 96 arms: {full:.2%} full, "
          f"{50 * 8 * 2048 / (time.perf_counter() - start):,.0f} tokens/s in one thread")


if __name__ == "__main__":
    torch.set_num_threads(1)
    demo()
