"""Reads GGUF, the format of llama.cpp's models: what describes a model, and its weights as float32. NumPy alone.

A file is a header, metadata (a key, a type and a value each), for each tensor its name, shape, type and place, and
then the data, padded. Integers are little-endian, and the first size of a shape is that of the innermost axis. Of the
types of weights those are read that `tools.smollm2` meets: F32, and two that keep blocks of 32 numbers of a byte or
half a byte each, Q8_0 and Q4_1.
"""

from __future__ import annotations

import math
import struct

import numpy as np

VERSION, ALIGNMENT = 3, 32
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # in metadata


def q8_0(blocks):
    """A scale, and 32 signed bytes."""
    return blocks["scale"].astype(np.float32)[:, None] * blocks["codes"]


def q4_1(blocks):
    """A scale, the least number, and 32 codes of four bits: the lower halves of the bytes, then the upper ones."""
    codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1)
    return blocks["scale"].astype(np.float32)[:, None] * codes + blocks["least"].astype(np.float32)[:, None]


# Of each type of weights: numbers in a block, the block as it lies in the file, and what makes float32 of blocks.
WEIGHTS = {
    0: (1, np.dtype("<f4"), lambda blocks: blocks),
    3: (32, np.dtype([("scale", "<f2"), ("least", "<f2"), ("codes", "u1", 16)]), q4_1),
    8: (32, np.dtype([("scale", "<f2"), ("codes", "i1", 32)]), q8_0),
}


class Reader:
    """What a file begins with, in order."""

    def __init__(self, data):
        self.data, self.position = data, 0

    def bytes(self, count):
        found = self.data[self.position : self.position + count]
        if len(found) < count:
            raise ValueError(f"the file ends after {len(self.data):,} bytes, within what describes the model")
        self.position += count
        return found

    def numbers(self, form, count=1):
        return struct.unpack(f"<{count}{form}", self.bytes(count * struct.calcsize(form)))

    def number(self, form):
        return self.numbers(form)[0]

    def string(self):
        return self.bytes(self.number("Q")).decode()

    def value(self, key):
        return self.values(key, self.number("I"), 1)[0]

    def values(self, key, kind, count):
        """`count` values of one type."""
        if kind in NUMBERS:
            return list(self.numbers(NUMBERS[kind], count))
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind == ARRAY:
            return [self.values(key, self.number("I"), self.number("Q")) for _ in range(count)]
        raise ValueError(f"the value of {key} is of type {kind}, which GGUF does not have")


def read_gguf(data):
    """(metadata, weights) of a file's bytes.

    Returns
    -------
    dict of str to int, float, bool, str or list
    dict of str to float32 array
        In the shapes of NumPy and PyTorch: the innermost axis is the last one.

    Raises
    ------
    ValueError
        For what is no GGUF of version 3, is cut off, or has weights of another type than WEIGHTS.
    """
    reader = Reader(data)
    if data[:4] != b"GGUF":
        raise ValueError(f"the file begins with {bytes(data[:4])!r}, but GGUF begins with b'GGUF'")
    reader.bytes(4)
    version = reader.number("I")
    if version != VERSION:
        raise ValueError(f"the file is GGUF of version {version}, but must be of version {VERSION}")
    num_tensors, num_keys = reader.numbers("Q", 2)
    metadata = {}
    for _ in range(num_keys):
        key = reader.string()
        metadata[key] = reader.value(key)
    places = []
    for _ in range(num_tensors):
        name = reader.string()
        shape = reader.numbers("Q", reader.number("I"))[::-1]
        places.append((name, shape, reader.number("I"), reader.number("Q")))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    begin = -(-reader.position // alignment) * alignment
    weights = {}
    for name, shape, kind, offset in places:
        if kind not in WEIGHTS:
            raise ValueError(f"{name} is of type {kind}, but only types {', '.join(map(str, WEIGHTS))} are read")
        in_block, block, as_float = WEIGHTS[kind]
        if shape and shape[-1] % in_block:
            raise ValueError(f"{name} has rows of {shape[-1]}, but its type {kind} has blocks of {in_block}")
        count = math.prod(shape) // in_block
        if len(data) < begin + offset + count * block.itemsize:
            raise ValueError(f"the file ends after {len(data):,} bytes, within {name}")
        weights[name] = as_float(np.frombuffer(data, block, count, begin + offset)).reshape(shape)
    return metadata, weights
