"""Rewrites of the captured graph into fused ops, one file each. A rewrite is a module with NAME and find(graph), see compiler/ir/rewrite.py."""
from . import attention

PIPELINE = (
    attention,  # softmax(score(q k^T)) v -> tileweld::attention
)
