"""Can a model look a number up in a book that it has read? (section 4.3, A.9, figures 1 and 9)

    prefix   the question, the book, the question again
    label    the numbers that were asked for, in that order

A pretrained model is fine-tuned on such books. Then it writes its answers greedily, token by
token, from its recurrent state, never from the true tokens. Digit accuracy compares an answer
with the label position by position: chance is 10%. An exact number has all of its ten digits
right.

Symbols: a book has entries, a name and a number each; a row of T tokens holds as many books as fit.

Run it:  python eval_phonebook.py           fine-tune and score out/ckpt.pt -> out/phonebook.json
         python eval_phonebook.py book      one book, its question and its answer
         python eval_phonebook.py --help    every setting

Departures from the paper, ours: the presets `cpu` and `gpu` scale books, steps and learning rate
to small models (`paper` has the paper's own, and longer rows, which our tokens need); the names.
A name and a number that stand together in a test book never do in a training book: the checksum
of the entry says to which side it belongs.
"""
import json
import os
import sys
import time
import zlib

import train                       # before torch: it sets how threads wait
import numpy as np
import torch
from tqdm import tqdm

from model import LM, MIXERS, load_checkpoint
from objectives import Loader, Tokenizer, lay_out, pack
from train import number

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "names.txt")) as file:
    FIRST, LAST = (names.split() for names in file.read().split("\n\n"))
QUESTION = "What are the phone numbers for {}? Find them in the phonebook {}."      # figure 9
N_NUMBERS = 1, 2, 4, 8, 16, 32
PRETRAINING = {"cpu": "cpu", "gpu": "gpu", "paper": "1.4b"}     # train.py's presets for those here
PRESETS = {                        # cpu: the defaults below
    "cpu": dict(),
    "gpu": dict(entries_min=50, entries_max=220, numbers_max=32, test_entries_min=200,
                test_entries_max=220, test_books=1024, max_steps=1000, batch_size=16,
                block_size=8192, lr=3e-4, beta2=0.95),
    "paper": dict(entries_min=200, entries_max=800, numbers_max=32, test_entries_min=750,
                  test_entries_max=800, test_books=1024, max_steps=1000, cooldown=0.0,
                  batch_size=64, block_size=24576, lr=5e-5, beta2=0.95),
}
MAY_CHANGE = train.MAY_CHANGE | {"test_entries_min", "test_entries_max", "test_books"}


def parse_args(argv):
    """-> (settings, the fine-tuned checkpoint to score again or None)."""
    parser, flag = train.command_line("python eval_phonebook.py [book] [--FLAG=VALUE ...]")
    count, entries = number(int, 1), number(int, 1, len(FIRST) * len(LAST))
    flag("--ckpt", help="checkpoint of train.py to fine-tune; by default ckpt.pt in out_dir")
    flag("--scratch", default="none", choices=["none", *MIXERS],
         help="instead of a checkpoint, random weights of this architecture: no pretraining")
    flag("--causal", action="store_true", help="with --scratch: no block reads right to left")
    flag("--preset", default="cpu", choices=PRESETS, help="defaults of a size; see PRESETS")
    flag("--entries_min", default=4, type=entries, help="entries of a book in fine-tuning, uniform")
    flag("--entries_max", default=8, type=entries, help="the most that one may have")
    flag("--numbers_max", default=1, type=count, help="numbers asked for: 1 to this many, uniform")
    flag("--test_entries_min", default=8, type=entries, help="entries of a test book, uniform")
    flag("--test_entries_max", default=8, type=entries, help="the most that one may have")
    flag("--test_books", default=512, type=count, help="for each of 1, 2, 4 ... numbers asked for")
    flag("--max_steps", default=2500, type=count, help="steps of fine-tuning")
    flag("--batch_size", default=8, type=count, help="rows in a step")
    flag("--block_size", default=384, type=count, help="tokens in a row")
    flag("--lr", default=2e-3, type=number(float, 1e-12), help="constant after 50 steps")
    flag("--cooldown", default=0.25, type=number(float, 0, 1),
         help="last share of the steps, in which the learning rate falls to 0")
    flag("--beta2", default=0.99, type=number(float, 0, 0.999999),
         help="AdamW's memory of squared gradients")

    args = parser.parse_args(argv)
    tuned = os.path.join(args.out_dir, "phonebook.pt")
    if args.resume and not os.path.exists(tuned):
        raise ValueError(f"there is no {tuned} to score again; drop --resume to fine-tune first")
    if args.resume:
        saved = load_checkpoint(tuned, "finetuning", "pretraining", "curve")
        args = train.resumed(parser, argv, saved["finetuning"], tuned, MAY_CHANGE)
    else:
        parser.set_defaults(ckpt=os.path.join(args.out_dir, "ckpt.pt"), **PRESETS[args.preset])
        args, saved = parser.parse_args(argv), None
    if os.path.exists(tuned) and not args.resume:
        raise ValueError(f"{tuned} exists; score it again with --resume, or fine-tune {args.ckpt} "
                         f"into another folder with --ckpt={args.ckpt} --out_dir=ANOTHER")
    if args.causal and args.scratch == "none":
        raise ValueError("causal is for random weights; pass --scratch=ARCHITECTURE, or drop "
                         "--causal: a checkpoint knows what it is")
    for kind in ("entries", "test_entries"):
        low, high = getattr(args, f"{kind}_min"), getattr(args, f"{kind}_max")
        if high < low:
            raise ValueError(f"{kind}_max is {high}; it must be {kind}_min, {low}, or more")
    return args, saved


