"""Adding and subtracting numbers of up to three digits, column by column as one does on paper.

The working is part of the answer: each step is small enough for a small network, and whoever reads it can check it.
"""

from __future__ import annotations

from random import Random

from training.sample import Sample, asked, is_held_out

_FORMS = (
    "What is {0} {1} {2}?",
    "What is {0} {1} {2}?",
    "{0} {1} {2}",
    "{0}{1}{2}",
    "{0} {1} {2} = ?",
    "Calculate {0} {1} {2}.",
    "How much is {0} {3} {2}?",
    "What is {0} {3} {2}?",
)
_WORDS = {"+": "plus", "-": "minus"}


class Arithmetic:
    name = "arithmetic"

    def make(self, random: Random, *, held_out: bool) -> Sample:
        while True:
            a, b = _number(random), _number(random)
            sign = random.choice("+-")
            if is_held_out(sign, min(a, b), max(a, b)) == held_out:
                return asked(random.choice(_FORMS).format(a, sign, b, _WORDS[sign]), worked(a, sign, b))


def worked(a: int, sign: str, b: int) -> str:
    """``347 + 85`` as "347 + 085: 7+5=12, 4+8+1=13, 3+0+1=4. The answer is 432." """
    if sign == "-" and a < b:
        return f"Turned round, {_steps(b, sign, a)}. The answer is {a - b}."
    return f"{_steps(a, sign, b)}. The answer is {a + b if sign == '+' else a - b}."


def _steps(a: int, sign: str, b: int) -> str:
    width = max(len(str(a)), len(str(b)))
    first, second = f"{a:0{width}}", f"{b:0{width}}"
    carry, steps = 0, list[str]()
    for x, y in zip(map(int, reversed(first)), map(int, reversed(second)), strict=True):
        kept = f"{sign}1" if carry else ""
        if sign == "+":
            result = x + y + carry
            carry = int(result > 9)
        else:
            borrowed = x - y - carry < 0
            x += 10 * borrowed
            result = x - y - carry
            carry = int(borrowed)
        steps.append(f"{x}{sign}{y}{kept}={result}")
    return f"{first} {sign} {second}: {', '.join(steps)}"


def _number(random: Random) -> int:
    digits = random.choice((1, 2, 2, 3, 3, 3))
    return random.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)
