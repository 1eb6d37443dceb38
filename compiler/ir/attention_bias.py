"""Whether a bias of an attention's keys or values counts: what passes/bias_rules.py and passes/reassociate.py ask before they move one.

    softmax_j(f q.(k_j + b)) = softmax_j(f q.k_j)      f q.b is added to all scores of a row, and softmax does not see it
    sum_j p_j (v_j + c)      = sum_j p_j v_j + c       the weights of a row add up to 1
"""
from __future__ import annotations

from . import scalar as sc
from .attention import Variant
from .masking import ABSORBING


def why_key_bias_counts(variant: Variant) -> str | None:
    """Why a bias of the keys, the same for all positions, changes the result of an attention; None where it does not."""
    slope = variant.score_expr.diff(sc.S)
    if slope.has(sc.S):
        return f"the score {variant.score} is not affine in s"
    if slope.has(sc.J):
        return f"the slope of the score {variant.score} differs from key to key"
    if variant.sink:
        return "the sink is a score without a bias"
    return None if variant.fill <= -ABSORBING or variant.mask == "True" else f"masked keys have the score {variant.fill}, which is to stay the same distance away"


def why_value_bias_counts(variant: Variant) -> str | None:
    """Why a bias of the values does not simply come out of an attention; None where it does."""
    if variant.sink:
        return "the weights of a row add up to less than 1, by the sink's"
    if variant.value:
        return f"the weights have a factor, {variant.value}"
    return "a row that sees no key gives 0" if variant.empty == "zero" and variant.mask != "True" else None
