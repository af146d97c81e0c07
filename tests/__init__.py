"""Quick tests: pure, or against small NBD servers and a QEMU that runs no guest."""
