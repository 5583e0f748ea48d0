"""scripts/perplexity: a plain model's figure is that of transformers, and quantised ones stand beside it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.support.checkpoints import make_checkpoint
from tests.support.quantised import quantise

ROOT = Path(__file__).parents[2]
TEXT = "Once upon a time there was a block of memory that travelled. " * 6
WINDOW = 48


def run(*argv: str) -> dict[str, tuple[float, float]]:
    """Per row of the table: perplexity, and its change in percent."""
    command = [sys.executable, str(ROOT / "scripts" / "perplexity"), *argv, "--device=cpu", "--threads=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    rows = re.findall(r"^ *(.+?)  +(\d+\.\d+) +([+-]\d+\.\d+) ±", done.stdout, re.MULTILINE)
    assert rows, done.stdout
    return {name: (float(perplexity), float(change)) for name, perplexity, change in rows}


def test_on_a_text(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = make_checkpoint(tmp_path / "plain")
    quantised, _ = quantise(plain, tmp_path, "gptq-asymmetric")
    (tmp_path / "text").write_text(TEXT)
    rows = run(str(plain), str(quantised), f"--text={tmp_path / 'text'}", f"--window={WINDOW}", "--dtype=float32")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    ids = Tokenizer.from_file(str(plain / "tokenizer.json")).encode(TEXT).ids
    losses = []
    for first in range(0, len(ids), WINDOW):
        window = torch.tensor(ids[first : first + WINDOW])
        if len(window) > 1:
            with torch.no_grad():
                logits = model(window[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    assert rows["float32"] == (pytest.approx(math.exp(float(torch.cat(losses).mean())), rel=1e-4), 0.0)
    changes = {name.split(" (")[0]: abs(change) for name, (_, change) in rows.items()}
    rounded = ["fp8", "and activations of 8 bits: fp8", "int8", "nf4"]
    assert list(changes) == ["float32", "float32, keys and values fp8", *rounded, "gptq"]
    assert all(change > 0 for name, change in changes.items() if name != "float32")
    assert len({perplexity for perplexity, _ in rows.values()}) == len(rows)


def test_on_the_models_own_words(tmp_path: Path) -> None:
    """Fewer bits are worse, on average, than the model that wrote the text."""
    plain = make_checkpoint(tmp_path / "plain")
    rows = run(str(plain), "--tokens=384", "--window=32", "--dtype=float32", "--round=int8,nf4", "--kv=auto")
    (plain_perplexity, _), (_, of_int8), (_, of_nf4) = rows.values()
    assert plain_perplexity < 300, "less than guessing among all tokens"
    assert of_nf4 > max(0, of_int8)
