"""Fused attention you can trust: one meaning on every path, every gradient, on any machine."""

__version__ = "0.1.0"
