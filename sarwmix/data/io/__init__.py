"""Readers of files: GeoTIFF, Zarr, LMDB."""
