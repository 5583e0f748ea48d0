"""Text to tokens: the chat template, a byte-level BPE learnt from samples, and which tokens are to be learnt.

Digits, and the space before a digit or a capital, are tokens of their own: a name or a number is then the same tokens
wherever it stands, and saying it again is copying.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from router.template import ChatTemplate
from router.values import Json
from training.sample import Sample

END, SYSTEM, USER, ASSISTANT, TOOL = range(5)
SPECIAL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
PLAIN_MARKS = ("<tool_call>", "</tool_call>", "<tools>", "</tools>")
"""Tokens of their own that a client sees."""

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
_PIECES = r"\d| ?[a-z]+|[A-Z]+[a-z]*| ?[^\sA-Za-z\d]+|\s"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample's tokens. ``learnt[i]`` says whether token i + 1 is to be predicted from the ones before."""

    tokens: Sequence[int]
    learnt: Sequence[bool]
    stretches: bool


class Renderer:
    """Samples as the served chat template renders them."""

    def __init__(self) -> None:
        self._template = ChatTemplate(TEMPLATE.read_text())

    def __call__(self, sample: Sample) -> str:
        tools = list[Json](sample.tools) or None
        return self._template.render({"messages": list[Json](sample.messages), "tools": tools})


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of ``size`` tokens; the special ones have the ids above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(PLAIN_MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in PLAIN_MARKS])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], samples: Sequence[Sample]) -> list[Encoded]:
    """The rendered ``texts`` of ``samples``, with what the assistant says, ends included, to be learnt."""
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [
        Encoded(encoding.ids, _learnt(encoding.ids), sample.stretches)
        for encoding, sample in zip(encodings, samples, strict=True)
    ]


def _learnt(tokens: Sequence[int]) -> list[bool]:
    learnt: list[bool] = []
    speaking = False
    for token in tokens:
        if token == ASSISTANT:
            speaking = True
        elif token == END:
            speaking = False
        learnt.append(speaking)
    return learnt
