"""Conversions of a model's weights that change what the model is. Opt-in, each reports what it cost; none is part of compilation.

    >>> from tileweld import convert
    >>> report = convert.to_gqa(model, 1, calibration=tokens)          # tokens [B, T] int64; the model is changed in place
    >>> print(report)
"""
from .gqa import to_gqa
from .report import ConversionReport, LayerReport

__all__ = ["ConversionReport", "LayerReport", "to_gqa"]
