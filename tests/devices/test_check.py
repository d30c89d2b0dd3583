import json

import pytest

from edgeattn.devices import check as check_module
from edgeattn.devices import latency
from edgeattn.devices.check import bench, check, evaluate_bundle
from edgeattn.devices.results import read_results
from edgeattn.devices.verdict import Verdict
from edgeattn.errors import DataError, UsageError
from edgeattn.runtime.session import Placement


@pytest.fixture(autouse=True)
def simulated_clock(monkeypatch, clock):
    def measure(*args, **options):
        return latency.measure_latency(*args, **options, clock=clock)

    monkeypatch.setattr(check_module, "measure_latency", measure)


@pytest.fixture
def drifting(brightness):
    return dict(cost=1.0, logits=lambda batch: brightness(batch, shift=0.4))


def test_good_bundle_passes_and_leaves_its_record(rig, labelled_images):
    result = check(rig.bundle, labelled_images(500), seconds=1)
    assert (result.verdict, result.exit_code) == (Verdict.PASS, 0)
    assert [target.target for target in result.targets] == ["fake", "other"]
    assert result.targets[0].speedup.ratio == 2 and "speed-up 2.00x" in result.targets[0].message
    (record,) = read_results(rig.bundle.path / "results.jsonl").records
    assert record == {"schema_version": 1, **json.loads(json.dumps(result.to_dict()))}
    assert all(session.closed for session in rig.opened) and (rig.bundle.path / "report.html").exists()


def test_bundle_with_results_still_opens_and_verifies(rig, labelled_images):
    check(rig.bundle, labelled_images(20), seconds=1)
    assert type(rig.bundle).open(rig.bundle.path).unlisted() == []


def test_twenty_images_are_not_enough(rig, labelled_images):
    result = check(str(rig.bundle.path), labelled_images(20), targets=["fake"], seconds=1)
    assert (result.verdict, result.exit_code) == (Verdict.INCONCLUSIVE, 5)
    assert "on 20 images" in result.message and "images would decide" in result.message


def test_drift_is_worse_than_slower(rig, labelled_images, drifting):
    rig.variants["quantized"] = {**drifting, "cost": 9.0}
    result = check(rig.bundle, labelled_images(100), seconds=1)
    assert (result.verdict, result.exit_code) == (Verdict.DRIFT, 1)
    assert "gate mlperf99 asks for 99.00 %" in result.message and "speed-up 0.22x" in result.message


def test_slower_counts(rig, labelled_images):
    rig.variants["quantized"]["cost"] = 4.0
    assert check(rig.bundle, labelled_images(500), seconds=1).verdict is Verdict.SLOWER


def test_fallback_tells_the_reason(rig, labelled_images):
    rig.variants["quantized"]["placement"] = Placement(0, 12, {}, "libedgeattn_ort.so is missing", True)
    result = check(rig.bundle, labelled_images(500), seconds=1)
    assert result.verdict is Verdict.FALLBACK and "libedgeattn_ort.so is missing" in result.message


def test_unlabelled_images_are_judged_by_agreement(rig, labelled_images):
    result = check(rig.bundle, [image for image, _ in labelled_images(500)], seconds=1)
    assert result.verdict is Verdict.PASS and "no labels" in result.message


def test_only_the_two_compared_sessions_are_open(rig, labelled_images, monkeypatch):
    opened, closed_before = type(rig.bundle).open_session, []

    def open_session(self, target, variant="quantized", **overrides):
        closed_before.append([session.closed for session in rig.opened])
        return opened(self, target, variant, **overrides)

    monkeypatch.setattr(type(rig.bundle), "open_session", open_session)
    check(rig.bundle, labelled_images(10), seconds=1)
    assert closed_before == [[], [False], [True, True], [True, True, False]]


def test_sessions_close_when_the_data_fails(rig, labelled_images):
    with pytest.raises(DataError, match="has label 9"):
        check(rig.bundle, [*labelled_images(3), (labelled_images(1)[0][0], 9)], seconds=1)
    assert rig.opened and all(session.closed for session in rig.opened)
    assert not (rig.bundle.path / "results.jsonl").exists()


def test_wrong_folders_fail_before_any_session_opens(rig, image_folder):
    with pytest.raises(DataError, match="does not know the class"):
        check(rig.bundle, image_folder({"cat": [3], "dog": [4]}))
    assert rig.opened == []


def test_threads_reach_the_session_and_the_command(rig, labelled_images):
    result = check(rig.bundle, labelled_images(10), targets=["other"], threads=3, limit=8, seconds=1)
    assert result.targets[0].settings["quantized"]["threads"] == 3
    assert "--data '<Python list>'" in result.command
    assert result.command.endswith("--gate mlperf99 --target other --threads 3 --limit 8 --seconds 1")


def test_progress_names_target_and_stage(rig, labelled_images):
    told = []
    check(rig.bundle, labelled_images(5), targets=["fake"], seconds=1, progress=lambda *step: told.append(step))
    assert told[-1] == ("fake: accuracy", 5, 5) and told[0][0] == "fake: latency"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(device="ssh://robot7"), "Remote devices come with the device lab"),
        (dict(gate="strict"), "use one of mlperf99"),
        (dict(targets=["tensorrt"]), "has no float32 artefact for target 'tensorrt'"),
    ],
    ids=["device", "gate", "target"],
)
def test_bad_requests_fail_at_once(rig, labelled_images, options, text):
    with pytest.raises(UsageError, match=text):
        check(rig.bundle, labelled_images(2), **options)
    assert rig.opened == []


def test_local_device_is_accepted(rig, labelled_images):
    assert check(rig.bundle, labelled_images(10), device="local", targets=["fake"], seconds=1).verdict is not None


def test_bench_needs_no_data_and_gives_no_verdict(rig):
    result = bench(rig.bundle, targets=["fake"], seconds=1)
    assert (result.kind, result.verdict, result.exit_code, result.data) == ("bench", None, 0, None)
    assert result.targets[0].speedup.ratio == 2 and result.targets[0].accuracy == {}


def test_evaluate_measures_no_time(rig, labelled_images, clock):
    result = evaluate_bundle(rig.bundle, labelled_images(30), targets=["fake"], batch_size=8)
    assert (result.kind, result.verdict) == ("eval", None)
    assert result.targets[0].accuracy["quantized"].top1 == 100 and result.targets[0].latency == {}


def test_unreadable_images_are_listed(rig, image_folder):
    folder = image_folder({None: [10, 100, 200]})
    (folder / "bad.png").write_bytes(b"not a picture")
    result = evaluate_bundle(rig.bundle, folder, skip_bad=True, targets=["fake"])
    assert len(result.skipped) == 1 and result.skipped[0].endswith("bad.png") and "--skip-bad" in result.command
    assert result.targets[0].accuracy["quantized"].images == 3


def test_history_is_kept(rig, labelled_images):
    bench(rig.bundle, targets=["fake"], seconds=1)
    evaluate_bundle(rig.bundle, labelled_images(5), targets=["fake"])
    check(rig.bundle, labelled_images(5), targets=["fake"], seconds=1)
    kinds = [record["kind"] for record in read_results(rig.bundle.path / "results.jsonl").records]
    assert kinds == ["bench", "eval", "check"]
