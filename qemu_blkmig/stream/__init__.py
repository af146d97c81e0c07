"""The old wire format: QEMU's migration stream with its "block" section, as QEMU 0.12 to 9.0 spoke it."""
