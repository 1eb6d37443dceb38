"""Conversions of a model's weights that change what the model is. Opt-in, each reports what it cost; none is part of compilation.

    >>> from tileweld import convert
    >>> report = convert.to_gqa(model, 1, calibration=tokens)          # tokens [B, T] int64; the model is changed in place
    >>> print(report)
    >>> print(convert.prune(model))                                    # dead heads and channels, exact
    >>> print(convert.quantize_(model, "weight_only"))                 # int8 weights, in place
"""
from .checkpoint import load_quantized, save_quantized
from .gqa import to_gqa
from .int8_modules import Int8Embedding, Int8Linear
from .prune import prune
from .quantize import QuantizedLayer, QuantizeReport, quantize_
from .report import ConversionReport, LayerReport, PrunedLayer, PruneReport
from .smooth import SmoothReport, smooth_

__all__ = ["ConversionReport", "Int8Embedding", "Int8Linear", "LayerReport", "PruneReport", "PrunedLayer", "QuantizeReport", "QuantizedLayer", "SmoothReport", "load_quantized", "prune", "quantize_", "save_quantized", "smooth_", "to_gqa"]
