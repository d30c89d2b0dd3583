import pytest

from edgeattn.errors import RecipeError
from edgeattn.quant.qat.settings import PRESETS, QatSettings, preset


def test_presets_and_switches():
    assert {"ofq-w2a2", "ofq-w3a3", "ofq-w4a4", "lsq-w2a2", "lsqplus-w4a4"} <= set(PRESETS)
    ofq = preset("ofq-w3a3")
    assert (ofq.weight_bits, ofq.statsq, ofq.shifts, ofq.qkr, ofq.cga) == (3, True, True, True, True)
    part = preset("ofq-w2a2-qkr-cga")
    assert part == preset("ofq-w2a2").switch(off=["qkr", "cga"]) and not part.qkr and part.name == "ofq-w2a2-qkr-cga"
    assert preset("lsq-w2a2+statsq").statsq and not preset("lsq-w2a2").statsq
    assert preset("lsqplus-w2a2").method == "lsq+"
    assert preset("ofq-w2a2").fine and not preset("lsq-w2a2").fine and preset("lsq-w2a2+fine").fine
    assert QatSettings.from_dict(part.to_dict()) == part


@pytest.mark.parametrize(
    "name, message",
    [
        ("ofq-w2a4", "unknown QAT preset 'ofq-w2a4': did you mean ofq-w4a4"),
        ("ofk-w2a2", "did you mean ofq-w2a2"),
        ("ofq-w1a1", "Presets: ofq-w2a2"),
        ("ofq-w2a2-qrk", "unknown part 'qrk' of ofq-w2a2: did you mean qkr"),
    ],
)
def test_unknown_names_get_near_ones(name, message):
    with pytest.raises(RecipeError, match=message):
        preset(name)


def test_wrong_values_are_refused():
    with pytest.raises(RecipeError, match="weight_bits is 1; expected 2 to 8"):
        QatSettings("own", 1, 4)
    with pytest.raises(RecipeError, match=r"boundary_range is 0\.7"):
        QatSettings("own", 2, 2, boundary_range=0.7)
    with pytest.raises(RecipeError, match=r"unknown QAT setting\(s\) bits; known: .*weight_bits"):
        QatSettings.from_dict({"bits": 2})
    with pytest.raises(RecipeError, match=r"incomplete QAT settings: .*weight_bits"):
        QatSettings.from_dict({"name": "own", "activation_bits": 2})
