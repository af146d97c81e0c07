"""Moves a running QEMU guest with its local disks to another QEMU, without shared storage."""

__version__ = "0.1.0"
