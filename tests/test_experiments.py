"""Every script of experiments/ runs, at a size of seconds: the comparison of figure 1 goes on where
it stopped, pictures are drawn from what was measured, and what is wrong is said in one line.

    python -m pytest tests/test_experiments.py
"""
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import eval_phonebook
import train
from scheduler import Birdie
from train import replacing

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.append(str(EXPERIMENTS))
import bandit_world
import bench
import figure1
import figure5
import gpu


def one_line(main, argv, message):
    with pytest.raises(SystemExit, match=message) as error:
        main(argv)
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)


# ---- figure 1 ----

def result_of(start, rate, digits, books=()):
    """What eval_phonebook.py leaves: `digits` right on validation books, and at every size."""
    return dict(config=dict(entries_min=start, lr=rate),
                curve=[dict(step=800, digits=0.1), dict(step=1600, digits=digits)],
                results=[dict(n_entries=n, n_numbers=1, books=1024, digits=digits, exact=0.5)
                         for n in books])


class Programs:
    """In the place of subprocess.run: notes commands and leaves what their programs would."""

    def __init__(self):
        self.commands, self.fails = [], ()

    def __call__(self, command, stdout, stderr, env, preexec_fn):
        program = os.path.basename(command[1])
        if "--resume" not in command:                   # then it would read the checkpoint
            module = train if program == "train.py" else eval_phonebook
            module.parse_args(command[2:])
        flags = dict(flag[2:].partition("=")[::2] for flag in command[2:])
        folder = Path(flags.pop("out_dir"))
        self.commands.append((program, flags))
        assert env["OMP_NUM_THREADS"] == str(figure1.cores())
        if self.fails == (program, folder.name):
            os.write(stdout.fileno(), b"one step\rerror: no luck\n\n")
            return subprocess.CompletedProcess(command, 3)
        folder.mkdir(exist_ok=True)
        (folder / ("ckpt.pt" if program == "train.py" else "phonebook.pt")).touch()
        if program == "eval_phonebook.py":
            start, rate = map(float, folder.name.split("-", 1))     # the rate 2e-3 is the best
            books = map(int, flags["test_entries"].split(",")) if "test_entries" in flags else ()
            found = result_of(start, rate, 0.9 if rate == 2e-3 else 0.8, books)
            with replacing(str(folder / "phonebook.json")) as part:
                Path(part).write_text(json.dumps(found))
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def programs(monkeypatch):
    found = Programs()
    monkeypatch.setattr(subprocess, "run", found)
    monkeypatch.setattr(figure1, "plot", lambda found, picture: None)
    return found


def test_a_run_is_pretrained_fine_tuned_at_three_rates_and_the_best_is_scored(programs, tmp_path):
    figure1.main([f"--out_dir={tmp_path}", "--preset=packages", "--jobs=1",
                  "--only=hawk-birdie-1,gated_ssm-none-2"])
    common = dict(flag[2:].split("=") for flag in figure1.MACHINE)
    score = dict(resume="", test_entries="4,8,16,32,64,128", test_books="1024")

    def tuned(**source):
        return [("eval_phonebook.py", {**source, "lr": rate, "test_books": "0", "batch_size": "2",
                                       "max_steps": "1066", "entries_min": "4"})
                for rate in ("0.001", "0.002", "0.004")] + [("eval_phonebook.py", score)]

    assert programs.commands == [
        *tuned(**common, seed="2", scratch="gated_ssm")[:3], ("eval_phonebook.py", score),
        ("train.py", dict(**common, seed="1", preset="wide", d_model="192", d_state="384",
                          n_head="4", lr="2e-3", arch="hawk", mixture="birdie")),
        *tuned(**common, seed="1", ckpt=f"{tmp_path}/packages/hawk-birdie-1/ckpt.pt")]
    runs = json.loads((tmp_path / "figure1.json").read_text())
    assert [(run["pretrained"], run["config"]["lr"]) for run in runs] == [
        ("none", 2e-3), ("birdie", 2e-3)]
    assert runs[0]["tried"] == {"0.001": 0.8, "0.002": 0.9, "0.004": 0.8}


