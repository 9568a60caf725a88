"""The order in which the last layer is taken, beside what an H200 took for each."""

import itertools

import pytest

from custom_ops.last_layer.plan import Plan, Sizes, _floors, default_memory, plan_of

LARGE, LARGER, SMALL = (
    Sizes(8192, 4096, 128_256, 2),
    Sizes(16_384, 2048, 248_320, 2),
    Sizes(8192, 4096, 32_000, 2),
)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("sizes", "whole", "kept", "again", "rows", "blocks"),
    [
        (LARGE, 1.04, 1.10, 1.46, 1.14, 4),
        (LARGER, 1.14, 1.15, 1.48, 1.36, 16),
        (SMALL, 1.04, 1.10, 1.47, 1.12, 1),
    ],
)
def test_the_estimate_is_within_four_hundredths_of_what_was_measured(
    sizes, whole, kept, again, rows, blocks
):
    N, D, C, *_ = sizes

    def floors(products: float, added: int) -> float:
        return _floors(sizes, Plan("whole", N, 0, 0, products, 0), added)

    slabs = -(-C // 8192) * 8 * N * D
    assert floors(3, 0) == pytest.approx(whole, abs=0.04)
    assert floors(3, slabs) == pytest.approx(kept, abs=0.04)
    assert floors(4, slabs) == pytest.approx(again, abs=0.04)
    assert floors(3, blocks * 8 * C * D) == pytest.approx(rows, abs=0.04)


@pytest.mark.parametrize("sizes", [LARGE, LARGER, SMALL, Sizes(10**6, 512, 32_000, 2)])
def test_more_memory_is_never_slower_and_never_exceeded(sizes):
    before = float("inf")
    for memory in (2**k for k in range(27, 40)):
        plan = plan_of(sizes, memory)
        fits = plan.bytes <= memory
        assert fits or plan.bytes == min(plan_of(sizes, 0).bytes, plan.bytes)
        if fits:
            assert plan.floors <= before
            before = plan.floors
    assert plan.order == "whole"


def test_the_products_are_those_of_the_formula():
    for sizes, memory in itertools.product((LARGE, LARGER), (600 * MIB, 1024 * MIB, 1800 * MIB)):
        N, D, C, e, *_ = sizes
        plan = plan_of(sizes, memory)
        assert plan.order == "classes"
        extra = max(0, plan.kept - D) * C * e
        want = 3 + max(0, 1 - min(1, D / N) - extra / (N * C * e))
        assert plan.products == pytest.approx(want)


def test_what_is_planned_for_the_head_of_a_large_model():
    default = plan_of(LARGE, default_memory(LARGE))
    N, D, C, e, *_ = LARGE
    assert default_memory(LARGE) == (N + C) * D * e
    assert (default.order, default.products < 3.1) == ("classes", True)
    assert default.bytes <= 1.1 * 2**30
    assert plan_of(LARGE, 320 * MIB).floors <= 1.5
    assert plan_of(LARGE, 1 << 40).order == "whole"
    # with very many rows, dW in float32 costs less than logits that are computed again
    assert plan_of(Sizes(2**20, 512, 32_000, 2), 1 << 30).order == "rows"


def test_a_loss_a_row_costs_no_fourth_product_where_its_logits_are_kept():
    of_rows = LARGE._replace(total=False)
    assert plan_of(of_rows, 1 << 40).products == 3
    assert plan_of(of_rows, default_memory(LARGE)).products < 3.1
    assert plan_of(of_rows, 320 * MIB).order == "classes"


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_smallest_plan_is_small(itemsize, device):
    """Nothing fits into no memory: 128 classes of all rows, or a row, and what is added up."""
    for wants_x, wants_W, total in itertools.product((False, True), repeat=3):
        s = Sizes(8192, 4096, 128_256, itemsize, device, total, wants_x, wants_W)
        sums = 4 * 8192 * 4096 * (itemsize == 2)
        assert plan_of(s, 0).bytes <= max(
            8192 * 128 * itemsize + sums * wants_x, 128_256 * itemsize
        )


def test_without_the_order_of_classes_the_smaller_of_the_others_is_taken():
    """All logits take 2004 MiB there, dx and dW in float32 2132 MiB; of more rows it is turned."""
    assert plan_of(LARGE, 1066 * MIB, by_classes=False).order == "whole"
    assert plan_of(LARGE._replace(rows=16_384), 1066 * MIB, by_classes=False).order == "rows"


@pytest.mark.parametrize(
    ("rows", "features", "classes", "total", "order"),
    [
        # in turns on two cores, in ms: rows, classes, whole
        (1024, 512, 32_000, True, "rows"),  # 382, 406, 538
        (512, 1024, 50_000, True, "classes"),  # 595, 552, 604
        (4096, 64, 64_000, True, "rows"),  # 648, 692, 1086
        (512, 1024, 50_000, False, "classes"),  # 773, 509, 522
        (128, 64, 10, True, "whole"),
        (128, 128, 1000, False, "whole"),  # rows 2.0, classes of 128 at a time 4.0, whole 1.7
    ],
)
def test_what_is_planned_for_a_cpu_was_the_fastest_within_its_memory(
    rows, features, classes, total, order
):
    s = Sizes(rows, features, classes, 4, "cpu", total)
    assert default_memory(s) == 50 * MIB
    plan = plan_of(s, default_memory(s))
    assert (plan.order, plan.bytes <= 50 * MIB) == (order, True)
    more = plan_of(s, 10_000 * MIB)
    assert more.floors <= plan.floors
    if total and classes > 1000:  # fresh memory costs more than it gives
        assert more.order == order


def test_a_cpus_block_has_64_rows_at_least():
    assert default_memory(Sizes(8192, 64, 10**6, 4, "cpu")) == 64 * 4 * 10**6
