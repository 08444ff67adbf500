"""What the phone book promises: questions that the book answers, scores that mean what they say, books of the test
that training never shows, one command that goes on where it stopped.   python -m pytest tests/test_phonebook.py"""
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

import eval_phonebook as pb
import train
from eval_phonebook import FIRST, LAST, Books, Config, Figure, digits_right, figure1, interval, main, score, write_book
from model import LM, ModelConfig
from objectives import RESET_FORWARD, Tokenizer
from train import load_model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOK = Tokenizer("bpe2048", 16)
TINY = dict(preset="cpu", entries_min=1, entries_max=3, numbers_max=2, test_entries_min=3, test_entries_max=4, test_books=8,
            max_steps=2, batch_size=2, block_size=256, workers=0, device="cpu")


def flags(**settings):
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]


def a_book(seed=0, n_entries=8, n_numbers=3, split="val"):
    return write_book(np.random.default_rng(seed), n_entries, n_numbers, split)


def entries_of(prompt):
    return re.findall(r"^(\w+ \w+): (\d{3}-\d{3}-\d{4})$", prompt, re.M)


def asked_in(prompt):
    return re.findall(r"[A-Z]\w+ [A-Z]\w+", re.search(r"numbers for (.*)\?", prompt)[1])


def read_book(prompts, n_numbers):
    """Looks every number up."""
    return [", ".join(dict(entries_of(prompt))[name] for name in asked_in(prompt)) for prompt in prompts]


def books(n_numbers, n=400, n_entries=8):
    return [a_book(seed, n_entries, n_numbers) for seed in range(n)]


# ---- books ----

def test_names_are_many_and_none_begins_another():
    assert len(set(FIRST)) == len(FIRST) == 300 and len(set(LAST)) == len(LAST) == 300
    assert not [(a, b) for a in FIRST + LAST for b in FIRST + LAST if a != b and b.startswith(a)]
    assert not set(FIRST) & set(LAST)


@pytest.mark.parametrize("n_numbers", [1, 2, 3, 8])
def test_a_book_is_question_book_question_and_answers_it(n_numbers):
    for seed in range(20):
        prompt, answer = a_book(seed, 8, n_numbers)
        entries = entries_of(prompt)
        assert len(entries) == len(dict(entries)) == 8
        above = prompt.index("\n\nPhonebook:\n")
        assert prompt[:above].replace("below", "above") == prompt[prompt.rindex("\n\n") + 2:]
        assert len(set(asked_in(prompt))) == n_numbers
        assert read_book([prompt], n_numbers) == [answer]


def test_the_question_reads_as_in_figure_9():
    one, two, three = (a_book(0, 4, n)[0].splitlines()[0] for n in (1, 2, 3))
    name = r"[A-Z]\w+ [A-Z]\w+"
    end = r"\? Find them in the phonebook below\."
    assert re.fullmatch(rf"What are the phone numbers for {name}{end}", one)
    assert re.fullmatch(rf"What are the phone numbers for {name} and {name}{end}", two)
    assert re.fullmatch(rf"What are the phone numbers for {name}, {name}, and {name}{end}", three)


def test_no_entry_of_a_test_book_can_be_in_a_training_book():
    sides = {split: {entry for seed in range(200) for entry in entries_of(a_book(seed, 20, 1, split)[0])}
             for split in ("train", "val")}
    assert min(map(len, sides.values())) > 3900 and not sides["train"] & sides["val"]
    # nor by luck: the same name and number are always on the same side
    rng = np.random.default_rng(0)
    pairs = [(name, pb.phone_number(rng, name, split), split) for split in sides for name in ("Amy Adams", "Roy Fox")]
    for name, number, split in pairs:
        again = iter([[int(c) for c in number.replace("-", "")], [1] * 10, [2] * 10, *([k] * 10 for k in range(3, 10))])

        class Fixed:
            def integers(self, *args, **kwargs):
                return np.array(next(again))
        assert pb.phone_number(Fixed(), name, split) == number
        other = "train" if split == "val" else "val"
        again = iter([[int(c) for c in number.replace("-", "")], *(list(map(int, f"{k:010d}")) for k in range(500))])
        assert pb.phone_number(Fixed(), name, other) != number


