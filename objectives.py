"""Text -> tokens -> samples of eight objectives -> packed batches (Birdie, arXiv 2411.01030).

    sample    tokens  = prefix + [GEN] + label[:-1]       a model reads the prefix both ways and
              targets = -100 * len(prefix) + label        writes the label from GEN on
              (len(prefix) + len(label) positions)

    class                     prefix -> label (section 3.2, A.2, A.5)                          arms
    next_token_prediction     nothing -> the text                                                 1
    prefix_lm                 first three quarters of the text -> its rest                        1
    selective_copying         delimiters of 1-4 spans, and a context -> the spans                16
    copying                   text -> text                                                        2
    deshuffling               text with half or all tokens moved -> text                          4
    infilling                 text with spans behind numbered masks -> mask, span, mask, ...     36
    autoencoding              text with spans behind masks -> the whole text                     18
    autoencoding_deshuffling  the same, what is left between the masks shuffled -> the text      18

Symbols: B rows of T tokens in a batch; an arm is one configuration of one class (96 at T = 2048);
action: a probability for each arm. Every array is numpy until `Loader` hands torch tensors on.

    python objectives.py     one sentence through all eight classes, one packed row, then packing speed

Our choices, where the paper is silent:
- every label but next token prediction's ends with DONE, so greedy decoding knows when to stop;
- next token prediction fills its row (it gives way, down to T/8, to a sample that shares the row);
  prefix LM splits texts of T/4 tokens and more at three quarters, as UL2 does;
- selective copying: delimiters are lengthened until each question has exactly one answer, order of the
  questions is random, and spans fill at most half of the context;
- a shuffle is one random cycle, so every token chosen to move does move;
- a batch draws its arms by systematic sampling, not one by one: each arm's expected share of the
  samples is exactly its probability, yet every batch has small and large samples in proportion, which is
  what lets rows come out full without leaving any sample for the next batch (see Batches).
"""
import glob
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
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

CLASSES = ('next_token_prediction', 'prefix_lm', 'selective_copying', 'copying', 'deshuffling',
           'infilling', 'autoencoding', 'autoencoding_deshuffling')
RESET_FORWARD, RESET_REVERSE = 1, 2  # bits of `reset`; scan.py reads them (section A.4)
IGNORE = -100                        # target without a loss


# ---------------------------------------------------------------------------------------- tokens
class Tokenizer:
    """Text to token ids and back; special tokens have the ids above the text's.

    name: 'bytes' (256 tokens, no download), a tiktoken encoding such as 'gpt2' (downloaded once), or
    the path of a .tiktoken file. n_masks: numbered masks for infilling; block_size // 8 is enough,
    see `arms`. (name, n_masks) rebuilds it. NUL is kept; a lone surrogate, which no encoding can
    write, becomes U+FFFD; any other text survives encode -> decode exactly.
    """

    def __init__(self, name: str = 'bytes', n_masks: int = 256):
        self.name, self.n_masks = name, n_masks
        self._encoding = _encoding(name)
        self.n_text = self._encoding.n_vocab
        names = ['PAD', 'GEN', 'DONE', 'END_OF_TEXT', 'COPY', 'START', 'END', 'CONTEXT', 'MASK']
        (self.PAD, self.GEN, self.DONE, self.END_OF_TEXT, self.COPY, self.START, self.END,
         self.CONTEXT, self.MASK) = range(self.n_text, self.n_text + len(names))
        self.paradigm = {c: self.n_text + len(names) + i for i, c in enumerate(CLASSES[1:])}
        names += [c.upper() for c in CLASSES[1:]]
        # Numbered masks come last: the other ids, and cached corpora, do not depend on n_masks.
        self.MASKS = self.n_text + len(names) + np.arange(n_masks)
        self.special_names = [f'<{s}>' for s in names] + [f'<MASK_{i}>' for i in range(n_masks)]
        self.vocab_size = self.n_text + len(self.special_names)
        self.fingerprint = self._encoding.name  # a file's holds the hash of its content

    def encode(self, text: str) -> np.ndarray:
        """(n,) int64. Text that looks like a special token is text."""
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def decode(self, ids) -> str:
        """Special tokens are shown by name, such as <GEN>."""
        ids = np.asarray(ids, dtype=np.int64)
        parts = []
        for run in np.split(ids, np.flatnonzero(np.diff(ids >= self.n_text)) + 1) if len(ids) else []:
            if run[0] < self.n_text:
                parts.append(self._encoding.decode_bytes(run.tolist()).decode('utf-8', 'replace'))
            else:
                parts += [self.special_names[i - self.n_text] for i in run]
        return ''.join(parts)


