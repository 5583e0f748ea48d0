"""``python -m training``: writes the corpus, learns the tokenizer, trains both networks, exports them.

Everything goes under ``--work`` and is taken up from there after an interruption, by the code that began it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from itertools import accumulate, islice
from pathlib import Path

import torch
from tokenizers import Tokenizer

from training.batches import Plan
from training.corpus import samples
from training.export import export
from training.model import Shape
from training.tokens import Renderer, train_tokenizer
from training.train import Recipe, Trainer

SEED = 2026
VOCABULARY = 1024
STEPS = 5000
LATE = 0.54
"""The part of the steps after which the learning rates fall, and what takes longest is practised most."""
REFINEMENTS = (0.24, 0.24, 0.12, 0.28, 0.2, 0.2)
"""How many steps follow in each, as parts of the first ones."""
_ROWS_PER_STEP = 40
_ONLY_SCORES = ("card.py", "evaluate.py", "guessing.py")


def main() -> int:
    parser = argparse.ArgumentParser("training", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".cache/builtin-model"), help="where to keep what is made")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--part", choices=("model", "draft"), action="append")
    parser.add_argument("--until", type=int, help="stop after this step, to go on later")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if trouble := claim(given.work, given.steps):
        parser.error(trouble)
    tokenizer = _tokenizer(given.work)
    for part in given.part or ("model", "draft"):
        steps = given.steps if part == "model" else given.steps // 3
        trainer = _trainer(part, given.work, tokenizer, steps)
        _say(f"{part}: {sum(p.numel() for p in trainer.network.parameters()):,} weights, at step {trainer.step}")
        trainer.run(_say, until=given.until)
        export(trainer.result(), tokenizer, given.work / "out" / ("" if part == "model" else part))
    return 0


def claim(work: Path, steps: int) -> str:
    """Why nothing can be added to what ``work`` holds; empty, and noted there, if it is all of this code's making."""
    maker = hashlib.sha256(f"{steps} steps".encode())
    for source in sorted(Path(__file__).parent.rglob("*")):
        if source.suffix in (".py", ".toml", ".jinja") and source.name not in _ONLY_SCORES:
            maker.update(source.name.encode() + source.read_bytes())
    note = work / "made-by"
    if any(work.iterdir()) and (not note.exists() or note.read_text() != maker.hexdigest()):
        return f"{work} holds what other code has made, or another number of steps: move it away, or give --work."
    note.write_text(maker.hexdigest())
    return ""


def _tokenizer(work: Path) -> Tokenizer:
    file = work / "tokenizer.json"
    if not file.exists():
        renderer = Renderer()
        texts = [renderer(sample) for sample in islice(samples(SEED, longest_passage=10), 20_000)]
        draft = file.with_suffix(".draft")
        train_tokenizer(texts, VOCABULARY).save(str(draft))
        draft.replace(file)
    return Tokenizer.from_file(str(file))


def _trainer(part: str, work: Path, tokenizer: Tokenizer, steps: int) -> Trainer:
    size = tokenizer.get_vocab_size()
    shape = Shape(size) if part == "model" else Shape(size, hidden=96, inner=256, layers=2, heads=3, kv_heads=1)
    lengths = tuple(round(steps * part) for part in REFINEMENTS)
    begins = tuple(accumulate(lengths[:-1], initial=steps))
    plan = Plan(SEED, _ROWS_PER_STEP, late_from=round(steps * LATE), refined_from=begins, context=shape.context)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Trainer(shape, Recipe(steps, lengths, plan, cool_down=1 - LATE), tokenizer, work / f"{part}.pt", device)


def _say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
