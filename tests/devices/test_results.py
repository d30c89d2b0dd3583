import json
import math
from pathlib import Path

import pytest

from edgeattn.devices import results
from edgeattn.devices.results import append_result, check_writable, machine_facts, read_results
from edgeattn.errors import DeviceError


def test_records_come_back_in_order(tmp_path):
    path = tmp_path / "results.jsonl"
    for number in range(3):
        append_result(path, {"number": number, "text": "zwölf\nlines"})
    assert [record["number"] for record in read_results(path).records] == [0, 1, 2]
    assert all(json.loads(line)["schema_version"] == 1 for line in path.read_text().splitlines())


def test_no_file_is_no_record(tmp_path):
    assert read_results(tmp_path / "results.jsonl") == results.ResultsFile(())


def test_cut_off_last_line_is_reported_and_stays_the_only_loss(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, {"number": 0})
    append_result(path, {"number": 1})
    path.write_bytes(path.read_bytes()[:-7])
    found = read_results(path)
    assert [record["number"] for record in found.records] == [0]
    assert len(found.ignored) == 1 and "line 2 is damaged" in found.ignored[0] and "ignored" in found.ignored[0]
    append_result(path, {"number": 2})
    assert [record["number"] for record in read_results(path).records] == [0, 2]


@pytest.mark.parametrize("line", [b"[1]", b"\xff\xfe{", b"nonsense"], ids=["list", "bytes", "text"])
def test_any_damage_is_ignored(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_bytes(line + b"\n")
    append_result(path, {"number": 1})
    found = read_results(path)
    assert len(found.records) == 1 and "line 1 is damaged" in found.ignored[0]


def test_newer_schema_is_not_read(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"schema_version": 2}\n')
    assert "schema_version 2, this edgeattn reads 1" in read_results(path).ignored[0]


def test_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        append_result(tmp_path / "results.jsonl", {"x": math.nan})
    assert not (tmp_path / "results.jsonl").exists()


def test_unwritable_place_is_found_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(results.os, "access", lambda path, mode: False)
    with pytest.raises(DeviceError, match=r"cannot write .* Copy the bundle"):
        check_writable(tmp_path / "results.jsonl")


def test_failing_append_says_what_to_do(tmp_path):
    with pytest.raises(DeviceError, match="cannot append to"):
        append_result(tmp_path, {"x": 1})


def test_machine_facts_are_json(tmp_path):
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts and facts["usable_cores"] >= 1


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\n", "Fast CPU @ 3 GHz"),
        ("processor\t: 0\nBogoMIPS\t: 108\n\nModel\t\t: Raspberry Pi 5 Model B\n", "Raspberry Pi 5 Model B"),
    ],
    ids=["x86", "arm board"],
)
def test_cpu_model_is_read(tmp_path, text, model):
    cpuinfo: Path = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    assert results._cpu_model(cpuinfo) == model