# GPT-2's pattern, but digits stand alone: numbers are copied digit by digit. Our choice.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def _encoding(name: str) -> tiktoken.Encoding:
    if name == 'bytes':
        return tiktoken.Encoding('bytes', pat_str=r'[\s\S]{1,64}', special_tokens={},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name in tiktoken.list_encoding_names():
        try:
            return tiktoken.get_encoding(name)
        except (OSError, ValueError) as e:
            raise ValueError(f'tokenizer {name!r} could not be downloaded ({type(e).__name__}): pass '
                             '--tokenizer bytes or a .tiktoken file, or come back with a network') from None
    if not os.path.isfile(name):
        raise ValueError(f"tokenizer {name!r} is neither 'bytes', nor a .tiktoken file, nor one of "
                         f'{", ".join(tiktoken.list_encoding_names())}; pass one of these as --tokenizer')
    digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()  # or tiktoken may read an old copy
    try:
        ranks = tiktoken.load.load_tiktoken_bpe(name, digest)
    except ValueError:
        raise ValueError(f'{name} is not a .tiktoken file: every line must be a token in base64, a space '
                         'and a rank; tiktoken.load.dump_tiktoken_bpe writes one') from None
    missing = 256 - sum(len(token) == 1 for token in ranks)
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f'{name} lacks {missing} of the 256 single bytes, or its ranks are not 0, 1, 2... '
                         'once each; tiktoken.load.dump_tiktoken_bpe writes such a file')
    return tiktoken.Encoding(f'file-{digest}', pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})


# ---------------------------------------------------------------------------------------- corpus
CHUNK = 1 << 18  # characters tokenised at a time, so memory stays bounded whatever the file
FORMAT = 1       # of the cache; raise it when its content changes
NO_SOURCE = {'site-packages', 'dist-packages', 'test', 'tests', 'idlelib'}


def _files(data: str) -> list[Path]:
    """The files that `data` means, sorted. Hidden files of a folder are left out."""
    path = Path(data).expanduser()
    if data in ('', 'stdlib'):
        path = Path(sysconfig.get_paths()['stdlib'])
        files = [f for f in path.rglob('*.py') if not NO_SOURCE & set(f.relative_to(path).parts)]
    elif path.is_dir():
        files = [f for f in path.rglob('*') if not any(p[0] == '.' for p in f.relative_to(path).parts)]
    else:
        files = [path] if path.is_file() else [Path(f) for f in glob.glob(str(path), recursive=True)]
    files = sorted(f for f in files if f.is_file())
    if not files:
        raise FileNotFoundError(f'no text at {str(path)!r}: --data takes a text file, a folder, a glob in '
                                "quotes, a .jsonl file or nothing (Python's standard library)")
    return files


def _pieces(path: Path):
    """(whether a document begins here, text) through a file, in bounded memory."""
    try:
        with open(path, encoding='utf-8-sig', newline='') as f:
            if path.suffix != '.jsonl':
                first = True
                while piece := f.read(CHUNK) + f.readline(CHUNK):  # up to a line's end, if one is near
                    yield first, piece
                    first = False
                return
            for number, line in enumerate(f, 1):
                try:
                    text = json.loads(line)['text'] if line.strip() else ''
                    pieces = [(i == 0, text[i:i + CHUNK]) for i in range(0, len(text), CHUNK)]
                    assert isinstance(text, str)
                except (ValueError, KeyError, TypeError, AssertionError):
                    raise ValueError(f'{path} line {number} is not a JSON object with a text: write '
                                     '{"text": "..."} on every line') from None
                yield from pieces
    except UnicodeDecodeError as e:
        raise ValueError(f'{path} is not UTF-8 text ({e.reason}): convert it, or pass a glob in quotes '
                         'that leaves it out') from None
    except OSError as e:
        raise ValueError(f'{path} cannot be read ({e.strerror}): make it readable, or pass a glob in '
                         'quotes that leaves it out') from None


