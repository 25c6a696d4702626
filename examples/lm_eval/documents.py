"""Documents for two small tasks of lm_eval, made on the spot: nothing is downloaded."""

import random
from pydoc_data.topics import topics

from datasets import Dataset

CONTEXT, ANSWER, CHOICES = 40, 12, 4  # words, words, answers
READ = 60  # topics that `tide calibrate --data pydoc --samples 60` has seen, which are left out


def continuations(documents: int = 100, **_: object) -> dict[str, Dataset]:
    """From Python's own documentation: 40 words, and which 12 follow. The others follow elsewhere in the same text."""
    rng = random.Random(0)
    texts = [text.split() for _, text in sorted(topics.items()) if len(text.strip()) > 100][READ:]
    rows, length = [], CONTEXT + ANSWER
    for words in texts:
        pieces = [words[i : i + length] for i in range(0, len(words) - length + 1, length)]
        answers = [" ".join(piece[CONTEXT:]) for piece in pieces]
        for piece, right in zip(pieces, answers, strict=True):
            others = sorted(set(answers) - {right})
            if len(others) < CHOICES - 1:
                continue
            choices = [right, *rng.sample(others, CHOICES - 1)]
            rng.shuffle(choices)
            context = " ".join(piece[:CONTEXT])
            rows.append({"context": context, "choices": choices, "answer": choices.index(right)})
    return {"test": Dataset.from_list(rng.sample(rows, documents))}


def sums(documents: int = 50, **_: object) -> dict[str, Dataset]:
    """Three sums and the beginning of a fourth."""
    rng = random.Random(0)
    rows = []
    for _ in range(documents):
        *shown, (a, b) = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(4)]
        lines = [f"{x} + {y} = {x + y}" for x, y in shown]
        rows.append({"prompt": "\n".join([*lines, f"{a} + {b} ="]), "sum": str(a + b)})
    return {"test": Dataset.from_list(rows)}
