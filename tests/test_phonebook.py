"""A question is answered by its book; no name of a test book is ever trained on; rows hold whole
books and drop none; scores mean what they say; fine-tuning goes on where it was stopped.

    python -m pytest tests/test_phonebook.py
"""
import json
import os
import re
import signal
import types

import numpy as np
import pytest
import torch

import eval_phonebook as pb
import train
from eval_phonebook import (Books, digits_right, interval, main, names, score, unseen_books,
                            write_book)
from model import LM, ModelConfig, load_checkpoint
from objectives import IGNORE, RESET_FORWARD, RESET_REVERSE, Tokenizer

TOK = Tokenizer("bpe2048", 16)
TINY = dict(entries_min=1, entries_max=3, numbers_max=2, test_entries="3,1", test_numbers="1,2",
            test_books=8, max_steps=2, batch_size=2, block_size=256, workers=0, device="cpu",
            dtype="float32", compile="no")


def flags(**settings):
    return [f"--{name}" if value is True else f"--{name}={value}"
            for name, value in settings.items()]


def make_books(**settings):
    plain = {"question": "both", "books": "uniform"}
    return Books(TOK, types.SimpleNamespace(**{**TINY, **plain, **settings}))


def a_book(seed=0, n_entries=8, n_numbers=3, split="test", question="both"):
    return write_book(np.random.default_rng(seed), n_entries, n_numbers, split, question)


def entries_of(prompt):
    return re.findall(r"^(\w+ \w+): (\d{3}-\d{3}-\d{4})$", prompt, re.M)


def asked_in(prompt):
    return re.findall(r"[A-Z]\w+ [A-Z]\w+", re.search(r"numbers for (.*)\?", prompt)[1])


def oracle(prompts, n_numbers):
    """Reads the book, and looks every number up."""
    return [", ".join(dict(entries_of(prompt))[name] for name in asked_in(prompt))
            for prompt in prompts]


# The test to copy for a task of your own: whoever reads the prompt can answer it.
@pytest.mark.parametrize("n_numbers", [1, 2, 3, 8])
def test_the_answer_is_what_a_reader_finds_in_the_book(n_numbers):
    for seed in range(20):
        prompt, answer = a_book(seed, 8, n_numbers)
        assert len(entries_of(prompt)) == len(dict(entries_of(prompt))) == 8
        assert len(set(asked_in(prompt))) == n_numbers
        assert oracle([prompt], n_numbers) == [answer]


def test_a_book_by_hand():
    """Figure 9: the question, the book, the question again."""
    prompt, answer = a_book(1, 4, 3)
    names = "Lawin Natavin, Tamar Omamar, and Levin Amowen"
    assert prompt == f"""\
What are the phone numbers for {names}? Find them in the phonebook below.

Phonebook:
Noden Talera: 923-842-8246
Levin Amowen: 500-878-5834
Tamar Omamar: 713-149-1349
Lawin Natavin: 252-070-2441

What are the phone numbers for {names}? Find them in the phonebook above."""
    assert answer == "252-070-2441, 713-149-1349, 500-878-5834"
    assert "for Lawin Natavin? Find" in a_book(1, 4, 1)[0]
    assert "for Tamar Omamar and Lawin Natavin? Find" in a_book(1, 4, 2)[0]


# ---- books --------------------------------------------------------------------------------------

def test_every_name_is_of_one_split_and_each_split_has_many():
    sides = {split: names(split) for split in pb.SPLITS}
    for kind, total in ((0, 900), (1, 26_100)):                 # first, last
        found = [set(sides[split][kind]) for split in pb.SPLITS]
        assert len(set.union(*found)) == sum(map(len, found)) == total
        assert [round(len(each) / total, 1) for each in found] == [0.8, 0.1, 0.1]


def test_no_name_of_a_test_book_is_in_a_training_or_validation_book():
    seen = {split: {name for seed in range(200) for person, _ in entries_of(
        a_book(seed, 20, 1, split)[0]) for name in person.split()} for split in pb.SPLITS}
    for split, others in (("test", ("train", "val")), ("val", ("train", "test"))):
        first, last = names(split)
        assert seen[split] <= {*first, *last} and len(seen[split]) > 500
        for other in others:        # a first name may be a last one elsewhere: few are
            assert len(seen[split] & seen[other]) == 0


def test_digits_are_uniform():
    digits = "".join(number for seed in range(200) for _, number in entries_of(a_book(seed)[0]))
    counts = np.bincount([int(digit) for digit in digits.replace("-", "")], minlength=10)
    assert abs(counts / counts.sum() - 0.1).max() < 0.012       # 16,000 digits: 5 standard errors


