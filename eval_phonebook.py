"""eval_phonebook.py -- can a model look a number up in a book that it has read? (section 4.3, A.9, figures 1 and 9)

    prefix   the question, the book, the question again
    label    the numbers that were asked for, in that order

A pretrained model is fine-tuned on such books. Then it writes its answers greedily, token by token, from its
recurrent state, never from the true tokens. Digit accuracy compares an answer with the label position by position:
chance is 10%. An exact number has all of its ten digits right.

Symbols: a book has entries, a name and a number each; B rows of T tokens are a batch; a row holds as many books as fit.

Run it:  python eval_phonebook.py --out_dir=out       fine-tune and score out/ckpt.pt -> out/phonebook.json
         python eval_phonebook.py book                one book, its question and its answer
         python eval_phonebook.py figure1             the comparison from nothing: pretrain, fine-tune, score, plot
         python eval_phonebook.py figure1 --only='gated_ssm-birdie-?,gated_ssm-ntp-?'    some of its runs
         python eval_phonebook.py --help              every setting

Departures from the paper, ours: the presets `cpu` and `gpu` scale books, steps and learning rate to small models (`paper`
has the paper's own, and longer rows, which our tokens need); the names. A name and a number that stand together in a test
book never do in a training book: the checksum of the entry says to which side it belongs.
"""
import fnmatch
import json
import os
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import train                       # before torch: it sets how threads wait
import numpy as np
import torch
from tqdm import tqdm

from model import LM
from objectives import Loader, Tokenizer, lay_out

