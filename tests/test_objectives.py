"""Proves that samples are what table 1 says, that rows are full without a bias, that batches are a pure
function, that validation text is never trained on, and that bad input ends in one line.

    python -m pytest tests/test_objectives.py
"""
import base64
import collections
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import regex
import torch

import objectives
from objectives import (CLASSES, IGNORE, Arm, Batches, Corpus, Loader, NotUnique, Tokenizer, arms, make_sample,
                        n_masked, positions)

ROOT = os.path.dirname(objectives.__file__)


@pytest.fixture(scope="session")
def tok():
    return Tokenizer("bytes", 256)


@pytest.fixture(scope="session")
def corpus(tok, own_cache):
    return Corpus("stdlib", tok)


@pytest.fixture(scope="session")
def batches(corpus, tok):
    return Batches(corpus, tok, 2048, 8)


def uniform(batches):
    return np.full(len(batches.arms), 1 / len(batches.arms))


# ------------------------------------------------------------------------------------------ arms
def test_there_are_96_arms_of_8_classes_at_2048():
    counts = collections.Counter(arm.cls for arm in arms(2048))
    assert dict(counts) == dict(zip(CLASSES, (1, 1, 16, 2, 4, 36, 18, 18)))
    assert "infilling-512-1024-15%-span8" in {arm.name for arm in arms(2048)}
    assert arms(2048)[0].name == "next_token_prediction"


@pytest.mark.parametrize("block_size", [64, 71, 100, 128, 256, 512, 1000, 2048, 16384])
def test_arms_fit_their_rows_and_have_names_of_their_own(block_size):
    found = arms(block_size)
    assert len({arm.name for arm in found}) == len(found) and {arm.cls for arm in found} == set(CLASSES)
    for arm in found:
        assert positions(arm, arm.shortest) <= positions(arm, arm.longest) <= block_size
        if arm.cls == "infilling":
            assert n_masked(arm, arm.longest)[1] <= block_size // 8


def test_dropped_arms_are_announced_once(capsys):
    arms.cache_clear()
    arms(128), arms(128)
    assert len(re.findall("block_size 128 has no room for .* arms .selective_copying", capsys.readouterr().out)) == 1


@pytest.mark.parametrize("options", [dict(masked=15), dict(masked=15, mean_span=8, shuffled=50), dict(span=3)])
def test_an_option_that_a_class_does_not_use_is_an_error(options):
    with pytest.raises((ValueError, TypeError)):
        Arm("infilling", 64, 128, **options)


def test_reset_bits_are_those_that_scan_reads():
    scan = pytest.importorskip("scan")
    assert (objectives.RESET_FORWARD, objectives.RESET_REVERSE) == (scan.RESET_FORWARD, scan.RESET_REVERSE)


# --------------------------------------------------------------------------------------- samples
def places(text, part):
    """Every place where `part` begins in `text`; both are strings of one character a token."""
    found = [text.find(part)]
    while found[-1] >= 0:
        found.append(text.find(part, found[-1] + 1))
    return found[:-1]


def check_selective_copying(arm, text, prefix, label, tok):
    string = "".join(map(chr, prefix))
    copy, start, end, context = map(chr, (tok.COPY, tok.START, tok.END, tok.CONTEXT))
    form = f"{copy}((?:{start}[^{end}]+{end}[^{start}{context}]+)+)", f"{context}([^{copy}]+)"
    before = re.fullmatch(form[0] + form[1], string, re.S)
    after = re.fullmatch(form[1] + form[0], string, re.S)
    assert before if arm.query == "before" else after
    query, text_found = before.groups() if before else after.groups()[::-1]
    assert arm.shortest <= len(text_found) <= arm.longest and text_found in "".join(map(chr, text))
    answers = "".join(map(chr, label)).split(chr(tok.DONE))
    assert answers.pop() == "" and len(answers) == arm.n_spans == arm.n_done
    covered = set()
    for question, answer in zip(query.split(start)[1:], answers, strict=True):
        delimiter, closing = question.split(end)
        assert 1 <= len(delimiter) <= 16 and 1 <= len(closing) <= 8 and 4 <= len(answer) <= 32
        where = places(text_found, delimiter)
        assert len(where) == 1                                          # exactly one answer
        first = where[0] + len(delimiter)
        assert text_found[first:text_found.index(closing, first)] == answer
        assert not covered & set(range(first, first + len(answer)))
        covered |= set(range(first, first + len(answer)))


