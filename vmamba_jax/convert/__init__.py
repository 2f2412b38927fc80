"""PyTorch weights in and out, without torch."""
