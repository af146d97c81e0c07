#!/usr/bin/env python3
"""Coverage-guided fuzzing of the stream decoder with atheris (pip install atheris; Python up to what it supports).

    fuzz/decoder.py -max_total_time=3600 -max_len=65536 -rss_limit_mb=512 -timeout=10 WORK fuzz/corpus

WORK is a directory for what the fuzzer finds; fuzz/corpus, with its small seeds, is read. `fuzz/decoder.py --seeds`
writes the seeds anew. What the fuzzer checks is `check`, which tests/stream/test_corpus.py replays for every seed.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

CORPUS = Path(__file__).parent / "corpus"


def check(data: bytes) -> None:
    """Decode the input twice, whole and in pieces, passing on: it is decoded or refused, both times alike.

    The first byte says how it is cut. Long payloads are not in seeds: a chunk's data is cut short by the end.
    """
    if not data:
        return
    step, stream = data[0] + 1, data[1:]
    whole, pieces = _decoded(stream, len(stream) or 1), _decoded(stream, step)
    if whole != pieces:
        raise AssertionError(f"{whole} is not {pieces}")


def _decoded(stream: bytes, step: int) -> tuple[list[str], bytes, str]:
    """The events, what was passed on, and the error, as far as they do not depend on how the stream was cut."""
    from qemu_blkmig.errors import StreamError
    from qemu_blkmig.stream.events import BlockData, Passed
    from qemu_blkmig.stream.framing import Decoder
    from qemu_blkmig.stream.survey import Survey

    decoder, survey = Decoder(pass_on=True), Survey()
    told: list[str] = []
    passed = bytearray()
    payload = 0
    flaw = ""
    try:
        for end in range(step, len(stream) + step, step):
            for event in decoder.feed(stream[end - step : end]):
                if isinstance(event, Passed):
                    passed += event.data
                elif isinstance(event, BlockData):
                    payload += len(event.data)
                else:
                    survey.take(event)
                    told.append(repr(event))
        list(decoder.close())
    except StreamError as error:
        flaw = str(error)
        passed.clear()  # how much was passed on before a flaw depends on the cuts
    survey.result(len(stream), flaw or None)
    for chunks in survey.maps.devices.values():
        chunks.picture(64)
    return [*told, str(payload)], bytes(passed), flaw


def write_seeds() -> None:
    """The captured streams without their long payloads, and every record that a stream can have."""
    from tests.stream.streams import CAPTURED, captured
    from tests.stream.test_decoder import BAD_STREAMS, RAM_RECORDS, ram

    CORPUS.mkdir(exist_ok=True)
    seeds = [captured(name)[:600] for name in CAPTURED]
    seeds += [stream[:2048] for stream, _, _ in BAD_STREAMS.values()]
    seeds += [ram(record)[:8192] for record in RAM_RECORDS.values()]
    zero = struct.pack(">QB", 0x100009, 3) + b"vda"
    for name in ("zero-blocks", "old-machine"):
        stream = captured(name)
        seeds.append(stream[:265] + zero * 3 + stream[-512:])
    for seed in seeds:
        (CORPUS / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(b"\x10" + seed)


def main() -> None:
    """Fuzz, by libFuzzer's arguments."""
    if sys.argv[1:] == ["--seeds"]:
        write_seeds()
        return
    import atheris

    with atheris.instrument_imports(include=["qemu_blkmig.stream"]):
        import qemu_blkmig.stream.framing
        import qemu_blkmig.stream.survey  # noqa: F401
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
