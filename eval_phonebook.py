"""Can a model look a number up in a book that it has read? (section 4.3, A.9, figures 1 and 9)

    prefix   the question, the book, the question again
    label    the numbers that were asked for, in that order

A pretrained model is fine-tuned on such books. Then it writes its answers greedily, token by
token, from its recurrent state, never from the true tokens. Digit accuracy compares an answer
with the label position by position: chance is 10%. An exact number has all of its ten digits
right.

Symbols: a book has entries, a name and a number each; a row of T tokens holds as many books as fit.
Names are made of syllables, and every first and last name belongs to one split: train, val (the
curve, and the choice of a learning rate) or test. So no name of a test book is ever trained on.

Run it:  python eval_phonebook.py           fine-tune and score out/ckpt.pt -> out/phonebook.json
         python eval_phonebook.py --resume  go on, or score again what is fine-tuned
         python eval_phonebook.py --ckpt=out/phonebook.pt --out_dir=two --numbers_max=2
                                            on from there: two numbers are learnt after one
         python eval_phonebook.py book      one book, its question and its answer
         python eval_phonebook.py --help    every setting

Departures from the paper, ours: the presets `cpu` and `gpu` scale books, steps and learning rate
to small models (`paper` has the paper's own, and longer rows, which our tokens need); the names;
books that grow, as large ones alone hide what is to be learnt.
"""
import itertools
import json
import os
import signal
import sys
import time
import zlib
from functools import lru_cache

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends the imports without a word

import train                       # before torch: it sets how threads wait
import numpy as np
import torch

from model import LM, MIXERS, errors_in_one_line, fits, load_checkpoint, number
from objectives import Loader, Tokenizer, lay_out, pack, progress_bar

STARTS = "A Be Bo Ca Da De E Fa Fe Ga He I Jo Ka La Le Lo Ma Me Mi Na No O Pa Ra Ro Sa Se Ta Vi"
MIDDLES = "be ci da di fo ga ki la le lo ma mi mo na ni pe ra re ri ro sa si ta te to va vi wi ya"
ENDS = "bin dal den dra fer gan lan len lia lin mar mir na nel nia nor ra ren rin ron sa sen son " \
       "ta tan via vin wen win zo"
QUESTION = "What are the phone numbers for {}? Find them in the phonebook {}."      # figure 9
PRETRAINING = {"cpu": "cpu", "wide": "wide", "gpu": "gpu", "paper": "1.4b"}     # train.py's presets
PRESETS = {                        # cpu: the defaults below
    "cpu": dict(),
    "wide": dict(max_steps=1066, batch_size=2, lr=1e-3),
    "gpu": dict(entries_max=220, numbers_max=32, test_entries=[200],
                test_numbers=[1, 2, 4, 8, 16, 32], max_steps=1000, batch_size=16,
                block_size=16384, lr=3e-4, beta2=0.95),
    "paper": dict(entries_min=200, entries_max=800, books="uniform", numbers_max=32,
                  test_entries=[775], test_numbers=[1, 2, 4, 8, 16, 32], max_steps=1000,
                  cooldown=0.0, batch_size=64, block_size=32768, lr=5e-5, beta2=0.95),
}
SPLITS = "train", "val", "test"
A_NUMBER = "669-174-4914"
MAY_CHANGE = train.MAY_CHANGE | {"test_entries", "test_numbers", "test_books"}


def numbers_with_commas(text):
    """A type of flag."""
    return [number(int, 1, 10 ** 4)(count) for count in text.split(",")]


