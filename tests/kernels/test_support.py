"""What docs/support.md says about devices, dtypes and head sizes, on the devices that there are."""

import re
from dataclasses import dataclass
from pathlib import Path

import gpu_harness
import pytest
import test_attend
import test_backward
import test_compensate
import test_estimate
import test_quantized
import test_ragged
from cases import DTYPES, Case
from ragged_batch import Requests

from rrattn import direct

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
PLATFORMS = {"CPU": ("cpu",), "Hopper": ("gpu", "paddle-gpu"), "Ampere and newer": (*gpu_harness.PATHS,)}


@dataclass(frozen=True)
class Row:
    device: str
    dtypes: tuple
    head_sizes: range
    forward: bool
    gradients: bool
    quantization: int  # the largest head size of it, 0 for none


def read_row(line):
    device, dtypes, head_sizes, *offered = (cell.strip() for cell in line.strip("|\n").split("|"))
    step, first, last = map(int, re.fullmatch(r"multiples of (\d+), (\d+) to (\d+)", head_sizes).groups())
    forward, gradients = ({"yes": True, "no": False}[cell] for cell in offered[:2])
    largest = re.fullmatch(r"up to (\d+)", offered[2])
    quantization = int(largest[1]) if largest else {"yes": last, "no": 0}[offered[2]]
    return Row(device, tuple(dtypes.split(", ")), range(first, last + 1, step), forward, gradients, quantization)


def read_table():
    lines = PAGE.read_text().splitlines()
    first = lines.index("| device | dtype | head size | forward | gradients | quantization |") + 2
    end = lines.index("", first)
    return [read_row(line) for line in lines[first:end]]


def row_of(platform, dtype, head_size):
    """The row that has it, or None."""
    rows = [
        row
        for row in read_table()
        if platform in PLATFORMS[row.device] and dtype in row.dtypes and head_size in row.head_sizes
    ]
    assert len(rows) <= 1, "two rows have it"
    return rows[0] if rows else None


def test_the_table_has_every_platform():
    assert {row.device for row in read_table()} == set(PLATFORMS)


HEAD_SIZES = [(size, size) for size in (4, 8, 12, 64, 96, 128, 130, 136, 192, 256, 264)] + [
    (size, of_values)
    for pair in ((8, 256), (12, 64), (64, 128), (128, 136), (128, 192), (136, 192), (264, 64))
    for size, of_values in (pair, pair[::-1])
]


@pytest.mark.parametrize("any_dtype", DTYPES)
@pytest.mark.parametrize("head_size, of_values", HEAD_SIZES)
@pytest.mark.parametrize("beside", (False, True), ids=("", "sink and gradient of lse"))
def test_what_is_in_the_table_runs_and_nothing_else_does(kernels, platform, any_dtype, head_size, of_values, beside):
    rows = [row_of(platform, any_dtype, size) for size in (head_size, of_values)]
    case = Case(
        130, 260, num_heads=2, num_heads_k=1, head_dim=head_size, head_dim_v=of_values, sink=beside, grad_lse=beside
    )
    culprit = "head_dim" if any_dtype in kernels.dtypes else "head_dim|dtype"
    forward = all(row is not None and row.forward for row in rows)
    quantization = max(row.quantization for row in read_table() if platform in PLATFORMS[row.device])
    if platform == "gpu" and direct.gpu_kernels() != "hopper":  # portable kernels on Hopper
        quantization = 0
    if forward and not quantization:
        with pytest.raises(ValueError, match="attention with quantization on: CPU"):
            test_quantized.run(kernels, case, any_dtype)
    for stage, runs in (
        (test_estimate, rows[0] is not None and rows[0].forward),
        (test_attend, forward),
        (test_compensate, forward),
        *(((test_quantized, forward and max(head_size, of_values) <= quantization),) if quantization else ()),
        (test_backward, all(row is not None and row.gradients for row in rows)),
    ):
        if runs:
            stage.check(kernels, case, any_dtype)
        else:
            with pytest.raises(ValueError, match=culprit):
                stage.run(kernels, case, any_dtype)


@pytest.mark.parametrize("any_dtype", DTYPES)
@pytest.mark.parametrize("head_size, of_values", HEAD_SIZES)
def test_ragged_batches_take_what_is_in_the_table_and_nothing_else(kernels, platform, any_dtype, head_size, of_values):
    rows = [row_of(platform, any_dtype, size) for size in (head_size, of_values)]
    sizes = {"num_heads": 2, "num_heads_k": 1, "head_dim": head_size, "head_dim_v": of_values}
    requests = Requests([(130, 260), (5, 5)], **sizes, dtype=any_dtype, kernels=kernels)
    if all(row is not None and row.forward for row in rows):
        results = requests.call(*requests.in_pages(64), threshold=0.5)
        test_ragged.assert_each_as_alone(requests, results, threshold=0.5)
    else:
        with pytest.raises(ValueError, match="head_dim" if any_dtype in kernels.dtypes else "head_dim|dtype"):
            requests.call(*requests.in_pages(64), threshold=0.5)
