"""The way through the compiler: capture, the passes in order, the report, and the backend that joins them."""