def _tokenise(files: list[Path], tok: Tokenizer, folder: Path, dtype) -> None:
    """Writes train.bin and val.bin: documents, END_OF_TEXT before each.

    Validation is the documents (5%) whose first piece hashes to it, so copies stay on one side. With
    few or uneven documents it may be under 1% or over 20%; then it is the last 5% of all tokens instead.
    """
    train, val = folder / 'train.bin', folder / 'val.bin'
    with open(train, 'wb') as f_train, open(val, 'wb') as f_val:
        for first, piece in (pair for path in files for pair in _pieces(path)):
            ids = tok.encode(piece)
            if first:
                hashed = zlib.crc32(piece.encode('utf-8', 'surrogatepass'))
                out = f_val if hashed % 20 == 0 else f_train
                ids = np.append(tok.END_OF_TEXT, ids)
            out.write(ids.astype(dtype).tobytes())
    n_val = val.stat().st_size
    n_all = n_val + train.stat().st_size
    if not n_all:
        raise ValueError(f'no text in {files[0]}{" and the other files" * (len(files) > 1)}: all of it is '
                         'empty; pass other --data')
    if not 0.01 * n_all < n_val < 0.2 * n_all:
        with open(train, 'ab') as f_train, open(val, 'rb') as f_val:
            shutil.copyfileobj(f_val, f_train)
        width = np.dtype(dtype).itemsize
        cut = n_all // width - max(1, n_all // width // 20)
        with open(train, 'r+b') as f_train, open(val, 'wb') as f_val:
            f_train.seek(cut * width)
            shutil.copyfileobj(f_train, f_val)
            f_train.truncate(cut * width)


@lru_cache
def _open(path: str, dtype: str) -> np.memmap:
    return np.memmap(path, dtype, 'r')  # one map per process; never sent to a worker


def _check_nanogpt(path: str, tok: Tokenizer) -> None:
    n_bytes = os.path.getsize(path) if os.path.isfile(path) else 0
    if not n_bytes or n_bytes % 2:
        raise ValueError(f'{path} is missing, empty or no array of uint16 ({n_bytes} bytes): run the script '
                         'that prepared it again')
    ids = _open(path, 'uint16')
    top = max(int(ids[i:i + (1 << 24)].max()) for i in range(0, len(ids), 1 << 24))
    if top >= tok.n_text:
        raise ValueError(f'{path} holds token {top}, but those of tokenizer {tok.name!r} end at '
                         f'{tok.n_text - 1}: pass the one it was made with, such as --tokenizer gpt2')


class Corpus:
    """Two streams of token ids, 'train' and 'val', that share no token; on disk, memory-mapped.

    data: text file, folder, glob, .jsonl with a `text` in each line, nanoGPT folder (train.bin, val.bin)
    or '' for the source of Python's standard library. Text is tokenised once, into
    $XDG_CACHE_HOME/birdie (or ~/.cache/birdie); processes that do so at the same time do not disturb each
    other. size: {'train': tokens, 'val': tokens}. Unusable data: ValueError or FileNotFoundError, one line.
    """

    def __init__(self, data: str, tok: Tokenizer):
        folder = Path(data).expanduser()
        nanogpt = data != '' and (folder / 'train.bin').is_file()
        self.dtype = 'uint16' if nanogpt or tok.END_OF_TEXT < 1 << 16 else 'uint32'
        if not nanogpt:
            folder = self._cached(_files(data), tok)
        self.paths = {split: str(folder / f'{split}.bin') for split in ('train', 'val')}
        if nanogpt:
            for path in self.paths.values():
                _check_nanogpt(path, tok)
        self.size = {split: len(_open(path, self.dtype)) for split, path in self.paths.items()}

    def _cached(self, files: list[Path], tok: Tokenizer) -> Path:
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        key = hashlib.sha256(json.dumps([FORMAT, tok.fingerprint, stats]).encode()).hexdigest()[:24]
        cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'birdie'
        if (cache / key).is_dir():
            return cache / key
        try:
            cache.mkdir(parents=True, exist_ok=True)
            temp = Path(tempfile.mkdtemp(prefix='writing-', dir=cache))
        except OSError as e:
            raise ValueError(f'tokens cannot be kept in {cache} ({e.strerror}): set XDG_CACHE_HOME to a '
                             'folder that can be written') from None
        try:
            _tokenise(files, tok, temp, self.dtype)
            os.replace(temp, cache / key)  # all or nothing
        except OSError as e:
            if not (cache / key).is_dir():  # otherwise another process was faster
                raise ValueError(f'tokens cannot be written to {cache} ({e.strerror}): free some space or '
                                 'set XDG_CACHE_HOME to another folder') from None
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        return cache / key

    def window(self, split: str, start: int, n: int) -> np.ndarray:
        """n tokens from `start` on: (n,) int64."""
        return _open(self.paths[split], self.dtype)[start:start + n].astype(np.int64)


