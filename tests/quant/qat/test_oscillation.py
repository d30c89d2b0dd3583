import pytest
import torch

from edgeattn.quant.qat.layers import QatLinear
from edgeattn.quant.qat.oscillation import OscillationTracker
from edgeattn.quant.qat.statsq import StatsQuantizer


def test_a_weight_that_goes_back_and_forth_is_found():
    layer = QatLinear(torch.nn.Linear(4, 1), StatsQuantizer(2))
    tracker = OscillationTracker({"layer": layer}, momentum=0.5, threshold=0.3)
    # First moves up and down, second up and up, third not at all, fourth makes the mean, which sets the scale.
    for first, second in ((-0.1, -1.0), (0.1, -0.1), (-0.1, 0.1), (0.1, 1.0)):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[first, second, 1.0, 2.9 - abs(first) - abs(second)]]))
        tracker.update()
    frequency = tracker.state_dict()["frequency"]["layer"]
    # Changes up, down, up: reversals at the second and third change, 0 -> 0.5 -> 0.75.
    assert frequency[0, 0] == pytest.approx(0.75) and frequency[0, 1] == frequency[0, 2] == 0
    assert tracker.summary()["oscillating"] == pytest.approx(0.25)
    resumed = OscillationTracker({"layer": layer}, momentum=0.5, threshold=0.3)
    resumed.load_state_dict(tracker.state_dict())
    assert resumed.summary() == tracker.summary()


def test_near_boundary_counts_positions():
    layer = QatLinear(torch.nn.Linear(4, 1), StatsQuantizer(2))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.01, -1.0, 1.0, -0.3]]))  # scale 1.155, codes 0, -2, 1, -1
    assert OscillationTracker({"layer": layer}).summary()["near_boundary"] == pytest.approx(0.25)