def check_masking(arm, text, prefix, label, tok):
    masked, n_spans = n_masked(arm, len(text))
    is_mask = np.isin(prefix, tok.MASKS if arm.cls == "infilling" else tok.MASK)
    assert is_mask.sum() == n_spans == max(1, round(masked / arm.mean_span))
    assert len(text) - (~is_mask).sum() == masked
    assert abs(masked / len(text) - arm.masked / 100) <= max(0.02, 1 / len(text))
    if arm.cls == "infilling":                                          # undone exactly
        spans = {}
        for token in label[:-1].tolist():
            if token >= tok.MASKS[0]:
                spans[token] = current = []
            else:
                current.append(token)
        assert all(spans.values()) and list(spans) == tok.MASKS[:n_spans].tolist()
        restored = [t for token in prefix.tolist() for t in spans.get(token, [token])]
        assert np.array_equal(restored, text)
    else:
        assert np.array_equal(label[:-1], text)
        gaps = np.split(prefix, np.flatnonzero(is_mask))
        gaps, whole = ["".join(map(chr, gap[gap != tok.MASK])) for gap in gaps], "".join(map(chr, text))
        assert all(gap in whole for gap in gaps)


def check(arm, text, prefix, label, tok):
    assert len(prefix) + len(label) <= positions(arm, len(text) - arm.room)
    if arm.cls == "next_token_prediction":
        assert len(prefix) == 0 and np.array_equal(label, text)
        return None
    first = prefix[0] == tok.paradigm[arm.cls]
    assert first or prefix[-1] == tok.paradigm[arm.cls]
    prefix = prefix[1:] if first else prefix[:-1]
    assert label[-1] == tok.DONE and (label == tok.DONE).sum() == arm.n_done
    if arm.cls == "prefix_lm":
        assert np.array_equal(np.append(prefix, label[:-1]), text) and len(prefix) == len(text) * 3 // 4
    elif arm.cls == "selective_copying":
        check_selective_copying(arm, text, prefix, label, tok)
    elif arm.cls in ("copying", "deshuffling"):
        assert np.array_equal(label[:-1], text)
        assert np.array_equal(np.sort(prefix), np.sort(text))
        assert arm.cls == "deshuffling" or np.array_equal(prefix, text)
    else:
        check_masking(arm, text, prefix, label, tok)
    return bool(first)


@pytest.mark.parametrize("block_size", [2048, 512, 256])
def test_samples_of_every_arm_are_what_they_should_be(block_size, tok, corpus):
    rng, firsts, lost = np.random.default_rng(block_size), [], 0
    for arm in arms(block_size) * 36:                                   # 3 x 3,456 samples
        n = int(rng.integers(arm.shortest, arm.longest + 1)) + arm.room
        text = corpus.window("train", int(rng.integers(corpus.size["train"] - n)), n)
        try:
            firsts.append(check(arm, text, *make_sample(arm, text, rng, tok), tok))
        except NotUnique:
            lost += 1
    assert lost < 0.01 * len(firsts)
    assert abs(np.mean([f for f in firsts if f is not None]) - 0.5) < 0.04


def test_shuffles_move_the_share_they_should(tok):
    rng = np.random.default_rng(0)
    for arm in arms(2048):
        text = 10_000 + np.arange(arm.shortest)                         # distinct, so moves can be counted
        if arm.cls == "deshuffling":
            prefix, _ = make_sample(arm, text, rng, tok)
            prefix = prefix[prefix >= 10_000]
            assert abs((prefix != text).mean() - arm.shuffled / 100) < 0.02
        if arm.cls in ("autoencoding", "autoencoding_deshuffling"):
            prefix, _ = make_sample(arm, text, rng, tok)
            in_order = (np.diff(prefix[prefix >= 10_000]) > 0).all()
            assert in_order == (arm.cls == "autoencoding")