def parse_args(argv):
    """-> settings; of a resumed run those that it was saved with."""
    parser, flag = train.shared_flags("python eval_phonebook.py [--FLAG=VALUE ...], or\n"
                                       "       python eval_phonebook.py book")
    flag("--ckpt", help="checkpoint to fine-tune, also once more; by default ckpt.pt in out_dir")
    flag("--scratch", default="none", choices=["none", *MIXERS],
         help="instead of a checkpoint, random weights of this architecture: no pretraining")
    flag("--causal", action="store_true", help="with --scratch: no block reads right to left")
    flag("--preset", default="cpu", choices=PRESETS, help="defaults of a size; see PRESETS")
    flag("--entries_min", default=4, help="the fewest entries of a book; with 2 it begins easier")
    flag("--entries_max", default=32, help="the most")
    flag("--books", default="growing", choices=("growing", "uniform"),
         help="uniform: of any size from the first step on; growing: of entries_min at first")
    flag("--numbers_max", default=1, help="numbers asked for: 1 to this many, uniform")
    flag("--question", default="both", choices=("both", "after"),
         help="asked before and after the book, or only after it")
    flag("--test_entries", default=[4, 8, 16, 32], type=numbers_with_commas,
         help="entries of test books")
    flag("--test_numbers", default=[1], type=numbers_with_commas,
         help="numbers asked for in test books")
    flag("--test_books", default=512, help="for each of both; 0: no test")
    flag("--max_steps", default=1600, help="steps of fine-tuning")
    flag("--batch_size", default=1, help="rows in a step")
    flag("--block_size", default=3072, help="tokens in a row")
    flag("--lr", default=2e-3, help="reached after 50 steps")
    flag("--cooldown", default=0.25,
         help="last share of the steps, in which the learning rate falls to 0")
    flag("--beta2", default=0.99, help="AdamW's memory of squared gradients")

    args = parser.parse_args(argv)
    tuned = os.path.join(args.out_dir, "phonebook.pt")
    if args.resume:
        saved = load_checkpoint(tuned, "finetuning", "pretraining", "results", "example")
        args = train.resumed(parser, argv, saved["finetuning"], tuned, MAY_CHANGE)
    else:
        parser.set_defaults(ckpt=os.path.join(args.out_dir, "ckpt.pt"), **PRESETS[args.preset])
        args = parser.parse_args(argv)
    if args.causal and args.scratch == "none":
        raise ValueError("causal is for random weights; pass --scratch=ARCHITECTURE, or drop "
                         "--causal: a checkpoint knows what it is")
    if min(args.test_numbers) > max(args.test_entries):
        raise ValueError(f"test_numbers {args.test_numbers} are all above test_entries "
                         f"{args.test_entries}; pass smaller ones")
    if args.entries_max < args.entries_min:
        raise ValueError(f"entries_max is {args.entries_max}; it must be entries_min, "
                         f"{args.entries_min}, or more")
    return args


# ---- books -------------------------------------------------------------------------------------

@lru_cache
def names(split: str):
    """-> (first names, last names) of 'train' (eight tenths), 'val' or 'test'."""
    parts = STARTS.split(), MIDDLES.split(), ENDS.split()
    first, last = itertools.product(parts[0], parts[2]), itertools.product(*parts)
    side = {"train": range(8), "val": [8], "test": [9]}[split]
    return [[name for name in map("".join, each) if zlib.crc32(name.encode()) % 10 in side]
            for each in (first, last)]


def phone_numbers(rng, n):
    """Ten random digits each, as 669-174-4914."""
    return ["{}{}{}-{}{}{}-{}{}{}{}".format(*digits) for digits in rng.integers(10, size=(n, 10))]


def write_book(rng, n_entries: int, n_numbers: int, split: str, question="both"):
    """-> (prompt, answer); `split` is 'train', 'val' or 'test'."""
    first, last = names(split)
    people = [f"{first[k // len(last)]} {last[k % len(last)]}"
              for k in rng.choice(len(first) * len(last), n_entries, replace=False)]
    numbers = phone_numbers(rng, n_entries)
    asked = rng.choice(n_entries, n_numbers, replace=False)
    names_asked = [people[k] for k in asked]
    if n_numbers > 1:
        names_asked[-1] = f"and {names_asked[-1]}"
    who = (" " if n_numbers == 2 else ", ").join(names_asked)
    entries = "\n".join(f"{name}: {number}" for name, number in zip(people, numbers))
    before = f"{QUESTION.format(who, 'below')}\n\n" if question == "both" else ""
    prompt = f"{before}Phonebook:\n{entries}\n\n{QUESTION.format(who, 'above')}"
    return prompt, ", ".join(numbers[k] for k in asked)


