"""The byte ledger: what each kernel asks for, against the least it can move, counted under the interpreter."""

from __future__ import annotations

import pytest
import torch

from fasttricks_kernels.proof import cases
from fasttricks_kernels.proof.cases import Case
from lib.interpreter import interpreted

CASES = {c.name: c for c in cases.every_case() if not c.family.endswith((" forward", " backward"))}
# Two FP32 rows of 21,843 do not fit the registers (held by 8 warps, sm_80 had 255 registers and 108 local accesses a
# thread): they are asked for twice. Each byte is still needed once.
READ_TWICE = {name for name in CASES if name.startswith("distillation") and name.endswith("K=21843-fp32")}
READ_TWICE |= {n for n in CASES if n.startswith("cross_entropy dense") and n.endswith("K=21843-fp32")}
READ_TWICE |= {n for n in CASES if n.startswith("cross_entropy class weights, smoothed-K=21843")}
# So are planes of more classes than a program holds.
READ_TWICE |= {name for name in CASES if name.startswith("cross_entropy planes") and "K=1000" in name}
# A partner that is not a pair is read as a partner and as an image.
ANY_PERMUTATION = {name for name in CASES if "any permutation" in name}
LONG = "K=21843", "C=256", "C=100"
# What make test counts: each family at each shape in one dtype, so the families of losses meet all three.
FAMILIES, SHAPES = (list(dict.fromkeys(getattr(c, part) for c in CASES.values())) for part in ("family", "shape"))
TURNS = {c.name: FAMILIES.index(c.family) + SHAPES.index(c.shape) for c in CASES.values()}
QUICK = {n for n, c in CASES.items() if list(cases.DTYPES)[TURNS[n] % 3] == c.dtype and c.shape not in LONG}
QUICK -= {n for n in CASES if n.startswith("cross_entropy planes") and "K=1000" in n}


def check(case: Case) -> None:
    from fasttricks_kernels.proof.ledger import ledger

    with ledger() as book:
        case.run()
    assert book.atomics == 0
    total = book.total
    if case.cached is not None:  # each program reads it, once or twice; a cache serves all but the first
        total -= book.read_again(case.cached)
    loss = case.family.startswith(("cross_entropy", "distillation"))
    assert case.parts_bytes <= 0.01 * case.floor_bytes
    assert book.unique <= (case.floor_bytes + 16 if loss else 1.005 * case.floor_bytes + case.parts_bytes)
    if case.name in READ_TWICE:
        assert total <= 5 / 3 * case.floor_bytes * 1.005
    elif case.name in ANY_PERMUTATION:
        assert book.total <= 1.5 * case.floor_bytes * 1.005
    else:
        asked = total - case.parts_bytes
        assert asked <= 1.005 * case.floor_bytes, asked / case.floor_bytes
        assert asked >= case.floor_bytes or not case.parts_bytes


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
@interpreted
def test_one_pass(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@interpreted
def test_the_autograd_pair(dtype: str) -> None:
    """Forward and backward of cross-entropy: at most 3 K e + 32 bytes a row, at every K."""
    from fasttricks_kernels.proof.ledger import ledger

    by_name = {c.name: c for form in ("forward", "backward") for c in cases.loss_cases("cross_entropy", form)}
    for num_classes in (10, 100, 1000, 1001):
        total = 0
        for form in ("forward", "backward"):
            with ledger() as book:
                by_name[f"cross_entropy {form}-K={num_classes}-{dtype}"].run()
            total += book.total
        size = torch.empty(0, dtype=cases.DTYPES[dtype]).element_size()
        assert total <= cases.rows_a_launch(num_classes) * (3 * num_classes * size + 32)


@interpreted
def test_the_ledger_sees_a_second_read() -> None:
    """The ledger itself: a kernel run twice asks for twice the bytes, at the same addresses."""
    from fasttricks_kernels.proof.ledger import ledger

    case = cases.loss_cases("cross_entropy", "forward")[0]
    with ledger() as once:
        case.run()
    with ledger() as twice:
        case.run()
        case.run()
    assert twice.total == 2 * once.total
    read = [sum(len(set(span.tolist())) for span in book.load_spans[:3]) for book in (once, twice)]
    assert read[0] == read[1]
