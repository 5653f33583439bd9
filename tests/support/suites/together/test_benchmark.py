import pytest


@pytest.mark.benchmark(group="sums")
def test_sum(benchmark):
    benchmark.extra_info["what"] = "a sum"
    assert benchmark(sum, [1, 2]) == 3


@pytest.mark.parametrize("size", [10, 20])
def test_sizes(benchmark, size):
    benchmark.pedantic(sorted, args=(range(size),), rounds=5, iterations=2)