class Books:
    """Batches of books: like objectives.Batches a pure function of (seed, rank, step, split)."""

    def __init__(self, tok: Tokenizer, args):
        self.tok, self.args = tok, args

        def size(text):
            return len(tok.encode(text))
        firsts, lasts = names("train")
        bare = max(map(size, firsts))
        first, last = (max(size(f" {name}") for name in each) for each in (firsts, lasts))
        # tokens at most: beside entries and names, of an entry, of a number asked for
        self.frame = (2 * size(QUESTION.format("", "below")) + 2 * size(" and")
                      + size("\n\nPhonebook:\n\n\n"))
        self.entry = bare + last + len(f": {A_NUMBER}\n")      # a character is a token at most
        self.asked = 2 * (first + last + size(",")) + len(f"{A_NUMBER}, ")
        largest = self.longest(args.entries_max)
        if largest > args.block_size:
            raise ValueError(f"a book of {args.entries_max} entries takes up to {largest} "
                             f"tokens, more than block_size {args.block_size}; pass --block_size="
                             f"{largest} or a smaller --entries_max or --numbers_max")

    def longest(self, n_entries: int) -> int:
        """Tokens that a prompt and its answer take at most."""
        return (self.frame + n_entries * self.entry
                + min(n_entries, self.args.numbers_max) * self.asked)

    def batch(self, seed, rank, step, action=None, split="train") -> dict:
        """(B, T) arrays as objectives.lay_out gives them; `action` has no meaning here."""
        rng = np.random.default_rng([seed, rank, step, SPLITS.index(split)])
        args, tok, most = self.args, self.tok, self.args.entries_max
        if args.books == "growing":                 # from entries_min to entries_max
            progress = (step + 1) / args.max_steps
            most = round(args.entries_min * (most / args.entries_min) ** progress)

        def draw():
            n_entries = int(rng.integers(args.entries_min, most + 1))
            n_numbers = int(rng.integers(1, min(n_entries, args.numbers_max) + 1))
            prompt, answer = write_book(rng, n_entries, n_numbers, split, args.question)
            prefix, label = tok.encode(prompt), np.append(tok.encode(answer), tok.DONE)
            size = len(prefix) + len(label)
            return (0, prefix, label), size, size

        packed = pack(args.batch_size, args.block_size, self.longest(most), draw)
        return lay_out([[book for book, _ in row] for row in packed], args.block_size, tok)

    def __getitem__(self, key):
        return self.batch(*key)


def unseen_books(args, n_entries: int, n_numbers: int, n_books: int, split="test") -> list:
    """[(prompt, answer)], the same for every model and seed."""
    rng = np.random.default_rng([n_entries, n_numbers, n_books, SPLITS.index(split)])
    return [write_book(rng, n_entries, n_numbers, split, args.question) for _ in range(n_books)]


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