# ---- books -------------------------------------------------------------------------------------

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
    prompt = (f"{QUESTION.format(names, 'below')}\n\nPhonebook:\n{entries}\n\n"
              f"{QUESTION.format(names, 'above')}")
    return prompt, ", ".join(numbers[k] for k in asked)


def phone_number(rng, name: str, split: str) -> str:
    """Ten random digits as 669-174-4914. One in 20 pairs of a name and a number belongs to
    'val'."""
    while True:
        digits = "".join(map(str, rng.integers(10, size=10)))
        number = f"{digits[:3]}-{digits[3:6]}-{digits[6:]}"
        if (zlib.crc32(f"{name}: {number}".encode()) % 20 == 0) == (split == "val"):
            return number


class Books:
    """Batches of books: like objectives.Batches a pure function of (seed, rank, step, split)."""

    def __init__(self, tok: Tokenizer, args):
        self.tok, self.args = tok, args
        self.largest = self.longest(args.entries_max, min(args.numbers_max, args.entries_max))
        if self.largest > args.block_size:
            raise ValueError(f"a book of {args.entries_max} entries takes up to {self.largest} "
                             f"tokens, more than block_size {args.block_size}; pass --block_size="
                             f"{self.largest} or a smaller --entries_max or --numbers_max")

    def longest(self, n_entries: int, n_numbers: int) -> int:
        """Tokens that a prompt and its answer take at most."""
        def size(text):
            return len(self.tok.encode(text))
        bare, first, last = (max(size(space + name) for name in names)
                             for space, names in (("", FIRST), (" ", FIRST), (" ", LAST)))
        questions = 2 * size(QUESTION.format("", "below")) + 2 * size(" and")
        return (questions + size("\n\nPhonebook:\n\n\n")
                + n_entries * (bare + last + size(": 111-111-1111\n"))
                + n_numbers * (2 * (first + last + size(",")) + size("111-111-1111, ")))

    def batch(self, seed, rank, step, action=None, split="train") -> dict:
        """(B, T) arrays as objectives.lay_out gives them; `action` has no meaning here."""
        rng = np.random.default_rng([seed, rank, step, ("train", "val").index(split)])
        args, tok = self.args, self.tok

        def draw():
            n_entries = int(rng.integers(args.entries_min, args.entries_max + 1))
            n_numbers = int(rng.integers(1, min(n_entries, args.numbers_max) + 1))
            prompt, answer = write_book(rng, n_entries, n_numbers, split)
            prefix, label = tok.encode(prompt), np.append(tok.encode(answer), tok.DONE)
            size = len(prefix) + len(label)
            return (0, prefix, label), size, size

        packed = pack(args.batch_size, args.block_size, self.largest, draw)
        return lay_out([[book for book, _ in row] for row in packed], args.block_size, tok)

    def __getitem__(self, key):
        return self.batch(*key)


