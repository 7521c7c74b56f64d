"""Weights in few bits: layers that multiply packed matrices, rounding, and the layouts of quantised files."""