def responder(model: LM, tok: Tokenizer, args):
    """A model as `score` asks it: greedy decoding from the recurrent state, some prompts at a
    time."""
    def respond(prompts, n_numbers):
        longest, answers = len(", ".join([A_NUMBER] * n_numbers)), []   # tokens, at most
        rows = max(1, min(64, 32768 // len(tok.encode(max(prompts, key=len)))))
        for start in range(0, len(prompts), rows):
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

def finetune(model, tok, args, saved, save, stop) -> dict:
    """The paper's protocol (A.9): AdamW without weight decay, a constant learning rate. Our
    choice: it rises over the first 50 steps, and falls to 0 over the last share `cooldown` of
    them. -> what a checkpoint needs to go on, of which the curve has some 20 points: step, mean
    loss since the last, share of digits right on 128 validation books of entries_max entries."""
    books, held_out = Books(tok, args), unseen_books(args, args.entries_max, 1, 128, "val")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.beta2),
                                  weight_decay=0.0, fused=True)
    learner = train.Learner(model, optimizer, args, clip=1.0)
    progress = saved or dict(step=0, curve=[], losses=[])
    begin, curve, losses = progress["step"], progress["curve"], [*progress["losses"]]
    if saved:
        with fits(args.out_dir):
            learner.load_state_dict(saved)
    batches = Loader(books, args.seed, args.workers).steps(begin, args.max_steps, None)
    bar = progress_bar(batches, "fine-tuning", args.max_steps, initial=begin, unit="step")
    for step, batch in enumerate(bar, begin + 1):
        stop.at_once = False
        falling = (args.max_steps - step + 1) / max(1, args.cooldown * args.max_steps)
        lr = args.lr * min(1, step / 50, falling)
        losses.append(learner.step(batch, lr)[0])
        at_point = step % max(1, args.max_steps // 20) == 0 or step == args.max_steps
        if at_point:
            digits = score(responder(model, tok, args), held_out)["digits"]
            loss = torch.stack([loss.cpu() for loss in losses]).mean().item()
            curve.append(dict(step=step, loss=loss, digits=digits))
            bar.set_postfix_str(f"loss {loss:.3f}, {digits:.0%} of digits")
            losses.clear()
        if at_point or stop.asked:
            progress = dict(learner.state_dict(), step=step, curve=curve,
                            losses=[loss.cpu() for loss in losses])
            save(progress)
            stop.saved(step, args, at_once=True)
    return progress


def load(args, tuned):
    """-> (model, its Tokenizer, settings and number of steps of its pretraining, and of fine-tuning
    before this one, what `tuned` holds of a resumed run)."""
    if args.resume:
        model, tokenizer, saved = LM.load(tuned)
        return model, Tokenizer(**tokenizer), saved["pretraining"], saved
    if args.scratch != "none":
        preset = PRETRAINING[args.preset]
        sizes = train.parse_args([f"--arch={args.scratch}", f"--preset={preset}"])
        sizes.causal, sizes.mixture, sizes.max_steps = args.causal, "none", 0
        tok = Tokenizer(sizes.tokenizer, n_masks=sizes.block_size // 8)
        torch.manual_seed(args.seed)
        return LM(train.model_config(sizes, tok)), tok, {**vars(sizes), "step": 0}, None
    model, tokenizer, saved = LM.load(args.ckpt)
    if "finetuning" in saved:
        before = {**saved["finetuning"], "step": saved["step"]}
        pretraining = {**saved["pretraining"], "finetuning": before}
    else:
        pretraining = {**saved["config"], "step": saved["step"]}
    return model, Tokenizer(**tokenizer), pretraining, None


def evaluate(args) -> None:
    """Fine-tune and score one model, into phonebook.json."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("WORLD_SIZE is not 1: fine-tuning is for one device; run it without "
                         "torchrun")
    tuned = os.path.join(args.out_dir, "phonebook.pt")
    with train.StopSignal("eval_phonebook.py") as stop, train.claimed(args.out_dir, "phonebook.pt"):
        if os.path.exists(tuned) and not args.resume:
            raise ValueError(f"{tuned} exists; go on or score it again with --resume, or fine-tune "
                             f"into another folder: --ckpt={args.ckpt} --out_dir=ANOTHER")
        finetune_and_score(args, tuned, stop)


def finetune_and_score(args, tuned, stop):
    begin = time.perf_counter()
    model, tok, pretraining, saved = load(args, tuned)
    train.settle(args)
    model.to(args.device)
    print(f"model    {pretraining['arch']}{', causal' * model.config.causal}, "
          f"{model.n_parameters():,} parameters, pretraining: {pretraining['mixture']}, "
          f"{pretraining['step']:,} of {pretraining['max_steps']:,} steps"
          + ", and fine-tuned" * ("finetuning" in pretraining))
    print(f"books    {args.entries_min} to {args.entries_max} entries, up to {args.numbers_max} "
          f"numbers asked; tests: {args.test_books} books each of "
          f"{', '.join(map(str, args.test_entries))} entries")

    results = saved["results"] if saved else []
    example = list(unseen_books(args, args.entries_max, 1, 1)[0])
    if saved and saved["example"] != example:
        raise ValueError(f"{tuned} was fine-tuned on books with other names, numbers or words; use "
                         f"the code it was made with, or choose another --out_dir")

    def save(progress):
        train.save_checkpoint(tuned, dict(
            progress, model=model.state_dict(), model_config=vars(model.config),
            tokenizer=tok.arguments, finetuning=vars(args), pretraining=pretraining,
            example=example, results=results))

    progress = finetune(model, tok, args, saved, save, stop)
    respond = responder(model, tok, args)
    for n_entries, n in itertools.product(args.test_entries, args.test_numbers):
        if n <= n_entries and args.test_books:
            books = unseen_books(args, n_entries, n, args.test_books)
            result = dict(n_entries=n_entries, **score(respond, books))
            same = "n_entries", "n_numbers", "books"            # earlier scores of others stay
            results = [each for each in results if any(each[k] != result[k] for k in same)]
            results.append(result)
            save(progress)
            low, high = result["digits_interval"]
            print(f"{n:3d} number{'s' * (n > 1)} of {n_entries} entries: {result['digits']:.1%} of "
                  f"digits right (95% interval {low:.1%} to {high:.1%}; chance 10%), "
                  f"{result['exact']:.1%} of numbers exact")
    show_example(respond, *example)
    path = os.path.join(args.out_dir, "phonebook.json")
    found = dict(config=vars(args), pretraining=pretraining, parameters=model.n_parameters(),
                 results=results, curve=progress["curve"],
                 seconds=round(time.perf_counter() - begin), torch=torch.__version__)
    with train.replacing(path) as part, open(part, "w") as file:
        json.dump(found, file, indent=1)


def main(argv):
    with errors_in_one_line():
        if argv == ["book"]:
            print("\n\n".join(write_book(np.random.default_rng(1), 6, 2, "test")))
        else:
            evaluate(parse_args(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
