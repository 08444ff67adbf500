"""What a run promises: resuming changes no bit, checkpoints and logs are whole at any moment, every class
learns, bad input ends in one line.   python -m pytest tests/test_train.py"""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import model
import train
from model import ARCHS, LM, ModelConfig
from objectives import CLASSES, RESET_FORWARD, Batches, Corpus, Tokenizer, arms, make_sample
from scheduler import mixture
from train import PRESETS, Config, Log, learning_rate, load_checkpoint, load_model, main, parse_args, save_checkpoint, sized

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = dict(n_layer=2, d_model=16, d_state=16, block_size=128, batch_size=4, eval_rows=1, workers=0, device="cpu",
            dtype="float32", compile="no", max_steps=24, lr=1e-2, mixture="fixed")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(open(os.path.join(ROOT, name)).read() for name in ("scan.py", "model.py", "objectives.py")))
    return str(path)


def flags(**settings):
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]


def tiny(out_dir, text, **kw):
    main(flags(**{**TINY, "data": text, "out_dir": out_dir, **kw}))


def log_of(out_dir, *without):
    with open(os.path.join(out_dir, "log.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    return [{key: value for key, value in line.items() if key not in without} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    out_dir = str(tmp_path_factory.mktemp("run") / "out")
    tiny(out_dir, text)
    return out_dir


def same_weights(one, other):
    one, other = (load_checkpoint(os.path.join(path, "ckpt.pt")) for path in (one, other))
    return one["step"] == other["step"] and all(torch.equal(one["model"][k], other["model"][k]) for k in one["model"])


# ---- resuming ----

@pytest.mark.parametrize("stop_after", (1, 10, 17))
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(finished, text, tmp_path, monkeypatch, stop_after):
    """Stopped before, at and after an evaluation; the same weights, the same log but for the clock."""
    class StopAfter:
        calls = 0
        @property
        def asked(self):
            self.calls += 1
            return self.calls == stop_after
    out_dir = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignal", StopAfter)
        with pytest.raises(SystemExit, match=f"stopped after step {stop_after}; go on with: python train.py .*--resume"):
            tiny(out_dir, text)
    main(flags(out_dir=out_dir, resume=True))
    assert same_weights(finished, out_dir)
    assert log_of(out_dir, "tokens_per_s", "config") == log_of(finished, "tokens_per_s", "config")


def test_a_resumed_bandit_has_the_same_history_and_actions(text, tmp_path, monkeypatch):
    class StopAfter:
        calls = 0
        @property
        def asked(self):
            self.calls += 1
            return self.calls == 14
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    tiny(whole, text, mixture="birdie")
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignal", StopAfter)
        with pytest.raises(SystemExit):
            tiny(parts, text, mixture="birdie")
    main(flags(out_dir=parts, resume=True))
    assert same_weights(whole, parts)
    assert log_of(whole, "tokens_per_s", "config") == log_of(parts, "tokens_per_s", "config")
    one, other = (load_checkpoint(f"{path}/ckpt.pt")["scheduler"] for path in (whole, parts))
    assert torch.equal(one["actions"], other["actions"]) and torch.equal(one["losses"], other["losses"])
    assert len(one["actions"]) == 2 and one["actions"][1].max() > 2 / len(one["action"])  # it did choose


def test_ctrl_c_saves_and_says_how_to_go_on(text, tmp_path):
    out_dir = str(tmp_path / "out")
    run = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"),
                            *flags(**{**TINY, "data": text, "out_dir": out_dir, "workers": 1, "max_steps": 100000})],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 60
    while not (os.path.exists(f"{out_dir}/log.jsonl") and len(log_of(out_dir)) > 2) and time.time() < deadline:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)                    # as a terminal does: the workers get it too
    _, err = run.communicate(timeout=60)
    assert run.returncode == 1 and f"--out_dir={out_dir} --resume" in err and "Traceback" not in err
    assert load_checkpoint(f"{out_dir}/ckpt.pt")["step"] > 0


def test_a_flag_that_contradicts_the_checkpoint_is_an_error_and_the_way_to_run_may_change(finished):
    path = os.path.join(finished, "ckpt.pt")
    before = open(path, "rb").read()
    for wrong in (dict(n_layer=3), dict(lr=0.5), dict(max_steps=30), dict(mixture="ntp")):
        with pytest.raises(SystemExit, match="in the checkpoint"):
            main(flags(out_dir=finished, resume=True, **wrong))
    assert open(path, "rb").read() == before
    main(flags(out_dir=finished, resume=True, workers=1, n_layer=2))


# ---- no leak, from text to logits ----

