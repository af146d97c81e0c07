"""What the user asked of `load`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qemu_blkmig.errors import UsageError
from qemu_blkmig.stream.framing import PAGE_SIZE


@dataclass(frozen=True)
class LoadOptions:
    """`images`: path by device. `sizes`, `expected`: bytes by device, None: of every device not named.

    `incremental`: parts that never come are left as they are, without a warning. Raises `UsageError` where a size is
    given for a device that has no image.
    """

    source: str
    images: Mapping[str, str]
    create: bool = False
    format: str | None = None
    sizes: Mapping[str | None, int] = field(default_factory=dict)
    expected: Mapping[str | None, int] = field(default_factory=dict)
    require_complete: bool = False
    incremental: bool = False
    forward: str | None = None
    page_size: int = PAGE_SIZE

    def __post_init__(self) -> None:
        for name in (*self.sizes, *self.expected):
            if name is not None and name not in self.images:
                raise UsageError(f"a size is given for device {name!r}, but no image")

    def size_of(self, device: str) -> int | None:
        """Bytes that the device's image is to have, as far as the user told."""
        return self.sizes.get(device, self.sizes.get(None))

    def expected_size_of(self, device: str) -> int | None:
        """Bytes of the disk to whose end the device's blocks must reach, if they must."""
        return self.expected.get(device, self.expected.get(None))