def test_questions_come_in_any_order(tok):
    arm, rng = Arm("selective_copying", 384, 768, n_spans=2, query="after"), np.random.default_rng(0)
    labels = [make_sample(arm, 10_000 + np.arange(600), rng, tok)[1] for _ in range(100)]
    assert 30 < sum(label[0] < label[-2] for label in labels) < 70


def test_text_that_repeats_itself_or_has_the_wrong_length_is_refused(tok):
    arm = next(arm for arm in arms(2048) if arm.n_spans == 4)
    with pytest.raises(NotUnique):
        make_sample(arm, np.zeros(arm.shortest + arm.room, int), np.random.default_rng(0), tok)
    with pytest.raises(ValueError, match="takes .* tokens of text, not 10"):
        make_sample(arm, np.arange(10), np.random.default_rng(0), tok)


# --------------------------------------------------------------------------------------- batches
def test_a_batch_is_laid_out_as_the_model_reads_it(batches, tok):
    for step in range(10):
        batch = batches.batch(0, 0, step, uniform(batches), "train")
        assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
            "tokens": ("int64", (8, 2048)), "targets": ("int64", (8, 2048)), "reset": ("uint8", (8, 2048)),
            "arm": ("int16", (8, 2048))}
        for tokens, targets, reset, arm in zip(*batch.values()):
            padding = arm < 0
            assert (tokens[padding] == tok.PAD).all() and (reset[padding] == 3).all()
            assert (targets[padding] == IGNORE).all() and not (np.diff(padding.astype(int)) < 0).any()
            starts = np.flatnonzero((reset & 1 > 0) & ~padding)
            assert starts[0] == 0
            for start, end in zip(starts, np.append(starts[1:], (~padding).sum())):
                gen = start + np.flatnonzero(tokens[start:end] == tok.GEN)
                assert len(gen) == 1 and len(set(arm[start:end])) == 1
                label = targets[gen[0]:end]
                assert (targets[start:gen[0]] == IGNORE).all() and (label >= 0).all()
                assert np.array_equal(tokens[gen[0] + 1:end], label[:-1])
                assert (reset[start:gen[0]] & 2 == 0).all() and (reset[gen[0]:end] & 2 > 0).all()
                assert (arm[start] == 0) == (gen[0] == start)            # only that class has no prefix


def test_rows_are_full_whatever_the_action(batches):
    for action in [uniform(batches), *np.eye(len(batches.arms))]:
        for step in range(2):
            full = (batches.batch(0, 0, step, action, "train")["arm"] >= 0).mean()
            assert full >= 0.97, (batches.arms[action.argmax()].name, full)


def actions(batches):
    counts = collections.Counter(arm.cls for arm in batches.arms)
    yield uniform(batches)
    yield np.array([1 / 8 / counts[arm.cls] for arm in batches.arms])
    for seed in range(4):
        yield np.random.default_rng(seed).dirichlet(np.full(len(batches.arms), 0.1))


@pytest.mark.parametrize("batch_size", [8, 32])
def test_the_share_of_each_arm_is_the_actions(batch_size, corpus, tok):
    batches = Batches(corpus, tok, 2048, batch_size)
    for action in actions(batches):
        n = batches._count(action.tobytes())
        drawn, offsets = np.zeros(len(action)), (np.arange(400) + 0.5) / 400
        for u in offsets:
            chosen = batches._choose(action, n, u)
            placed = batches._place(chosen)
            drawn += np.bincount(chosen[placed >= 0], minlength=len(action))
        assert abs(drawn / drawn.sum() - action).sum() / 2 < 0.005, (n, drawn.sum())


def test_next_token_prediction_fills_its_rows(batches):
    batch = batches.batch(0, 0, 0, np.eye(len(batches.arms))[0], "val")
    assert (batch["arm"] == 0).all() and ((batch["reset"] & 1).sum(1) == 1).all()


def test_batches_go_to_spawned_workers_without_their_text(batches):
    assert len(pickle.dumps(batches)) < 100_000


def digest(batch):
    return hashlib.sha256(b"".join(np.asarray(batch[key]).tobytes() for key in sorted(batch))).hexdigest()


