"""cuma-ds: a DeepSpeed trainer for the Cultural Mixture of Adapters (CuMA)."""

__version__ = "0.1.0"