# ---- batches ------------------------------------------------------------------------------------

def test_a_batch_is_a_pure_function_and_its_rows_hold_whole_books():
    batch, again = (make_books(block_size=512).batch(1, 0, 5) for _ in range(2))
    assert all(np.array_equal(batch[key], again[key]) for key in batch)
    for key in ((2, 0, 5), (1, 1, 5), (1, 0, 6)):
        other = make_books(block_size=512).batch(*key)
        assert not np.array_equal(batch["tokens"], other["tokens"])
    n_books = 0
    for row in range(2):
        tokens, targets, reset, arm = (batch[k][row] for k in ("tokens", "targets", "reset", "arm"))
        n = int((arm >= 0).sum())
        starts = np.flatnonzero(reset[:n] & RESET_FORWARD)
        for begin, end in zip(starts, [*starts[1:], n]):
            label = targets[begin:end][targets[begin:end] != IGNORE]
            prompt = TOK.decode(tokens[begin:end - len(label)])
            assert oracle([prompt], None) == [TOK.decode(label[:-1])] and label[-1] == TOK.DONE
            assert tokens[end - len(label)] == TOK.GEN
            n_books += 1
    assert n_books > 4


def test_books_have_on_average_as_many_entries_as_was_asked(monkeypatch):
    """No book is dropped because it does not fit: a packer that did so made it 0.992 of that, seven
    standard errors of these 20,000 books."""
    books = make_books(entries_min=4, entries_max=8, batch_size=8, block_size=384)
    written, ready = [], {(n, k): a_book(0, n, k) for n in range(4, 9) for k in (1, 2)}

    def write(rng, n_entries, n_numbers, split, question):
        written.append((n_entries, n_numbers))
        return ready[n_entries, n_numbers]

    monkeypatch.setattr(pb, "write_book", write)
    packed = step = 0
    while len(written) < 20_000:
        batch = books.batch(1, 0, step)
        packed += ((batch["reset"] & RESET_FORWARD > 0) & (batch["arm"] >= 0)).sum()
        step += 1
    assert packed == len(written)
    entries, numbers = np.transpose(written)                    # 4 to 8 and 1 or 2, uniform
    assert abs(entries.mean() - 6) < 4 * (2 / len(written)) ** 0.5
    assert abs(numbers.mean() - 1.5) < 4 * (0.25 / len(written)) ** 0.5


def test_growing_books_begin_with_the_fewest_entries_and_end_with_any_number():
    books = make_books(entries_min=4, entries_max=32, numbers_max=1, block_size=1024,
                       books="growing", max_steps=100)

    def smallest_and_largest(step):
        rows = [row for seed in range(60) for row in books.batch(seed, 0, step)["tokens"]]
        text = "".join(map(TOK.decode, rows))
        sizes = [len(entries_of(book)) for book in text.split("Phonebook:")[1:]]
        return min(sizes), max(sizes)

    assert smallest_and_largest(0) == (4, 4)
    assert smallest_and_largest(49) == (4, 11)                  # 4 sqrt(32 / 4), rounded
    assert smallest_and_largest(99) == (4, 32)


def test_no_book_is_longer_than_the_bound_and_one_that_may_not_fit_is_refused(monkeypatch):
    bound = make_books(block_size=4096, numbers_max=4).longest(12)

    def size(seed, n_numbers=4):
        return sum(len(TOK.encode(text)) for text in a_book(seed, 12, n_numbers)) + 1

    sizes = [size(seed) for seed in range(100)]
    assert max(sizes) <= bound < 1.25 * np.mean(sizes)
    books = make_books(entries_max=12, numbers_max=4, block_size=bound)
    assert all((books.batch(1, 0, step)["arm"] >= 0).sum(1).max() <= bound for step in range(50))
    with pytest.raises(ValueError, match=f"takes up to {bound} tokens.*--block_size={bound}"):
        make_books(entries_max=12, numbers_max=4, block_size=bound - 1)
    costly = [[max(each, key=lambda name: len(TOK.encode(space + name)))] * 4   # where they stand
              for each, space in zip(names("train"), ("", " "))]
    monkeypatch.setattr(pb, "names", lambda split: costly)
    bound = make_books(block_size=4096, numbers_max=1).longest(12)
    assert all(size(seed, 1) <= bound for seed in range(20))


# ---- scores -------------------------------------------------------------------------------------

def books_of(n_numbers, n_books=400):
    return [a_book(seed, 8, n_numbers) for seed in range(n_books)]


