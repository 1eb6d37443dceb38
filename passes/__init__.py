"""Rewrites of the captured graph into fused ops, one file each."""