FIRST = """
Aaron Adele Adrian Agnes Aisha Alan Albert Alexis Alfred Alice Alma Alvin Amara Amber Amelia Amos Amy
Andrea Andrew Angela Anita Annette April Archie Ariana Arlene Arthur Ashley Astrid Aubrey August Aurora
Barry Belinda Bernard Bertha Beverly Blake Bonnie Boris Brandon Brenda Brian Bridget Bruce Bruno Bryce
Byron Caleb Calvin Camille Candace Cara Carmen Casey Catherine Cedric Chad Chelsea Chester Chloe Clara
Clarence Clayton Clifford Clyde Cody Colleen Conrad Constance Corinne Craig Crystal Curtis Cyrus Daisy
Damian Daniel Daphne Darius Darlene Darren David Dawn Declan Delia Denise Derek Diana Dolores Dominic
Donald Doris Dorothy Douglas Duncan Dustin Dwayne Dylan Edgar Edith Edmund Eduardo Edward Eileen Elaine
Eleanor Elise Eloise Elsa Emily Enrique Ernest Esther Ethan Eunice Evelyn Faith Felix Fiona Florence
Floyd Frances Freda Frederick Gabriel Gail Gavin George Gerald Gilbert Ginger Gladys Glenn Gordon Grace
Graham Grant Gregory Guy Gwen Harold Harriet Harvey Hazel Heather Hector Heidi Helen Henry Herbert
Herman Hilda Holly Homer Horace Howard Hubert Hugo Ian Ida Imogen Ingrid Irene Iris Irving Isaac Isabel
Ivan Jack Jade Jamal James Janet Jared Jasmine Jason Javier Jean Jenna Jerome Jesse Jill Joel Jonas
Jordan Joseph Joyce Judith Julia June Justin Kara Karen Katherine Kayla Keith Kelly Kenneth Kerry Kevin
Kirsten Kristen Kurt Kyle Lacey Lambert Lance Laura Lawrence Leah Leila Lena Leonard Leroy Leslie Lester
Lewis Liam Lillian Linda Lionel Lisa Lloyd Logan Lois Loretta Louise Lucas Luther Lynn Mabel Mandy Mark
Martin Mary Mason Mildred Milton Mindy Molly Nathan Neil Nina Noel Nora Oliver Omar Opal Oscar Otto
Pamela Paul Pearl Pedro Perry Randall Reuben Richard Rita Roger Roland Ross Roy Ruby Ruth Ryan Sally
Sandra Sean Selma Seth Shawn Silas Simon Stuart Susan Sven Tara Terrence Thelma Theodore Todd Tony Troy
Tyler Vera Victor Wade Walter Wanda Warren Wayne Wendy Willa Winston Yasmin Zachary Zelda Zoe
""".split()
LAST = """
Abrams Acosta Adams Albright Atkins Atwood Austin Avery Ayers Bachman Bailey Baldwin Ballard Banks
Barker Barnett Barrera Bates Bauer Beard Becker Benitez Benson Berger Bishop Blair Bolton Booker Bowman
Boyd Brady Branch Brewer Briggs Brooks Browning Bullock Burch Burgess Burns Burris Butler Byrd Cabrera
Calderon Cameron Cannon Cantrell Cardenas Carlson Carpenter Carson Carter Carver Chandler Chavez Cherry
Church Cisneros Clements Cline Cochran Coffey Coleman Collier Compton Conley Conway Cooper Copeland
Cortez Cowan Crawford Crosby Cruz Cummings Dalton Davenport Davila Decker Dejesus Dempsey Dennis Diaz
Dickerson Dillard Dixon Dodson Dorsey Doyle Drake Duffy Duke Dunlap Duran Eaton Eckert Edison Emerson
Estrada Farley Farmer Farrell Fields Finley Fischer Fleming Flores Foley Forbes Foster Fowler Fox
Freeman Frost Fuentes Fuller Gaines Galindo Galloway Gardner Garner Garza Gates Gentry Gibbs Glass
Glover Golden Gomez Goodwin Gould Graves Greer Griffin Grimes Hahn Haley Hancock Hardin Harper
Harrington Hartman Hastings Hatfield Hayden Hebert Henson Herrera Hickman Hinton Hodges Hoffman Holcomb
Holden Holland Hooper Hoover Horton Huang Hubbard Huff Hurley Hurst Ibarra Ingram Jennings Jensen
Jimenez Jones Juarez Kane Keller Kemp Kendrick Kent Kessler Kirby Klein Knapp Knight Koch Kramer Krueger
Lancaster Landry Larsen Levine Levy Lindsey Lopez Lowery Lucero Lynch Lyons Mack Maddox Mann Marquez
Massey Mayer Mcclure Mccoy Mcgee Mclean Meadows Merrill Meyers Mills Molina Monroe Moody Moore Moran
Morrow Moses Mosley Moyer Mueller Mullins Munoz Murray Myers Nash Navarro Newman Nichols Nixon Nolan
Norton Novak Nunez Ochoa Odom Oneal Oneill Orozco Owens Pacheco Padilla Palmer Parks Patel Payne Pena
Ponce Porter Potter Prince Proctor Pugh Reilly Reyes Rios Roach Romero Roth Rowe Rush Sanders Savage
Sexton Shaffer Short Sims Slater Sloan Smith Sosa Soto Spears Stanton Stark Stein Stone Stout Summers
Sutton Tanner Tate Torres Townsend Turner Vance Vargas Villa Walsh Walton Ware Waters Weaver Webster
Weiss Wells Winters Wright Yang Yates Yoder York
""".split()
QUESTION = "What are the phone numbers for {}? Find them in the phonebook {}."      # figure 9
N_NUMBERS = 1, 2, 4, 8, 16, 32
PRETRAINING = {"cpu": "cpu", "gpu": "gpu", "paper": "1.4b"}      # presets of train.py that go with those here
PRESETS = {
    "cpu": dict(entries_min=4, entries_max=8, numbers_max=1, test_entries_min=8, test_entries_max=8, test_books=512,
                max_steps=2500, cooldown=0.25, batch_size=8, block_size=384, lr=2e-3, beta2=0.99),
    "gpu": dict(entries_min=50, entries_max=220, numbers_max=32, test_entries_min=200, test_entries_max=220,
                test_books=1024, max_steps=1000, cooldown=0.25, batch_size=16, block_size=8192, lr=3e-4, beta2=0.95),
    "paper": dict(entries_min=200, entries_max=800, numbers_max=32, test_entries_min=750, test_entries_max=800,
                  test_books=1024, max_steps=1000, cooldown=0.0, batch_size=64, block_size=24576,
                  lr=5e-5, beta2=0.95),
}