def test_a_batch_depends_on_its_arguments_only(batches):
    action = uniform(batches)
    calls = [(0, 0, 0, "train"), (1, 0, 0, "train"), (0, 1, 0, "train"), (0, 0, 1, "train"), (0, 0, 0, "val")]
    first = [digest(batches.batch(*c[:3], action, c[3])) for c in calls]
    assert len(set(first)) == len(calls)
    assert first[::-1] == [digest(batches.batch(*c[:3], action, c[3])) for c in calls[::-1]]


def test_workers_and_other_processes_give_the_same_bytes(batches):
    one_hot = np.eye(len(batches.arms))[5]
    expected = [digest(batches.batch(3, 1, step, uniform(batches) if step < 9 else one_hot, "train"))
                for step in range(5, 12)]
    for workers in (0, 1, 3):
        loader = Loader(batches, seed=3, rank=1, workers=workers)
        found = [*loader.steps(5, 9, uniform(batches)), *loader.steps(9, 12, one_hot)]
        assert [digest(batch) for batch in found] == expected
        assert isinstance(found[0]["tokens"], torch.Tensor) and found[0]["reset"].dtype == torch.uint8
    code = ("import numpy as np; from objectives import *; from tests.test_objectives import digest; "
            't = Tokenizer("bytes", 256); b = Batches(Corpus("stdlib", t), t, 2048, 8); '
            'print(digest(b.batch(3, 1, 5, np.full(96, 1 / 96), "train")))')
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == expected[0]


# ------------------------------------------------------------------------------- tokens and text
def test_any_text_survives_the_tokenizer(tok):
    points = np.random.default_rng(0).integers(1, 0x110000, 5000)
    text = "".join(chr(c) for c in points if not 0xD800 <= c < 0xE000) + "\0 <GEN> <|endoftext|>\r\n\n"
    assert tok.decode(tok.encode(text)) == text
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    assert tok.decode([tok.GEN, *tok.encode("é"), tok.MASKS[7], tok.paradigm["copying"]]) == "<GEN>é<MASK_7><COPYING>"
    assert len(set(tok.special_names)) == tok.vocab_size - tok.n_text == 9 + 7 + 256


def test_an_id_without_text_is_shown_as_such():
    tok = Tokenizer("bytes", 8)
    ranks = {bytes([i]): i + (i > 100) for i in range(256)}             # like cl100k_base, skips an id
    tok._encoding = objectives.tiktoken.Encoding("gap", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    assert tok.decode([tok.GEN, 101, tok.DONE, 100, 101, 100]) == "<GEN><?><DONE>d<?>d"


@pytest.fixture
def ranks_file(tmp_path):
    ranks = [bytes([i]) for i in range(256)] + [b"12", b"th", b"the"]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks)))
    return path


def test_a_tiktoken_file_works_and_leaves_digits_alone(ranks_file):
    tok = Tokenizer(str(ranks_file), 8)
    assert tok.n_text == 259 and tok.encode("the 12").tolist() == [258, ord(" "), ord("1"), ord("2")]
    old = tok.fingerprint
    ranks_file.write_bytes(ranks_file.read_bytes() + base64.b64encode(b"zz") + b" 259\n")
    assert Tokenizer(str(ranks_file), 8).n_text == 260 and Tokenizer(str(ranks_file), 8).fingerprint != old


def stream(corpus, split):
    return corpus.window(split, 0, corpus.size[split])


@pytest.mark.parametrize("kind", ["folder", "glob", "jsonl"])
def test_no_document_is_in_training_and_validation(kind, tok, tmp_path):
    documents = [f"document {i} " * (1 + i % 7) for i in range(300)]
    if kind == "jsonl":
        lines = [json.dumps({"text": text}) for text in documents + documents]  # every one twice
        (tmp_path / "all.jsonl").write_text("\n\n".join(lines))
    else:
        for i, text in enumerate(documents):
            (tmp_path / f"{i}.txt").write_text(text)
            (tmp_path / f".{i}").write_bytes(b"\xff hidden")
    corpus = Corpus(str({"folder": tmp_path, "glob": tmp_path / "*.txt", "jsonl": tmp_path / "all.jsonl"}[kind]), tok)
    train, val = (set(tok.decode(stream(corpus, s)).split("<END_OF_TEXT>")[1:]) for s in ("train", "val"))
    assert not train & val and train | val == set(documents) and 3 <= len(val) <= 40


