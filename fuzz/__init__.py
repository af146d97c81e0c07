"""Fuzz targets; what they check is replayed by the tests."""