# ------------------------------------------------------------------------------------------ arms
MIN_BLOCK, MIN_TEXT = 64, 8         # a shorter row or text holds nothing worth learning: our choice
SPAN = 4, 32                        # selective copying: tokens of a span (section 3.2)
DELIMITER = 8                       # drawn tokens of a delimiter, 1-8; an end delimiter has no more
START_DELIMITER = 16                # a start delimiter may grow to this until it is unique: our choice
USES = {'selective_copying': {'n_spans', 'query'}, 'deshuffling': {'shuffled'},
        'infilling': {'masked', 'mean_span'}, 'autoencoding': {'masked', 'mean_span'},
        'autoencoding_deshuffling': {'masked', 'mean_span'}}


@dataclass(frozen=True)
class Arm:
    """One configuration of one class. An option its class does not use is an error."""
    cls: str
    shortest: int       # tokens of text, table 1; of the context in selective copying
    longest: int
    masked: int = 0     # percent
    mean_span: int = 0  # tokens behind a mask
    shuffled: int = 0   # percent
    n_spans: int = 0    # questions of selective copying
    query: str = ''     # 'before' or 'after' the context

    def __post_init__(self):
        if self.cls not in CLASSES:
            raise ValueError(f'no class {self.cls!r}: it is one of {", ".join(CLASSES)}')
        for option in ('masked', 'mean_span', 'shuffled', 'n_spans', 'query'):
            if bool(getattr(self, option)) != (option in USES.get(self.cls, ())):
                raise ValueError(f'{self.cls} with {option}={getattr(self, option)!r}: it takes '
                                 f'{", ".join(sorted(USES.get(self.cls, ()))) or "no options"}')

    @property
    def name(self) -> str:
        if self.cls == 'next_token_prediction':
            return self.cls
        parts = [f'{self.cls}-{self.shortest}-{self.longest}']
        parts += [f'{self.masked}%-span{self.mean_span}'] if self.masked else []
        parts += [f'{self.shuffled}%'] if self.shuffled else []
        parts += [f'{self.n_spans}spans-query-{self.query}'] if self.n_spans else []
        return '-'.join(parts)

    @property
    def longest_span(self) -> int:
        return min(SPAN[1], self.shortest // (2 * self.n_spans))  # at most half of the context

    @property
    def room(self) -> int:
        """Tokens make_sample takes beyond the length: what delimiters and spans of selective copying add
        to the row beyond the least, when delimiters are longest and spans average. Else 0."""
        return self.n_spans and self.n_spans * (START_DELIMITER + DELIMITER - 2
                                                + (self.longest_span - SPAN[0]) // 2)

    @property
    def n_done(self) -> int:
        """How many DONE a label holds; its last token is one. A decoder stops at this many."""
        return self.n_spans or int(self.cls != 'next_token_prediction')


def positions(arm: Arm, n: int) -> int:
    """Tokens of a row that a sample of length n takes at most: len(prefix) + len(label)."""
    if arm.cls == 'next_token_prediction':
        return n
    if arm.cls == 'prefix_lm':
        return n + 2                                    # paradigm token, DONE
    if arm.cls in ('copying', 'deshuffling'):
        return 2 * n + 2
    if arm.cls == 'selective_copying':                  # + COPY, CONTEXT; per span START, END, DONE
        return n + arm.room + 3 + arm.n_spans * (2 + 1 + 1 + 1 + SPAN[0])  # delimiters of 1, span of 4
    masked, n_spans = _n_masked(arm, n)
    return n + 2 * n_spans + 2 if arm.cls == 'infilling' else 2 * n - masked + n_spans + 2


def _n_masked(arm: Arm, n: int) -> tuple[int, int]:
    """Tokens masked, and spans they are in: the masked fraction wins over the mean span.

    Numbered masks: s spans of mean 3 take masked >= 3s - 1 tokens, at 50% from a text of n >= 6s - 2, so
    T >= positions = n + 2s + 2 >= 8s, and T // 8 numbered masks are enough.
    """
    masked = max(1, n * arm.masked // 100)
    return masked, max(1, round(masked / arm.mean_span))


def _configurations():
    """Class, shortest and longest text at T = 2048, options: SPEC of table 1."""
    yield 'next_token_prediction', 256, 2048, {}
    yield 'prefix_lm', 512, 2048, {}
    for n_spans in (1, 2, 3, 4):
        for query in ('before', 'after'):
            for length in (384, 768):
                yield 'selective_copying', length, 2 * length, dict(n_spans=n_spans, query=query)
    yield 'copying', 64, 256, {}
    yield 'copying', 256, 1014, {}
    for length in ((128, 256), (512, 1024)):
        for shuffled in (50, 100):
            yield 'deshuffling', *length, dict(shuffled=shuffled)
    for length in (128, 256, 512, 1024):
        for masked in (5, 15, 50):
            for mean_span in (3, 8, 32):
                yield 'infilling', length, 2 * length, dict(masked=masked, mean_span=mean_span)
    for cls in ('autoencoding', 'autoencoding_deshuffling'):
        for length in (192, 384, 768):
            for masked in (15, 85):
                for mean_span in (3, 8, 32):
                    yield cls, length, 2 * length, dict(masked=masked, mean_span=mean_span)


@lru_cache
def arms(block_size: int) -> tuple[Arm, ...]:
    """All arms for rows of block_size tokens: 96 at 2048, where lengths are the paper's; they scale.

    A longest text that does not fit is clipped, which the name shows; an arm without room is dropped,
    which is printed, once.
    """
    if block_size < MIN_BLOCK:
        raise ValueError(f'block_size {block_size} is below {MIN_BLOCK}, the shortest row that holds samples '
                         f'of every class; pass --block_size {MIN_BLOCK} or more')
    kept, dropped = [], []
    for cls, low, high, options in _configurations():
        low, high = (length * block_size // 2048 for length in (low, high))
        arm = Arm(cls, max(low, MIN_TEXT), high, **options)
        fits = bisect_right(range(high + 1), block_size, key=lambda n: positions(arm, n)) - 1
        arm = replace(arm, longest=fits)
        cramped = arm.n_spans and arm.longest_span < SPAN[0]
        (dropped if fits < arm.shortest or cramped else kept).append(arm)
    if dropped:
        print(f'block_size {block_size} has no room for {len(dropped)} of {len(kept) + len(dropped)} arms: '
              f'{", ".join(sorted({arm.cls for arm in dropped}))}')
    return tuple(kept)


# --------------------------------------------------------------------------------------- samples
def make_sample(arm: Arm, text: np.ndarray, rng: np.random.Generator, tok: Tokenizer):
    """(prefix, label), int64 arrays that take at most positions(arm, len(text)) tokens of a row.

    text: (n + arm.room,) ids, arm.shortest <= n <= arm.longest. Raises NotUnique where selective copying
    finds no spans in it that can be asked for: then take another text.
    """
    if not arm.shortest <= len(text) - arm.room <= arm.longest:
        raise ValueError(f'{arm.name} takes {arm.shortest + arm.room} to {arm.longest + arm.room} tokens of '
                         f'text, not {len(text)}')
    if arm.cls == 'next_token_prediction':
        return text[:0], text
    if arm.cls == 'prefix_lm':
        prefix, label = np.split(text, [len(text) * 3 // 4])
    elif arm.cls == 'selective_copying':
        prefix, label = _selective_copying(arm, text, rng, tok)
    elif arm.cls == 'copying':
        prefix, label = text, text
    elif arm.cls == 'deshuffling':
        prefix, label = text[_shuffle(len(text), len(text) * arm.shuffled // 100, rng)], text
    else:
        prefix, label = _masking(arm, text, rng, tok)
    if arm.cls != 'selective_copying':  # whose label ends with one already
        label = np.append(label, tok.DONE)
    where = 0 if rng.random() < 0.5 else len(prefix)  # section A.7
    return np.insert(prefix, where, tok.paradigm[arm.cls]), label


def _shuffle(n: int, n_moved: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation of n in which exactly n_moved random positions move, in one cycle."""
    order, moved = np.arange(n), rng.permutation(n)[:n_moved]
    order[moved] = np.roll(moved, 1)
    return order


def _split(total: int, n_parts: int, smallest: int, rng: np.random.Generator) -> np.ndarray:
    """n_parts random sizes of at least `smallest` that sum to total, every way equally likely."""
    free = total - n_parts * smallest
    cuts = np.sort(rng.choice(free + n_parts - 1, n_parts - 1, replace=False))
    return np.diff(cuts, prepend=-1, append=free + n_parts - 1) - 1 + smallest


def _pieces_of(ids: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """ids[starts[0] : starts[0] + sizes[0]], then the next piece, and so on, as one array."""
    before = np.cumsum(sizes) - sizes
    return ids[np.repeat(starts - before, sizes) + np.arange(sizes.sum())]


def _masking(arm: Arm, text, rng, tok):
    """Infilling and both autoencodings: gap, span, gap, span ... gap; the spans are masked."""
    masked, n_spans = _n_masked(arm, len(text))
    spans = _split(masked, n_spans, 1, rng)
    gaps = _split(len(text) - masked, n_spans + 1, 0, rng)
    starts = np.cumsum(gaps) - gaps + np.cumsum(np.append(0, spans))  # of the gaps
    if arm.cls == 'autoencoding_deshuffling':
        order = _shuffle(n_spans + 1, n_spans + 1, rng)
        starts, gaps = starts[order], gaps[order]
    masks = tok.MASKS[:n_spans] if arm.cls == 'infilling' else tok.MASK
    prefix = np.insert(_pieces_of(text, starts, gaps), np.cumsum(gaps)[:-1], masks)
    if arm.cls != 'infilling':
        return prefix, text
    starts = starts[1:] - spans                                       # of the spans
    return prefix, np.insert(_pieces_of(text, starts, spans), np.cumsum(spans) - spans, masks)


class NotUnique(ValueError):
    """No spans were found whose delimiters point at one place only."""


def _delimiter(text: np.ndarray, end: int, shortest: int, longest: int) -> int:
    """Length of the shortest run of tokens that ends at `end` and occurs once in text; 0 if none."""
    ends = np.flatnonzero(text == text[end - 1]) + 1
    for n in range(1, longest + 1):
        ends = ends[ends >= n]
        ends = ends[text[ends - n] == text[end - n]]
        if len(ends) == 1:
            return max(n, min(shortest, longest))
    return 0


def _selective_copying(arm: Arm, text, rng, tok):
    """Spans of the text, found by what stands before and after them (section 3.2, figure 3).

    The longer delimiters and spans come out, the less of the text becomes context: so the sample's size
    is known beforehand. Spans and delimiters lie in a stretch of text that is in the context in any
    case; a delimiter that occurs once in the text occurs once in the context.
    """
    k, delimiters = arm.n_spans, arm.n_spans * (START_DELIMITER + DELIMITER - 2)
    for _ in range(16):
        more = rng.integers(arm.longest_span - SPAN[0] + 1, size=k)   # span tokens beyond the least
        over = int(more.sum()) - (len(text) - arm.shortest - delimiters)
        if over > 0:
            more -= -(-over * more // more.sum())
        spans = SPAN[0] + more
        stretch = min(arm.longest, len(text) - delimiters - int(more.sum()))
        first = int(rng.integers(len(text) - stretch + 1))
        gaps = _split(stretch - int(spans.sum()), k + 1, 1, rng)
        starts = first + np.cumsum(gaps[:-1]) + np.cumsum(spans) - spans
        before, after = rng.integers(1, DELIMITER + 1, (2, k))
        for i, (start, end) in enumerate(zip(starts.tolist(), (starts + spans).tolist())):
            before[i] = _delimiter(text, start, before[i], min(START_DELIMITER, start - first))
            rest = text[start:min(end + DELIMITER, first + stretch)][::-1]  # the answer ends where the
            back = len(rest) - (end - start)                                # end delimiter is first seen
            after[i] = _delimiter(rest, back, after[i], back)
        if before.all() and after.all():
            break
    else:
        raise NotUnique(f'{arm.name}: the text repeats itself so much that no question has one answer')
    n = min(arm.longest, len(text) - int((before + after - 2 + more).sum()))
    start = rng.integers(max(0, first + stretch - n), min(first, len(text) - n) + 1)
    context, query, label = [[tok.CONTEXT], text[start:start + n]], [[tok.COPY]], []
    for i in rng.permutation(k):
        start, end = starts[i], starts[i] + spans[i]
        query += [[tok.START], text[start - before[i]:start], [tok.END], text[end:end + after[i]]]
        label += [text[start:end], [tok.DONE]]
    parts = query + context if arm.query == 'before' else context + query
    return np.concatenate(parts), np.concatenate(label)


# ---------------------------------------------------------------------------------------- batches
def lay_out(rows: list, block_size: int, tok: Tokenizer) -> dict:
    """Arrays (B, T) from rows of samples (arm index, prefix, label). Padding: PAD, -100, both bits, -1."""
    shape = len(rows), block_size
    out = {'tokens': np.full(shape, tok.PAD, np.int64), 'targets': np.full(shape, IGNORE, np.int64),
           'reset': np.full(shape, RESET_FORWARD | RESET_REVERSE, np.uint8),
           'arm': np.full(shape, -1, np.int16)}
    for b, samples in enumerate(rows):
        tokens, targets, reset, arm = (out[key][b] for key in ('tokens', 'targets', 'reset', 'arm'))
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
    """Batches as a pure function of (seed, rank, step, action, split): no state, nothing carried over.

    Packing without leftovers must not prefer the samples that happen to fit, or the bandit's action is
    not what the model sees. So:
    1. how many samples a batch holds, K, depends on the action alone (`_count`): the number nearest to
       B * T / mean size whose samples fit and can fill the rows;
    2. K arms are drawn by systematic sampling over the arms in order of size (`_choose`): arm i is drawn
       K * action[i] times on average, exactly, and at most one more or less than that every time;
    3. the largest goes first, each into the row with the most room (`_place`), counted with usual sizes;
    4. each sample draws its length from its arm's range; then all lengths of a row move by one share of
       what their ranges still allow, until the row is full (`_lengths`).
    """

    def __init__(self, corpus: Corpus, tok: Tokenizer, block_size: int, batch_size: int):
        self.corpus, self.tok, self.block_size, self.batch_size = corpus, tok, block_size, batch_size
        self.arms = arms(block_size)
        self.low = np.array([positions(arm, arm.shortest) for arm in self.arms])
        self.high = np.array([positions(arm, arm.longest) for arm in self.arms])
        self.fills = np.array([arm.cls == 'next_token_prediction' for arm in self.arms])
        self.usual = np.where(self.fills, self.high, (self.low + self.high) / 2)
        self.by_size = np.argsort(self.usual, kind='stable')
        need = max(arm.longest + arm.room for arm in self.arms)
        for split, size in corpus.size.items():
            if size < need:
                raise ValueError(f'the {split} split has {size} tokens, but one sample takes up to {need}: '
                                 'pass more text as --data, or a smaller --block_size')

    def batch(self, seed: int, rank: int, step: int, action: np.ndarray, split: str) -> dict:
        """(B, T) arrays: tokens and targets int64, reset uint8, arm int16 (index into self.arms, -1: PAD)."""
        action = np.asarray(action, np.float64)
        if action.shape != (len(self.arms),) or not (action >= 0).all() or abs(action.sum() - 1) > 1e-3:
            raise ValueError(f'an action is {len(self.arms)} probabilities with sum 1, not {action.shape} with '
                             f'sum {action.sum()}')
        rng = np.random.Generator(np.random.PCG64([seed, rank, step, ('train', 'val').index(split)]))
        chosen = self._choose(action, self._count(action.tobytes()), rng.random(dtype=np.float32))
        placed = self._place(chosen)
        rows = [self._row(rng.permutation(chosen[placed == b]), rng, split) for b in range(self.batch_size)]
        return lay_out(rows, self.block_size, self.tok)

    def __getitem__(self, key):
        return self.batch(*key)

    def _choose(self, action, n: int, u: float) -> np.ndarray:
        share = np.cumsum(action[self.by_size])
        return self.by_size[np.searchsorted(share / share[-1], (np.arange(n) + u) / n, side='right')]

    def _place(self, chosen) -> np.ndarray:
        """Row of each chosen sample, -1 if even its shortest form fits nowhere (see _count: very rare)."""
        usual_room = np.full(self.batch_size, float(self.block_size))
        room = np.full(self.batch_size, self.block_size)
        placed = np.full(len(chosen), -1)
        for i in range(len(chosen))[::-1]:  # chosen is in order of size
            arm = chosen[i]
            b = np.where(room >= self.low[arm], usual_room, -np.inf).argmax()
            if room[b] >= self.low[arm]:
                placed[i] = b
                room[b] -= self.low[arm]
                usual_room[b] -= self.usual[arm]
        return placed

    @lru_cache(maxsize=256)
    def _count(self, action: bytes) -> int:
        action = np.frombuffer(action)
        guess = self.batch_size * self.block_size / (action @ self.usual / action.sum())
        best = 0, 1
        for n in sorted(range(max(1, int(guess / 2)), int(guess * 2) + 2, 1 + int(guess / 32)), key=lambda n: abs(n - guess)):
            full = min(self._fullness(self._choose(action, n, u)) for u in (0.1, 0.3, 0.5, 0.7, 0.9))
            best = max(best, (full, -n))
            if full > 0.99:
                return n
        return -best[1]

    def _fullness(self, chosen) -> float:
        """Share of the rows that the chosen samples can fill; 0 if some do not fit."""
        placed = self._place(chosen)
        reach = np.bincount(placed, self.high[chosen], self.batch_size) if (placed >= 0).all() else 0
        return float(np.minimum(reach, self.block_size).sum() / self.batch_size / self.block_size)

    def _lengths(self, members, rng) -> np.ndarray:
        """Positions for each sample of a row, in the end T in all if their ranges allow it."""
        low, high = self.low[members], self.high[members]
        size = np.where(self.fills[members], high, low + rng.random(len(members)) * (high - low))
        spare = self.block_size - size.sum()
        give = high - size if spare > 0 else size - low
        return size + give * min(1, max(-1, spare / max(1, give.sum())))

    def _row(self, members, rng, split) -> list:
        samples, spare = [], 0.0
        for index, size in zip(members.tolist(), self._lengths(members, rng).tolist()):
            arm = self.arms[index]
            lengths = range(arm.shortest, arm.longest + 1)
            fits = bisect_right(lengths, size + spare, key=lambda n: positions(arm, n))
            n = lengths[max(0, fits - 1)]
            prefix, label = self._sample(arm, n, rng, split)
            spare += size - len(prefix) - len(label)  # what is left over goes to the next one
            samples.append((index, prefix, label))
        return samples

    def _sample(self, arm, n, rng, split):
        for _ in range(64):
            start = int(rng.integers(self.corpus.size[split] - n - arm.room + 1))
            try:
                return make_sample(arm, self.corpus.window(split, start, n + arm.room), rng, self.tok)
            except NotUnique as e:
                error = e
        raise ValueError(f'{error} in 64 places of the {split} split; pass other --data, or a mixture '
                         'without selective copying')


class Loader:
    """The same batches as torch tensors, made ahead by worker processes that live as long as this does."""

    def __init__(self, batches: Batches, seed: int, rank: int = 0, workers: int = 0):
        self.seed, self.rank, self.keys = seed, rank, []
        self.loader = DataLoader(batches, batch_size=None, sampler=self.keys, num_workers=workers,
                                 persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())

    def steps(self, start: int, stop: int, action: np.ndarray, split: str = 'train'):
        """Batches of steps start to stop - 1, in order, all under one action; call again when it changes."""
        self.keys[:] = [(self.seed, self.rank, step, action, split) for step in range(start, stop)]
        return iter(self.loader)
