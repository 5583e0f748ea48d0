"""Finding a checkpoint: a local folder as it is, a hub name by way of the hub's cache.

Knows file names; reads only what a model card carries. ``huggingface_hub`` is imported when a hub name is used, never
for a local folder; HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are its own environment variables.
"""

from __future__ import annotations

from pathlib import Path

from proto.errors import CheckpointError, SettingsError
from proto.settings import ModelSettings

CARD_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a router needs of a checkpoint, where present."""

_MODEL_FILES = ("config.json", "generation_config.json")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
_NOT_OURS = ("consolidated*", "original/*")


def locate(settings: ModelSettings) -> Path:
    """The folder of ``settings.model``, downloaded when it is a hub name (without weights for dummy ones).

    Raises SettingsError when no model is named, CheckpointError when it cannot be found or fetched.
    """
    if not settings.model:
        raise SettingsError("No model given: name a local folder or a hub model.", param="model")
    weights = () if settings.load_format == "dummy" else _WEIGHT_FILES
    return _folder(settings.model, settings, CARD_FILES + weights)


def locate_tokenizer(settings: ModelSettings, model_folder: Path) -> Path:
    """The folder of the tokenizer: the model's own unless another one is named."""
    return _folder(settings.tokenizer, settings, CARD_FILES) if settings.tokenizer else model_folder


def card_files(model_folder: Path, tokenizer_folder: Path) -> dict[str, bytes]:
    """The contents of ``CARD_FILES``: the model's configs, everything else from the tokenizer's folder."""
    files: dict[str, bytes] = {}
    for name in CARD_FILES:
        path = (model_folder if name in _MODEL_FILES else tokenizer_folder) / name
        if path.is_file():
            files[name] = path.read_bytes()
    return files


def local_folder(name: str) -> Path | None:
    """The folder of that name, or None for what may be a hub name. Raises CheckpointError for what can be neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"There is no folder {name}, and a hub name has the form owner/model.", param="model")
    return None


def _folder(name: str, settings: ModelSettings, patterns: tuple[str, ...]) -> Path:
    return local_folder(name) or _download(name, settings, patterns)


def _download(name: str, settings: ModelSettings, patterns: tuple[str, ...]) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"There is no folder {name}, and huggingface_hub is not installed to fetch it."
        ) from error
    try:
        folder = snapshot_download(
            name,
            revision=settings.revision,
            cache_dir=settings.download_dir,
            token=settings.hf_token,
            allow_patterns=list(patterns),
            ignore_patterns=list(_NOT_OURS),
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())  # the library writes paragraphs
        raise CheckpointError(
            f"There is no folder {name}, and the hub did not give a model of that name: {reason}", param="model"
        ) from error
    return Path(folder)