def test_books(args, n_numbers: int, n_books: int) -> list:
    """[(prompt, answer)], the same for every model and seed."""
    rng = np.random.default_rng([n_numbers, n_books])
    sizes = range(args.test_entries_min, args.test_entries_max + 1)
    return [write_book(rng, int(rng.choice(sizes)), n_numbers, "val") for _ in range(n_books)]


# ---- scores ------------------------------------------------------------------------------------

def digits_right(answer: str, label: str) -> np.ndarray:
    """(n, 10) bool: which digits of the label's n numbers stand at the same place of the answer."""
    places = [i for i, c in enumerate(label) if c.isdigit()]
    return np.array([answer[i:i + 1] == label[i] for i in places]).reshape(-1, 10)


def interval(share: float, n: int) -> list:
    """Wilson's 95% interval of a share of n trials. Trials here are books: the digits of one are
    not independent, so for digits the interval is rather too wide than too narrow."""
    z = 1.96
    middle = share + z * z / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [float((middle + side * half) / (1 + z * z / n)) for side in (-1, 1)]


def score(respond, books: list) -> dict:
    """Shares of right digits and exact numbers, with 95% intervals; by_place: of each of ten
    digits.

    respond(prompts, n): answers to prompts that ask for n numbers each. books: [(prompt, answer)].
    """
    n_numbers = len(digits_right("", books[0][1]))
    answers = respond([prompt for prompt, _ in books], n_numbers)
    right = np.array([digits_right(answer, label) for answer, (_, label) in zip(answers, books)])
    digits, exact = float(right.mean()), float(right.all(-1).mean())        # right: (books, n, 10)
    return dict(n_numbers=n_numbers, books=len(books),
                digits=digits, digits_interval=interval(digits, len(books)),
                exact=exact, exact_interval=interval(exact, len(books)),
                by_place=right.mean((0, 1)).tolist())


def responder(model: LM, tok: Tokenizer, args, rows: int = 64):
    """A model as `score` asks it: greedy decoding from the recurrent state, `rows` prompts at a
    time."""
    def respond(prompts, n_numbers):
        longest, answers = len(tok.encode(", ".join(["111-111-1111"] * n_numbers))), []
        starts = range(0, len(prompts), rows)
        for start in tqdm(starts, f"asking for {n_numbers}", unit="batch", leave=False):
            asked = [(tok.encode(prompt), [tok.GEN]) for prompt in prompts[start:start + rows]]
            with train.autocast(args):
                written = model.generate(asked, longest, tok.DONE)
            answers += [tok.decode(row).removesuffix("<DONE>") for row in written]
        return answers
    return respond


def show_example(respond, prompt: str, label: str) -> None:
    answer, = respond([prompt], len(digits_right("", label)))
    wrong = "".join(" ^"[answer[i:i + 1] != c] for i, c in enumerate(label))
    print(f"\n{prompt}\n\n  label  {label}\n  model  {answer}\n         {wrong.rstrip()}")


# ---- fine-tuning and scoring one model ---------------------------------------------------------

