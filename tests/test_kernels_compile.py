"""Machine code for GPUs that are not here: widths, registers, spills, atomics, as they would be launched."""

from __future__ import annotations

import pytest
import triton

from fasttricks_kernels.proof.aot import inspect, record_launches
from fasttricks_kernels.proof.cases import Case, every_case

CASES = {case.name: case for case in every_case()}
ARCHITECTURES = (70, 80, 90, 100)
# What misses "no spills": rows of 21,843, which fill the registers. Local loads and stores in the code, as seen, by architecture.
SPILLS: dict[str, dict[int, int]] = {
    "cross_entropy class weights-K=21843-fp16": {80: 4},
    "cross_entropy class weights, smoothed-K=21843-bf16": {80: 16, 90: 20, 100: 6},
    "cross_entropy class weights, smoothed-K=21843-fp16": {80: 16, 90: 26, 100: 10},
    "cross_entropy class weights, smoothed-K=21843-fp32": {80: 40, 90: 26, 100: 2},
    "cross_entropy loss_and_grad-K=21843-bf16": {100: 28},
    "cross_entropy loss_and_grad-K=21843-fp16": {100: 22},
    "cross_entropy mixup-K=21843-bf16": {80: 4, 90: 2},
    "cross_entropy mixup-K=21843-fp32": {100: 6},
    "distillation backward-K=21843-bf16": {90: 2, 100: 26},
    "distillation backward-K=21843-fp16": {100: 20},
    "distillation forward-K=21843-fp32": {100: 6},
    "distillation loss_and_grad-K=21843-bf16": {90: 8, 100: 2},
    "distillation loss_and_grad-K=21843-fp16": {100: 2},
    "distillation loss_and_grad-K=21843-fp32": {90: 4},
    "distillation mixup-K=21843-bf16": {80: 22, 100: 2},
    "distillation mixup-K=21843-fp16": {100: 2},
}
# What make test compiles. One of a kind: short, whole, shifted, FP32, every family; each architecture twice.
QUICK = {
    ("cross_entropy loss_and_grad-K=10-fp16", 70),
    ("cross_entropy loss_and_grad-K=1000-fp16", 90),
    ("cross_entropy mixup-K=1001-fp16", 100),
    ("cross_entropy forward-K=1001-fp32", 80),
    ("cross_entropy class weights, smoothed-K=1001-fp16", 80),
    ("cross_entropy planes loss_and_grad-K=21-fp32", 70),
    ("cross_entropy dense class weights-K=1001-fp16", 100),
    ("distillation loss_and_grad-K=1001-fp16", 90),
    ("mixup pairs-3x32x32-fp16", 70),
    ("augment pairs-50x99-fp16", 80),
    ("batch_norm_act values with a residual-C=64-fp16", 90),
    ("batch_norm_act gradients-C=256-bf16", 80),
    ("batch_norm_act gradients of a fork with a residual-C=64-fp16", 100),
    ("sgd step-3 tensors-fp16", 100),
    ("sgd overflow-3 tensors-fp16", 80),
}
# What make test-all compiles besides: the next case for the other two architectures, so each family, shape and dtype meets
# all four; and all that is known to spill.
ALTERNATE = {(name, arch) for place, name in enumerate(CASES) for arch in ARCHITECTURES[place % 2 :: 2]}
EVERY = (ALTERNATE | {(name, arch) for name, spills in SPILLS.items() for arch in spills}) - QUICK


# They read and write some numbers a channel.
MERGES = {"merge_statistics_kernel", "merge_gradients_kernel"}
# They write and read the mask's bytes. Triton before 3.7 moves a tile of them to the same lanes through shared memory.
MASKED = {"normalise_kernel", "gradient_sums_kernel"}
MASK_SHARED = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 512