@dataclass
class Config:
    out_dir: str = "out"           # phonebook.json and phonebook.pt, the fine-tuned checkpoint, are written here
    ckpt: str = ""                 # checkpoint of train.py to fine-tune; "": ckpt.pt in out_dir
    scratch: str = ""              # instead of a checkpoint, random weights of this architecture: no pretraining
    causal: bool = False           # with --scratch: no block reads the prefix right to left
    preset: str = ""               # for what is left at 0: cpu, gpu or paper; "": gpu if there is one, else cpu
    entries_min: int = 0           # entries of a book in fine-tuning, drawn uniformly
    entries_max: int = 0           # the most that one may have
    numbers_max: int = 0           # numbers asked for: 1 to this many, drawn uniformly
    test_entries_min: int = 0      # entries of a test book, drawn uniformly
    test_entries_max: int = 0
    test_books: int = 0            # for each of 1, 2, 4, 8, 16 and 32 numbers up to numbers_max
    max_steps: int = 0             # of fine-tuning
    batch_size: int = 0            # rows in a step
    block_size: int = 0            # tokens in a row
    lr: float = 0.0                # of fine-tuning, constant after 50 steps
    cooldown: float = -1.0         # last share of the steps, in which the learning rate falls to 0; -1: the preset's
    beta2: float = 0.0             # AdamW's memory of squared gradients
    seed: int = 1                  # of the training books, and of random weights
    workers: int = 1               # processes that make books
    device: str = ""               # cpu, cuda, cuda:1 ...; "": cuda if there is one
    resume: bool = False           # score out_dir/phonebook.pt again; test_... may say on what


# What --resume may change
RESCORED = {"out_dir", "device", "workers", "resume", "test_entries_min", "test_entries_max", "test_books"}


# ---- books -----------------------------------------------------------------------------------------

def write_book(rng, n_entries: int, n_numbers: int, split: str) -> tuple[str, str]:
    """-> (prompt, answer); `split` is 'train' or 'val'."""
    people = [f"{FIRST[k // len(LAST)]} {LAST[k % len(LAST)]}"
              for k in rng.choice(len(FIRST) * len(LAST), n_entries, replace=False)]
    numbers = [phone_number(rng, name, split) for name in people]
    asked = rng.choice(n_entries, n_numbers, replace=False)
    names = [people[k] for k in asked]
    if n_numbers > 1:
        names[-1] = f"and {names[-1]}"
    names = (" " if n_numbers == 2 else ", ").join(names)
    entries = "\n".join(f"{name}: {number}" for name, number in zip(people, numbers))
    prompt = f"{QUESTION.format(names, 'below')}\n\nPhonebook:\n{entries}\n\n{QUESTION.format(names, 'above')}"
    return prompt, ", ".join(numbers[k] for k in asked)


def phone_number(rng, name: str, split: str) -> str:
    """Ten random digits as 669-174-4914. One in 20 pairs of a name and a number belongs to 'val'."""
    while True:
        digits = "".join(map(str, rng.integers(10, size=10)))
        number = f"{digits[:3]}-{digits[3:6]}-{digits[6:]}"
        if (zlib.crc32(f"{name}: {number}".encode()) % 20 == 0) == (split == "val"):
            return number


