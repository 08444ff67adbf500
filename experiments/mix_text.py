"""Two texts in one: a folder for --data, of which a share is a second text, repeated as needed.

    python experiments/mix_text.py FOLDER [SHARE] [FIRST] [SECOND]      (0.25 packages tables)
    python train.py --data=FOLDER --block_size=256 --max_steps=12000 --out_dir=mixed

Makes the text of "Real text with a quarter of tables" in experiments/phonebook_trials.md.
"""
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from objectives import Corpus, Tokenizer


def mix(folder, share="0.25", first="packages", second="tables"):
    share, tok = float(share), Tokenizer()
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; it must be between 0 and 1")
    texts = [Corpus(data, tok) for data in (first, second)]
    os.makedirs(folder, exist_ok=True)
    for split in ("train", "val"):
        one, two = (np.fromfile(text.paths[split], text.dtype) for text in texts)
        times = max(1, round(len(one) * share / (1 - share) / len(two)))
        np.concatenate([one, *[two] * times]).tofile(os.path.join(folder, f"{split}.bin"))
        print(f"{split}: {len(one):,} tokens of {first}, {times} times {len(two):,} of {second}")


if __name__ == "__main__":
    try:
        mix(*sys.argv[1:])
    except (TypeError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}; {__doc__.splitlines()[2].strip()}")
