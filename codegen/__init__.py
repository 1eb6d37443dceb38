"""From fused ops and regions of the graph to kernel source."""
