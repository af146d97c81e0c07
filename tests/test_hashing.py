"""The hash functions, by the digests that others publish for them."""

from __future__ import annotations

import sys

import pytest

from qemu_blkmig.errors import Refused
from qemu_blkmig.hashing import SIZES, Algorithm, hash_function

OF_NOTHING: dict[Algorithm, str] = {
    "xxh3-128": "99aa06d3014798d86001c324468d497f",
    "blake3": "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
}


@pytest.mark.parametrize("algorithm", SIZES)
def test_each_algorithm_gives_its_well_known_digest(algorithm: Algorithm) -> None:
    digest = hash_function(algorithm)(memoryview(b""))
    assert digest.hex() == OF_NOTHING[algorithm]
    assert len(digest) == SIZES[algorithm]


def test_a_hash_that_cannot_be_computed_here_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(Refused, match="blake3 cannot be computed on ") as refused:
        hash_function("blake3")
    assert "PyPI's blake3" in str(refused.value.advice)