def finetune(model: LM, tok: Tokenizer, args) -> list:
    """The paper's protocol (A.9): AdamW without weight decay, a constant learning rate. Our
    choice: it rises over the first 50 steps, and falls to 0 over the last share `cooldown` of
    them. -> the curve, 20 points of step, mean loss since the last, and share of digits right on
    128 test books."""
    books, held_out, curve, losses = Books(tok, args), test_books(args, 1, 128), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.beta2),
                                  weight_decay=0.0, fused=True)
    learner = train.Learner(model, optimizer, args, clip=1.0)
    batches = Loader(books, args.seed, workers=args.workers).steps(0, args.max_steps, None)
    bar = tqdm(batches, "fine-tuning", args.max_steps, unit="step")
    for step, batch in enumerate(bar, 1):
        falling = (args.max_steps - step + 1) / max(1, args.cooldown * args.max_steps)
        lr = args.lr * min(1, step / 50, falling)
        losses.append(learner.step(batch, lr)[0])
        if step % max(1, args.max_steps // 20) == 0 or step == args.max_steps:
            digits = score(responder(model, tok, args), held_out)["digits"]
            curve.append(dict(step=step, loss=torch.stack(losses).mean().item(), digits=digits))
            bar.set_postfix_str(f"loss {curve[-1]['loss']:.3f}, {digits:.0%} of digits")
            losses.clear()
    return curve


def load(args, saved):
    """-> (model, arguments of its Tokenizer, settings and number of steps of its pretraining)."""
    if saved:
        model, tokenizer, _ = LM.load(os.path.join(args.out_dir, "phonebook.pt"))
        return model, tokenizer, saved["pretraining"]
    if args.scratch != "none":
        preset = PRETRAINING[args.preset]
        sizes, _ = train.parse_args([f"--arch={args.scratch}", f"--preset={preset}"])
        sizes.causal, sizes.mixture, sizes.max_steps = args.causal, "none", 0
        tokenizer = Tokenizer(sizes.tokenizer, n_masks=sizes.block_size // 8).arguments
        torch.manual_seed(args.seed)
        model = LM(train.model_config(sizes, Tokenizer(**tokenizer)))
        return model, tokenizer, {**vars(sizes), "step": 0}
    model, tokenizer, checkpoint = LM.load(args.ckpt)
    return model, tokenizer, {**checkpoint["config"], "step": checkpoint["step"]}


def evaluate(args, saved=None) -> dict:
    """Fine-tune and score one model; -> what it writes to phonebook.json."""
    begin = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("WORLD_SIZE is not 1: fine-tuning is for one device; run it without "
                         "torchrun")
    model, tokenizer, pretraining = load(args, saved)
    tok = Tokenizer(**tokenizer)
    train.settle(args)
    train.keep_freed_memory()
    model.to(args.device)
    print(f"model    {pretraining['arch']}{', causal' * model.config.causal}, "
          f"{model.n_parameters():,} parameters, pretraining: {pretraining['mixture']}, "
          f"{pretraining['step']:,} of {pretraining['max_steps']:,} steps")
    print(f"books    {args.entries_min} to {args.entries_max} entries, up to {args.numbers_max} "
          f"numbers asked; tests: {args.test_books} books of {args.test_entries_min} to "
          f"{args.test_entries_max}")
    os.makedirs(args.out_dir, exist_ok=True)
    curve = saved["curve"] if saved else finetune(model, tok, args)
    if not saved:
        train.save_checkpoint(os.path.join(args.out_dir, "phonebook.pt"), dict(
            model=model.state_dict(), model_config=vars(model.config), tokenizer=tokenizer,
            finetuning=vars(args), pretraining=pretraining, curve=curve))

    respond, results = responder(model, tok, args), []
    for n in [n for n in N_NUMBERS if n <= min(args.numbers_max, args.test_entries_min)]:
        result = score(respond, test_books(args, n, args.test_books))
        results.append(result)
        low, high = result["digits_interval"]
        print(f"{n:3d} number{'s' * (n > 1)}: {result['digits']:.1%} of digits right (95% interval "
              f"{low:.1%} to {high:.1%}; chance 10%), {result['exact']:.1%} of numbers exact")
    show_example(respond, *test_books(args, results[-1]["n_numbers"], 1)[0])
    found = dict(config=vars(args), pretraining=pretraining, parameters=model.n_parameters(),
                 results=results, curve=curve, seconds=round(time.perf_counter() - begin),
                 torch=torch.__version__)
    path = os.path.join(args.out_dir, "phonebook.json")
    with open(path + ".part", "w") as file:
        json.dump(found, file, indent=1)
    os.replace(path + ".part", path)
    return found


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv == ["book"]:
            print("\n\n".join(write_book(np.random.default_rng(1), 6, 2, "val")))
        else:
            evaluate(*parse_args(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
