"""Every input that ever mattered, and some thousands made from them, within time and memory.

`tests/fuzz/run.py` finds such inputs; what it found is in `corpus/`. Here they are replayed.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from pathlib import Path

import pytest

from protos.chunk import chunk_message, read_chunk
from tests.fuzz.targets import TARGETS, seeds

CORPUS = Path(__file__).parent / "corpus"
MOST_CORPUS_BYTES = 300_000
MOST_BYTES, MOST_S = 8 << 20, 2.0  # that an input may take
MUTATED = {"claims": 30, "part": 150, "mirror": 200, "packed": 300, "update": 300}
EDGES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff" * 9)


def kept(target):
    """The corpus of a target, oldest first."""
    return [path.read_bytes() for path in sorted((CORPUS / target).glob("*"))]


def mutated(data, others, draw):
    """Some bytes changed, left out, put in, or taken from another input."""
    data = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at:at] = draw.choice(EDGES)
            case 2:
                del data[at : at + draw.choice((1, 4, 32))]
            case 3:
                edge = draw.choice(EDGES)
                data[at : at + len(edge)] = edge
            case _:
                other = draw.choice(others)
                cut = draw.randrange(len(other) + 1)
                data[at:] = other[cut:]
        data = data or bytearray(1)
    return bytes(data[:4096])


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_crashes_hangs_or_takes_memory(target):
    decode, good = TARGETS[target], seeds(target)
    known = kept(target) + good
    draw = random.Random(target)
    for data in good:
        decode(data)  # what is built once is not an input's
    inputs = known + [
        mutated(draw.choice(known), known, draw) for _ in range(MUTATED.get(target, 600))
    ]
    tracemalloc.start()
    try:
        for data in inputs:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            begun = time.process_time()
            decode(data)
            took_s = time.process_time() - begun
            took_bytes = tracemalloc.get_traced_memory()[1] - before
            assert took_s < MOST_S, f"{took_s:.1f} s for {data[:200].hex()}"
            assert took_bytes < MOST_BYTES, f"{took_bytes:,} bytes for {data[:200].hex()}"
    finally:
        tracemalloc.stop()


def test_every_decoder_begins_with_inputs_that_it_decodes():
    """Else the fuzzer would look at refusals only."""
    assert all(seeds(target) for target in TARGETS)


def test_the_corpus_stays_small():
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert 0 < sum(sizes) < MOST_CORPUS_BYTES
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)


@pytest.mark.parametrize("head", [b"", b"\x08"])
def test_a_message_of_a_megabyte_that_is_no_chunk_is_told_at_once(head):
    """A number of a million digits took minutes to put together."""
    begun = time.process_time()
    assert read_chunk(head + b"\xff" * 2**20) is None
    assert read_chunk(b"\x08\x01" * 2**19) is None
    assert time.process_time() - begun < 0.1


def test_numbers_of_a_chunk_have_64_bits_as_protobuf_s():
    message = b"\x08" + b"\xff" * 9 + b"\x7f" + chunk_message(read_chunk(b"\xc2\x02\x01a"))
    found = read_chunk(message)
    assert found is not None and found.offset == -1