def test_one_document_is_split_by_position_in_bounded_memory(tok, tmp_path):
    text = "".join(map(str, range(1_600_000)))                          # one line of 10 MB
    (tmp_path / "line.txt").write_text(text)
    tracemalloc.start()
    corpus = Corpus(str(tmp_path / "line.txt"), tok)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert np.array_equal(np.append(stream(corpus, "train"), stream(corpus, "val"))[1:], tok.encode(text))
    assert 0.04 < corpus.size["val"] / corpus.size["train"] < 0.06


def test_numpys_tables_are_a_corpus_of_digits_and_their_absence_is_said(monkeypatch, tmp_path):
    tok = Tokenizer("bpe2048", 16)
    corpus = Corpus("tables", tok)
    ids = np.append(stream(corpus, "train"), stream(corpus, "val"))
    digits = np.isin(ids, [int(tok.encode(str(digit))[0]) for digit in range(10)]).mean()
    assert len(ids) > 1_000_000 and digits > 0.4 and "np.float32,0x" in tok.decode(ids[:5000])
    monkeypatch.setattr(np, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="no file at .*'tables' for numpy's"):
        Corpus("tables", tok)


def test_odd_text_is_kept(tok, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"text": "a\\u0000b\\ud800c"}\n\n{"text": ""}\n{"text": "\\r\\n"}')
    corpus = Corpus(str(tmp_path / "odd.jsonl"), tok)
    joined = np.append(stream(corpus, "train"), stream(corpus, "val"))
    assert tok.decode(joined) == "<END_OF_TEXT>a\0b\ufffdc<END_OF_TEXT>\r\n"
    (tmp_path / "odd.txt").write_bytes(b"\xef\xbb\xbfa\0\r\nb\rc\n")  # begins with a byte order mark
    corpus = Corpus(str(tmp_path / "odd.txt"), tok)
    assert tok.decode(np.append(stream(corpus, "train"), stream(corpus, "val"))) == "<END_OF_TEXT>a\0\r\nb\rc\n"


def test_text_is_tokenised_once_also_by_two_at_a_time(tok, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text " * 100_000)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: Corpus(str(tmp_path / "a.txt"), tok), range(4)))
    assert len({corpus.paths["train"] for corpus in found}) == 1
    monkeypatch.setattr(objectives, "_tokenise", None)                  # the cache is read, not made again
    Corpus(str(tmp_path / "a.txt"), tok)
    assert {len(name) for name in os.listdir(os.path.join(os.environ["XDG_CACHE_HOME"], "birdie"))} == {24}


def test_nanogpt_folders_are_read_as_they_are(tok, tmp_path):
    ids = {"train": np.arange(5000) % 256, "val": np.arange(3000) % 255}
    for split in ids:
        ids[split].astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    corpus = Corpus(str(tmp_path), tok)
    assert all(np.array_equal(stream(corpus, split), ids[split]) for split in ids)


BAD_DATA = {
    "missing": ({}, "no.txt", "no file at"),
    "glob without a match": ({}, "*.txt", "no file at"),
    "empty folder": ({}, "", "no file at"),
    "only hidden files": ({".a": b"text"}, "", "no file at"),
    "empty file": ({"a.txt": b""}, "a.txt", "no text in"),
    "folder of empty files": ({"a.txt": b"", "b.txt": b""}, "", "no text in"),
    "binary junk": ({"a.txt": bytes(range(256))}, "a.txt", "not UTF-8"),
    "junk among text": ({"a.txt": b"text", "b.png": b"\x89PNG\xff"}, "", "b.png is not UTF-8"),
    "utf-16": ({"a.txt": "text".encode("utf-16")}, "a.txt", "not UTF-8"),
    "JSON without text": ({"a.jsonl": b'{"text": "a"}\n{"body": "b"}'}, "a.jsonl", "line 2 is not like"),
    "JSON text not a string": ({"a.jsonl": b'{"text": ["a"]}'}, "a.jsonl", "line 1 is not like"),
    "no JSON": ({"a.jsonl": b"hello"}, "a.jsonl", "line 1 is not like"),
    "blank JSON lines": ({"a.jsonl": b"\n\n"}, "a.jsonl", "no text in"),
    "odd bytes": ({"train.bin": b"abc", "val.bin": b"ab"}, "", "train.bin is .*3 bytes"),
    "no val.bin": ({"train.bin": b"a\0"}, "", "val.bin is missing"),
    "empty train.bin": ({"train.bin": b"", "val.bin": b"a\0"}, "", "train.bin is .*0 bytes"),
    "ids above the vocabulary": ({"train.bin": b"\xff\xff", "val.bin": b"a\0"}, "", "token 65535, .* --tokenizer"),
}


@pytest.mark.parametrize("files, data, message", BAD_DATA.values(), ids=BAD_DATA)
def test_bad_text_ends_in_one_line(files, data, message, tok, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Corpus(f"{tmp_path}/{data}", tok)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, message", [
    (None, "neither"), (b"", "no .tiktoken file"), (b"\xff\x00 junk", "no .tiktoken file"),
    (b"YQ== 0\n", "no .tiktoken file"), (b"YQ== 0 1\n", "no .tiktoken file")])
