"""QEMU's control side: everything that is said to a QEMU over QMP, and to its guest agent."""