def check(case: Case, arch: int) -> None:
    for launch in record_launches(case.run):
        code = inspect(launch, arch)
        assert code.atomics == 0
        assert code.local_accesses <= SPILLS.get(case.name, {}).get(arch, 0), code
        if case.wide and code.kernel not in MERGES:
            assert code.loads[128] > 0, code
            narrow = code.kernel == "statistics_kernel" or (
                code.kernel == "gradient_sums_kernel" and "residual" not in case.name
            )
            assert code.stores[128] > 0 or narrow or "forward" in case.name or "overflow" in case.name, code
            # a lane's own byte of the mask: wider ones would have come through shared memory
            if case.name.startswith("batch_norm_act") and code.kernel in MASKED and "residual" in case.name:
                bytes_ = code.stores if code.kernel == "normalise_kernel" else code.loads
                assert bytes_[8] > 0 and not bytes_[16], code
                assert code.shared_bytes <= MASK_SHARED or code.kernel != "normalise_kernel", code


@pytest.mark.parametrize(("name", "arch"), sorted(QUICK))
def test_machine_code(name: str, arch: int) -> None:
    check(CASES[name], arch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), sorted(EVERY))
def test_machine_code_of_every_case(name: str, arch: int) -> None:
    check(CASES[name], arch)


@pytest.mark.parametrize("arch", [70, 90])
def test_a_misaligned_gradient_leaves_the_step_wide(arch: int) -> None:
    """One gradient of a list at an address that 16 does not divide: alignment is a tensor's own, not a launch's."""
    import torch

    from fasttricks_kernels.optim._kernels import launch_overflow, launch_sgd

    weights, masters, momenta = (
        [torch.zeros(2048, dtype=d) for _ in range(2)] for d in (torch.half, *[torch.float] * 2)
    )
    grads = [torch.zeros(2048).half(), torch.zeros(2049).half()[1:]]
    options = 0.1, 0.9, 0.0, 1e-4, True, False
    for launch in record_launches(
        lambda: (
            launch_sgd(weights, grads, masters, momenta, *options, torch.tensor(1.0), launch_overflow(grads)),
            launch_overflow(grads[::-1]),
        )
    ):
        code = inspect(launch, arch)
        assert code.loads[128] > 0 and (code.stores[128] > 0 or code.kernel == "overflow_kernel"), code
        assert code.local_accesses == 0, code


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (70, 80, 100))])
def test_machine_code_of_batch_norm_over_ranks(arch: int) -> None:
    """The kernels that merge: a rank's total for the others, and the ranks' totals."""
    import torch

    from fasttricks_kernels.norm import _launches as norm

    x, options, means = (
        torch.zeros(2, 5, 5, 64).movedim(-1, 1),
        norm.Options("relu", True, 0.1, 1e-5),
        torch.ones(2, 64),
    )
    numbers, channels, count = torch.ones(4, 64), [torch.ones(64) for _ in range(4)], torch.ones(())
    running, others = (*channels[:2], None, *channels[2:]), (None,) * 6

    def run() -> None:
        norm.launch_merge_statistics(x, torch.zeros(3, 1, 64), *others, torch.zeros(193), None, options)
        norm.launch_merge_statistics(x, torch.zeros(3, 193), *running, numbers, None, count, options)
        norm.launch_merge_gradients(x, torch.zeros(2, 1, 64), numbers, means, None, None, True)
        norm.launch_merge_gradients(x, torch.zeros(3, 128), numbers, None, means, count, False)

    codes = [inspect(launch, arch) for launch in record_launches(run)]
    assert [code.kernel for code in codes] == ["merge_statistics_kernel"] * 2 + ["merge_gradients_kernel"] * 2
    assert all(code.atomics == code.local_accesses == 0 for code in codes), codes


def test_the_gate_sees_narrow_accesses() -> None:
    """The gate itself: logits at an address that 16 does not divide must show no wide load."""
    import torch

    from fasttricks_kernels.losses._kernels import launch_cross_entropy
    from fasttricks_kernels.losses._options import Labels

    logits = torch.zeros(4 * 1000 + 1, dtype=torch.float16)[1:].view(4, 1000)
    (launch,) = record_launches(lambda: launch_cross_entropy(logits, Labels(torch.zeros(4, dtype=torch.int64))))
    assert inspect(launch, 80).loads[128] == 0