class Books:
    """Batches of books: like objectives.Batches a pure function of (seed, rank, step, split), and so for its Loader."""

    def __init__(self, tok: Tokenizer, config: Config):
        self.tok, self.config = tok, config
        longest = self.longest(config.entries_max, min(config.numbers_max, config.entries_max))
        if longest > config.block_size:
            raise ValueError(f"a book of {config.entries_max} entries takes up to {longest} tokens, more than block_size "
                             f"{config.block_size}; pass --block_size={longest} or a smaller --entries_max or --numbers_max")

    def longest(self, n_entries: int, n_numbers: int) -> int:
        """Tokens that a prompt and its answer take at most."""
        def size(text):
            return len(self.tok.encode(text))
        bare, first, last = (max(size(space + name) for name in names)
                             for space, names in (("", FIRST), (" ", FIRST), (" ", LAST)))
        return (2 * size(QUESTION.format("", "below")) + size("\n\nPhonebook:\n\n\n") + 2 * size(" and")
                + n_entries * (bare + last + size(": 111-111-1111\n"))
                + n_numbers * (2 * (first + last + size(",")) + size("111-111-1111, ")))

    def batch(self, seed, rank, step, action=None, split="train") -> dict:
        """(B, T) arrays as objectives.lay_out gives them; `action` has no meaning here.

        Books are drawn in turn and share a row while they fit; the first that finds no row is left out.
        """
        rng, config = np.random.default_rng([seed, rank, step, ("train", "val").index(split)]), self.config
        rows, room = [], 0
        while True:
            n_entries = int(rng.integers(config.entries_min, config.entries_max + 1))
            n_numbers = int(rng.integers(1, min(n_entries, config.numbers_max) + 1))
            prompt, answer = write_book(rng, n_entries, n_numbers, split)
            prefix, label = self.tok.encode(prompt), np.append(self.tok.encode(answer), self.tok.DONE)
            if len(prefix) + len(label) > room:
                if len(rows) == config.batch_size:
                    return lay_out(rows, config.block_size, self.tok)
                rows.append([])
                room = config.block_size
            rows[-1].append((0, prefix, label))
            room -= len(prefix) + len(label)

    def __getitem__(self, key):
        return self.batch(*key)


def test_books(config: Config, n_numbers: int, n_books: int) -> list:
    """[(prompt, answer)], the same for every model and seed."""
    rng = np.random.default_rng([n_numbers, n_books])
    sizes = range(config.test_entries_min, config.test_entries_max + 1)
    return [write_book(rng, int(rng.choice(sizes)), n_numbers, "val") for _ in range(n_books)]


# ---- scores ----------------------------------------------------------------------------------------

def digits_right(answer: str, label: str) -> np.ndarray:
    """(n, 10) bool: which digits of the label's n numbers stand at the same place of the answer."""
    places = [i for i, c in enumerate(label) if c.isdigit()]
    return np.array([answer[i:i + 1] == label[i] for i in places]).reshape(-1, 10)


