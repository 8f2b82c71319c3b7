"""Kinds of labels: inputs, losses, metrics, selection, intervals."""
