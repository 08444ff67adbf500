"""numpy's tables fifteen times over, every hexadecimal digit drawn anew: a text that never repeats.

    python experiments/fresh_tables.py fresh.txt      then: python train.py --data=fresh.txt

20 MB, 18.2 million tokens, so that the 16.4 million of a default run read it less than once.
"""
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from model import errors_in_one_line
from objectives import find_files


def main(argv):
    if len(argv) != 1:
        raise ValueError("python experiments/fresh_tables.py OUT.txt")
    text = b"".join(open(path, "rb").read() for path in find_files("tables"))
    places = np.concatenate([np.arange(*found.span(1))
                             for found in re.finditer(b"0x([0-9a-f]+)", text)])
    rng, copy = np.random.default_rng(1), np.frombuffer(text, np.uint8).copy()
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    with open(argv[0], "wb") as file:
        for _ in range(15):
            copy[places] = digits[rng.integers(16, size=len(places))]
            file.write(copy.tobytes())


if __name__ == "__main__":
    with errors_in_one_line():
        main(sys.argv[1:])