@pytest.mark.parametrize("arch", ARCHS)
def test_in_real_batches_no_label_is_seen_before_its_turn_and_no_sample_sees_another(text, arch):
    """Every class in packed rows of the real pipeline; one token changed; bit for bit."""
    tok = Tokenizer("bytes", 16)
    batches = Batches(Corpus(text, tok), tok, 128, 16)
    batch = batches.batch(1, 0, 0, mixture("fixed", batches.arms), "train")
    assert {batches.arms[k].cls for k in set(batch["arm"].flatten()) - {-1}} == set(CLASSES)
    tokens, reset, targets = (torch.from_numpy(batch[key]) for key in ("tokens", "reset", "targets"))
    model_ = LM(ModelConfig(arch=arch, vocab_size=tok.vocab_size, block_size=128, d_model=32, d_state=32, n_head=2))
    with torch.no_grad():
        before = model_(tokens, reset)[0]
        for seed in range(30):
            rng, changed, allowed = np.random.default_rng(seed), tokens.clone(), torch.zeros(16, 128, dtype=torch.bool)
            for b in range(16):
                at = int(rng.integers(128))
                starts = (reset[b] & RESET_FORWARD).nonzero().flatten().tolist() + [128]
                first, end = max(s for s in starts if s <= at), min(s for s in starts if s > at)
                changed[b, at] = 0 if tokens[b, at] else 1
                causal = (targets[b, first:end] != -100).nonzero()           # none in padding
                first_label = first + int(causal[0]) if len(causal) else end
                allowed[b, (at if at > first_label else first):end] = True   # GEN at first_label is no label
            assert not ((model_(changed, reset)[0] != before).any(-1) & ~allowed).any()


# ---- the run folder ----

def test_a_run_that_blows_up_keeps_its_last_good_checkpoint(text, tmp_path):
    with pytest.raises(SystemExit, match="no longer finite at step .* lower --lr"):
        tiny(tmp_path / "out", text, lr=1e30, clip=1e30, max_steps=40)
    checkpoint = load_checkpoint(str(tmp_path / "out" / "ckpt.pt"))
    assert all(p.isfinite().all() for p in checkpoint["model"].values())


