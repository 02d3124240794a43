"""TFRecord files, read and checked without TensorFlow.

A record is the length of its data (8 bytes), the length's checksum (4), the data, and the data's
checksum (4), all little-endian. A checksum is a masked CRC-32C.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits in reverse
MASK_DELTA = 0xA282EAD8
LONGEST = 1 << 20  # bytes in a record: far more than an image of CIFAR-10 takes


def read(path: Path) -> list[bytes]:
    """The data of every record, in the file's order.

    Raises:
        OSError: the file cannot be read.
        ValueError: a record is damaged; the message names the first that is.
    """
    content = path.read_bytes()
    lengths, records, told, complaint = [], [], [], ""
    position = 0
    while position < len(content) and not complaint:
        start = position + 12
        length = int.from_bytes(content[position : position + 8], "little")
        if length > LONGEST:
            complaint = f"claims to be {length} bytes long"
        elif start + length + 4 > len(content):
            complaint = "is cut short"
        else:
            lengths.append(content[position : position + 8])
            records.append(content[start : start + length])
            told.append(struct.unpack_from("<I", content, start - 4))
            told[-1] += struct.unpack_from("<I", content, start + length)
        position = start + length + 4
    found = np.stack([checksums(lengths), checksums(records)], 1)
    # After a wrong length nothing is where it seems to be, so a wrong checksum is told first.
    wrong = np.flatnonzero((found != np.array(told, np.uint32).reshape(-1, 2)).any(1))
    if wrong.size:
        raise ValueError(f"record {wrong[0]} has another checksum than its bytes")
    if complaint:
        raise ValueError(f"record {len(records)} {complaint}")
    return records


def checksums(blocks: Sequence[bytes]) -> np.ndarray:
    """Masked CRC-32C of each block, (n,) uint32; all blocks at once, byte after byte."""
    lengths = np.array([len(block) for block in blocks], np.int64)
    order = np.argsort(-lengths, kind="stable")  # so that those with an i-th byte come first
    buffer = np.frombuffer(b"".join(blocks), np.uint8)
    starts = (np.cumsum(lengths) - lengths)[order]
    ended = np.bincount(lengths, minlength=1)
    crc, active = np.full(len(blocks), 0xFFFFFFFF, np.uint32), len(blocks)
    for i in range(lengths.max(initial=0)):
        active -= ended[i]
        now = crc[:active]
        crc[:active] = TABLE[(now ^ buffer[starts[:active] + i]) & 0xFF] ^ (now >> 8)
    crc = ~crc
    masked = np.empty_like(crc)
    masked[order] = ((crc >> 15) | (crc << 17)) + np.uint32(MASK_DELTA)
    return masked


def _make_table() -> np.ndarray:
    """What each value of a byte does to a CRC, (256,) uint32."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(POLYNOMIAL), table >> 1)
    return table


TABLE = _make_table()
