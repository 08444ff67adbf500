"""Byte pair encoding, learnt from text and written as a .tiktoken file.

    python experiments/make_vocabulary.py N_TOKENS OUT.tiktoken [DATA]

DATA is what train.py takes as --data, by default stdlib, the source of Python's standard library.
assets/bpe2048.tiktoken was made so, with 2,048 tokens, from Python 3.11's, in 12 s. Words are what
Tokenizer splits text into; the pair of neighbouring tokens that is most frequent, counted over all
words, becomes the next token.
"""
import base64
import collections
import os
import sys

import regex

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from objectives import PATTERN, find_files


def learn(texts, n_tokens):
    """-> list of n_tokens byte strings, all single bytes first."""
    counts = collections.Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [(list(word.encode()), n) for word, n in counts.items()]
    tokens = [bytes([i]) for i in range(256)]
    pairs, holders = collections.Counter(), collections.defaultdict(set)

    def count(k, sign):
        ids, n = words[k]
        for pair in zip(ids, ids[1:]):
            pairs[pair] += sign * n
            (holders[pair].add if sign > 0 else holders[pair].discard)(k)

    for k in range(len(words)):
        count(k, 1)
    while len(tokens) < n_tokens:
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if not pairs[best]:
            raise ValueError(f"this text has pairs for {len(tokens)} tokens only: pass more, or "
                             f"{len(tokens)} instead of {n_tokens}")
        for k in list(holders[best]):
            count(k, -1)
            ids, i = words[k][0], 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i:i + 2] = [len(tokens)]
                i += 1
            count(k, 1)
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def main(argv):
    try:
        match argv:
            case [n_tokens, out, *data] if n_tokens.isdigit() and len(data) < 2:
                files = find_files(data[0] if data else "stdlib")
            case _:
                raise ValueError("make_vocabulary.py takes N_TOKENS OUT.tiktoken [DATA]")
        texts = (file.read_text("utf-8", errors="replace") for file in files)
        tokens = learn(texts, int(n_tokens))
        with open(out, "w") as file:
            for rank, token in enumerate(tokens):
                file.write(f"{base64.b64encode(token).decode()} {rank}\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