def test_resuming_on_other_text_is_an_error(finished, text):
    original = open(text).read()
    try:
        open(text, "w").write(original[:-2000])
        with pytest.raises(SystemExit, match="the same text"):
            main(flags(out_dir=finished, resume=True))
    finally:
        open(text, "w").write(original)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = str(tmp_path / "ckpt.pt")
    save_checkpoint(path, {"step": 1})
    with pytest.raises(Exception):
        save_checkpoint(path, {"step": 2, "bad": lambda: None})
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_damaged_checkpoint_is_called_so_wherever_it_is_cut(finished, tmp_path):
    good = open(os.path.join(finished, "ckpt.pt"), "rb").read()
    for cut in (0, 1, 10, 100, 1000, len(good) // 3, len(good) - 1000, len(good) - 1):
        (tmp_path / "ckpt.pt").write_bytes(good[:cut])
        with pytest.raises(ValueError, match="damaged"):
            load_checkpoint(str(tmp_path / "ckpt.pt"))


def test_a_resumed_log_drops_a_torn_line_and_what_will_be_written_again(tmp_path):
    path = str(tmp_path / "log.jsonl")
    open(path, "w").write('{"step": -1}\n{"step": 9}\n{"step": 19}\n{"ste')
    Log(path, resume_at=19).write(step=19, loss=2.0)
    assert [json.loads(line) for line in open(path)] == [{"step": -1}, {"step": 9}, {"step": 19, "loss": 2.0}]


def test_the_log_holds_every_arm_at_every_evaluation(finished):
    head, *lines = log_of(finished)
    assert head["config"]["max_steps"] == 24 and len(head["arms"]) > 8
    evals = [line for line in lines if "eval" in line]
    assert [line["step"] for line in evals] == [0, 10, 24]
    for line in evals:
        assert all(len(line["eval"][key]) == len(head["arms"]) for key in ("loss", "accuracy", "reward", "action"))
        assert np.isfinite(line["eval"]["loss"]).all() and abs(sum(line["eval"]["action"]) - 1) < 1e-9
    assert (np.array(evals[-1]["eval"]["loss"]) < np.array(evals[0]["eval"]["loss"])).all()


def test_a_saved_model_loads_and_decodes_as_it_was(finished):
    trained, tok, checkpoint = load_model(os.path.join(finished, "ckpt.pt"))
    assert checkpoint["step"] == 24
    answer, = trained.generate([(tok.encode("def f("), [tok.GEN])], 8)
    assert len(answer) == 8 and isinstance(tok.decode(answer), str)


@pytest.mark.parametrize("flags_", [[], ["--objective=copy"], ["--objective=unshuffle"], ["--temperature=1", "--top_k=5"],
                                    ["--objective=infill"], ["--objective=lookup", "--start=def ", "--end=("]])
def test_a_person_can_try_a_trained_model(finished, flags_, capsys):
    model.try_out([f"--ckpt={finished}/ckpt.pt", "--prompt=def f(x): return ___ + ___", "--max_new_tokens=8", *flags_])
    assert len(capsys.readouterr().out) > 1


@pytest.mark.parametrize("flags_, remedy", [(["--objective=infill"], "___"), (["--ckpt=/no"], "train one"), (["--nothing"], "--help")])
def test_a_wrong_prompt_ends_in_one_line(finished, flags_, remedy):
    with pytest.raises(SystemExit, match=f"^error: .*{remedy}"):
        model.try_out([f"--ckpt={finished}/ckpt.pt", "--prompt=no gap", *flags_])


def test_prompts_are_laid_out_as_training_samples_are():
    """Infilling, copying and selective copying of one text, against objectives.make_sample."""
    tok = Tokenizer("bytes", 32)
    prefix, start = model.as_trained("infill", "a___c___", tok, "", "")
    a, c = tok.encode("ac")
    assert prefix == [tok.paradigm["infilling"], a, tok.MASKS[0], c, tok.MASKS[1]] and start == [tok.GEN]
    text = tok.encode("".join(chr(33 + i % 90) for i in range(60)))
    for arm in arms(256):
        if arm.cls == "copying" and arm.shortest <= 60 <= arm.longest:
            for seed in range(9):
                made, _ = make_sample(arm, text, np.random.default_rng(seed), tok)
                if made[0] == tok.paradigm["copying"]:
                    assert made.tolist() == list(map(int, model.as_trained("copy", tok.decode(text), tok, "", "")[0]))
                    return
    raise AssertionError("no arm copies 60 tokens")


# ---- learning ----

def test_a_preset_fills_what_was_left_open_and_only_the_bandit_has_its_focus():
    config = sized(Config(preset="cpu", data="mine.txt", lr=1.0))
    assert (config.data, config.lr, config.focus, config.batch_size) == ("mine.txt", 1.0, "selective_copying", 16)
    assert sized(Config(preset="cpu", focus="none")).focus == "none"
    assert sized(Config(preset="cpu", mixture="ntp")).focus == sized(Config(preset="text")).focus == ""
    assert sized(Config(preset="text", arch="hawk")).n_layer == 2 and all(
        sized(Config(preset=name)).data and 0 < sized(Config(preset=name)).beta2 < 1 for name in PRESETS)


def test_the_learning_rate_rises_to_lr_and_falls_to_a_tenth():
    config = Config(lr=1.0, max_steps=1000, warmup=0.02)
    rates = [learning_rate(step, config) for step in range(1000)]
    assert np.allclose(np.diff(rates[:20]), 0.05) and max(rates) == rates[19] == 1.0
    assert (np.diff(rates[20:]) < 0).all() and abs(rates[-1] - 0.1) < 1e-3


@pytest.mark.parametrize("arch, mixture", [("hawk", "uniform"), ("transformer", "ul2"), ("gated_ssm", "ntp")])
def test_every_architecture_and_mixture_trains_and_shows_a_sample_of_each_class(text, tmp_path, capsys, arch, mixture):
    tiny(tmp_path / "out", text, arch=arch, mixture=mixture, max_steps=12, **({"causal": True} if arch == "hawk" else {}))
    shown = capsys.readouterr().out
    assert all(f"--- {cls}" in shown for cls in CLASSES) and shown.count("target |") == 8
    evals = [line["eval"] for line in log_of(tmp_path / "out") if "eval" in line]
    assert np.mean(evals[-1]["loss"]) < np.mean(evals[0]["loss"])


def test_help_says_what_every_flag_means(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--batch_size 0 rows in a step" in shown and "--resume, --no-resume go on from out_dir/ckpt.pt" in shown


# ---- bad input: one line that names the remedy, an exit code, and nothing written ----

BAD = [
    (dict(data="/no/such/file"), "--data"), (dict(data="empty.txt"), "--data"), (dict(data="short.txt"), "--data"),
    (dict(data="emptydir"), "--data"), (dict(data="binary.txt"), "UTF-8"), (dict(data="bad.jsonl"), "text"),
    (dict(data="nanogpt"), "--tokenizer"), (dict(data="oddgpt"), "prepare"),
    (dict(tokenizer="gpt3"), "gpt2"), (dict(tokenizer="bad.tiktoken"), "tiktoken"),
    (dict(mixture="birdy"), "choose one of"), (dict(arch="mamba"), "choose one of"), (dict(preset="tpu"), "choose one of"),
    (dict(device="gpux"), "choose cpu"), (dict(device="cuda"), "--device=cpu"), (dict(dtype="int8"), "choose float32"),
    (dict(compile="maybe"), "yes nor no"), (dict(block_size=16), "--block_size"), (dict(max_steps=-1), "at least 1"),
    (dict(batch_size=-2), "at least 1"), (dict(n_layer=-1), "at least 1"), (dict(lr=-1), "lr"), (dict(beta2=1.0), "between 0 and 1"),
    (dict(focus="copy", mixture="birdie"), "choose one of"), (dict(focus="copying", mixture="ntp"), "drop --focus"), (dict(lr="fast"), "--help"),
    (dict(seed=-1), "at least 0"), (dict(workers=-1), "at least 0"), (dict(device="mps"), "choose cpu"),
    (dict(n_layers=3), "--help"), (dict(n_lay=3), "--help"), (dict(out_dir="/dev/null/out"), "--out_dir"),
    (dict(out_dir="taken"), "--resume"), (dict(out_dir="nothing", resume=True), "--out_dir"),
    (dict(out_dir="cut", resume=True), "damaged"), (dict(out_dir="hostile", resume=True), "damaged"),
    (dict(out_dir="other", resume=True), "not a checkpoint"), (dict(out_dir="newer", resume=True), "unknown here, flavour"),
]


class Hostile:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory, finished):
    """A folder of files that are wrong, each in its own way."""
    here = tmp_path_factory.mktemp("bad")
    for folder in ("emptydir", "nanogpt", "oddgpt", "taken", "cut", "hostile", "other", "newer"):
        (here / folder).mkdir()
    (here / "empty.txt").write_text("")
    (here / "short.txt").write_text("a")
    (here / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (here / "bad.jsonl").write_text('{"body": "no text here"}\n')
    (here / "bad.tiktoken").write_text("not base64 at all\n")
    for split in ("train.bin", "val.bin"):
        (here / "nanogpt" / split).write_bytes(np.full(4000, 50256, np.uint16).tobytes())
        (here / "oddgpt" / split).write_bytes(b"x" * 4001)
    good = open(os.path.join(finished, "ckpt.pt"), "rb").read()
    (here / "taken" / "ckpt.pt").write_bytes(good)
    (here / "cut" / "ckpt.pt").write_bytes(good[:len(good) // 2])
    torch.save({"config": Hostile()}, here / "hostile" / "ckpt.pt")
    torch.save({"weights": 1}, here / "other" / "ckpt.pt")
    newer = torch.load(os.path.join(finished, "ckpt.pt"), weights_only=True)
    torch.save({**newer, "config": {**newer["config"], "flavour": 1}}, here / "newer" / "ckpt.pt")
    return here


@pytest.mark.parametrize("settings, remedy", BAD, ids=lambda value: str(value)[:40])
def test_bad_input_ends_in_one_line_and_writes_nothing(settings, remedy, bad_inputs, text, monkeypatch):
    if settings == dict(device="cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.chdir(bad_inputs)
    def files():
        return {path: path.read_bytes() for path in bad_inputs.rglob("*") if path.is_file()}
    before = files()
    base = {} if settings.get("resume") else {**TINY, "data": text, "out_dir": "new"}
    with pytest.raises(SystemExit) as stopped:
        main(flags(**{**base, **settings}))
    message = str(stopped.value.code)
    assert message.startswith("error: ") and remedy in message and "\n" not in message.strip()
    assert files() == before and not os.path.exists("new")


@pytest.mark.parametrize("change", [lambda text: text.replace(" ", "\x00"), lambda text: text.replace("\n", " "),
                                    lambda text: text.replace("e", "\u00e9\U0001f600")])
def test_odd_text_trains(change, text, tmp_path):
    """NUL bytes, one endless line, characters of several bytes."""
    (tmp_path / "odd.txt").write_text(change(open(text).read()))
    tiny(tmp_path / "out", tmp_path / "odd.txt", max_steps=2, mixture="ntp")


def test_every_field_of_the_configuration_is_a_flag():
    config, given = parse_args(Config, ["--causal", "--lr=0.5", "--n_layer=3", "--data=x"])
    assert (config.causal, config.lr, config.n_layer, config.data) == (True, 0.5, 3, "x")
    assert given == {"causal", "lr", "n_layer", "data"}