def test_digits_of_random_numbers_are_uniform():
    digits = "".join(number for seed in range(200) for _, number in entries_of(a_book(seed)[0])).replace("-", "")
    counts = np.bincount([int(d) for d in digits], minlength=10)
    assert abs(counts / counts.sum() - 0.1).max() < 0.012       # 16,000 digits: 5 standard deviations


# ---- batches ----

def config(**settings):
    return Config(**{**TINY, **settings})


def test_a_batch_is_a_pure_function_and_its_rows_hold_whole_books():
    made = Books(TOK, config(block_size=512))
    one, other, next_one = made.batch(1, 0, 5), Books(TOK, config(block_size=512)).batch(1, 0, 5), made.batch(1, 0, 6)
    assert all(np.array_equal(one[key], other[key]) for key in one)
    assert not np.array_equal(one["tokens"], next_one["tokens"])
    n_books = 0
    for tokens, targets, reset, arm in zip(*(one[key] for key in ("tokens", "targets", "reset", "arm"))):
        starts = np.flatnonzero((reset & RESET_FORWARD > 0) & (arm >= 0)).tolist()
        for begin, end in zip(starts, starts[1:] + [int((arm >= 0).sum())]):
            label = targets[begin:end][targets[begin:end] != -100]
            prompt = TOK.decode(tokens[begin:end - len(label)])
            assert read_book([prompt], None) == [TOK.decode(label[:-1])] and label[-1] == TOK.DONE
            assert tokens[end - len(label)] == TOK.GEN
            n_books += 1
    assert n_books > 4


def test_rows_are_filled_to_the_last_token_and_never_over():
    made = Books(TOK, config(block_size=Books(TOK, config()).longest(3, 2)))
    full = max(int((made.batch(1, 0, step)["arm"] >= 0).sum(1).max()) for step in range(200))
    assert made.config.block_size - 10 <= full <= made.config.block_size


def test_no_book_is_longer_than_the_bound_even_of_names_that_cost_most_at_the_start_of_a_line(monkeypatch):
    bound = Books(TOK, config(block_size=4096)).longest(8, 1)
    for name, names, space in (("FIRST", FIRST, ""), ("LAST", LAST, " ")):
        monkeypatch.setattr(pb, name, [max(names, key=lambda name: len(TOK.encode(space + name)))] * 8)
    assert all(sum(len(TOK.encode(text)) for text in a_book(seed, 8, 1)) + 1 <= bound for seed in range(20))


def test_a_book_that_may_not_fit_is_refused_before_training():
    bound = Books(TOK, config(block_size=4096)).longest(12, 4)
    sizes = [sum(len(TOK.encode(text)) for text in a_book(seed, 12, 4)) + 1 for seed in range(300)]
    assert max(sizes) <= bound < 1.25 * np.mean(sizes)
    with pytest.raises(ValueError, match=f"takes up to {bound} tokens.*--block_size={bound}"):
        Books(TOK, config(entries_max=12, numbers_max=4, block_size=bound - 1))


# ---- scores ----

def test_an_oracle_that_reads_the_book_scores_100_percent():
    for n in (1, 2, 8):
        result = score(read_book, books(n, 50))
        assert result["digits"] == result["exact"] == 1 and result["n_numbers"] == n and result["books"] == 50


def test_random_answers_score_10_percent():
    rng = np.random.default_rng(0)

    def guess(prompts, n):
        return [", ".join(pb.phone_number(rng, "", "train") for _ in range(n)) for _ in prompts]
    result = score(guess, books(4))
    assert abs(result["digits"] - 0.1) < 0.01 and result["exact"] == 0


def test_an_answer_right_in_its_first_group_alone_shows_by_place():
    """What a model does that finds the entry and cannot copy on."""
    result = score(lambda prompts, n: [", ".join(number[:3] for number in read_book([prompt], n)[0].split(", ")) for prompt in prompts],
                   books(1, 20))
    assert result["by_place"] == [1] * 3 + [0] * 7 and abs(result["digits"] - 0.3) < 1e-9 and result["exact"] == 0


def test_the_first_entry_every_time_scores_one_in_n_entries():
    """It is right in 1/8 of the books, and by chance in 1/10 of the digits of the others."""
    result = score(lambda prompts, n: [entries_of(prompt)[0][1] for prompt in prompts], books(1, 2000))
    assert abs(result["exact"] - 1 / 8) < 0.025 and abs(result["digits"] - (1 / 8 + 7 / 80)) < 0.025


