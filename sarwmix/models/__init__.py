"""Encoders by name, and loading of weights."""
