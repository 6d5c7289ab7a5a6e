"""What the stage shapes of gpu.py measures, and its table: no torch, so that tables.py draws it anywhere.

A record is one pass, "forward" or "backward", of one shape.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 128
PASSES = ("forward", "backward")
DENSE = ("cudnn dense", "flash dense")


@dataclass(frozen=True)
class Shape:
    """Attention with as many queries as keys; `documents` of equal length share each sequence, by FlashMask."""

    tokens: int = 16384
    num_heads: int = 32
    num_heads_k: int = 8
    head_dim: int = 128
    batch: int = 1
    documents: int = 1
    density: float = 0.5
    """With which each block before a row's own is selected, of those in its document."""

    @property
    def document_tokens(self):
        return self.tokens // self.documents

    @property
    def all_heads(self):
        """Query heads of all sequences."""
        return self.batch * self.num_heads

    @property
    def visible_blocks(self):
        """Of all heads: a row sees those of its document up to its own."""
        rows = self.document_tokens // BLOCK
        return self.all_heads * self.documents * rows * (rows + 1) // 2


SHAPES = {
    "D 128, 32/8": Shape(),
    "D 64": Shape(head_dim=64),
    "D 96": Shape(head_dim=96),
    "D 80": Shape(head_dim=80),
    "D 192, 16/4": Shape(num_heads=16, num_heads_k=4, head_dim=192),
    "D 256, 16/4": Shape(num_heads=16, num_heads_k=4, head_dim=256),
    "MHA 32/32": Shape(num_heads_k=32),
    "MQA 32/1": Shape(num_heads_k=1),
    "28/4": Shape(num_heads=28, num_heads_k=4),
    "batch 8 of 4K": Shape(tokens=4096, batch=8),
    "batch 32 of 2K": Shape(tokens=2048, batch=32),
    "4/1, 64K": Shape(tokens=65536, num_heads=4, num_heads_k=1),
    "8 documents": Shape(tokens=32768, documents=8),
    "5% of 64K": Shape(tokens=65536, density=0.05),
}


def dense_of(record):
    """The (name, ms) of the dense attention that a record is compared with; None where none ran.

    It is cuDNN's; of gradients above a head size of 128, which not every cuDNN has, the fastest.
    """
    ran = {name: record["baselines"][name] for name in DENSE if name in record["baselines"]}
    if record["pass"] == "backward" and record["head_dim"] > 128:
        return min(ran.items(), key=lambda item: item[1], default=None)
    return ("cudnn dense", ran["cudnn dense"]) if "cudnn dense" in ran else None


def ratio(ms, record):
    """How often the time of a record goes into another, as text."""
    return "-" if ms is None else f"{ms / record['ms']:.2f}"


def ratios(record):
    """(to dense attention, to FlashAttention-4), as text."""
    dense = dense_of(record)
    return ratio(dense and dense[1], record), ratio(record["baselines"].get("fa4"), record)


def passes_of(records):
    """{name of a shape: {pass: record}}, in the order of SHAPES."""
    found = {}
    for record in records:
        found.setdefault(record["shape"], {})[record["pass"]] = record
    return {name: found[name] for name in SHAPES if name in found}


def line(record):
    """One line of text."""
    rivals = "  ".join(f"{name} {ms:.3f} ({ratio(ms, record)}x)" for name, ms in record["baselines"].items())
    return (
        f"{record['shape']:15} {record['pass']:8} density {record['density']:.3f} |{record['ms']:9.3f} ms |"
        f"{record['tflops']:5.0f} TFLOP/s | {rivals}"
    )


def short_table(records):
    """Lines of text: of each shape and pass the rate, and the ratios to dense attention and to FlashAttention-4."""
    lines = [f"{'':15} {'forward':>8} {'x dense':>8} {'x fa4':>8} {'backward':>9} {'x dense':>8} {'x fa4':>8}"]
    for name, found in passes_of(records).items():
        text = f"{name:15} "
        for each, width in zip(PASSES, (8, 9)):
            cells = (f"{found[each]['tflops']:.0f}", *ratios(found[each])) if each in found else ("-",) * 3
            text += f"{cells[0]:>{width}} {cells[1]:>8} {cells[2]:>8} "
        lines.append(text.rstrip())
    return lines
