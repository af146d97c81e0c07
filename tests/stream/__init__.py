"""The old wire format, against streams of a real QEMU and against the real QEMU."""