@pytest.mark.parametrize("n_numbers", [1, 2, 8])
def test_the_oracle_scores_100_percent_and_random_numbers_10(n_numbers):
    rng, books = np.random.default_rng(0), books_of(n_numbers)
    result = score(oracle, books)
    assert result["digits"] == result["exact"] == 1 and result["by_place"] == [1] * 10
    assert result["n_numbers"] == n_numbers and result["books"] == 400

    def guess(prompts, n):
        return [", ".join(entries_of(a_book(rng, 1, 1)[0])[0][1] for _ in range(n))
                for _ in prompts]

    result = score(guess, books)
    assert abs(result["digits"] - 0.1) < 0.02 and result["exact"] == 0


def test_answers_by_other_rules_score_what_they_should():
    def first_entry(prompts, n):    # right in 1/8 of the books, and in 1/10 of the others' digits
        return [entries_of(prompt)[0][1] for prompt in prompts]

    def first_group(prompts, n):    # a model that finds the entry, and cannot copy on
        return [answer[:3] for answer in oracle(prompts, n)]

    result = score(first_entry, books_of(1, 2000))
    assert abs(result["exact"] - 1 / 8) < 0.025
    assert abs(result["digits"] - (1 / 8 + 7 / 80)) < 0.025
    result = score(first_group, books_of(1))
    assert result["by_place"] == [1] * 3 + [0] * 7 and result["exact"] == 0


def test_digits_count_by_place_and_missing_ones_are_wrong():
    label = "123-456-7890, 111-222-3333"
    for answer, right in ((label, [10, 10]), ("", [0, 0]), ("123-456-7890", [10, 0]),
                          ("23-456-7890", [0, 0]), ("923-456-7899, 111-222-3333 .", [8, 10])):
        assert digits_right(answer, label).sum(1).tolist() == right


def test_the_interval_holds_the_true_share_95_times_in_100():
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.97):
        found = [interval(k / 200, 200) for k in rng.binomial(200, share, 4000)]
        assert 0.925 < np.mean([low <= share <= high for low, high in found]) < 0.98
    assert interval(1.0, 100)[0] < 0.97


# ---- a whole run --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny model, pretrained for four steps and fine-tuned for two."""
    folder = tmp_path_factory.mktemp("phonebook")
    (folder / "text.txt").write_text(a_book(0, 1000)[0])
    train.main(flags(n_layer=2, d_model=16, d_state=16, block_size=64, batch_size=4, eval_rows=1,
                     workers=0, device="cpu", dtype="float32", compile="no", max_steps=4, lr=1e-2,
                     mixture="fixed", data=folder / "text.txt", out_dir=folder / "out"))
    main(flags(**TINY, out_dir=folder / "out"))
    return folder / "out"


def result_of(folder):
    return json.loads((folder / "phonebook.json").read_text())


def test_a_run_leaves_results_a_curve_and_a_checkpoint(run):
    found = result_of(run)
    assert [(result["n_entries"], result["n_numbers"]) for result in found["results"]] == [
        (3, 1), (3, 2), (1, 1)]         # two numbers of one entry cannot be asked for
    assert [point["step"] for point in found["curve"]] == [1, 2]
    assert found["pretraining"]["mixture"] == "fixed" and found["pretraining"]["step"] == 4
    assert found["config"]["test_books"] == 8 and found["parameters"] > 1000
    tuned, base = (LM.load(run / name)[0].state_dict() for name in ("phonebook.pt", "ckpt.pt"))
    assert any(not torch.equal(tuned[key], base[key]) for key in tuned)
    unused = TOK.MASKS[:8]              # no weight decay: what a book never shows stays as it was
    assert torch.equal(tuned["embed.weight"][unused], base["embed.weight"][unused])


