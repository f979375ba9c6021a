"""The frame of `python -m tests.faults`; the faults themselves take minutes and are run by it."""

import pytest

from tests import faults
from tests.faults import Fault, Findings, markdown, observe


def row(findings: Findings | Exception) -> Fault:
    async def scene() -> Findings:
        if isinstance(findings, Exception):
            raise findings
        return findings

    return Fault("none", "No fault", "nothing", "all is well", scene)


def test_a_row_is_ok_when_all_it_found_is_as_promised() -> None:
    outcome = observe(row([("one", True), ("two", True)]))
    assert outcome.ok
    assert outcome.observed == "one; two"


def test_a_finding_that_is_not_as_promised_is_marked_and_fails_the_row() -> None:
    outcome = observe(row([("one", True), ("two", False)]))
    assert not outcome.ok
    assert outcome.observed == "one; NOT AS PROMISED: two"


def test_a_row_that_found_nothing_or_broke_off_is_not_ok() -> None:
    assert not observe(row([])).ok
    broken = observe(row(TimeoutError("too long")))
    assert not broken.ok
    assert "TimeoutError: too long" in broken.observed


@pytest.mark.parametrize(("good", "status", "cell"), [(True, 0, "yes"), (False, 1, "**no**")])
def test_the_command_ends_with_1_where_a_row_is_not_ok(
    good: bool,
    status: int,
    cell: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(faults, "FAULTS", [row([("seen", good)])])
    assert faults.main(["--markdown"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| fault | what was done | expected | observed | ok |"
    assert lines[2].endswith(f"seen | {cell} |")


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        faults.main(["flood", "frogs"])
    assert ended.value.code == 2
    assert "unknown fault 'frogs'; allowed are overload, " in capsys.readouterr().err


def test_every_row_says_what_it_is() -> None:
    assert len({each.name for each in faults.FAULTS}) == len(faults.FAULTS) > 5
    assert all(each.what and each.done and each.expected for each in faults.FAULTS)
    assert markdown([]).count("\n") == 1
