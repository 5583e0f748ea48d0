"""A served model as the HTTP side sees it: text to ids and back, chat prompts, sampling defaults, names.

Made from the ModelCard that every worker shows, so it needs neither the checkpoint, torch nor transformers; encodes
as transformers' tokenizers do. Knows nothing of HTTP or of workers.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from proto.control import ModelCard
from proto.errors import CheckpointError, InvalidRequest, SettingsError
from router.detokenizer import REPLACEMENT, IncrementalDetokenizer
from router.template import ChatTemplates
from router.values import Json, JsonObject

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MANY_TOKENS = 4096
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ServedModel:
    """Everything here is fixed once made, and may be used from several threads.

    ``templates.render`` makes a conversation a text that has its special tokens: encode it without adding them.
    ``defaults`` are sampling values for requests that name none; ``created`` is in Unix seconds.
    """

    def __init__(
        self, card: ModelCard, tokenizer: Tokenizer, templates: ChatTemplates, defaults: Mapping[str, float]
    ) -> None:
        self.card = card
        self.templates = templates
        self.defaults = dict(defaults)
        self.created = int(time.time())
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self._is_byte_level = b'"ByteLevel"' in tokenizer.decoder.__getstate__() if tokenizer.decoder else False
        self._anchor = self._find_anchor()
        self.token_text = functools.lru_cache(maxsize=65536)(self._token_text)
        self.token_bytes = functools.lru_cache(maxsize=65536)(self._token_bytes)

    @classmethod
    def from_card(
        cls,
        card: ModelCard,
        *,
        chat_template: str | None = None,
        generation_config: str = "auto",
        override_generation_config: Mapping[str, Json] | None = None,
    ) -> ServedModel:
        """``chat_template`` is a file's path; the other two are the settings of those names.

        Raises CheckpointError for a card without a usable tokenizer, SettingsError for a file or value that is wrong.
        """
        config = _read_object(card.files, "tokenizer_config.json")
        special = _special_tokens(config, _read_object(card.files, "special_tokens_map.json"))
        templates = ChatTemplates(_template_sources(card.files, config, chat_template), special)
        tokenizer = _load_tokenizer(card, config, special)
        defaults = _sampling_defaults(card, generation_config, override_generation_config or {})
        return cls(card, tokenizer, templates, defaults)

    @property
    def name(self) -> str:
        return self.card.served_names[0] if self.card.served_names else self.card.model

    @property
    def names(self) -> tuple[str, ...]:
        return self.card.served_names or (self.card.model,)

    @property
    def max_model_len(self) -> int:
        return self.card.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.card.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Other threads can run meanwhile. Raises InvalidRequest for text that is not Unicode (a lone surrogate)."""
        try:
            # As a batch of one: unlike plain encode, that lets go of the interpreter lock.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(encoding.ids)
        except (TypeError, UnicodeError):
            raise InvalidRequest("The prompt is not valid Unicode text.", param="prompt") from None

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Of many tokens, other threads can run meanwhile."""
        if len(tokens) > _MANY_TOKENS:
            # As a batch of one, for the same reason as in ``encode``; of few tokens that would only be slower.
            (text,) = self._tokenizer.decode_batch([tokens], skip_special_tokens=skip_special_tokens)
            return str(text)
        return str(self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def detokenizer(self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """For the tokens generated after ``prompt``."""
        hidden = self._special_ids if skip_special_tokens else frozenset()
        decode = functools.partial(self.decode, skip_special_tokens=False)
        return IncrementalDetokenizer(decode, self.token_bytes, prompt, hidden)

    def _token_text(self, token: int) -> str:
        """A token's text as it reads inside a sentence, special or not; U+FFFD for a part of a character."""
        if self._anchor is None:
            return self.decode([token], skip_special_tokens=False)
        anchor, anchor_text = self._anchor
        return self.decode([anchor, token], skip_special_tokens=False)[len(anchor_text) :]

    def _token_bytes(self, token: int) -> bytes:
        """A token's UTF-8 bytes, also where they are only a part of a character."""
        text = self.token_text(token)
        if REPLACEMENT not in text:
            return text.encode()
        piece = self._tokenizer.id_to_token(token) or ""
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        alphabet = _byte_alphabet() if self._is_byte_level else {}
        if piece and all(char in alphabet for char in piece):
            return bytes(alphabet[char] for char in piece)
        return text.encode()

    def _find_anchor(self) -> tuple[int, str] | None:
        """A token with plain text, to decode others after: alone, a token may lose its leading space."""
        for word in ("a", ":", "the", "0"):
            for token in self._tokenizer.encode(word, add_special_tokens=False).ids:
                text = self.decode([token])
                if text.strip() and REPLACEMENT not in text:
                    return token, text
        return None


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte, inverted: printable Latin-1 bytes stand for themselves, the others
    follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