def test_scored_again_it_is_as_it_was_and_contradictions_are_refused(run, capsys, monkeypatch):
    before = result_of(run)
    main(flags(out_dir=run, resume=True, test_books=4, test_entries=5))     # not today's defaults
    after = result_of(run)
    assert after["config"] == {**before["config"], "test_books": 4, "test_entries": [5],
                               "resume": True}
    assert after["results"][:3] == before["results"]            # earlier scores are kept
    assert [result["n_entries"] for result in after["results"][3:]] == [5, 5]
    main(flags(out_dir=run, resume=True, test_books=8, test_entries="3,1"))
    after = result_of(run)
    assert after["results"][2:] == before["results"] and after["curve"] == before["curve"]
    assert "pretraining: fixed, 4 of 4 steps" in capsys.readouterr().out
    for name, value in (("max_steps", 9), ("preset", "gpu"), ("lr", 0.5), ("question", "after")):
        with pytest.raises(SystemExit, match=f"{name} is .* on the command line; drop --{name}"):
            main(flags(out_dir=run, resume=True, **{name: value}))
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="books with other names"):
        patch.setattr(pb, "QUESTION", "Whose are the numbers of {}, {}?")
        main(flags(out_dir=run, resume=True))
    with pytest.raises(SystemExit, match="phonebook.pt exists; go on or score it again with"):
        main(flags(**TINY, out_dir=run))
    with pytest.raises(SystemExit, match="there is no checkpoint .*elsewhere/phonebook.pt"):
        main(flags(out_dir=run / "elsewhere", resume=True))
    with pytest.raises(SystemExit, match=r"test_numbers \[1, 2\] are all|test_numbers \[9\]"):
        main(flags(out_dir=run, resume=True, test_numbers=9))


def test_what_is_fine_tuned_is_fine_tuned_once_more_and_says_so(run, tmp_path, capsys):
    main(flags(**{**TINY, "lr": 1e-12}, out_dir=tmp_path, ckpt=run / "phonebook.pt"))
    assert "fixed, 4 of 4 steps, and fine-tuned\n" in capsys.readouterr().out
    before, after = result_of(run), result_of(tmp_path)
    assert after["pretraining"].pop("finetuning") == {**before["config"], "step": 2}
    assert after["pretraining"] == before["pretraining"]
    base, once, twice = (LM.load(path)[0].W_head.weight for path in (
        run / "ckpt.pt", run / "phonebook.pt", tmp_path / "phonebook.pt"))
    assert torch.allclose(once, twice, atol=1e-9) and not torch.allclose(once, base, atol=1e-9)


def test_fine_tuning_stopped_and_resumed_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    """Ctrl-C in the middle of the seventh step; a point of the curve is every second one."""
    settings = {**TINY, "max_steps": 40, "ckpt": run / "ckpt.pt"}
    main(flags(**settings, out_dir=tmp_path / "whole"))
    step, n = train.Learner.step, iter(range(100))

    def interrupted(self, *args):
        if next(n) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(train.Learner, "step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(flags(**settings, out_dir=tmp_path / "parts"))
    assert stopped.value.code == 130
    assert load_checkpoint(tmp_path / "parts/phonebook.pt")["step"] == 7
    main(flags(out_dir=tmp_path / "parts", resume=True))
    whole, parts = (load_checkpoint(tmp_path / name / "phonebook.pt")
                    for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][key], parts["model"][key]) for key in whole["model"])
    assert result_of(tmp_path / "whole")["curve"] == result_of(tmp_path / "parts")["curve"]
    assert result_of(tmp_path / "whole")["results"] == result_of(tmp_path / "parts")["results"]


def test_a_setting_that_one_version_lacks_is_neither_filled_in_nor_dropped(run, tmp_path):
    saved = load_checkpoint(run / "phonebook.pt")
    saved["finetuning"]["focus"] = saved["finetuning"].pop("books")
    train.save_checkpoint(str(tmp_path / "phonebook.pt"), saved)
    with pytest.raises(SystemExit, match=r"another version, .* \(books, focus\); go on with the"):
        main(flags(out_dir=tmp_path, resume=True))


def test_asked_only_after_the_book_the_question_stands_nowhere_else():
    (prompt, answer), (both, same) = (a_book(3, 8, 2, "test", question)
                                      for question in ("after", "both"))
    assert answer == same and both.endswith(prompt) and prompt.startswith("Phonebook:\n")
    assert prompt.count("What are the phone numbers") == 1 and oracle([prompt], 2) == [answer]


def test_validation_and_test_books_are_the_same_for_every_model():
    args = types.SimpleNamespace(question="both")
    books = unseen_books(args, 8, 2, 5)
    assert books == unseen_books(args, 8, 2, 5) != unseen_books(args, 8, 2, 5, "val")
    assert len({prompt for prompt, _ in books}) == 5


def test_a_pretraining_that_is_not_over_says_so(run, tmp_path, capsys):
    saved = load_checkpoint(run / "ckpt.pt")
    train.save_checkpoint(str(tmp_path / "ckpt.pt"), {**saved, "step": 3})
    main(flags(**TINY, out_dir=tmp_path))
    assert "pretraining: fixed, 3 of 4 steps" in capsys.readouterr().out
    assert result_of(tmp_path)["pretraining"]["step"] == 3