def interval(share: float, n: int) -> list:
    """Wilson's 95% interval of a share of n trials. Trials here are books: the digits of one are not independent,
    so for digits the interval is rather too wide than too narrow."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [float((middle + side * half) / (1 + z * z / n)) for side in (-1, 1)]


def score(respond, books: list) -> dict:
    """Shares of right digits and exact numbers, with their 95% intervals; by_place: of each of a number's ten digits.

    respond(prompts, n): answers to prompts that ask for n numbers each. books: [(prompt, answer)], n numbers each.
    """
    n_numbers = len(digits_right("", books[0][1]))
    answers = respond([prompt for prompt, _ in books], n_numbers)
    right = np.array([digits_right(answer, label) for answer, (_, label) in zip(answers, books)])   # (books, n, 10)
    digits, exact = float(right.mean()), float(right.all(-1).mean())
    return dict(n_numbers=n_numbers, books=len(books), digits=digits, digits_interval=interval(digits, len(books)),
                by_place=right.mean((0, 1)).tolist(), exact=exact, exact_interval=interval(exact, len(books)))


def responder(model: LM, tok: Tokenizer, run: train.Config, rows: int = 64):
    """A model as `score` asks it: greedy decoding from the recurrent state, `rows` prompts at a time."""
    def respond(prompts, n_numbers):
        longest, answers = len(tok.encode(", ".join(["111-111-1111"] * n_numbers))), []
        model.eval()
        for start in tqdm(range(0, len(prompts), rows), f"asking for {n_numbers}", unit="batch", leave=False):
            asked = [(tok.encode(prompt), [tok.GEN]) for prompt in prompts[start:start + rows]]
            with train.autocast(run):
                written = model.generate(asked, longest, tok.DONE)
            answers += [tok.decode([token for token in row if token != tok.DONE]) for row in written]
        model.train()
        return answers
    return respond


def show_example(respond, prompt: str, label: str) -> None:
    answer, = respond([prompt], len(digits_right("", label)))
    wrong = "".join(" ^"[answer[i:i + 1] != c] for i, c in enumerate(label))
    print(f"\n{prompt}\n\n  label  {label}\n  model  {answer}\n         {wrong.rstrip()}")


# ---- fine-tuning and scoring one model --------------------------------------------------------------

def completed(config: Config) -> Config:
    """Fill in what was left open, and refuse what cannot be done, before anything is computed."""
    on_gpu = torch.cuda.is_available() and not config.device.startswith("cpu")
    config.preset = config.preset or ("gpu" if on_gpu else "cpu")
    if config.preset not in PRESETS:
        raise ValueError(f"preset {config.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    for name, value in PRESETS[config.preset].items():
        if getattr(config, name) == getattr(Config, name):
            setattr(config, name, value)
    if config.causal and not config.scratch:
        raise ValueError("causal is for random weights; pass --scratch=ARCHITECTURE, or drop --causal: a checkpoint knows "
                         "what it is")
    config.ckpt = config.ckpt or os.path.join(config.out_dir, "ckpt.pt")
    for name in ("entries_min", "numbers_max", "test_entries_min", "test_books", "max_steps", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    for kind in ("entries", "test_entries"):
        low, high = getattr(config, f"{kind}_min"), getattr(config, f"{kind}_max")
        if high < low or high > len(FIRST) * len(LAST):
            raise ValueError(f"{kind}_max is {high}; it must be from {kind}_min, {low}, to {len(FIRST) * len(LAST)} names")
    if not 0 <= config.cooldown <= 1:
        raise ValueError(f"cooldown is {config.cooldown}; it must be a share of the steps, from 0 to 1")
    tuned = os.path.join(config.out_dir, "phonebook.pt")
    if os.path.exists(tuned) and not config.resume:
        raise ValueError(f"{tuned} exists; score it again with --resume, or fine-tune {config.ckpt} into another folder "
                         f"with --ckpt={config.ckpt} --out_dir=ANOTHER")
    return config


def as_finetuned(config: Config, given: set) -> Config:
    """How out_dir/phonebook.pt was fine-tuned, but for what `given`, flags of --resume, may change."""
    path = os.path.join(config.out_dir, "phonebook.pt")
    if not os.path.exists(path):
        raise ValueError(f"there is no {path} to score again; drop --resume to fine-tune first")
    saved = train.load_checkpoint(path, "finetuning", "pretrained")["finetuning"]
    for name in sorted(given - RESCORED):
        if getattr(config, name) != saved[name]:
            raise ValueError(f"{name} is {saved[name]!r} in {path} and {getattr(config, name)!r} on the command line; drop "
                             f"--{name}, or fine-tune into another --out_dir without --resume")
    changes = {name: getattr(config, name) for name in given & RESCORED}
    return Config(**{**saved, "device": "", **changes, "out_dir": config.out_dir, "resume": True})


def load(config: Config):
    """-> (model on the CPU, tokenizer, train.Config of its pretraining, checkpoint)."""
    if config.scratch and not config.resume:
        pretraining = train.sized(train.Config(arch=config.scratch, causal=config.causal, mixture="none",
                                               preset=PRETRAINING[config.preset], seed=config.seed))
        tok = Tokenizer(pretraining.tokenizer, n_masks=pretraining.block_size // 8)
        torch.manual_seed(config.seed)
        return LM(train.model_config(pretraining, tok)), tok, pretraining, {}
    path = os.path.join(config.out_dir, "phonebook.pt") if config.resume else config.ckpt
    model, tok, checkpoint = train.load_model(path)
    return model, tok, train.Config(**checkpoint["config"]), checkpoint


def finetune(model: LM, tok: Tokenizer, run: train.Config, config: Config) -> list:
    """The paper's protocol (A.9): AdamW without weight decay, a constant learning rate. Our choice: it rises over the
    first 50 steps, and falls to 0 over the last share `cooldown` of them. -> the curve, 20 points of step, mean loss
    since the last, and share of digits right on 128 test books."""
    books, held_out, curve, losses = Books(tok, config), test_books(config, 1, 128), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, config.beta2), weight_decay=0.0,
                                  fused=True)
    step_model = torch.compile(model) if run.compile == "yes" else model
    batches = Loader(books, config.seed, workers=config.workers).steps(0, config.max_steps, None)
    bar = tqdm(batches, "fine-tuning", config.max_steps, unit="step")
    for step, batch in enumerate(bar, 1):
        falling = (config.max_steps - step + 1) / max(1, config.cooldown * config.max_steps)
        losses.append(train.learn(step_model, optimizer, batch, config.lr * min(1, step / 50, falling), run)[0])
        if step % max(1, config.max_steps // 20) == 0 or step == config.max_steps:
            digits = score(responder(model, tok, run), held_out)["digits"]
            curve.append(dict(step=step, loss=torch.stack(losses).mean().item(), digits=digits))
            bar.set_postfix_str(f"loss {curve[-1]['loss']:.3f}, {digits:.0%} of digits")
            losses.clear()
    return curve


def evaluate(config: Config, given: set) -> dict:
    """Fine-tune and score one model; -> what it writes to phonebook.json. given: names of the flags that were set."""
    begin, config = time.perf_counter(), completed(as_finetuned(config, given) if config.resume else config)
    model, tok, pretraining, checkpoint = load(config)
    pretrained = checkpoint.get("pretrained", checkpoint.get("step", 0))      # steps; a fine-tuned one has both
    run = train.resolve(replace(pretraining, device=config.device, dtype="", compile="", batch_size=config.batch_size,
                                block_size=config.block_size, max_steps=config.max_steps, lr=config.lr))
    train.keep_freed_memory()
    model.to(run.device)
    steps = f", {pretrained:,} of {pretraining.max_steps:,} steps" * (pretraining.mixture != "none")
    print(f"model    {run.arch}{' --causal' * run.causal}, {model.n_parameters():,} parameters, pretraining: "
          f"{run.mixture}{steps}")
    print(f"books    preset {config.preset}: {config.entries_min} to {config.entries_max} entries, up to "
          f"{config.numbers_max} numbers asked; tests: {config.test_books} books of {config.test_entries_min} to "
          f"{config.test_entries_max} entries")
    os.makedirs(config.out_dir, exist_ok=True)
    curve = checkpoint["curve"] if config.resume else finetune(model, tok, run, config)
    if not config.resume:
        train.save_checkpoint(os.path.join(config.out_dir, "phonebook.pt"), dict(
            config=asdict(pretraining), tokenizer=dict(name=tok.name, n_masks=tok.n_masks), model=model.state_dict(),
            step=config.max_steps, curve=curve, pretrained=pretrained, finetuning=asdict(config)))
    respond, results = responder(model, tok, run), []
    for n in N_NUMBERS:
        if n <= min(config.numbers_max, config.test_entries_min):
            result = score(respond, test_books(config, n, config.test_books))
            results.append(result)
            low, high = result["digits_interval"]
            print(f"{n:3d} number{'s' * (n > 1)}: {result['digits']:.1%} of digits right (95% interval {low:.1%} to {high:.1%}; "
                  f"chance 10%), {result['exact']:.1%} of numbers exact")
    show_example(respond, *test_books(config, results[-1]["n_numbers"], 1)[0])
    found = dict(config=asdict(config), pretraining=asdict(pretraining), pretrained=pretrained, parameters=model.n_parameters(),
                 results=results, curve=curve, seconds=round(time.perf_counter() - begin), torch=torch.__version__)
    with open(os.path.join(config.out_dir, "phonebook.json.part"), "w") as file:
        json.dump(found, file, indent=1)
    os.replace(file.name, os.path.join(config.out_dir, "phonebook.json"))
    return found


# ---- the whole comparison --------------------------------------------------------------------------

MIXTURES = {                                                                # and how the picture calls them
    "birdie": "Birdie", "birdie-causal": "Birdie, causal", "fixed": "fixed mixture", "ul2": "UL2",
    "ntp": "next token prediction", "none": "no pretraining", "none-causal": "no pretraining, causal"}
# In the order in which they run
RUNS = {f"{arch}-{mixture}-{seed}": (arch, mixture, seed) for arch, mixture, seed in (
    *((arch, mixture, seed) for arch in ("gated_ssm", "hawk") for seed in (1, 2, 3)
      for mixture in ("birdie", "ntp", "birdie-causal", "none", "none-causal", "fixed")),
    *((arch, "ul2", 1) for arch in ("gated_ssm", "hawk")),
    *(("transformer", mixture, 1) for mixture in ("birdie", "ntp")))}


@dataclass
class Figure:
    out_dir: str = "figure1"       # a folder for each run; figure1.json and figure1.png
    preset: str = ""               # cpu, gpu or paper; "": gpu if there is one, else cpu
    only: str = "*"                # runs that match one of these patterns, such as 'gated_ssm-*-1,hawk-ntp-*'
    jobs: int = 0                  # runs at a time; 0: one a core (a thread each), or one on a GPU


def run_one(folder: str, arch: str, mixture: str, seed: int, preset: str, threads: int) -> str:
    """Pretrain and fine-tune in processes of their own, from where an earlier call stopped; "" or what went wrong."""
    def done(name):
        return os.path.exists(os.path.join(folder, name))

    common = [f"--seed={seed}", f"--out_dir={folder}", "--workers=0"]
    score_it = ["eval_phonebook.py", f"--preset={preset}", *common] + ["--resume"] * done("phonebook.pt")
    if mixture.startswith("none"):
        score_it += [f"--scratch={arch}"] + ["--causal"] * mixture.endswith("causal")
    pretrain = ["train.py", f"--arch={arch}", f"--mixture={mixture}", f"--preset={PRETRAINING[preset]}", *common]
    pretrain += ["--resume"] * done("ckpt.pt")
    commands = [score_it] if mixture.startswith("none") or done("phonebook.pt") else [pretrain, score_it]
    os.makedirs(folder, exist_ok=True)
    here = os.path.dirname(os.path.abspath(__file__))
    for program, *flags in commands:
        with open(os.path.join(folder, "log.txt"), "a") as log:
            begin = time.time()
            code = subprocess.run([sys.executable, os.path.join(here, program), *flags], stdout=log, stderr=log,
                                  env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
            print(f"\n{program} took {time.time() - begin:.0f} s with {threads} threads", file=log)
        if code:
            with open(log.name, errors="replace") as log:
                lines = [line for line in log.read().replace("\r", "\n").splitlines() if line.strip()]
            return f"{program} failed with exit code {code}; {log.name} ends: {lines[-2:][0]}"
    return ""


def figure1(figure: Figure) -> None:
    """Everything that `only` asks for and that is not there yet; then the picture of all that is there."""
    on_gpu = torch.cuda.is_available()
    figure.preset = figure.preset or ("gpu" if on_gpu else "cpu")
    if figure.preset not in PRESETS:
        raise ValueError(f"preset {figure.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    os.makedirs(figure.out_dir, exist_ok=True)
    patterns = [pattern.strip() for pattern in figure.only.split(",")]
    for pattern in patterns:
        if not fnmatch.filter(RUNS, pattern):
            raise ValueError(f"no run matches {pattern!r} of --only; runs are named {', '.join(RUNS)}")
    collect(figure)
    missing = [name for name in RUNS if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
               and not os.path.exists(os.path.join(figure.out_dir, name, "phonebook.json"))]
    jobs = figure.jobs or (1 if on_gpu else min(len(missing), os.cpu_count())) or 1
    threads = max(1, os.cpu_count() // jobs)
    print(f"{len(missing)} runs to do, {jobs} at a time, {threads} threads each")
    failed = []

    def run(name):
        return run_one(os.path.join(figure.out_dir, name), *RUNS[name], figure.preset, threads)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(missing), unit="run") as bar:
        for name, error in zip(missing, pool.map(run, missing)):
            failed += [error] * bool(error)
            bar.set_postfix_str(f"last: {name}")
            bar.update()
            collect(figure)
    for error in failed:
        print(f"error: {error}")
    if failed:
        raise SystemExit(f"error: {len(failed)} of {len(missing)} runs failed; run the same command again to go on")
    found = collect(figure)
    show_table(found)
    plot(found, os.path.join(figure.out_dir, "figure1.png"))


def collect(figure: Figure) -> list:
    """The results that are there -> figure1.json. Raises ValueError where one has other settings than the preset's."""
    found = []
    for name, (arch, mixture, seed) in RUNS.items():
        path = os.path.join(figure.out_dir, name, "phonebook.json")
        if os.path.exists(path):
            with open(path) as file:
                result = json.load(file)
            for name, value in PRESETS[figure.preset].items():
                if result["config"][name] != value:
                    raise ValueError(f"{path} has {name} {result['config'][name]}, and preset {figure.preset} has {value}; "
                                     f"remove it and phonebook.pt beside it to fine-tune again, or choose another --out_dir")
            found.append(dict(arch=arch, mixture=mixture, seed=seed, **result))
    with open(os.path.join(figure.out_dir, "figure1.json"), "w") as file:
        json.dump(found, file, indent=1)
    return found


