"""Measures a running stack and judges its answers."""
