"""Resuming changes no bit, checkpoints and logs are whole at any moment, every class learns, bad
input ends in one line, and what one adds trains: a setting, a class, a mixer, a scheduler.

    python -m pytest tests/test_train.py
"""
import contextlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from model import (IGNORE, LM, MIXERS, RESET_FORWARD, ModelConfig, answer, command_line,
                   errors_in_one_line, load_checkpoint)
from objectives import CLASSES, STOP_SIGNALS, Batches, Corpus, Tokenizer, arms, as_prompt
from scheduler import MIXTURES, Birdie, make_scheduler, reward
from test_model import EMA
from train import PRESETS, Log, Validation, learning_rate, main, parse_args, save_checkpoint

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
ROOT = os.path.dirname(os.path.abspath(train.__file__))
TINY = dict(tokenizer="bytes", n_layer=2, d_model=16, d_state=16, block_size=64, batch_size=4,
            eval_rows=1, workers=0, device="cpu", dtype="float32", compile="no", max_steps=20,
            lr=0.01, mixture="fixed")       # evaluates at 0, 10 and 20


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The bandit's reward model takes 5 steps an evaluation, not 200."""
    monkeypatch.setattr(Birdie, "train_steps", 5)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    sources = [open(os.path.join(ROOT, name)).read() for name in ("model.py", "objectives.py")]
    odd = "\0 one endless line \u00e9\U0001f600 " * 500
    path.write_text("".join([*sources, odd]), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    out_dir = str(tmp_path_factory.mktemp("run") / "out")
    tiny(out_dir, text)
    return out_dir


def flags(**settings):
    return [f"--{name}" + (value is not True) * f"={value}" for name, value in settings.items()]


def tiny(out_dir, text, **settings):
    main(flags(**{**TINY, "data": text, "out_dir": out_dir, **settings}))


def checkpoint(out_dir):
    return load_checkpoint(os.path.join(out_dir, "ckpt.pt"))


def log_of(out_dir):
    with open(os.path.join(out_dir, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


def evaluations(out_dir):
    return [line for line in log_of(out_dir) if "mean_loss" in line]


# ---- the test to copy: what every setting does -------------------------------------------------

@pytest.fixture(scope="module")
def usual(tmp_path_factory, text):
    """The weights after three steps of TINY."""
    out_dir = str(tmp_path_factory.mktemp("usual") / "out")
    tiny(out_dir, text, max_steps=3)
    return checkpoint(out_dir)["model"]


@pytest.mark.parametrize("name, value, other", [
    ("memory", 8, 16), ("lr", 0.02, 0.01), ("beta2", 0.5, 0.6), ("weight_decay", 5.0, 0.1),
    ("clip", 0.01, 1.0), ("warmup", 1.0, 0.5), ("seed", 2, 3), ("mixture", "ul2", "ntp")])
def test_a_setting_changes_the_run_and_cannot_change_when_it_is_resumed(name, value, other, usual,
                                                                         text, tmp_path):
    tiny(tmp_path, text, max_steps=3, **{name: value})
    saved = checkpoint(tmp_path)
    assert saved["config"][name] == value
    assert any(not torch.equal(usual[key], saved["model"][key]) for key in usual)
    with pytest.raises(SystemExit, match=f"^error: {name} is .*drop --{name}"):
        main(flags(out_dir=tmp_path, resume=True, **{name: other}))


# ---- an example to check by hand ---------------------------------------------------------------

def test_the_log_of_ten_steps(text, tmp_path):
    tiny(tmp_path, text, max_steps=10)
    head, before, step, after = log_of(tmp_path)
    assert [line["step"] for line in (head, before, step, after)] == [-1, 0, 9, 10]
    assert head["config"]["lr"] == 0.01 and head["arms"] == [arm.name for arm in arms(64)]
    # A new model knows nothing: each of V tokens is as likely as another
    V = Tokenizer("bytes", n_masks=64 // 8).vocab_size
    assert before["mean_loss"] == pytest.approx(math.log(V), abs=0.1)
    assert before["share_copying"] == pytest.approx(1 / len(CLASSES), abs=1e-5)
    assert before["reward_copying"] == 0 < after["reward_copying"]
    # One step of warm-up, then a cosine over nine, of which eight are over at step 9
    rates = [0.01, 0.01 * (0.55 + 0.45 * math.cos(math.pi * 8 / 9)), 0.001]
    assert [line["lr"] for line in (before, step, after)] == pytest.approx(rates)
    # Ten steps of 4 rows of 64 tokens have read this share of the text
    assert [before["passes"], after["passes"]] == [0, 10 * 4 * 64 / head["data"]["train"]]
    assert set(step) == {"step", "train_loss", "norm", "lr", "tokens_per_s"}


# ---- what is measured, and what can be seen ----------------------------------------------------

def little(text, block_size=64, batch_size=4, **sizes):
    """-> (model, batches) of text in bytes."""
    tok = Tokenizer("bytes", block_size // 8)
    batches = Batches(Corpus(text, tok), tok, block_size, batch_size)
    torch.manual_seed(0)
    sizes = dict(d_model=16, d_state=16, n_head=2) | sizes
    return LM(ModelConfig(vocab_size=tok.vocab_size, **sizes)), batches


def test_validation_is_the_mean_over_the_labels_of_each_arm_on_the_same_rows_every_time(text):
    model, batches = little(text, batch_size=2)
    validation, again = Validation(batches), Validation(batches)
    rows = validation.rows
    assert all(torch.equal(rows[key], again.rows[key]) for key in rows)
    first = rows["targets"][0].numpy()              # next token prediction's: text as it is
    text = batches.corpus.window("val", 0, batches.corpus.size["val"])
    assert any(np.array_equal(first, text[i:i + len(first)]) for i in range(len(text)))
    loss, accuracy = validation(model, SimpleNamespace(batch_size=7, device="cpu", dtype="float32"))
    logits = model(rows["tokens"], rows["reset"])[0].detach()
    p = logits.double().softmax(-1)
    for k in range(len(batches.arms)):
        assert set(rows["arm"][2 * k:2 * k + 2].flatten().tolist()) <= {k, -1}      # -1: padding
        labels = ((rows["arm"] == k) & (rows["targets"] != IGNORE)).nonzero().tolist()
        answers = [(b, t, rows["targets"][b, t]) for b, t in labels]
        assert loss[k] == pytest.approx(np.mean([-p[at].log() for at in answers]), rel=1e-5)
        assert accuracy[k] == np.mean([p[b, t].argmax() == label for b, t, label in answers])


def test_the_learning_rate_rises_to_lr_and_falls_to_a_tenth():
    args = SimpleNamespace(lr=1.0, max_steps=1000, warmup=0.02)
    rates = [learning_rate(step, args) for step in range(1001)]
    assert np.allclose(np.diff(rates[:20]), 0.05) and max(rates) == rates[19] == 1.0
    assert (np.diff(rates[20:]) < 0).all() and rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("arch", MIXERS)
def test_in_real_batches_no_label_is_seen_before_its_turn_and_no_sample_sees_another(text, arch):
    """Every class in packed rows of the real pipeline; one token a row changed; bit for bit."""
    B, T = 32, 128
    model, batches = little(text, T, B, arch=arch)
    batch = batches.batch(1, 0, 0, make_scheduler("fixed", batches.arms, 1).action, "train")
    assert {batches.arms[k].cls for k in np.unique(batch["arm"]) if k >= 0} == set(CLASSES)
    tokens, reset, targets = map(torch.from_numpy, (batch["tokens"], batch["reset"],
                                                    batch["targets"]))
    rng = np.random.default_rng(0)
    with torch.no_grad():
        before = model(tokens, reset)[0]
        for _ in range(15):
            changed, reach = tokens.clone(), torch.zeros(B, T, dtype=torch.bool)
            for b in range(B):
                at = int(rng.integers(T))
                firsts = (reset[b] & RESET_FORWARD).nonzero().flatten().tolist() + [T]
                first, end = max(s for s in firsts if s <= at), min(s for s in firsts if s > at)
                labels = (targets[b, first:end] != IGNORE).nonzero().flatten().tolist()
                gen = first + labels[0] if labels else end          # padding has no labels
                changed[b, at] = 0 if tokens[b, at] else 1
                reach[b, at if at > gen else first:end] = True
            assert not ((model(changed, reset)[0] != before).any(-1) & ~reach).any()


# ---- one step, in pieces and in 16 bits --------------------------------------------------------

def learner(text, dtype="float32", **sizes):
    """-> (a Learner of a small model, a batch of four rows with 1, 8, 20 and 50 labels)."""
    args = parse_args(flags(**{**TINY, "data": text, "dtype": dtype, **sizes}))
    tok = Tokenizer(args.tokenizer, n_masks=8)
    torch.manual_seed(0)
    model = LM(train.model_config(args, tok))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    targets = torch.randint(256, (4, 64))
    for row, n in zip(targets, (1, 8, 20, 50)):
        row[n:] = IGNORE
    reset = torch.zeros(4, 64, dtype=torch.uint8)
    reset[:, 0] = RESET_FORWARD
    batch = dict(tokens=torch.randint(256, (4, 64)), targets=targets, reset=reset)
    return train.Learner(model, optimizer, args, clip=1e9), batch


@pytest.mark.parametrize("recompute", [{}, {"recompute": True}])
def test_micro_batches_give_the_gradient_of_the_whole_batch(text, recompute):
    found = []
    for rows in (4, 2, 1):
        step, batch = learner(text, **recompute)
        step.rows, step.optimizer.zero_grad = rows, lambda: None
        loss, norm = step.step(batch, 0.0)
        found.append([loss, norm, *(p.grad for p in step.raw.parameters())])
    for other in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found[0], other))


def too_large(monkeypatch, n_rows):
    """A device without room for more than n_rows at a time."""
    forward = LM.forward

    def short(self, tokens, *rest):
        if torch.is_grad_enabled() and len(tokens) > n_rows:
            raise torch.OutOfMemoryError(f"tried to allocate {len(tokens)} rows")
        return forward(self, tokens, *rest)
    monkeypatch.setattr(LM, "forward", short)


def test_a_run_that_is_told_out_of_memory_twice_ends_with_the_same_losses(text, tmp_path, capsys,
                                                                          monkeypatch):
    tiny(str(tmp_path / "whole"), text)
    too_large(monkeypatch, 1)
    tiny(str(tmp_path / "pieces"), text)
    out = capsys.readouterr().out
    assert "4 rows do not fit: trying 2" in out and "a step is 4 micro-batches of 1 rows" in out
    one, two = ([line["mean_loss"] for line in evaluations(tmp_path / run)]
                for run in ("whole", "pieces"))
    assert np.allclose(one, two, atol=1e-5)


def test_it_says_how_many_micro_batches_it_makes(text, tmp_path, capsys, monkeypatch):
    too_large(monkeypatch, 2)
    passes, backward = [], train.Learner.backward

    def counted(self, *args, **options):
        passes.append(1)
        return backward(self, *args, **options)
    monkeypatch.setattr(train.Learner, "backward", counted)
    tiny(str(tmp_path), text, batch_size=6, max_steps=10)
    assert "a step is 3 micro-batches of 2 rows" in capsys.readouterr().out
    assert len(passes) == 3 + 3 * 10            # 6 rows are tried, then 3, then 2


def test_a_row_that_does_not_fit_says_what_to_change(text, tmp_path, monkeypatch):
    too_large(monkeypatch, 0)
    with pytest.raises(SystemExit, match="error: 1 rows of 64 tokens .*--recompute"):
        tiny(str(tmp_path), text)


def test_float16_ends_as_bfloat16_does(text, tmp_path):
    for dtype in ("float16", "bfloat16"):
        tiny(str(tmp_path / dtype), text, dtype=dtype, max_steps=300)
    half, brain = (evaluations(tmp_path / dtype)[-1]["mean_loss"]
                   for dtype in ("float16", "bfloat16"))
    assert abs(half / brain - 1) < 0.02
    assert log_of(tmp_path / "float16")[-2]["skipped"] < 10
    assert "skipped" not in log_of(tmp_path / "bfloat16")[-2]


def test_a_step_whose_gradients_overflow_is_skipped_and_counted(text):
    step, batch = learner(text, dtype="float16")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 60)
    before = [p.clone() for p in step.raw.parameters()]
    step.step(batch, 0.1)
    assert step.counts() == {"skipped": 1}
    assert all(torch.equal(one, two) for one, two in zip(before, step.raw.parameters()))
    assert step.scaler.get_scale() == 2.0 ** 59


def test_a_step_never_waits_for_the_device(text):
    """Reading a number of a GPU's tensor on the CPU is this operator."""
    class Watch(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.seen += operator in (torch.ops.aten._local_scalar_dense.default,
                                      torch.ops.aten.nonzero.default)
            return operator(*args, **(kwargs or {}))

    step, batch = learner(text)
    with Watch() as watch:
        for _ in range(3):
            loss, _ = step.step(batch, 0.1)
        assert watch.seen == 0
        loss.item()
    assert watch.seen == 1


# ---- several processes -------------------------------------------------------------------------

def torchrun(n, out_dir, text, **settings):
    """n processes, or with n = 0 one without torchrun."""
    command = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--rdzv_backend=c10d",
               "--rdzv_endpoint=localhost:0", "train.py"] if n else ["train.py"]
    settings = {**TINY, "data": text, "out_dir": out_dir, **settings}
    return subprocess.Popen([sys.executable, *command, *flags(**settings)], cwd=ROOT, env=ENV,
                            start_new_session=True, stderr=subprocess.PIPE, text=True)


def ends_well(run):
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 0, said


def still_there(session):
    found = subprocess.run(["pgrep", "-s", str(session)], capture_output=True, text=True)
    return found.stdout.split()


fsdp_on_a_cpu = pytest.mark.skipif(torch.__version__.startswith("2.6"),
                                   reason="torch 2.6 has FSDP2 on GPUs only")


@pytest.mark.parametrize("more", [{}, pytest.param({"shard": True, "recompute": True},
                                                   marks=fsdp_on_a_cpu)])
def test_two_processes_train_as_one_does(more, text, tmp_path):
    """A fixed mixture: the bandit's choice among proposals can tip by a rounding."""
    settings = dict(max_steps=50, batch_size=6)
    tiny(str(tmp_path / "one"), text, **settings)
    ends_well(torchrun(2, str(tmp_path / "two"), text, **settings, **more))
    assert sorted(os.listdir(tmp_path / "two")) == ["ckpt.pt", "log.jsonl"]
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for key in ("train_loss", "mean_loss", "arm_share"):
        here, there = ([line[key] for line in log if key in line] for log in (one, two))
        assert len(here) >= 5 and np.allclose(here, there, atol=1e-5)


@fsdp_on_a_cpu
def test_what_one_process_has_begun_two_end_in_shards(text, tmp_path, monkeypatch):
    one, both = str(tmp_path / "one"), str(tmp_path / "both")
    tiny(one, text, shard=True)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_in_step(patch, 17)
        tiny(both, text, shard=True)
    ends_well(torchrun(2, both, text, shard=True, resume=True))
    assert checkpoint(both)["step"] == checkpoint(one)["step"] > 17
    one, both = (checkpoint(path) for path in (one, both))
    for k, kept in one["optimizer"]["state"].items():
        for name, value in kept.items():
            assert torch.allclose(both["optimizer"]["state"][k][name], value, atol=1e-5)
    for name, value in one["model"].items():
        assert torch.allclose(both["model"][name], value, atol=1e-4)


@pytest.mark.parametrize("how", ["SIGTERM to torchrun", "SIGKILL to a rank"])
def test_when_one_process_stops_all_do_and_the_folder_is_whole(how, text, tmp_path):
    out_dir = str(tmp_path)
    run = torchrun(2, out_dir, text, max_steps=100_000, workers=1)
    try:
        wait_for(lambda: os.path.exists(os.path.join(out_dir, "log.jsonl"))
                 and any("train_loss" in line for line in log_of(out_dir)))
        if how == "SIGTERM to torchrun":
            run.terminate()
        else:
            ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
            os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
        said = run.communicate(timeout=60)[1]
        wait_for(lambda: not still_there(run.pid), 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    saved = checkpoint(out_dir)["step"]
    if how == "SIGTERM to torchrun":
        assert saved > 0 and f"stopped after step {saved}" in said


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


# ---- resuming ----------------------------------------------------------------------------------

def signal_in_step(monkeypatch, n, number=signal.SIGINT):
    """In the middle of the n-th step from now."""
    step, steps = train.Learner.step, iter(range(1, 1000))

    def signalled(self, *args):
        if next(steps) == n:
            os.kill(os.getpid(), number)
        return step(self, *args)
    monkeypatch.setattr(train.Learner, "step", signalled)


def resumes_bit_for_bit(text, tmp_path, monkeypatch, capsys, n_steps, **settings):
    """A run stopped after n_steps and resumed ends with the weights of a whole one, and with its
    log but for the clock and the folder's name -> the folder."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    tiny(whole, text, **settings)
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    for number in STOP_SIGNALS if n_steps == 10 else [signal.SIGTERM]:
        shutil.rmtree(parts, ignore_errors=True)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            signal_in_step(patch, n_steps, number)
            tiny(parts, text, **settings)
        assert stopped.value.code == 128 + number
        said = capsys.readouterr().err
        assert f"after step {n_steps}; go on with: python train.py --out_dir={parts} --res" in said
        assert sorted(os.listdir(parts)) == ["ckpt.pt", "log.jsonl"]
    assert handlers == [signal.getsignal(number) for number in STOP_SIGNALS]    # as they were
    main(flags(out_dir=parts, resume=True))
    one, two = (checkpoint(path)["model"] for path in (whole, parts))
    assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = ([{**line, "tokens_per_s": 0, "config": 0} for line in log_of(path)]
                for path in (whole, parts))
    assert one == two
    return parts


@pytest.mark.parametrize("mixture, n_steps", [("fixed", 1), ("fixed", 10), ("birdie", 17)])
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(mixture, n_steps, text, tmp_path,
                                                           monkeypatch, capsys):
    """Stopped before, at and after an evaluation; the bandit goes on with what it had chosen."""
    out_dir = resumes_bit_for_bit(text, tmp_path, monkeypatch, capsys, n_steps, mixture=mixture)
    first, second, _ = (line["arm_share"] for line in evaluations(out_dir))
    assert (first != second) == (mixture == "birdie")


def test_a_signal_to_the_process_group_saves_and_says_how_to_go_on(text, tmp_path):
    """Ctrl-C in a terminal, and a scheduler's SIGTERM, reach the workers too."""
    runs = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        out_dir = str(tmp_path / number.name)
        settings = {**TINY, "data": text, "out_dir": out_dir, "workers": 1, "max_steps": 20_000}
        runs[number] = out_dir, subprocess.Popen(
            [sys.executable, os.path.join(ROOT, "train.py"), *flags(**settings)], text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, env=ENV)
    for number, (out_dir, run) in runs.items():
        deadline = time.time() + 100
        while time.time() < deadline and run.poll() is None:
            if os.path.exists(f"{out_dir}/log.jsonl") and len(log_of(out_dir)) > 2:
                break
            time.sleep(0.1)
        os.killpg(run.pid, number)
    for number, (out_dir, run) in runs.items():
        _, printed = run.communicate(timeout=100)
        assert run.returncode == 128 + number and f"--out_dir={out_dir} --resume" in printed
        assert "Traceback" not in printed and checkpoint(out_dir)["step"] > 0


def test_where_and_how_a_run_goes_on_may_change(finished, tmp_path, monkeypatch):
    moved = str(tmp_path / "out")
    shutil.copytree(finished, moved)
    main(flags(out_dir=moved, resume=True, workers=1, n_layer=2))
    assert log_of(moved) == log_of(finished)
    monkeypatch.chdir(tmp_path)
    assert train.parse_args(["--resume"]).out_dir == "out"      # not where it was once


def test_resuming_on_other_text_is_an_error(finished, text, tmp_path):
    (tmp_path / "other.txt").write_text(open(text).read()[:-2000])
    with pytest.raises(SystemExit, match="the same text"):
        main(flags(out_dir=finished, resume=True, data=tmp_path / "other.txt"))


def test_a_checkpoint_of_other_classes_is_refused_by_every_command(finished, tmp_path, monkeypatch):
    """Its special tokens mean something else here, so its answers would be silently wrong."""
    saved = load_checkpoint(os.path.join(finished, "ckpt.pt"))
    saved["tokenizer"]["classes"] = saved["tokenizer"]["classes"][:-1]
    save_checkpoint(str(tmp_path / "ckpt.pt"), saved)
    for command in (lambda: main(flags(out_dir=tmp_path, resume=True)),
                    lambda: answer([f"--ckpt={tmp_path}/ckpt.pt", "--prompt=x"])):
        with pytest.raises(SystemExit, match="has the classes .* train anew"), errors_in_one_line():
            command()


# ---- the run folder ----------------------------------------------------------------------------

def test_the_log_is_json_line_by_line_and_holds_every_class_and_arm(finished):
    head, *_ = log_of(finished)
    found, previous = evaluations(finished), None
    assert [line["step"] for line in found] == [0, 10, 20]
    for line in found:
        loss, share = np.array(line["arm_loss"]), np.array(line["arm_share"])
        rewards = reward(loss if previous is None else previous, loss)
        for cls in CLASSES:
            of_class = np.array([name.split("-")[0] == cls for name in head["arms"]])
            assert line[f"loss_{cls}"] == pytest.approx(loss[of_class].mean(), abs=1e-5)
            assert line[f"reward_{cls}"] == pytest.approx(rewards[of_class].mean(), abs=1e-5)
            assert line[f"share_{cls}"] == pytest.approx(share[of_class].sum(), abs=1e-5)
            assert 0 <= line[f"accuracy_{cls}"] <= 1
        previous = loss
    assert all(found[-1][f"loss_{cls}"] < found[0][f"loss_{cls}"] for cls in CLASSES)


def test_a_resumed_log_drops_a_torn_line_and_what_will_be_written_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": -1}\n{"step": 9}\n{"step": 19}\n{"ste')
    Log(str(path), resume_at=19).write(step=19, loss=2.0)
    assert path.read_text() == '{"step": -1}\n{"step": 9}\n{"step": 19, "loss": 2.0}\n'


def test_a_run_that_blows_up_stops_at_once_and_keeps_its_last_good_checkpoint(text, tmp_path):
    with pytest.raises(SystemExit, match="the loss is nan at step 9; .*lower --lr than 100"):
        tiny(tmp_path, text, lr=100, clip=1e12, max_steps=40, warmup=0, mixture="ntp")
    assert all(p.isfinite().all() for p in checkpoint(tmp_path)["model"].values())
    with open(tmp_path / "log.jsonl") as file:
        assert not re.search("NaN|Infinity", file.read())       # JSON has none


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    path, good = str(tmp_path / "ckpt.pt"), dict(model={"w": torch.ones(2)}, model_config={},
                                                 tokenizer={})
    save_checkpoint(path, good)
    before = open(path, "rb").read()
    for bad, message in ((dict(step=np.ones(2)), "would not load again"),
                         (dict(step=lambda: 1), "would not load again"),
                         (dict(model={"w": torch.tensor([math.nan])}), "no longer finite")):
        with pytest.raises(ValueError, match=message):
            save_checkpoint(path, {**good, **bad})
        assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["ckpt.pt"]


def limited(n_bytes):
    """No file may grow beyond so many bytes, as on a disk that is full there."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.parametrize("n_bytes, file", [(20_000, "ckpt.pt"), (3_000, "log.jsonl")])
def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(n_bytes, file, finished, text,
                                                            tmp_path):
    if file == "ckpt.pt":
        shutil.copy(os.path.join(finished, "ckpt.pt"), tmp_path)
    command = flags(out_dir=tmp_path, resume=True) if file == "ckpt.pt" else flags(
        **{**TINY, "data": text, "out_dir": tmp_path})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *command], text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          env={**ENV, "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]},
                          preexec_fn=lambda: limited(n_bytes)) as run:
        last = run.stderr.read().splitlines()[-1]
    assert run.returncode == 1 and re.match(f"error: .*{file} cannot be written", last)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()
                      if path.name != "log.jsonl"}


def test_damage_anywhere_in_a_checkpoint_is_found(finished, tmp_path):
    good = open(os.path.join(finished, "ckpt.pt"), "rb").read()
    rng, third = np.random.default_rng(0), len(good) // 3
    damaged = [good[:cut] for cut in (0, 1, 10, 100, 1000, third, len(good) - 1)]
    inverted = bytes(255 - byte for byte in good[third:third + 100])
    damaged += [good[:third] + inverted + good[third + 100:], good[third:] + good[:third]]
    for at in rng.integers(len(good), size=50):
        damaged.append(bytearray(good))
        damaged[-1][at] ^= 1 << rng.integers(8)
    for content in damaged:
        (tmp_path / "ckpt.pt").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or no checkpoint of this version"):
            checkpoint(tmp_path)


def test_what_is_intact_and_cannot_be_read_is_not_called_damaged(finished, tmp_path, monkeypatch):
    (tmp_path / "ckpt.pt").mkdir()
    with pytest.raises(ValueError, match="ckpt.pt is a folder; pass a checkpoint"):
        checkpoint(tmp_path)

    def short(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(torch, "load", short)
    with pytest.raises(ValueError, match="may be intact .*can't allocate memory"):
        checkpoint(finished)


def test_a_checkpoint_for_which_memory_is_short_is_not_blamed(finished, tmp_path, monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    for where in (torch.nn.Module, torch.optim.AdamW):
        with monkeypatch.context() as patch:
            patch.setattr(where, "load_state_dict", short)
            with pytest.raises(SystemExit, match="memory is short .*2.00 GiB.; pass smaller sizes"):
                main(flags(out_dir=finished, resume=True))


def test_a_checkpoint_that_does_not_fit_the_code_says_so_in_one_line(finished, tmp_path):
    saved, path = checkpoint(finished), str(tmp_path / "ckpt.pt")
    del saved["model"]["norm.weight"]
    save_checkpoint(path, saved)
    with pytest.raises(SystemExit, match="ckpt.pt does not fit this code.*norm.weight"):
        main(flags(out_dir=tmp_path, resume=True))
    with pytest.raises(ValueError, match="ckpt.pt does not fit this code.*norm.weight"):
        LM.load(path)


@pytest.mark.parametrize("line", ["[1]", '{"a": 1}', '{"step": null}', "garbage", "", "NaN"])
def test_a_damaged_log_is_named_with_the_line(line, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    with open(tmp_path / "out/log.jsonl") as file:
        lines = file.readlines()
    (tmp_path / "out/log.jsonl").write_text("".join([lines[0], line + "\n", *lines[1:]]))
    with pytest.raises(SystemExit, match="log.jsonl line 2 is not of a log: .*remove it"):
        main(flags(out_dir=tmp_path / "out", resume=True))
    assert (tmp_path / "out/log.jsonl").read_text().count("\n") == len(lines) + 1


def test_only_one_process_at_a_time_has_a_folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    holder = subprocess.Popen([sys.executable, "-c", f"""
import sys; sys.path.insert(0, {ROOT!r})
import train
with train.claimed({str(tmp_path / "out")!r}, "ckpt.pt"):
    print("mine", flush=True); sys.stdin.read()"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"mine\n"
    (tmp_path / "out/ckpt.pt.part").write_text("of a process that was killed")
    for settings in (dict(resume=True), {**TINY, "data": __file__}):
        with pytest.raises(SystemExit, match="another process is at work in .*out; wait for it"):
            main(flags(out_dir=tmp_path / "out", **settings))
    holder.kill()
    holder.wait()
    main(flags(out_dir=tmp_path / "out", resume=True))          # the lock went with its process
    assert sorted(os.listdir(tmp_path / "out")) == ["ckpt.pt", "log.jsonl"]


def test_a_worker_that_is_killed_costs_nothing(text, tmp_path, monkeypatch, capsys):
    tiny(tmp_path / "whole", text, workers=0)
    step, steps = train.Learner.step, iter(range(1000))

    def killing(self, *args):
        if next(steps) == 3:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return step(self, *args)
    monkeypatch.setattr(train.Learner, "step", killing)
    tiny(tmp_path / "killed", text, workers=2)
    assert "batches are made without any from now" in capsys.readouterr().out
    one, two = (checkpoint(tmp_path / name)["model"] for name in ("whole", "killed"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_cuda_graphs_are_asked_for_by_name(monkeypatch):
    modes, model = [], torch.nn.Linear(1, 1)
    monkeypatch.setattr(torch, "compile", lambda model, mode, **_: modes.append(mode) or model)
    for compile in ("yes", "graphs", "no"):
        args = SimpleNamespace(compile=compile, device="cpu", dtype="float32")
        train.Learner(model, torch.optim.AdamW(model.parameters()), args, clip=1.0)
    assert modes == [None, "reduce-overhead"]


def test_cuda_graphs_are_refused_where_a_step_is_micro_batches(text, monkeypatch):
    step, batch = learner(text)
    too_large(monkeypatch, 1)
    step.args.compile = "graphs"
    with pytest.raises(ValueError, match="4 micro-batches .*--compile=yes"):
        step.step(batch, 0.0)


def test_where_torch_compile_fails_the_run_goes_on_without(text, tmp_path, monkeypatch, capsys):
    def compile(model, **_):
        def call(*_):
            raise RuntimeError("file too short")
        return call
    tiny(tmp_path / "plain", text, max_steps=3)
    monkeypatch.setattr(torch, "compile", compile)
    tiny(tmp_path / "failed", text, max_steps=3, compile="yes")
    assert re.search("compile  no: it failed .*file too short", capsys.readouterr().out)
    one, two = (checkpoint(tmp_path / name)["model"] for name in ("plain", "failed"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_stdout_cannot_show_is_escaped(finished):
    run = subprocess.run([sys.executable, os.path.join(ROOT, "model.py"), "--prompt=\u20ac",
                          f"--ckpt={finished}/ckpt.pt", "--max_new_tokens=2"], text=True,
                         capture_output=True, env={**ENV, "PYTHONIOENCODING": "latin-1"})
    assert run.returncode == 0 and run.stdout.startswith("\\u20ac")
    said = run.stderr.splitlines()      # a CUDA build of torch may note that there is no GPU
    assert all(line.startswith("No CUDA runtime is found") for line in said)


# ---- text and vocabulary -----------------------------------------------------------------------

def test_another_text_of_the_same_size_is_noticed_and_a_moved_one_is_not(text, tmp_path):
    one, out_dir = tmp_path / "one.txt", tmp_path / "out"
    shutil.copy(text, one)
    tiny(out_dir, str(one), max_steps=3)
    one.rename(tmp_path / "moved.txt")
    main(flags(out_dir=out_dir, resume=True, data=tmp_path / "moved.txt"))
    stat, content = os.stat(tmp_path / "moved.txt"), one.with_name("moved.txt").read_text()
    one.write_text(content.swapcase())
    os.utime(one, ns=(stat.st_atime_ns, stat.st_mtime_ns))      # the same size and time
    with pytest.raises(SystemExit, match="give it the same text, or train on this .*--init_from="):
        main(flags(out_dir=out_dir, resume=True, data=one))


def test_a_checkpoint_holds_its_vocabulary(text, tmp_path, capsys):
    """An edited or lost .tiktoken file changes no answer."""
    shutil.copy(os.path.join(ROOT, "assets", "bpe2048.tiktoken"), tmp_path / "own.tiktoken")
    tiny(tmp_path / "out", text, max_steps=3, tokenizer=tmp_path / "own.tiktoken")
    ask = [f"--ckpt={tmp_path}/out/ckpt.pt", "--prompt=def main", "--max_new_tokens=4"]
    capsys.readouterr()
    answer(ask)
    before = capsys.readouterr().out
    lines = (tmp_path / "own.tiktoken").read_text().splitlines()
    ranks = [line.split()[1] for line in lines]
    other = [f"{line.split()[0]} {rank}" for line, rank in zip(lines[::-1], ranks)]
    (tmp_path / "own.tiktoken").write_text("\n".join(other))
    answer(ask)
    assert capsys.readouterr().out == before
    (tmp_path / "own.tiktoken").unlink()
    main(flags(out_dir=tmp_path / "out", resume=True))
    capsys.readouterr()
    answer(ask)
    assert capsys.readouterr().out == before


def test_a_run_begins_with_the_weights_of_another_on_other_text(finished, tmp_path, capsys):
    tiny(tmp_path, os.path.join(ROOT, "train.py"), max_steps=1, lr=1e-9,
         init_from=f"{finished}/ckpt.pt", n_layer=2)
    one, two = checkpoint(finished), checkpoint(tmp_path)
    assert two["data"] != one["data"] and two["step"] == 1
    assert all(torch.allclose(one["model"][key], two["model"][key], atol=1e-7)
               for key in one["model"])
    for other, why in ((dict(n_layer=3), "drop"), (dict(tokenizer="bpe2048"), "drop"),
                       (dict(mixture="ntp"), "causal is False .*drop --mixture=ntp"),
                       (dict(block_size=128), "pass --block_size=64")):
        with pytest.raises(SystemExit, match=f"^error: .*{why}"):
            tiny(tmp_path / "new", __file__, init_from=f"{finished}/ckpt.pt", **other)
    main(flags(out_dir=finished, resume=True))
    assert "it is finished: only its last evaluation is repeated" in capsys.readouterr().out


# ---- what one adds -----------------------------------------------------------------------------

class TakeTurns:
    """A scheduler: at every evaluation the next arm, alone."""

    def __init__(self, arms, max_steps, seed):
        self.turn, self.action = 0, np.eye(len(arms))[0]

    def update(self, step, losses):
        self.turn += 1
        self.action = np.roll(self.action, 1)

    def state_dict(self):
        return {"turn": self.turn, "action": torch.tensor(self.action)}

    def load_state_dict(self, state):
        self.turn, self.action = state["turn"], state["action"].numpy()


@pytest.mark.parametrize("added", (dict(mixture="turns"), dict(arch="ema")), ids=str)
def test_a_scheduler_in_mixtures_or_a_mixer_in_mixers_trains_and_resumes(added, text, tmp_path,
                                                                         monkeypatch, capsys):
    monkeypatch.setitem(MIXTURES, "turns", TakeTurns)
    monkeypatch.setitem(MIXERS, "ema", EMA)
    out_dir = resumes_bit_for_bit(text, tmp_path, monkeypatch, capsys, 12, **added)
    first, *_, last = found = evaluations(out_dir)
    assert last["mean_loss"] < first["mean_loss"]
    if "mixture" in added:
        assert [np.argmax(line["arm_share"]) for line in found] == [1, 2, 3]


def test_a_scheduler_whose_state_cannot_be_read_again_is_refused_at_once(text, tmp_path,
                                                                         monkeypatch):
    class Forgetful(TakeTurns):
        def state_dict(self):
            return {"action": self.action}
    monkeypatch.setitem(MIXTURES, "forgetful", Forgetful)
    with pytest.raises(SystemExit, match="^error: .* a state_dict may hold tensors, .*$"):
        tiny(tmp_path, text, mixture="forgetful")
    assert os.listdir(tmp_path) == ["log.jsonl"] and len(log_of(tmp_path)) == 1


def test_what_is_wrong_with_an_added_scheduler_is_said_at_once(text, tmp_path, monkeypatch):
    class Wrong(TakeTurns):
        def update(self, step, losses):
            self.action = 1.2 * self.action
    monkeypatch.setitem(MIXTURES, "wrong", Wrong)
    with pytest.raises(SystemExit, match="^error: an action is .* probabilities, not .* sum 1.2$"):
        tiny(tmp_path, text, mixture="wrong", workers=1)        # before a worker takes it


def test_python_in_its_dev_mode_shows_where_an_error_was_raised():
    command = [os.path.join(ROOT, "model.py"), "--ckpt=nowhere", "--prompt=x"]
    usual, dev = (subprocess.run([sys.executable, *mode, *command], capture_output=True, text=True)
                  for mode in ((), ("-X", "dev")))
    assert usual.stderr.startswith("error: there is no checkpoint nowhere")
    assert re.search(r"model.py\", line \d+, in load_checkpoint", dev.stderr)


def test_a_number_that_is_a_flags_default_makes_it_a_flag_of_numbers():
    parser, flag = command_line("usage")
    flag("--n_groups", default=4)
    assert parser.parse_args(["--n_groups=8"]).n_groups == 8
    with pytest.raises(SystemExit, match="n_groups: invalid int value: 'x'"):
        parser.parse_args(["--n_groups=x"])


NINTH = """
def reversing(text, rng, tok):
    return text, text[::-1]
OBJECTIVES["reversing"] = Objective(reversing, lambda n: 2 * n, ((64, 256), (256, 1014)))
"""


def test_a_class_named_in_objectives_trains_is_logged_and_shown(text, tmp_path):
    tree, out_dir = tmp_path / "tree", str(tmp_path / "out")
    shutil.copytree(ROOT, tree, ignore=lambda folder, names: [
        name for name in names if not name.endswith((".py", ".tiktoken")) and name != "assets"])
    source = (tree / "objectives.py").read_text()
    assert source.count("CLASSES = tuple(OBJECTIVES)") == 1
    (tree / "objectives.py").write_text(
        source.replace("CLASSES = tuple(OBJECTIVES)", NINTH + "CLASSES = tuple(OBJECTIVES)"))
    settings = {**TINY, "data": text, "out_dir": out_dir, "mixture": "birdie", "max_steps": 4}
    shown = subprocess.run([sys.executable, tree / "train.py", *flags(**settings)], check=True,
                           capture_output=True, text=True, env=ENV).stdout
    assert "--- reversing" in shown
    first, last = evaluations(out_dir)
    assert last["loss_reversing"] < first["loss_reversing"] and last["share_reversing"] > 0
    with subprocess.Popen([sys.executable, "-u", tree / "objectives.py"], text=True,
                          stdout=subprocess.PIPE) as run:
        lines = [run.stdout.readline().strip() for _ in range(3 * (len(CLASSES) + 1))]
        run.terminate()                     # before it reads the standard library
    given, target = lines[lines.index("reversing") + 1:][:2]
    given = given.removeprefix("Input   ").replace("<REVERSING>", "")
    assert target == f"Target  {given[::-1]}<DONE>"


# ---- every architecture and mixture, and what a person tries -----------------------------------

longer, shorter = sorted((MIXERS, MIXTURES), key=len, reverse=True)


@pytest.mark.parametrize("one, two", list(zip(longer, cycle(shorter))))
def test_architectures_and_mixtures_train_and_show_a_sample_of_each_class(one, two, text, tmp_path,
                                                                         capsys):
    arch, mixture = (one, two) if one in MIXERS else (two, one)
    tiny(tmp_path, text, arch=arch, mixture=mixture, max_steps=12)
    shown = capsys.readouterr().out
    assert all(f"--- {cls}" in shown for cls in CLASSES) and shown.count("target |") == len(CLASSES)
    first, last = evaluations(tmp_path)
    assert last["mean_loss"] < first["mean_loss"]
    assert checkpoint(tmp_path)["model_config"]["causal"] == (mixture in train.CAUSAL_MIXTURES)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_person_can_try_a_trained_model(cls, finished, capsys):
    path, prompt = f"{finished}/ckpt.pt", "def f(x): return ___ + ___"
    answer([f"--ckpt={path}", f"--prompt={prompt}", f"--objective={cls}", "--start=def ", "--end=(",
            "--max_new_tokens=8"])
    model, tokenizer, saved = LM.load(path)
    tok = Tokenizer(**tokenizer)
    written, = model.generate([as_prompt(cls, prompt, tok, "def ", "(")], 8, tok.DONE)
    opening = prompt if cls == "next_token_prediction" else ""
    assert saved["step"] == 20 and len(written) > 0
    assert capsys.readouterr().out == opening + tok.decode(written).removesuffix("<DONE>") + "\n"


@pytest.mark.parametrize("wrong, remedy", [
    ("--objective=infilling", "___"), ("--ckpt=/no", "train one"), ("--nothing", "--help"),
    ("--objective=copy", "copying"), ("--temperature=-1", "--temperature: -1 is not from 0"),
    ("--temperature=nan", "argument --temperature: nan"), ("--max_new_tokens=0", "from 1 to")])
def test_a_wrong_prompt_ends_in_one_line(wrong, remedy, finished):
    with pytest.raises(SystemExit, match=f"^error: .*{remedy}"), errors_in_one_line():
        answer([f"--ckpt={finished}/ckpt.pt", "--prompt=no gap", wrong])


def test_help_shows_the_default_that_a_run_takes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, value in vars(parse_args([])).items():
        assert re.search(rf"--{name}\b[^()]*(\([^()]*\)[^()]*)*\(default: {value}\)", shown), name


def test_a_preset_gives_defaults_and_flags_win():
    assert parse_args(["--out_dir=~/new"]).out_dir == os.path.expanduser("~/new")
    args = parse_args(["--preset=text", "--lr=0.5", "--arch=hawk"])
    assert (args.data, args.memory, args.lr, args.n_layer) == ("stdlib", 128, 0.5, 2)
    for preset in PRESETS:
        assert set(vars(parse_args([f"--preset={preset}"]))) == set(vars(args))


# ---- bad input: one line that names the remedy, and nothing written ----------------------------

BAD = [
    (dict(data="/no/such/file"), "--data"), (dict(data="empty.txt"), "--data"),
    (dict(data="short.txt"), "--data"), (dict(data="folder"), "--data"),
    (dict(data="binary.txt"), "--data"), (dict(data="bad.jsonl"), "text"),
    (dict(data="other_tokens"), "--tokenizer"), (dict(data="odd_size"), "prepare"),
    (dict(tokenizer="gpt3"), "gpt2"), (dict(tokenizer="bad.tiktoken"), "tiktoken"),
    (dict(mixture="birdy"), "birdie"), (dict(arch="no_such"), "hawk"),
    (dict(device="mps"), "--device=cpu"), (dict(device="cuda"), "--device=cpu"),
    (dict(device="tpu"), "choose cpu"), (dict(compile="graphs"), "--compile=yes"),
    (dict(block_size=16), "--block_size"), (dict(arch="transformer", d_model=18), "n_head"),
    (dict(max_steps=0), "from 1"), (dict(lr="nan"), "from 1e-12"), (dict(beta2=1.0), "to 0.999999"),
    (dict(lr="fast"), "--help"), (dict(n_lay=3), "--help"), (dict(out_dir="taken"), "--resume"),
    (dict(out_dir="/dev/null/x"), "--out_dir"), (dict(out_dir="nothing", resume=True), "--out_dir"),
    (dict(out_dir="cut", resume=True), "damaged"),
    (dict(out_dir="other", resume=True), "no checkpoint of this"),
    (dict(out_dir="hostile", resume=True), "damaged"),
]


class Hostile:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory, finished):
    """A folder of files that are wrong, each in its own way."""
    here = tmp_path_factory.mktemp("bad")
    for folder in ("folder", "other_tokens", "odd_size", "taken", "cut", "hostile", "other"):
        (here / folder).mkdir()
    (here / "empty.txt").write_text("")
    (here / "short.txt").write_text("a")
    (here / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (here / "bad.jsonl").write_text('{"body": "no text here"}\n')
    (here / "bad.tiktoken").write_text("not base64 at all\n")
    for split in ("train.bin", "val.bin"):
        (here / "other_tokens" / split).write_bytes(np.full(4000, 50256, np.uint16).tobytes())
        (here / "odd_size" / split).write_bytes(b"x" * 4001)
    good = open(os.path.join(finished, "ckpt.pt"), "rb").read()
    (here / "taken" / "ckpt.pt").write_bytes(good)
    (here / "cut" / "ckpt.pt").write_bytes(good[:len(good) // 2])
    torch.save({"config": Hostile()}, here / "hostile" / "ckpt.pt")
    torch.save({"weights": 1}, here / "other" / "ckpt.pt")
    return here


@pytest.mark.parametrize("settings, remedy", BAD, ids=lambda value: str(value)[:40])
def test_bad_input_ends_in_one_line_and_writes_nothing(settings, remedy, bad_inputs, text,
                                                       monkeypatch):
    if settings == dict(device="cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.chdir(bad_inputs)

    def files():
        return {path: path.read_bytes() for path in bad_inputs.rglob("*") if path.is_file()}
    before = files()
    new = f"new_{abs(hash(str(settings)))}"         # of its own: one failure stays one
    base = {} if "resume" in settings else {**TINY, "data": text, "out_dir": new}
    with pytest.raises(SystemExit) as stopped:
        main(flags(**{**base, **settings}))
    message = str(stopped.value.code)
    assert message.startswith("error: ") and remedy in message and "\n" not in message
    assert files() == before and not os.path.exists(new)