def test_bad_tokenizers_end_in_one_line(content, message, tmp_path):
    path = tmp_path / "bad.tiktoken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(str(path))
    assert "\n" not in str(error.value)


def test_what_cannot_be_used_says_so_in_one_line(tok, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no network")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="could not be downloaded"):
        patch.setattr(objectives.tiktoken, "get_encoding", fails)
        Tokenizer("gpt2")
    with pytest.raises(ValueError, match="pass --block_size 64 or more"):
        arms(32)
    with pytest.raises(ValueError, match="make it with 256"):
        Batches(None, Tokenizer("bytes", 255), 2048, 8)
    (tmp_path / "a.txt").write_text("too little")
    with pytest.raises(ValueError, match="more text as --data"):
        Batches(Corpus(str(tmp_path / "a.txt"), tok), tok, 256, 8)
    (tmp_path / "a.txt").write_text("a" * 100_000)
    batches = Batches(Corpus(str(tmp_path / "a.txt"), tok), tok, 256, 8)
    with pytest.raises(ValueError, match="pass other --data"):
        batches.batch(0, 0, 0, uniform(batches), "train")
    with pytest.raises(ValueError, match="an action is 96 probabilities"):
        batches.batch(0, 0, 0, np.ones(3) / 3, "train")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_text("a cache that is a file")
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        Corpus(str(tmp_path / "b.txt"), tok)


def test_the_demonstration_runs(capsys):
    objectives.demo()
    out = capsys.readouterr().out
    assert all(f"{cls}\n  Input" in out for cls in CLASSES) and "<GEN>" in out and "tokens/s" in out


# ---- the vocabulary that comes with the project ----

def test_the_shipped_vocabulary_keeps_digits_single_and_shortens_text():
    tok = Tokenizer("bpe2048", 8)
    text = open(os.path.join(ROOT, "objectives.py")).read()
    assert tok.n_text == 2048 and tok.decode(tok.encode(text)) == text
    assert len(text.encode()) > 2.5 * len(tok.encode(text))
    assert [tok.decode([i]) for i in tok.encode("669-174")] == list("669-174")


def test_a_vocabulary_is_learnt_by_merging_the_most_frequent_pair(tmp_path):
    """make_vocabulary.py against recounting every pair for every token."""
    text, out = "low lower lowest newer newest wider widest the the then 1212 " * 3, tmp_path / "own.tiktoken"
    (tmp_path / "text.txt").write_text(text)
    subprocess.run([sys.executable, os.path.join(ROOT, "assets", "make_vocabulary.py"), "275", str(out),
                    str(tmp_path / "text.txt")], check=True)
    made = [base64.b64decode(line.split()[0]) for line in out.read_text().splitlines()]
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(objectives.PATTERN, text)]
    rank = {token: k for k, token in enumerate(made)}
    for new in made[256:]:
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        best = max(pairs, key=lambda pair: (pairs[pair], [rank[part] for part in pair]))
        assert new == b"".join(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                word[i:i + 2] = [new] if (word[i], word[i + 1]) == best else word[i:i + 2]
                i += 1
    assert len(made) == 275 and Tokenizer(str(out), 8).n_text == 275
