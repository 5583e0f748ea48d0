"""The models that workers show, and the one that is served. Knows cards and tokenizers; knows no workers."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from proto.control import ModelCard
from proto.errors import CheckpointError, NoWorker
from proto.hashing import BlockHasher, hash_key
from proto.settings import ModelSettings
from router.tokenizer import ServedModel

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Models:
    """One ServedModel per layout that was shown. ``serve`` says which of them is current; ``on_served`` hears of it."""

    def __init__(
        self,
        settings: ModelSettings,
        *,
        chat_template: str | None = None,
        prefix_hash_key: str = "",
        on_served: Callable[[ServedModel], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._chat_template = chat_template
        self._hash_key = hash_key(prefix_hash_key)
        self._known: dict[str, tuple[ServedModel, BlockHasher]] = {}
        self._layout = ""
        self._on_served = on_served
        self.trouble = "no worker has been seen yet"
        """Why there is no current model."""

    def knows(self, layout: str) -> bool:
        return layout in self._known

    async def learn(self, card: ModelCard) -> None:
        """Makes the card's model usable. Raises CheckpointError or SettingsError where its tokenizer is not."""
        served = await asyncio.to_thread(self._load, card)
        hasher = BlockHasher(card.hash_namespace, card.block_size, self._hash_key)
        self._known[card.layout] = (served, hasher)
        log.info("model %s: %d tokens of context, vocabulary of %d", card.model, card.max_model_len, card.vocab_size)

    def serve(self, layout: str) -> None:
        """From now on ``layout``'s model is current. An empty or unknown one changes nothing."""
        if layout != self._layout and layout in self._known:
            self._layout = layout
            self._on_served(self.current())

    def current(self) -> ServedModel:
        """Raises NoWorker while no worker was ever seen."""
        return self._find(self._layout)[0]

    def hasher(self, layout: str) -> BlockHasher:
        """For blocks of ``layout``. Raises NoWorker while no worker of it was ever seen."""
        return self._find(layout)[1]

    def _find(self, layout: str) -> tuple[ServedModel, BlockHasher]:
        if layout not in self._known:
            raise NoWorker(self.trouble)
        return self._known[layout]

    def _load(self, card: ModelCard) -> ServedModel:
        settings = self._settings
        files = dict(card.files)
        if settings.tokenizer is not None:
            files = {name: data for name, data in files.items() if name not in TOKENIZER_FILES}
            files |= self._tokenizer_files(settings.tokenizer)
        names = settings.served_model_name or card.served_names
        return ServedModel.from_card(
            dataclasses.replace(card, files=files, served_names=names),
            chat_template=self._chat_template,
            generation_config=settings.generation_config,
            override_generation_config=settings.override_generation_config,
        )

    def _tokenizer_files(self, place: str) -> dict[str, bytes]:
        local = Path(place).expanduser()
        folder = local if local.is_dir() else self._from_hub(place)
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        if "tokenizer.json" not in files:
            raise CheckpointError(f"--tokenizer {place}: there is no tokenizer.json")
        return files

    def _from_hub(self, name: str) -> Path:
        from huggingface_hub import snapshot_download  # slow to import, and seldom needed

        settings = self._settings
        try:
            folder = snapshot_download(
                name,
                revision=settings.revision,
                cache_dir=settings.download_dir,
                token=settings.hf_token,
                allow_patterns=list(TOKENIZER_FILES),
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"--tokenizer {name} is no folder, and the hub does not give it: {error}") from error
        return Path(folder)
