"""The fuzzer's corpus, replayed: what it once found, and what it starts from (fuzz/decoder.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.decoder import CORPUS, check


@pytest.mark.parametrize("seed", sorted(CORPUS.iterdir()), ids=lambda path: str(path.name))
def test_every_seed_is_decoded_or_refused_however_it_is_cut(seed: Path) -> None:
    data = seed.read_bytes()
    for step in {data[0], 0, 1, 6, 255}:
        check(bytes([step]) + data[1:])
