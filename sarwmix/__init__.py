"""Sentinel-1 specific parts: data sets, weighting, transforms, metrics, preparation."""
