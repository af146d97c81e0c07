"""Tests of the control side against real QEMU processes without a guest OS."""
