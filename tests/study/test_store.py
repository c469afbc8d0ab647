"""Studies survive their workers: resumed, shared, refused to strangers, on SQLite and PostgreSQL."""

import contextlib
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pytest

from sysmt.errors import ConfigError, OutputError
from sysmt.study.storage import storage_url
from sysmt.study.store import Point, Store
from sysmt.study.worker import Worker

LAYERS = ["a", "b", "c"]
FACTS = {"model": "tiny", "weights_sha256": "1234", "seed": 0}

WORKER = """
import os, sys, time
from sysmt.study.store import Store
from sysmt.study.worker import Worker

url, log, seconds, seed = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])

def say(word, point):
    line = f"{word} {os.getpid()} {point.key}\\n"
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, line.encode())
    os.close(handle)

def measure(point):
    say("begin", point)
    time.sleep(seconds)
    say("end", point)
    return {"speedup": float(sum(point.threads.values())), "top1": 0.5}

Worker(Store(url, heartbeat_s=1, grace_s=2), measure, seed).work()
"""


def points(count=9):
    return [Point({"a": 4, "b": (1, 2, 4)[i % 3], "c": (1, 2, 4)[i // 3 % 3]}) for i in range(count)]


def measure(point):
    return {"speedup": sum(point.threads.values()) / 3, "top1": 1 - sum(point.threads.values()) / 100}


def make(tmp_path, **more):
    return Store(tmp_path / "study.db", "s", **{"facts": FACTS, "layers": LAYERS, **more})


def start_worker(url, log, seconds, seed=0):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(url), str(log), str(seconds), str(seed)])


def lines(log, word):
    return (
        [line.split() for line in log.read_text().splitlines() if line.startswith(word)]
        if log.exists()
        else []
    )


def wait_for(log, word, count, seconds=60):
    end = time.monotonic() + seconds
    while len(lines(log, word)) < count:
        assert time.monotonic() < end, "the worker does not get on"
        time.sleep(0.02)


def test_every_point_is_evaluated_once_and_kept(tmp_path):
    store = make(tmp_path)
    assert store.enqueue(points(), "grid") == 9
    assert store.enqueue(points(), "grid") == 0
    seen = []
    assert Worker(store, measure).work(lambda point, measured: seen.append(point.key)) == 9
    assert sorted(seen) == sorted(point.key for point in points())
    again = Store(tmp_path)
    assert again.name == "s"
    assert again.enqueue(points(), "grid") == 0
    assert Worker(again, measure).work() == 0
    table = again.table("grid")
    assert list(table["point"]) == [point.key for point in points()]
    for point, row in zip(points(), table.to_dict("records"), strict=True):
        assert {name: row[f"threads of {name}"] for name in LAYERS} == point.threads
        assert row["speedup"] == measure(point)["speedup"]
        assert again.measured(point)["top1"] == row["top1"]
    assert again.counts() == {"complete": 9, "waiting": 0, "running": 0, "failed": 0}


def test_methods_share_points_and_keep_their_order(tmp_path):
    store = make(tmp_path)
    store.enqueue(points(3), "first")
    store.enqueue(points(5)[::-1], "second")
    Worker(store, measure).work()
    assert len(store.table()) == 5
    assert list(store.table("second")["point"]) == [point.key for point in points(5)[::-1]]
    assert list(store.table()["method"]) == ["first"] * 3 + ["second"] * 2


def test_keys_tell_points_apart():
    base = Point({"a": 1, "b": 2})
    assert base.key == Point({"b": 2, "a": 1}).key
    others = [
        Point({"a": 2, "b": 2}),
        Point({"a": 1, "b": 2}, policy="S"),
        Point({"a": 1, "b": 2}, sparsity=0.5),
    ]
    others.append(Point({"a": 1, "b": 2}, recalibrate="ema"))
    assert len({point.key for point in [base, *others]}) == 5
    assert all(Point.from_params(point.to_params()) == point for point in others)


def test_a_point_needs_every_layer(tmp_path):
    with pytest.raises(ConfigError, match="'c'"):
        make(tmp_path).enqueue([Point({"a": 1, "b": 2})])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weights_sha256": "99"}, "weights_sha256='1234', not '99'"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"new": 1}, "new"),
    ],
)
def test_a_study_refuses_another_network_or_data(tmp_path, change, word):
    make(tmp_path)
    with pytest.raises(ConfigError, match=word):
        make(tmp_path, facts=FACTS | change)
    make(tmp_path)  # and takes its own


