"""The statistics under chance: 300 sets of labels that mean nothing, 8 cells each, fitted as users fit them."""

import pytest
from calibration import Case, calibrate, clustered
from scipy import stats


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(100, 8), Case(120, 8, per_group=3)], ids=str)
def test_intervals_and_p_values_are_calibrated(case):
    found = calibrate(case, 300)
    share, error = found.coverage
    assert share + 1.96 * error >= 0.93 and share - 1.96 * error <= 0.97
    assert stats.kstest(found.p, "uniform").pvalue > 0.01
    assert abs(found.auc - 0.5) < 0.02
    # The test can tell: intervals that take folds as independent hold one half too seldom.
    naive, error = clustered(found.naive)
    assert naive + 1.96 * error < 0.93
