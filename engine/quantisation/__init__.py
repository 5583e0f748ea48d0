"""Quantised weights: what a checkpoint's config.json or a flag asks for, and the matrices that come of it.

``config`` decides once, at start: for a ``Rounding`` of plain weights as they are read (``rounding``), or for the
``Scheme`` in which a checkpoint stores them: ``packed`` (AWQ and GPTQ), ``fp8``, ``bitsandbytes``,
``compressed_tensors``. ``source`` puts either before the model. Embeddings and norms are never quantised, and lm_head
only where a checkpoint stores it so.
"""

from engine.quantisation.config import Quantisation, read_quantisation
from engine.quantisation.rounding import Rounding
from engine.quantisation.scheme import Scheme
from engine.quantisation.source import RoundingSource, StoredSource

__all__ = ["Quantisation", "Rounding", "RoundingSource", "Scheme", "StoredSource", "read_quantisation"]