def test_digits_count_by_place_and_missing_ones_are_wrong():
    label = "123-456-7890, 111-222-3333"
    assert digits_right(label, label).all()
    assert digits_right("", label).sum() == 0 and digits_right("", label).shape == (2, 10)
    assert digits_right("123-456-7890", label).sum(1).tolist() == [10, 0]
    assert digits_right("923-456-7899, 111-222-3333 and more", label).sum(1).tolist() == [8, 10]
    assert digits_right(label[1:], label)[0].sum() == 0           # shifted by one


def test_the_interval_holds_the_true_share_95_times_in_100():
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.97):
        found = rng.binomial(200, share, 4000) / 200
        inside = [low <= share <= high for low, high in (interval(s, 200) for s in found)]
        assert 0.925 < np.mean(inside) < 0.98
    assert interval(1.0, 100)[0] < 0.97


# ---- a whole run ----

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny model, pretrained and fine-tuned for two steps."""
    folder = str(tmp_path_factory.mktemp("phonebook"))
    text = os.path.join(folder, "text.txt")
    with open(text, "w") as file:
        file.write(open(os.path.join(ROOT, "model.py")).read())
    train.main(flags(n_layer=2, d_model=16, d_state=16, block_size=64, batch_size=4, eval_rows=1, workers=0, device="cpu",
                     dtype="float32", compile="no", max_steps=4, lr=1e-2, mixture="fixed", data=text, out_dir=f"{folder}/out"))
    main(flags(**TINY, out_dir=f"{folder}/out"))
    return f"{folder}/out"


def test_a_run_leaves_results_a_curve_and_a_checkpoint(run):
    with open(f"{run}/phonebook.json") as file:
        found = json.load(file)
    assert [result["n_numbers"] for result in found["results"]] == [1, 2] and found["curve"][-1]["step"] == 2
    assert found["pretraining"]["mixture"] == "fixed" and found["config"]["test_books"] == 8
    tuned, base = (load_model(f"{run}/{name}.pt")[0].state_dict() for name in ("phonebook", "ckpt"))
    assert any(not torch.equal(tuned[key], base[key]) for key in tuned)
    unused = TOK.MASKS[:8]                    # no weight decay: what a book never shows stays as it was
    assert torch.equal(tuned["embed.weight"][unused], base["embed.weight"][unused])


def test_what_is_fine_tuned_is_not_lost_and_scored_again_gives_the_same(run, capsys):
    with pytest.raises(SystemExit, match="phonebook.pt exists; score it again with --resume"):
        main(flags(**TINY, out_dir=run))
    before = open(f"{run}/phonebook.json").read()
    main(flags(**TINY, out_dir=run, resume=True))
    after = open(f"{run}/phonebook.json").read()
    assert json.loads(before)["results"] == json.loads(after)["results"]
    assert json.loads(before)["curve"] == json.loads(after)["curve"]
    assert "Phonebook:" in capsys.readouterr().out


def test_a_pretraining_that_is_not_over_shows_so(run, tmp_path, capsys):
    for step in (3, 4):                                         # of 4; scored again, the fine-tuned one knows it too
        checkpoint = {**train.load_checkpoint(f"{run}/ckpt.pt"), "step": step}
        torch.save(checkpoint, tmp_path / "ckpt.pt")
        for again in (False, True):
            main(flags(**TINY, ckpt=tmp_path / "ckpt.pt", out_dir=tmp_path / str(step), **({"resume": True} if again else {})))
            assert f"pretraining: fixed, {step} of 4 steps" in capsys.readouterr().out
            assert json.loads((tmp_path / str(step) / "phonebook.json").read_text())["pretrained"] == step


def test_scoring_again_keeps_how_it_was_fine_tuned_and_refuses_what_contradicts_it(run):
    was = json.loads(open(f"{run}/phonebook.json").read())["config"]
    main(flags(out_dir=run, resume=True, test_books=4))         # nothing of today's preset
    again = json.loads(open(f"{run}/phonebook.json").read())["config"]
    assert again == {**was, "test_books": 4, "resume": True, "device": "", "workers": again["workers"]}
    for flag, value in (("max_steps", 9), ("preset", "gpu"), ("lr", 0.5)):
        with pytest.raises(SystemExit, match=f"{flag} is .* on the command line; drop --{flag}"):
            main(flags(out_dir=run, resume=True, **{flag: value}))
    with pytest.raises(SystemExit, match="there is no .*phonebook.pt to score again; drop --resume"):
        main(flags(out_dir=f"{run}/elsewhere", resume=True))
    main(flags(out_dir=run, resume=True, test_books=was["test_books"]))       # as it was, for the other tests


def test_answers_are_written_freely_from_what_was_written_before():
    """Teacher forcing would never feed the model its own mistakes: here every token follows from its own."""
    torch.manual_seed(0)
    model, tok = LM(ModelConfig(vocab_size=TOK.vocab_size, n_layer=2, d_model=64, d_state=64)), TOK
    torch.nn.init.normal_(model.W_head.weight)                  # so that it says many things
    plain = train.Config(dtype="float32", device="cpu")
    (prompt, _), = books(1, 1)
    answer, = pb.responder(model, tok, plain)([prompt], 1)
    prefix, written = tok.encode(prompt).tolist(), []
    with torch.no_grad():
        while len(written) < 12 and tok.DONE not in written:
            tokens = torch.tensor([prefix + [tok.GEN] + written])
            reset = torch.tensor([[0] * len(prefix) + [2] * (1 + len(written))], dtype=torch.uint8)
            reset[0, 0] |= RESET_FORWARD
            written.append(int(model.eval()(tokens, reset)[0][0, -1].argmax()))
    assert answer == tok.decode([token for token in written if token != tok.DONE]) and len(set(written)) > 4


def test_from_scratch_ignores_every_checkpoint(run, tmp_path):
    for causal in (False, True):
        main(flags(**{**TINY, "max_steps": 1}, scratch="gated_ssm", out_dir=tmp_path / str(causal), **({"causal": True} if causal else {})))
        with open(tmp_path / str(causal) / "phonebook.json") as file:
            pretraining = json.load(file)["pretraining"]
        assert pretraining["mixture"] == "none" and pretraining["d_model"] == train.PRESETS["cpu"]["d_model"]
        assert load_model(tmp_path / str(causal) / "phonebook.pt")[0].config.causal == pretraining["causal"] == causal


@pytest.mark.parametrize("preset", pb.PRESETS)
def test_every_arm_of_the_comparison_is_pretrained_alike_but_for_its_mixture(preset):
    alike = set()
    for mixture in pb.MIXTURES:
        config = train.sized(train.Config(mixture=mixture, preset=pb.PRETRAINING[preset]))
        assert config.mixture == mixture and bool(config.focus) == (preset == "cpu" and "birdie" in mixture)
        alike.add(str(replace(config, mixture="", focus="")))
    assert len(alike) == 1


def test_the_learning_rate_of_fine_tuning_rises_stays_and_falls(run, tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (seen.append(self.param_groups[0]["lr"]), step(self, *a))[1])
    for cooldown in (0.25, 0.0):
        seen.clear()
        main(flags(**{**TINY, "max_steps": 100, "test_books": 1, "test_entries_min": 1, "test_entries_max": 1, "entries_max": 1,
                      "batch_size": 1, "lr": 1e-3, "cooldown": cooldown}, ckpt=f"{run}/ckpt.pt", out_dir=tmp_path / str(cooldown)))
        assert np.allclose(seen[:60:10], np.minimum(1e-3, 1e-3 * np.arange(1, 60, 10) / 50)) and seen[60:70] == [1e-3] * 10
        assert np.allclose(seen[-3:], [1.2e-4, 0.8e-4, 0.4e-4] if cooldown else 1e-3) and len(seen) == 100


@pytest.mark.parametrize("bad, message", [
    (dict(causal=True), "causal is for random weights; pass --scratch"), (dict(preset="laptop"), "preset 'laptop' is unknown; choose one of cpu, gpu, paper"),
    (dict(scratch="rnn"), "arch 'rnn' is unknown"),
    (dict(ckpt="nowhere.pt"), "there is no checkpoint nowhere.pt"),
    (dict(entries_max=40), "pass --block_size="),
    (dict(entries_min=9), "entries_max is 3; it must be from entries_min, 9"),
    (dict(test_entries_max=100000), "test_entries_max is 100000"),
    (dict(numbers_max=-1), "numbers_max is -1"),
    (dict(lr=-1.0), "lr is -1.0"),
    (dict(cooldown=2.0), "cooldown is 2.0; it must be a share"),
    (dict(flavour=1), "unrecognized arguments"),
])
def test_bad_input_ends_in_one_line(run, tmp_path, bad, message):
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        main(flags(**{**TINY, "ckpt": f"{run}/ckpt.pt", "out_dir": tmp_path, **bad}))
    assert "\n" not in str(error.value)


# ---- the whole comparison ----

def test_figure_1_runs_what_is_missing_keeps_what_is_there_and_names_what_failed(run, tmp_path, monkeypatch, capsys):
    calls = []

    def one(command, stdout, stderr, env):
        out_dir = next(flag for flag in command if flag.startswith("--out_dir="))[len("--out_dir="):]
        calls.append([os.path.basename(command[1]), *command[2:]])
        fails = "ntp" in out_dir and len(calls) < 5
        stdout.write("first line\nerror: no luck\n" if fails else "")
        shutil.copy(f"{run}/phonebook.json", f"{out_dir}/new")
        os.replace(f"{out_dir}/new", os.path.join(out_dir, "ckpt.pt" if "train.py" in command[1] else "phonebook.json"))
        return subprocess.CompletedProcess(command, int(fails))

    monkeypatch.setattr(pb, "plot", lambda found, picture: None)
    monkeypatch.setattr(subprocess, "run", one)
    with open(f"{run}/phonebook.json") as file:
        as_run = json.load(file)["config"]
    monkeypatch.setitem(pb.PRESETS, "cpu", {name: as_run[name] for name in pb.PRESETS["cpu"]})
    figure = Figure(out_dir=str(tmp_path), preset="cpu", only="gated_ssm-birdie-1,*_ssm-ntp-1,gated_ssm-none-1", jobs=1)
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):
        figure1(figure)
    assert "train.py failed with exit code 1" in (out := capsys.readouterr().out) and "no luck" in out
    assert [call[0] for call in calls] == ["train.py", "eval_phonebook.py", "train.py", "eval_phonebook.py"]
    assert "--mixture=birdie" in calls[0] and "--mixture=ntp" in calls[2] and "--scratch=gated_ssm" in calls[3]
    figure1(figure)
    assert [call[0] for call in calls[4:]] == ["train.py", "eval_phonebook.py"] and "--resume" in calls[4]
    os.replace(tmp_path / "gated_ssm-ntp-1" / "phonebook.json", tmp_path / "gated_ssm-ntp-1" / "phonebook.pt")
    figure1(figure)                                             # fine-tuned, but not yet scored
    assert [call[0] for call in calls[6:]] == ["eval_phonebook.py"] and "--resume" in calls[6]
    assert "| gated_ssm | next token prediction |" in capsys.readouterr().out
    with open(tmp_path / "figure1.json") as file:
        assert [(r["arch"], r["mixture"], r["seed"]) for r in json.load(file)] == [
            ("gated_ssm", "birdie", 1), ("gated_ssm", "ntp", 1), ("gated_ssm", "none", 1)]
    pb.PRESETS["cpu"]["lr"] = 0.5
    with pytest.raises(ValueError, match="phonebook.json has lr .*, and preset cpu has 0.5; remove it"):
        figure1(figure)
    with pytest.raises(ValueError, match="no run matches 'hawk_ntp' of --only; runs are named gated_ssm-birdie-1"):
        figure1(replace(figure, only="gated_ssm-birdie-1, hawk_ntp"))


def test_the_picture_is_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    with open(f"{run}/phonebook.json") as file:
        found = json.load(file)
    pb.plot([dict(arch=arch, mixture=mixture, seed=seed, **found) for arch in ("gated_ssm", "hawk")
             for mixture in ("birdie", "ntp") for seed in (1, 2)], str(tmp_path / "figure1.png"))
    assert (tmp_path / "figure1.png").stat().st_size > 10000


def test_book_prints_one_book(capsys):
    main(["book"])
    out = capsys.readouterr().out
    assert len(entries_of(out)) == 6 and re.search(r"\n\n\d{3}-\d{3}-\d{4}, \d{3}-\d{3}-\d{4}$", out.strip())