def by_arm(found: list) -> dict:
    """{(architecture, pretraining): the runs of its seeds}."""
    arms = dict.fromkeys((run["arch"], run["mixture"]) for run in found)
    return {arm: [run for run in found if (run["arch"], run["mixture"]) == arm] for arm in arms}


def show_table(found: list) -> None:
    """Digit accuracy for each number of numbers, as markdown: mean over the seeds, and each seed."""
    numbers = sorted({result["n_numbers"] for run in found for result in run["results"]})
    print("\n| model | pretraining | " + " | ".join(f"{n} number{'s' * (n > 1)}" for n in numbers) + " |")
    print("|---" * (len(numbers) + 2) + "|")
    for (arch, mixture), runs in by_arm(found).items():
        cells = []
        for n in numbers:
            shares = [result["digits"] for run in runs for result in run["results"] if result["n_numbers"] == n]
            cells.append(f"{np.mean(shares):.1%} ({', '.join(f'{share:.1%}' for share in shares)})" if shares else "")
        print(f"| {arch} | {MIXTURES[mixture]} | " + " | ".join(cells) + " |")


def plot(found: list, picture: str) -> None:
    """Figure 1: digit accuracy by numbers asked for, and on the way there; lines: means, bands: over the seeds."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("the picture needs matplotlib; pip install matplotlib, then run the same command again")
        return
    archs = list(dict.fromkeys(run["arch"] for run in found))
    panels = [("curve", "step")] + [("results", "n_numbers")] * any(len(run["results"]) > 1 for run in found)
    figure, axes = plt.subplots(len(panels), len(archs), figsize=(3 + 4 * len(archs), 4 * len(panels)),
                                layout="constrained", squeeze=False, sharey=True)
    lines = {}
    for (arch, mixture), runs in by_arm(found).items():
        for axis, (series, x) in zip(axes[:, archs.index(arch)], panels):
            values = np.array([[point["digits"] for point in run[series]] for run in runs])
            at, color = [point[x] for point in runs[0][series]], f"C{list(MIXTURES).index(mixture)}"
            lines[mixture], = axis.plot(at, values.mean(0), marker="o" if x == "n_numbers" else None, color=color)
            axis.fill_between(at, values.min(0), values.max(0), color=color, alpha=0.2)
    for (_, x), row in zip(panels, axes):
        row[0].set(ylabel="digits right", ylim=(0, 1.02))
        for arch, axis in zip(archs, row):
            chance = axis.axhline(0.1, color="gray", linestyle=":")
            axis.set(title=arch, xlabel="fine-tuning step (1 number, 128 books)")
            if x == "n_numbers":
                axis.set(xlabel="numbers asked for", xticks=N_NUMBERS)
    named = {name: lines[mixture] for mixture, name in MIXTURES.items() if mixture in lines} | {"chance": chance}
    figure.legend(named.values(), named.keys(), loc="outside right upper")
    plt.savefig(picture, dpi=110)
    print(f"wrote {picture}")


def main(argv: list) -> None:
    try:
        if argv[:1] == ["figure1"]:
            figure1(train.parse_args(Figure, argv[1:])[0])
        elif argv == ["book"]:
            print("\n\n".join(write_book(np.random.default_rng(1), 6, 2, "val")))
        else:
            evaluate(*train.parse_args(Config, argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
