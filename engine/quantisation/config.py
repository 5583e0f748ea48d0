"""Which quantisation: config.json's quantization_config, and whether the flags agree with it. Opens no weights."""

from __future__ import annotations

from engine.config_file import ConfigFile
from engine.quantisation import compressed_tensors
from engine.quantisation.bitsandbytes import BitsAndBytes
from engine.quantisation.fp8 import BLOCK, Fp8
from engine.quantisation.packed import Awq, Gptq
from engine.quantisation.rounding import ROUNDINGS, Rounding
from engine.quantisation.scheme import Scheme
from proto.errors import SettingsError, UnsupportedModel
from proto.settings import ModelSettings

_SUFFIX = "_marlin"
"""vLLM has kernels of that name for AWQ and GPTQ; the checkpoints are the same."""

_SECTIONS = ("quantization_config", "compression_config")

Quantisation = Rounding | Scheme


def read_quantisation(config: ConfigFile, settings: ModelSettings) -> Quantisation | None:
    """What to do about the weights of that config.json; None: take them as they are.

    Raises UnsupportedModel for a way of storing that cannot be read here, SettingsError where the flags ask for
    another one than the checkpoint has.
    """
    wish = _wish(settings)
    section = next(filter(None, map(config.section, _SECTIONS)), None)
    if section is None:
        return _of_plain(wish)
    stored = _read(section)
    if wish not in (None, stored.name):
        raise SettingsError(
            f"quantization {wish} does not fit this checkpoint, which is {stored.describe()} already ({section.name}). "
            "Leave --quantization out, or take the unquantised checkpoint.",
            param="quantization",
        )
    if settings.load_format == "dummy":
        raise SettingsError(
            f"Dummy weights cannot be {stored.describe()}. Take a plain config.json, with --quantization "
            f"{', '.join(ROUNDINGS)} to round its dummy weights.",
            param="load_format",
        )
    return stored


def _wish(settings: ModelSettings) -> str | None:
    """--quantization, which --load-format bitsandbytes implies, without what makes no difference here."""
    wish = settings.quantization
    name = None if wish in (None, "none") else wish.removesuffix(_SUFFIX)
    if settings.load_format == "bitsandbytes":
        if name not in (None, "bitsandbytes"):
            raise SettingsError(
                f"load_format bitsandbytes contradicts quantization {name}; leave one out.", param="load_format"
            )
        return "bitsandbytes"
    return name


def _of_plain(wish: str | None) -> Rounding | None:
    if wish is None:
        return None
    if wish not in ROUNDINGS:
        raise SettingsError(
            f"quantization {wish} needs a checkpoint that was quantised so, and this one's config.json has no "
            f"quantization_config: its weights are plain. Take a checkpoint made by {wish}, round these at load with "
            f"--quantization {', '.join(ROUNDINGS)}, or leave the flag out.",
            param="quantization",
        )
    return ROUNDINGS[wish]


def _read(section: ConfigFile) -> Scheme:
    method = section.text("quant_method", _older_name(section)).lower().removesuffix(_SUFFIX)
    if method not in _READERS:
        raise UnsupportedModel(
            f"{section.name}: weights quantised by {method or 'an unnamed method'} are not supported. "
            f"Supported: {', '.join(_READERS)}, and plain weights."
        )
    return _READERS[method](section)


def _older_name(section: ConfigFile) -> str:
    """Before quant_method there was only one."""
    return "bitsandbytes" if section.has("load_in_4bit") or section.has("load_in_8bit") else ""


def _awq(section: ConfigFile) -> Scheme:
    bits, version = section.whole("bits", 4), section.text("version", "gemm").lower()
    if bits != 4 or version != "gemm" or not section.flag("zero_point", True):
        raise UnsupportedModel(
            f"{section.name}: AWQ of {bits} bits, version {version}, "
            f"{'with' if section.flag('zero_point', True) else 'without'} zero points is not supported. "
            "Supported: 4 bits, version gemm, with zero points."
        )
    return Awq(_group_size(section))


def _gptq(section: ConfigFile) -> Scheme:
    bits, stored = section.whole("bits"), section.text("checkpoint_format", "gptq").lower()
    if bits not in (4, 8) or stored not in ("gptq", "gptq_v2") or section.flag("is_marlin_format", False):
        raise UnsupportedModel(
            f"{section.name}: GPTQ of {bits} bits in format {stored} is not supported. "
            "Supported: 4 or 8 bits, format gptq or gptq_v2."
        )
    dynamic = section.section("dynamic")
    if dynamic is not None and not all(pattern.startswith("-") for pattern in dynamic.sections()):
        raise UnsupportedModel(f"{dynamic.name}: modules with parameters of their own are not supported.")
    return Gptq(bits, _group_size(section), zero_offset=1 if stored == "gptq" else 0)


def _fp8(section: ConfigFile) -> Scheme:
    kind = section.text("activation_scheme", "dynamic")
    block = tuple(section.numbers("weight_block_size")) if section.has("weight_block_size") else None
    if kind not in ("dynamic", "static") or block not in (None, BLOCK):
        raise UnsupportedModel(
            f"{section.name}: fp8 with {kind} activations and blocks of {block} is not supported. Supported: "
            f"dynamic or static activations, and blocks of {list(BLOCK)} or none."
        )
    return Fp8(BLOCK if block else None, is_static=kind == "static")


def _bitsandbytes(section: ConfigFile) -> Scheme:
    return BitsAndBytes(8 if section.flag("load_in_8bit", False) else 4)


def _group_size(section: ConfigFile) -> int:
    """-1, a scale per row, is the one number that may be negative."""
    size = int(section.number("group_size", 128))
    if size != -1 and size < 1:
        raise UnsupportedModel(f"{section.name}: groups of {size} are not supported.")
    return size


_READERS = {
    "fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": compressed_tensors.read,
}