def test_a_study_refuses_other_layers(tmp_path):
    make(tmp_path)
    with pytest.raises(ConfigError, match="other layers"):
        make(tmp_path, layers=["a", "b"])


def test_joining_needs_a_study_that_is_there(tmp_path):
    with pytest.raises(ConfigError, match="missing"):
        Store(tmp_path / "none.db")
    make(tmp_path)
    Store(tmp_path / "study.db", "t", facts=FACTS, layers=LAYERS)
    with pytest.raises(ConfigError, match="2 studies"):
        Store(tmp_path / "study.db")
    with pytest.raises(ConfigError, match="no study 'u'"):
        Store(tmp_path / "study.db", "u")


def test_a_storage_out_of_reach_is_one_of_our_errors_and_hides_the_password():
    with pytest.raises(OutputError, match="cannot be used") as caught:
        Store("postgresql+psycopg://me:secret@127.0.0.1:9/none", "s", facts=FACTS, layers=LAYERS)
    assert "secret" not in str(caught.value)
    with pytest.raises(OutputError, match="needs a driver"):
        Store("mysql://127.0.0.1/none", "s", facts=FACTS, layers=LAYERS)


def test_a_damaged_file_is_one_of_our_errors(tmp_path):
    (tmp_path / "study.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(OutputError, match="cannot be used"):
        make(tmp_path)


def test_an_error_ends_the_work_and_the_next_run_takes_the_point_up_again(tmp_path):
    store = make(tmp_path)
    store.enqueue(points(3))

    def breaks(point):
        if point == points(3)[1]:
            raise ConfigError("no such thing")
        return measure(point)

    with pytest.raises(ConfigError, match="no such thing"):
        Worker(store, breaks).work()
    assert store.counts()["complete"] == 1
    assert Worker(store, measure).work() == 1  # other workers leave it alone
    assert store.enqueue(points(3)) == 1  # a new run asks for it again
    assert Worker(store, measure).work() == 1


def test_ctrl_c_gives_the_point_back(tmp_path):
    store = make(tmp_path)
    store.enqueue(points(2))
    for _ in range(4):  # more often than a point may end its worker

        def interrupted(point):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Worker(store, interrupted).work()
    assert Worker(store, measure).work() == 2


def test_nan_measurements_are_kept_as_missing(tmp_path):
    store = make(tmp_path)
    store.enqueue(points(1))
    Worker(store, lambda point: measure(point) | {"top1_difference_se": float("nan")}).work()
    assert store.table()["top1_difference_se"].isna().all()


def test_kill_9_loses_the_point_in_progress_alone(tmp_path):
    store = make(tmp_path)
    store.enqueue(points(6))
    log = tmp_path / "log"
    first = start_worker(tmp_path / "study.db", log, 0.3)
    wait_for(log, "begin", 3)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    finished = len(store.table())
    assert finished >= 2
    assert store.counts()["running"] == 1
    second = start_worker(tmp_path / "study.db", log, 0.01)
    assert second.wait(timeout=60) == 0
    assert store.counts() == {"complete": 6, "waiting": 0, "running": 0, "failed": 0}
    began = [key for _, pid, key in lines(log, "begin") if int(pid) == second.pid]
    assert len(began) == len(set(began)) == 6 - finished  # the lost one among them, no finished one


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_worker_killed_before_its_first_heartbeat_is_noticed(tmp_path):
    store = make(tmp_path, heartbeat_s=1, grace_s=1)
    store.enqueue(points(2))
    store.study.ask()  # taken, and then silence
    assert Worker(store, measure).work() == 2


@pytest.mark.filterwarnings("ignore:Heartbeat of storage", "ignore:optuna.storages._heartbeat")
def test_a_point_that_kills_its_workers_is_given_up_and_counted(tmp_path):
    store = make(tmp_path)
    store.enqueue(points(1))
    for _ in range(3):
        store.study.tell(store.study.ask(), state=_failed())
        Worker(store, measure).reclaim()
    assert store.counts()["failed"] == 1
    assert Worker(store, measure).work() == 0
    (left,) = store.left_out().to_dict("records")
    assert (left["point"], left["reason"]) == (points(1)[0].key, "it ended 3 workers")
    assert {name: left[f"threads of {name}"] for name in LAYERS} == points(1)[0].threads
    assert store.enqueue(points(2)) == 1  # a new run leaves it alone, unless it is told to retry
    assert store.retry_given_up() == 1
    assert store.retry_given_up() == 0
    store.study.tell(store.study.ask(), state=_failed())  # the other point, for once
    for _ in range(2):
        store.study.tell(store.study.ask(), state=_failed())
        Worker(store, measure).reclaim()
    assert store.counts()["failed"] == 0  # it has three attempts again
    assert Worker(store, measure).work() == 2
    assert store.counts() == {"complete": 2, "waiting": 0, "running": 0, "failed": 0}
    assert store.left_out().empty


def _failed():
    import optuna

    return optuna.trial.TrialState.FAIL


def test_a_result_that_comes_too_late_still_counts(tmp_path):
    store = make(tmp_path)
    store.enqueue(points(1))
    calls = []

    def slept(point):
        if not calls:  # meanwhile, others thought this worker dead
            store.study.tell(0, state=_failed())
        calls.append(point)
        return measure(point)

    Worker(store, slept).work()
    assert store.counts()["complete"] == 1
    assert len(calls) == 1


def test_two_workers_share_the_queue(tmp_path):
    store = make(tmp_path)
    store.enqueue(points())
    log = tmp_path / "log"
    workers = [start_worker(tmp_path / "study.db", log, 0.2, seed) for seed in (1, 2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert len(store.table()) == 9
    assert len(lines(log, "end")) in (9, 10)


def test_a_search_samples_up_to_its_budget_and_holds_what_is_fixed(tmp_path):
    store = make(tmp_path)
    seeds = [Point(dict.fromkeys(LAYERS, t), policy="S+W", recalibrate="ema") for t in (1, 2, 4)]
    store.enqueue(seeds, "search")
    store.plan_search(12, population=3, fixed=seeds[0], method="search")
    assert Worker(store, measure, seed=5).work() == 12
    table = store.table("search")
    assert list(table["point"][:3]) == [point.key for point in seeds]
    assert set(table["policy"]) == {"S+W"}
    assert set(table["recalibrate"]) == {"ema"}
    assert set(table["sparsity"]) == {0.0}
    assert Worker(store, measure, seed=5).work() == 0


def test_two_workers_refine_one_search(tmp_path):
    layers = [f"l{i}" for i in range(8)]
    store = make(tmp_path, layers=layers)
    seeds = [Point({name: (4 if i % 4 == s else 2) for i, name in enumerate(layers)}) for s in range(4)]
    store.enqueue(seeds, "search")
    store.plan_search(16, population=4, fixed=seeds[0], method="search")
    log = tmp_path / "log"
    workers = [start_worker(tmp_path / "study.db", log, 0.2, seed) for seed in (1, 2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    found = store.table("search")
    assert len(found) in (16, 17)  # at the last point both may be at work
    assert set(found["point"][:4]) == {point.key for point in seeds}
    ended = [key for _, _, key in lines(log, "end")]
    assert len(ended) <= len(set(ended)) + 1  # two may breed the same child at once, rarely
    assert len({pid for _, pid, _ in lines(log, "end")}) == 2
    assert store.counts()["running"] == store.counts()["waiting"] == 0


def test_a_search_breeds_from_points_that_were_finished_before(tmp_path):
    store = make(tmp_path, layers=[f"l{i}" for i in range(12)])
    seeds = [Point({name: (4 if name == f"l{i}" else 2) for name in store.layers}) for i in range(4)]
    store.enqueue(seeds, "sweep")
    Worker(store, measure).work()
    store.enqueue(seeds, "search", even_finished=True)
    store.plan_search(20, population=4, fixed=seeds[0], method="search")
    assert Worker(store, measure, seed=1).work() == 16
    children = store.table("search").tail(16)
    twos = (children[[name for name in children if name.startswith("threads of")]] == 2).mean(axis=1)
    assert twos.mean() > 0.7  # as in the seeds; a third, were they random


def test_a_search_in_an_exhausted_space_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("sysmt.study.worker.MAX_COPIES", 20)
    store = make(tmp_path, layers=["a"])
    seeds = [Point({"a": 1}), Point({"a": 4})]
    store.enqueue(seeds, "search")
    store.plan_search(12, population=2, fixed=seeds[0], method="search")
    with pytest.warns(UserWarning, match="no new points"):
        assert Worker(store, lambda point: {"speedup": 1.0, "top1": 0.5}).work() == 3


# -- where a study is kept ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run?lr=1", "100%", "100%25", "{x}", "a#b", "ü ñ+&", "a%3Fb", "x.db"])
def test_any_file_name_is_a_database_of_its_own(tmp_path, name):
    (tmp_path / "run?lr=2").mkdir()
    for path in (tmp_path / name / "study.db", tmp_path / "run?lr=2"):
        store = Store(path, "s", facts={"at": str(path)}, layers=LAYERS)
        assert Store(path).facts == Store(store.url).facts == {"at": str(path)}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "run?lr=2"])
    assert (tmp_path / name / "study.db").is_file()


def test_a_database_in_memory_is_refused():
    for url in ("sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"):
        with pytest.raises(ConfigError, match="in memory"):
            Store(url, "s", facts=FACTS, layers=LAYERS)


@pytest.mark.parametrize(
    ("directions", "attributes", "trials"),
    [
        (["minimize", "minimize"], {}, 1),
        (["minimize"], {}, 0),
        (["maximize", "maximize"], {}, 1),
        (["maximize", "maximize"], {"mine": 1}, 0),
        (["maximize", "maximize"], {"facts": 1, "layers": [], "notes": {}}, 0),
    ],
)
def test_somebody_elses_study_is_refused_and_left_as_it_was(tmp_path, directions, attributes, trials):
    url = f"sqlite:///{tmp_path}/theirs.db"
    theirs = optuna.create_study(storage=url, study_name="mine", directions=directions)
    for key, value in attributes.items():
        theirs.set_user_attr(key, value)
    for _ in range(trials):
        theirs.enqueue_trial({"x": 0.7})
    for more in ({"facts": FACTS, "layers": LAYERS}, {}):
        with pytest.raises(ConfigError, match="not one of sysmt's"):
            Store(url, "mine", **more)
    found = optuna.load_study(storage=url, study_name="mine")
    assert found.metric_names is None
    assert [one.name.lower() for one in found.directions] == directions
    assert found.user_attrs == attributes
    assert [trial.state.name for trial in found.trials] == ["WAITING"] * trials
    Store(url, "another", facts=FACTS, layers=LAYERS)  # beside it there is room


def test_joining_makes_no_tables_in_somebody_elses_database(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "theirs.db")) as theirs:
        theirs.execute("create table things (x)")
        with pytest.raises(ConfigError, match="no studies"):
            Store(tmp_path / "theirs.db")
        assert theirs.execute("select name from sqlite_master").fetchall() == [("things",)]


def test_tables_of_another_version_of_optuna_are_one_of_our_errors(tmp_path):
    make(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        connection.execute("update alembic_version set version_num='v2.6.0.a'")
        connection.commit()
    for more in ({"facts": FACTS, "layers": LAYERS}, {}):
        with pytest.raises(OutputError, match="cannot be used: .*optuna"):
            Store(tmp_path / "study.db", "s", **more)


def test_a_study_whose_maker_was_killed_is_completed(tmp_path, monkeypatch):
    monkeypatch.setattr("sysmt.study.store.HALF_MADE_S", 0.2)
    url = f"sqlite:///{tmp_path}/study.db"
    half = optuna.create_study(storage=url, study_name="s", directions=["maximize", "maximize"])
    half.set_user_attr("layers", ["other"])
    with pytest.raises(ConfigError, match="not finished being made"):
        Store(url)
    store = make(tmp_path)
    assert (store.facts, store.layers, store.notes) == (FACTS, LAYERS, {})
    assert store.study.metric_names == ["speedup", "top1"]


MAKER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_store import FACTS, LAYERS, measure, points
from sysmt.study.store import Store
from sysmt.study.worker import Worker

store = Store(sys.argv[1], "s", facts=FACTS, layers=LAYERS)
store.enqueue(points(), "sweep")
print(Worker(store, measure).work())
"""


def test_the_same_new_study_started_several_times_at_once_measures_every_point_once(tmp_path):
    for attempt in range(3):
        path = tmp_path / f"{attempt}.db"
        command = [sys.executable, "-c", MAKER, str(path), str(Path(__file__).parent)]
        started = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        said = [one.communicate(timeout=120) for one in started]
        assert [one.returncode for one in started] == [0, 0, 0], said
        assert sum(int(out) for out, _ in said) == 9
        store = Store(path)
        assert store.counts() == {"complete": 9, "waiting": 0, "running": 0, "failed": 0}
        assert len(store.table("sweep")) == 9


def test_a_point_that_was_asked_for_twice_is_measured_once(tmp_path):
    store = make(tmp_path)
    store.enqueue(points(2))
    for point in points(2):  # as if another command had asked at the same moment
        store.study.enqueue_trial(point.to_params(), user_attrs={"point": point.key})
    first = Worker(store, measure)
    taken, _ = first._take()
    measured = []
    done = Worker(store, lambda point: measured.append(point) or measure(point))
    for _ in range(3):
        done._evaluate(done._take()[0], False)
    assert measured == points(2)[1:]  # neither what the first worker has, nor its own point again
    assert first._evaluate(taken, False) is not None
    assert store.counts() == {"complete": 2, "waiting": 0, "running": 0, "failed": 0}


def test_storage_url(tmp_path):
    assert storage_url("postgresql://me@host/db") == "postgresql+psycopg://me@host/db"
    assert storage_url("postgresql+psycopg2://host/db") == "postgresql+psycopg2://host/db"
    assert storage_url(tmp_path) == f"sqlite:///{tmp_path}/study.db"
    assert storage_url(tmp_path / "x.db") == f"sqlite:///{tmp_path}/x.db"
    assert storage_url("postgresql://u:p@ss:w@rd/x") == "postgresql+psycopg://u:p%40ss%3Aw@rd/x"
    assert storage_url("postgresql://u:p%40ss@h:1/x?a=b@c") == "postgresql+psycopg://u:p%40ss@h:1/x?a=b@c"


# -- PostgreSQL --------------------------------------------------------------------------------


def _postgres_bin():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


@pytest.fixture(scope="module")
def postgres():
    """A server of our own on a Unix socket in a temporary directory, as a user that is not root."""
    bin_dir = _postgres_bin()
    if bin_dir is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: postgresql)")
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory(prefix="sysmt-pg-", dir="/tmp") as directory:
        as_server = []
        if os.getuid() == 0:  # the server refuses to run as root
            shutil.chown(directory, "postgres")
            as_server = ["runuser", "-u", "postgres", "--"]

        def run(tool, *arguments):
            command = [*as_server, str(bin_dir / tool), *arguments]
            subprocess.run(command, check=True, cwd=directory, stdout=subprocess.DEVNULL)

        data = f"{directory}/data"
        run("initdb", "-D", data, "--auth=trust", "--username=sysmt", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={directory} -c fsync=off"
        run("pg_ctl", "-D", data, "-w", "-l", f"{directory}/log", "-o", options, "start")
        try:
            run("createdb", "-h", directory, "-U", "sysmt", "studies")
            yield f"postgresql+psycopg://sysmt@/studies?host={directory}"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")


def test_two_workers_share_a_study_on_postgresql_and_one_dies(postgres, tmp_path):
    store = Store(postgres, "shared", facts=FACTS, layers=LAYERS)
    store.enqueue(points(), "grid")
    log = tmp_path / "log"
    workers = [start_worker(postgres, log, 0.25, seed) for seed in (1, 2)]
    wait_for(log, "end", 3)
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].wait()
    assert workers[1].wait(timeout=120) == 0
    assert store.counts() == {"complete": 9, "waiting": 0, "running": 0, "failed": 0}
    assert {pid for _, pid, _ in lines(log, "end")} == {str(worker.pid) for worker in workers}
    ended = [key for _, _, key in lines(log, "end")]
    assert set(ended) == {point.key for point in points()}
    assert len(ended) <= 10  # the race for a point may cost one
    with pytest.raises(ConfigError, match="weights_sha256"):
        Store(postgres, "shared", facts=FACTS | {"weights_sha256": "99"})


def test_a_study_opens_in_optuna_dashboard(tmp_path):
    dashboard = pytest.importorskip("optuna_dashboard")
    store = make(tmp_path)
    store.enqueue(points(3))
    Worker(store, measure).work()
    answer = {}

    def ask(path):
        body = dashboard.wsgi(store.storage)(
            {
                "REQUEST_METHOD": "GET",
                "PATH_INFO": path,
                "QUERY_STRING": "after=0",
                "SERVER_NAME": "localhost",
                "SERVER_PORT": "80",
                "wsgi.input": io.BytesIO(),
                "wsgi.errors": io.StringIO(),
                "wsgi.url_scheme": "http",
            },
            lambda status, headers, *rest: answer.update(status=status),
        )
        return json.loads(b"".join(body))

    (study,) = ask("/api/studies")["study_summaries"]
    assert answer["status"].startswith("200")
    assert study["study_name"] == "s"
    shown = ask(f"/api/studies/{study['study_id']}")
    assert answer["status"].startswith("200")
    assert len(shown["trials"]) == 3