@pytest.mark.parametrize("preset", figure1.PRESETS)
def test_the_programs_take_every_flag_of_a_preset(preset, programs, tmp_path):
    figure1.main([f"--out_dir={tmp_path}", f"--preset={preset}", "--only=*-1", "--jobs=1"])
    names = [name for name in figure1.RUNS if name.endswith("-1")]
    rates = figure1.PRESETS[preset][3]
    assert len(programs.commands) == sum(len(rates) + 1 + ("-none-" not in n) for n in names)
    lower = {float(flags["lr"]) for program, flags in programs.commands
             if "transformer" in str(flags) and "lr" in flags and program == "eval_phonebook.py"}
    assert lower == {rate / 4 for rate in rates}
    parsed = eval_phonebook.parse_args([*figure1.PRESETS[preset][2], "--scratch=gated_ssm"])
    sizes = eval_phonebook.PRETRAINING[parsed.preset]
    given = train.parse_args(figure1.PRESETS[preset][1])        # none is as large as the others
    alike = train.parse_args([f"--preset={sizes}"])
    assert (given.d_model, given.d_state, given.n_layer) == (
        alike.d_model, alike.d_state, alike.n_layer)


def test_the_comparison_makes_what_is_missing_and_names_what_failed(programs, tmp_path, capsys):
    command = [f"--out_dir={tmp_path}", "--only=gated_ssm-birdie-1, *_ssm-ntp-1", "--jobs=1"]
    ntp = tmp_path / "tables/gated_ssm-ntp-1"

    def ran():
        """What has run since the last call: p and P are train.py new and resumed, f and F the
        other."""
        done = [("pf"[program != "train.py"], "resume" in flags)
                for program, flags in programs.commands]
        programs.commands.clear()
        return "".join(letter.upper() if resumed else letter for letter, resumed in done)

    programs.fails = "train.py", ntp.name
    one_line(figure1.main, command, "1 of 2 runs failed; the same command goes on")
    assert ran() == "pfffF" + "p"
    out = capsys.readouterr().out
    assert f"train.py failed with exit code 3; {ntp / 'log.txt'} ends: error: no luck" in out
    programs.fails = "eval_phonebook.py", "4-0.002"
    one_line(figure1.main, command, "1 of 1 runs failed")
    assert ran() == "pff"
    (ntp / "4-0.002").mkdir()
    (ntp / "4-0.002/phonebook.pt").touch()      # as if it had been stopped
    programs.fails = ()
    figure1.main(command)
    assert ran() == "FfF"                       # the second rate goes on
    figure1.main(command)
    assert ran() == ""
    figure1.main([*command, "--entries_min=2"])
    assert ran() == 2 * "PfffF"                 # from the same checkpoints
    table = capsys.readouterr().out
    assert re.search(r"\| tables, next token prediction, 1 \| 80.0%, 90.0%, 80.0% "
                     r"\| 1,600, 1,600 (\| 90.0%, 50% ){6}\|", table)
    assert "| tables, books from 2, Birdie, 1 |" in table
    (ntp / "4-0.001/phonebook.json").write_text("[1]")
    one_line(figure1.main, command, "4-0.001/phonebook.json is no result of eval_phonebook.py")


def test_a_folder_is_for_one_comparison_at_a_time(tmp_path):
    command = [sys.executable, EXPERIMENTS / "figure1.py", f"--out_dir={tmp_path}",
               "--only=gated_ssm-none-1"]
    with train.claimed(tmp_path, "figure1.json"):
        second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"another process is at work in {tmp_path}" in second.stderr
    assert second.returncode == 1 and not tmp_path.exists()     # the first has written nothing


@pytest.mark.parametrize("argv, message", [
    (["--only=gated_ssm-birdie-1,hawk_ntp"], "no run matches 'hawk_ntp' .* gated_ssm-birdie-1"),
    (["--jobs=0"], "--jobs: 0 is not from 1"), (["--preset=tpu"], "invalid choice: 'tpu'"),
    (["draw"], "figure1.py draw JSON OUT.png"), (["draw", "nowhere", "x.png"], "nowhere"),
    (["draw", str(EXPERIMENTS / "mixtures.json"), "x.png"], "is no list of phone book results"),
])
def test_figure_1_says_in_one_line_what_is_wrong(argv, message):
    one_line(figure1.main, argv, message)


def test_the_readme_has_the_table_of_what_was_measured(capsys):
    figure1.show_table(figure1.load(EXPERIMENTS / "figure1.json"))
    lines = capsys.readouterr().out.strip()
    assert len(lines.splitlines()) > 30 and lines in (EXPERIMENTS / "README.md").read_text()


