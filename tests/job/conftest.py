"""The real QEMUs and images of the QMP side's tests."""

from tests.qmp.conftest import make_image, start_qemu

__all__ = ["make_image", "start_qemu"]
