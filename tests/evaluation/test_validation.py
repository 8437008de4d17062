from cmrssp.evaluation.validation import undetected


def test_classes_without_any_overlap_are_named():
    assert undetected({"dice": 0.4, "dice_LV": 0.8, "dice_MYO": 0.0}) == ["MYO"]
    assert undetected({}) == []