@pytest.mark.parametrize("causal", [False, True])
def test_from_scratch_no_checkpoint_is_read(causal, tmp_path):
    (tmp_path / "ckpt.pt").write_text("no checkpoint")
    settings = {**TINY, "max_steps": 1, "out_dir": tmp_path, "scratch": "gated_ssm"}
    main(flags(**settings, **({"causal": True} if causal else {})))
    pretraining = result_of(tmp_path)["pretraining"]
    assert pretraining["mixture"] == "none" and pretraining["step"] == 0
    assert pretraining["d_model"] == train.parse_args([]).d_model
    assert LM.load(tmp_path / "phonebook.pt")[0].config.causal == pretraining["causal"] == causal


@pytest.mark.parametrize("cooldown, last", [(0.25, [1.2e-4, 8e-5, 4e-5]), (0.0, [1e-3] * 3)])
def test_the_learning_rate_rises_stays_and_falls(cooldown, last, run, tmp_path, monkeypatch):
    seen = []

    def step(self, batch, lr):
        seen.append(lr)
        return torch.zeros(()), None

    monkeypatch.setattr(train.Learner, "step", step)
    main(flags(**{**TINY, "max_steps": 100, "test_books": 1, "lr": 1e-3, "cooldown": cooldown,
                  "ckpt": run / "ckpt.pt", "out_dir": tmp_path}))
    assert np.allclose(seen[:50], 1e-3 * np.arange(1, 51) / 50) and seen[50:75] == [1e-3] * 25
    assert np.allclose(seen[-3:], last) and len(seen) == 100


def test_answers_are_written_from_what_was_written_before():
    """Teacher forcing would hide the model's mistakes from it: here it goes on from its own."""
    torch.manual_seed(0)
    model = LM(ModelConfig(vocab_size=TOK.vocab_size, n_layer=2, d_model=64, d_state=64)).eval()
    torch.nn.init.normal_(model.W_head.weight)                  # so that it says many things
    prompt, _ = a_book(0, 8, 1)
    plain = types.SimpleNamespace(dtype="float32", device="cpu")
    answer, = pb.responder(model, TOK, plain)([prompt], 1)
    prefix, written = TOK.encode(prompt).tolist(), []
    while len(written) < 12 and TOK.DONE not in written:
        tokens = torch.tensor([prefix + [TOK.GEN] + written])
        reset = torch.full(tokens.shape, RESET_REVERSE, dtype=torch.uint8)
        reset[0, :len(prefix)] = 0
        reset[0, 0] = RESET_FORWARD
        with torch.no_grad():
            written.append(int(model(tokens, reset)[0][0, -1].argmax()))
    assert answer == TOK.decode([token for token in written if token != TOK.DONE])
    assert len(set(written)) > 4


@pytest.mark.parametrize("bad, message", [
    (dict(causal=True), "causal is for random weights; pass --scratch"),
    (dict(preset="laptop"), "invalid choice: 'laptop'"),
    (dict(scratch="rnn"), "invalid choice: 'rnn'"),
    (dict(ckpt="nowhere.pt"), "nowhere.pt"),
    (dict(entries_max=40), "pass --block_size="),
    (dict(entries_min=9), "entries_max is 3; it must be entries_min, 9, or more"),
    (dict(test_entries="8,100000"), "argument --test_entries: 100000 is not from 1 to 10000"),
    (dict(test_entries="many"), "argument --test_entries"),
    (dict(test_numbers="5"), "test_numbers [5] are all above test_entries [3, 1]"),
    (dict(lr="inf"), "argument --lr: inf is not from 1e-12 to 100"),
    (dict(beta2="nan"), "argument --beta2: nan is not from 0 to 0.999999"),
    (dict(numbers_max=-1), "-1 is not from 1"),
    (dict(lr=-1.0), "argument --lr"),
    (dict(cooldown=2.0), "argument --cooldown: 2.0 is not from 0 to 1"),
    (dict(flavour=1), "unrecognized arguments"),
])
def test_bad_input_ends_in_one_line(bad, message, run, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        main(flags(**{**TINY, "ckpt": run / "ckpt.pt", "out_dir": tmp_path, **bad}))
    assert "\n" not in str(error.value)


def test_several_processes_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="error: WORLD_SIZE is not 1: .*without torchrun"):
        main(flags(**{**TINY, "ckpt": run / "ckpt.pt", "out_dir": tmp_path}))


def test_book_prints_one_book(capsys):
    main(["book"])
    prompt, _, answer = capsys.readouterr().out.rstrip().rpartition("\n\n")
    assert oracle([prompt], 2) == [answer]