def test_figure_1_is_drawn_from_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    figure1.main(["draw", str(EXPERIMENTS / "figure1.json"), str(tmp_path / "figure1.png")])
    assert (tmp_path / "figure1.png").stat().st_size > 10_000


# ---- figure 5 ----

def log(path, n_evaluations=3):
    """A run's log.jsonl as train.py writes it, with two classes."""
    lines = [dict(step=-1, config=dict(mixture="birdie", arch="hawk", seed=2))]
    for k in range(n_evaluations):
        lines.append(dict(step=10 * k, loss_copying=2.0 - k / 4, loss_prefix_lm=3.0, mean_loss=2.5,
                          accuracy_copying=k / 4, accuracy_prefix_lm=0.1, reward_copying=1.0,
                          share_copying=k / 2, share_prefix_lm=1 - k / 2, arm_loss=[1.0, 2.0]))
        lines.append(dict(step=10 * k + 9, train_loss=2.0, norm=1.0))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_figure_5_is_drawn_from_one_log_or_two(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    logs = [log(tmp_path / "a.jsonl"), log(tmp_path / "b.jsonl", n_evaluations=2)]
    for n in (1, 2):
        figure5.main([*logs[:n], f"--out={tmp_path / 'figure5.png'}"])
        assert (tmp_path / "figure5.png").stat().st_size > n * 10_000
    title, columns = figure5.read(logs[0])
    assert title == "birdie, hawk, seed 2" and columns["loss_copying"] == [2.0, 1.75, 1.5]


def test_figure_5_says_in_one_line_what_is_wrong(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    one_line(figure5.main, [], "required: LOG")
    one_line(figure5.main, ["a", "b", "c"], "3 logs do not fit")
    one_line(figure5.main, ["nowhere"], "nowhere")
    one_line(figure5.main, [str(EXPERIMENTS / "figure1.json")], "no log of train.py")
    one_line(figure5.main, [log(tmp_path / "log.jsonl", 1)], "has 1 evaluations, and a picture")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    one_line(figure5.main, [str(tmp_path / "list.jsonl")], "no log of train.py")


# ---- the others ----

def test_the_benchmark_times_everything_it_names(capsys):
    bench.main(["--quick"])
    out = capsys.readouterr().out
    for named in ("torch", "scan(a, x)", *eval_phonebook.MIXERS, "ms a token", "batches/s"):
        assert named in out
    one_line(bench.main, ["scna"], "scna is unknown; choose from scan, step, decode, batches")
    one_line(bench.main, ["step", "--quick", "--nanogpt=nowhere"], "nowhere")


def test_the_table_of_simulated_worlds_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(Birdie, "train_steps", 1)
    monkeypatch.setattr(bandit_world, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    bandit_world.table(1)
    out = capsys.readouterr().out
    assert all(way in out for way in bandit_world.WAYS) and "of 1" in out


def test_the_check_on_a_gpu_goes_on_after_an_error_and_ends_with_it(tmp_path, monkeypatch, capsys):
    report = tmp_path / "gpu.json"
    command = ["--device=cpu", "--quick", f"--out={report}"]
    gpu.main([*command, "--only=kernel,sanitizer,scan,step"])
    parts, out = json.loads(report.read_text())["parts"], capsys.readouterr().out
    assert parts["kernel"]["torch"]["cases"] and parts["kernel"]["torch"]["dx"] < 1e-6
    assert parts["step"]["110m hawk"]["tokens_per_s"] > 0
    assert all(f"\n{part}: " in out for part in parts)

    right = gpu.S.torch_walk

    def wrong(a, x, out, reverse, h=None, da=None):
        right(a, x, out, reverse, h, da)
        if da is not None and not reverse:
            da[:, -1] += 1                      # the first step, which has no state before it
    monkeypatch.setattr(gpu.S, "torch_walk", wrong)
    one_line(gpu.main, [*command, "--only=scan,kernel"], "something went wrong")
    parts = json.loads(report.read_text())["parts"]
    assert "da is off by" in parts["kernel"]["torch"]["error"]
    assert "error" not in parts["kernel"].get("cpp", {}) and "error" not in str(parts["scan"])

    gpu.main([*command, "--only=scan", "--minutes=0"])
    assert set(json.loads(report.read_text())["parts"]["scan"].values()) == {
        "skipped: the time is over"}
    one_line(gpu.main, [*command, "--only=kernle"], "choose from kernel, sanitizer, scan")
