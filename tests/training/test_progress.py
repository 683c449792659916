from caravan.training.progress import Progress, prefixed


def test_a_prefix_stands_before_the_task_and_changes_nothing_else():
    told = []
    report = prefixed(told.append, "round 1: ")
    assert report is not None
    report(Progress("training the head", 3, 9, loss=0.5, rate=7.0))
    assert told == [Progress("round 1: training the head", 3, 9, loss=0.5, rate=7.0)]


def test_no_report_with_a_prefix_is_no_report():
    assert prefixed(None, "round 1: ") is None