def _load_tokenizer(card: ModelCard, config: JsonObject, special: Mapping[str, Json]) -> Tokenizer:
    """Whether a BOS is added is tokenizer.json's to say: like transformers, this does not read add_bos_token."""
    data = card.files.get("tokenizer.json")
    if data is None:
        raise CheckpointError(
            f"{card.model} has no tokenizer.json. Convert its tokenizer (transformers' save_pretrained writes one), "
            "or give --tokenizer."
        )
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{card.model}: tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_missing_tokens(tokenizer, config, special)
    return tokenizer


def _add_missing_tokens(tokenizer: Tokenizer, config: JsonObject, special: Mapping[str, Json]) -> None:
    """Tokens that only tokenizer_config.json declares; named ones are special even where the file does not say so."""
    known = tokenizer.get_added_tokens_decoder()
    declared = config.get("added_tokens_decoder")
    entries = declared if isinstance(declared, dict) else {}
    if wrong := [key for key in entries if not (key.isascii() and key.isdigit())]:
        raise CheckpointError(f"tokenizer_config.json: added_tokens_decoder: {wrong[0][:80]!r} is no token id")
    for key, entry in sorted(entries.items(), key=lambda item: int(item[0])):
        if int(key) not in known and isinstance(entry, dict):
            flags = {
                name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            tokenizer.add_tokens([AddedToken(str(entry.get("content", "")), **flags)])
    contents = {entry.content for entry in tokenizer.get_added_tokens_decoder().values() if entry.special}
    named = [str(special[name]) for name in _NAMED_TOKENS if name in special]
    extra = special.get("additional_special_tokens")
    named += [str(token) for token in extra] if isinstance(extra, list) else []
    missing = [
        AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(named) if token not in contents
    ]
    if missing:
        tokenizer.add_special_tokens(missing)


def _special_tokens(config: JsonObject, legacy: JsonObject) -> dict[str, Json]:
    """Name to text: the variables that chat templates see."""
    merged = {**legacy, **config}
    special: dict[str, Json] = {}
    for name in _NAMED_TOKENS:
        if (text := _token_content(merged.get(name))) is not None:
            special[name] = text
    extra = merged.get("extra_special_tokens") or merged.get("additional_special_tokens")
    if isinstance(extra, dict):
        special.update({name: text for name, entry in extra.items() if (text := _token_content(entry)) is not None})
    elif isinstance(extra, list):
        special["additional_special_tokens"] = [text for entry in extra if (text := _token_content(entry)) is not None]
    return special


def _token_content(entry: Json) -> str | None:
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _template_sources(files: Mapping[str, bytes], config: JsonObject, override: str | None) -> dict[str, str]:
    """Templates by name: the operator's file, else chat_template.jinja, else what the configuration embeds."""
    if override is not None:
        try:
            return {"default": Path(override).read_text(encoding="utf-8")}
        except (OSError, UnicodeError) as error:
            raise SettingsError(f"--chat-template {override}: {error}") from error
    embedded = config.get("chat_template") or _read_object(files, "chat_template.json").get("chat_template")
    sources: dict[str, str] = {}
    if isinstance(embedded, str):
        sources["default"] = embedded
    elif isinstance(embedded, dict):
        sources = {name: source for name, source in embedded.items() if isinstance(source, str)}
    elif isinstance(embedded, list):
        entries = [entry for entry in embedded if isinstance(entry, dict)]
        sources = {str(entry.get("name")): str(entry.get("template")) for entry in entries}
    if "chat_template.jinja" in files:
        sources["default"] = files["chat_template.jinja"].decode("utf-8", errors="replace")
    for path, data in files.items():
        if path.startswith("additional_chat_templates/") and path.endswith(".jinja"):
            sources[Path(path).stem] = data.decode("utf-8", errors="replace")
    return sources


def _sampling_defaults(card: ModelCard, source: str, override: Mapping[str, Json]) -> dict[str, float]:
    """The model's sampling defaults; max_new_tokens and all else that is not sampling is left out."""
    if source == "auto":
        config = _read_object(card.files, "generation_config.json")
    elif source == "vllm":
        config = {}
    else:
        path = Path(source) / "generation_config.json"
        try:
            config = _read_object({path.name: path.read_bytes()}, path.name)
        except OSError as error:
            raise SettingsError(f"--generation-config {source}: {error}") from error
    for name in override:
        if name not in _SAMPLING_DEFAULTS:
            raise SettingsError(
                f"--override-generation-config: unknown key {name!r} (known: {', '.join(_SAMPLING_DEFAULTS)})."
            )
    merged = {**config, **override}
    found = ((name, merged.get(name)) for name in _SAMPLING_DEFAULTS)
    return {name: value for name, value in found if isinstance(value, (int, float)) and not isinstance(value, bool)}


def _read_object(files: Mapping[str, bytes], name: str) -> JsonObject:
    """The JSON object in file ``name``; an empty one if there is no such file. Raises CheckpointError."""
    data = files.get(name)
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object.")
    return value
