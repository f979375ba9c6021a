"""The benchmarks of training."""

from tests.benchmarks.step_rate import render_rates


def test_rates_are_compared_with_the_first_build() -> None:
    table = render_rates(128, {"before": [100.0, 300.0, 200.0], "after": [400.0]}).splitlines()

    assert table[1].split() == ["before", "200", "100", "300", "1.00"]
    assert table[2].split() == ["after", "400", "400", "400", "2.00"]
