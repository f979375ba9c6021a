"""The numbers that several processes count in files, each in a process of its own."""

import json
from pathlib import Path

from tests.support.processes import run

COUNT = """
import json, sys, threading
from pathlib import Path
from prometheus_client import Counter, Gauge
from service.telemetry.metrics import share, shared_registry

folder = Path(sys.argv[1])
share(folder, sys.argv[2])
first = Counter("first_total", "", registry=None)
moment = Gauge("moment", "", registry=None, multiprocess_mode="livesum")
many = Counter("many_total", "", ["number"], registry=None)
{work}
found = {{
    sample.name: sample.value
    for family in shared_registry(folder).collect()
    for sample in family.samples
    if sample.name in {{"first_total", "moment"}}
}}
print(json.dumps(found))
"""


def counted(folder: Path, name: str, work: str) -> dict[str, float]:
    ended = run("-c", COUNT.format(work=work), str(folder), name)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, float] = json.loads(ended.stdout)
    return found


def test_threads_that_count_the_same_lose_nothing(tmp_path: Path) -> None:
    work = """
def count():
    for _ in range(50_000):
        first.inc()
        moment.inc()
        moment.dec()
sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=count) for _ in range(4)]
for each in threads: each.start()
for each in threads: each.join()
"""
    assert counted(tmp_path, "0", work) == {"first_total": 200_000, "moment": 0}


def test_numbers_are_found_in_a_file_that_has_grown(tmp_path: Path) -> None:
    work = """
first.inc(2)
before = (folder / "counter_0.db").stat().st_size
for number in range(5_000):
    many.labels(str(number)).inc()
assert (folder / "counter_0.db").stat().st_size > before
first.inc(3)
moment.set(7)
moment.inc()
"""
    assert counted(tmp_path, "0", work) == {"first_total": 5, "moment": 8}


def test_a_process_goes_on_from_the_counts_of_the_one_it_replaces(tmp_path: Path) -> None:
    assert counted(tmp_path, "0", "first.inc(5)")["first_total"] == 5
    assert counted(tmp_path, "1", "first.inc(2)")["first_total"] == 7
    assert counted(tmp_path, "0", "first.inc(4)")["first_total"] == 11
