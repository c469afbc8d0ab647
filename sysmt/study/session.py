"""One sweep or search on disk: its directory, its study, its workers, and the files it leaves.

A directory that such a command wrote is gone on with by the same command; the study in it refuses
other networks, data and arrays.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w

import sysmt
from sysmt.errors import EXIT_INCOMPLETE, ConfigError, InUseError, SysmtError
from sysmt.files import read_toml
from sysmt.progress import progress_bar
from sysmt.study.pareto import Reference, hypervolume_curve
from sysmt.study.run_config import RunConfig
from sysmt.study.run_directory import DEFAULT_PARENT, RunDirectory, provenance, without_password
from sysmt.study.search import BASELINES, SEARCH, SearchConfig, front_table, run_baselines, run_search
from sysmt.study.storage import storage_url
from sysmt.study.store import Point, Store
from sysmt.study.sweep import Bench, Sweep, usable_cpus
from sysmt.study.thread_maps import threads_of, write_threads_map
from sysmt.study.worker import Worker

__all__ = ["Session", "join"]

FILES = (
    "config.toml", "study.db*", "points.csv", "front.csv", "sensitivities.csv", "hypervolume.csv",
    "maps/*.toml", "chosen.toml", "*.png", "worker-*.log",
)  # fmt: skip
"""What a sweep or search writes."""

HYPERVOLUME_DROP = 0.02
"""Lower edge of hypervolumes, below the float network's accuracy."""

_HEAD = """\
The same command with the same --out goes on with this study; `sysmt sweep --join` helps with it.
[run] and [study] are what it was made with; [made_by] is for the record."""

OnPoint = Callable[[Point, Mapping[str, Any]], None]


class Session:
    """A study being worked on from the command line.

    Parameters
    ----------
    kind : str
        ``"sweep"`` or ``"search"``.
    config : RunConfig
    out : Path or None
        Directory for the results; by default a new one in ./results.
    storage : str or None
        A database's URL or file; by default ``study.db`` in that directory.
    study : str or None
        Its name there; by default the kind and the model.
    overwrite : bool
        Start anew in a directory that has results.
    held_out : float
        See `Bench`.
    asked : mapping, optional
        What else was asked for, as plain values. Without `out`, a study in ./results that was stopped, and of
        which the same was asked, is gone on with.
    new : bool
        Begin another one all the same.

    Attributes
    ----------
    directory : RunDirectory
    bench : Bench
    store : Store
    goes_on : bool
        Whether there was such a study already.
    helps : bool
        Whether another process is working on the same sweep in the same directory, and this one helps it.

    Raises
    ------
    SysmtError
        If the directory, network, data or study cannot be had, or do not fit each other.
    """

    def __init__(
        self,
        kind: str,
        config: RunConfig,
        *,
        out: Path | None = None,
        storage: str | None = None,
        study: str | None = None,
        overwrite: bool = False,
        held_out: float = 0.0,
        asked: Mapping[str, Any] | None = None,
        new: bool = False,
    ) -> None:
        self.kind, self.config = kind, config
        place = {"storage": without_password(storage or ""), "study": study or "", "held_out": held_out}
        self._asked = _plain({**(asked or {}), **place})
        if out is None and not new and not overwrite:
            out = self._stopped()
        self.helps = False
        try:
            self.directory = RunDirectory(
                out,
                name=f"{kind}-{config.model}",
                overwrite=overwrite,
                stale=FILES,
                resumes=None if overwrite else lambda path: _is_kind(path, kind),
            )
        except InUseError:
            # A search's points depend on what it found before; a sweep's are known, and can be shared.
            if out is None or overwrite or kind != "sweep" or not _becomes_kind(out, kind):
                raise
            self.directory, self.helps = RunDirectory(out, shared=True), True
        self.goes_on = self.directory.resumed
        name = study or f"{kind} {config.model}"
        where = storage_url(storage or self.directory.path / "study.db")
        try:
            if not self.goes_on:
                # Before the study itself: a directory whose process is killed from here on is gone on with.
                self._write_config(where, name)
            self.bench = Bench(config, held_out)
            self.store = Store(
                where,
                name,
                facts=self.bench.facts(),
                layers=self.bench.layers,
                notes={"config": self.bench.config.to_record()},
            )
        except BaseException:
            if not self.goes_on:
                (self.directory.path / "config.toml").unlink(missing_ok=True)
            self.directory.remove_if_empty()
            raise
        self._write_config(where, name)

    def _stopped(self) -> Path | None:
        """Return the directory of a study that was stopped early, and of which the same was asked."""
        run = _plain(self.config.to_record())
        for path in sorted(DEFAULT_PARENT.glob(f"{self.kind}-*/config.toml"), key=os.path.getmtime):
            try:
                record = read_toml(path)
                with RunDirectory(path.parent, overwrite=True):  # nobody is working there
                    same = record["run"] == run and record["study"]["asked"] == self._asked
                    if same and record["outcome"]["status"] not in ("complete", "incomplete"):
                        return path.parent
            except (SysmtError, KeyError, TypeError):
                continue  # no study of this command's
        return None

    def _write_config(self, url: str, name: str, status: str = "running") -> None:
        if self.helps:
            return
        self._where = url, name
        self.directory.write_toml(
            "config.toml",
            {
                "study": {
                    "kind": self.kind,
                    "storage": without_password(url),
                    "name": name,
                    "asked": self._asked,
                },
                "run": self.config.to_record(),
                "made_by": provenance(),
                "outcome": {"status": status},
            },
            comment=_HEAD,
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            status = "incomplete" if len(self.store.left_out()) else "complete"
        elif isinstance(error, KeyboardInterrupt):
            status = "interrupted"
        else:
            status = f"failed: {error or type(error).__name__}"
        if not self.helps:
            self._write_config(*self._where, status)
        self.directory.close()

    # -- sweep ---------------------------------------------------------------------------------

    def sweep(self, sweep: Sweep, workers: int = 1, retry_failed: bool = False) -> pd.DataFrame:
        """Evaluate a sweep's points with so many processes, this one included; return the table.

        `retry_failed` takes points up again that were given up.
        """
        points = sweep.points(self.bench.layers)
        if retry_failed:
            self.store.retry_given_up()
        self.store.enqueue(points, "sweep")
        open_points = len(points) - len(self.store.table("sweep"))
        with self._files(), self._helpers(workers - 1):
            self._work(open_points)
        return self.store.table()

    def _work(self, total: int) -> None:
        done = self.store.counts()["complete"]
        with progress_bar(self.kind, total, "points") as bar:

            def on_point(point: Point, measured: Mapping[str, Any]) -> None:
                # Other workers' points count, too.
                bar.advance(self.store.counts()["complete"] - done - bar.done, _described(measured))

            Worker(self.store, self.bench.measure, self.config.seed).work(on_point)

    @contextlib.contextmanager
    def _helpers(self, count: int) -> Iterator[None]:
        """Run more workers on this machine, each with its share of the CPUs; they end with this one.

        A helper watches a pipe that closes with this process, however that ends, and then gives its
        point back. The pipe also tells it the storage, whose password others must not see. Ctrl-C reaches
        this process alone, so that a helper is interrupted once.
        """
        threads = self.config.cpu_threads or max(1, usable_cpus() // (count + 1))
        # -P: nothing in the current directory is imported, whatever its name.
        command = [sys.executable, "-P", "-m", "sysmt", "sweep", "--join", self.store.shown_url]
        command += ["--study", self.store.name, f"--cpu-threads={threads}", "--helper"]
        helpers: list[subprocess.Popen[bytes]] = []
        logs = [self.directory.path / f"worker-{number}.log" for number in range(1, count + 1)]
        with contextlib.ExitStack() as stack:
            for path in logs:
                log = stack.enter_context(path.open("wb"))
                helper = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=_where_this_package_is(),
                    start_new_session=True,
                )
                assert helper.stdin is not None
                stack.callback(helper.wait)
                stack.enter_context(helper.stdin)
                helpers.append(helper)
                with contextlib.suppress(BrokenPipeError):
                    helper.stdin.write(f"{self.store.url}\n".encode())
                    helper.stdin.flush()
            yield
            codes = [helper.wait() for helper in helpers]
        for code, path in zip(codes, logs, strict=True):
            if code not in (0, EXIT_INCOMPLETE):
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                warnings.warn(f"a worker ended early, {how}; see {path}", stacklevel=2)

    # -- search --------------------------------------------------------------------------------

    def search(
        self, search: SearchConfig, baselines: bool = False, retry_failed: bool = False
    ) -> pd.DataFrame:
        """Search, and compare with the baselines if asked to; return the search's points.

        `retry_failed` takes points up again that were given up.
        """
        if retry_failed:
            self.store.retry_given_up()
        total = search.evaluations * (3 if baselines else 1) + (3 if baselines else 0)
        with self._files(), progress_bar("search", total, "points") as bar:

            def on_point(point: Point, measured: Mapping[str, Any]) -> None:
                bar.advance(1, _described(measured))

            sensitivities = run_search(self.bench, self.store, search, on_point)
            self.directory.write_csv("sensitivities.csv", sensitivities)
            if baselines:
                run_baselines(self.bench, self.store, search, BASELINES, on_point)
        points = self.store.table(SEARCH)
        front = front_table(points)
        self.directory.write_csv("front.csv", front)
        for row in front.to_dict("records"):
            name = f"threads-{row['speedup']:.2f}x-{row['point'][:6]}.toml"
            write_threads_map(self.directory.path / "maps" / name, threads_of(row))
        self.directory.write_csv("hypervolume.csv", self._hypervolumes(search))
        return points

    def _hypervolumes(self, search: SearchConfig) -> pd.DataFrame:
        self.bench.select(search.sparsity)
        best = self.bench.float_top1
        reference = Reference(1.0, best - HYPERVOLUME_DROP, 4.0, best)
        rows = []
        for method in (SEARCH, *BASELINES):
            table = self.store.table(method)
            curve = hypervolume_curve(table["speedup"], table["top1"], reference) if len(table) else ()
            rows += [
                {"method": method, "seed": search.seed, "evaluations": number, "hypervolume": float(value)}
                for number, value in enumerate(curve, 1)
            ]
        return pd.DataFrame(rows)

    def keep_choice(self, row: Mapping[Any, Any]) -> Path:
        """Write the thread map of the point that was picked."""
        path = self.directory.path / "chosen.toml"
        write_threads_map(path, threads_of(row))
        return path

    # -- files ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _files(self) -> Iterator[None]:
        """Write the points measured so far, and those left out beside them, whatever ends the work."""
        try:
            yield
        finally:
            table, left_out = self.store.table(), self.store.left_out()
            if len(table) and len(left_out):
                counts = dict.fromkeys(table.select_dtypes("integer").columns, "Int64")
                table = pd.concat([table, left_out.drop(columns="reason")], ignore_index=True).astype(counts)
            if len(table):
                self.directory.write_csv("points.csv", table)

    def draw(self) -> None:
        """Draw the plots, from the tables on disk."""
        from sysmt.study.plots.study import draw_study

        title = f"{self.config.model}, {self.bench.job.data.name}"
        draw_study(self.directory.path, title)


def join(
    storage: str,
    study: str | None,
    chosen: Mapping[str, Any],
    on_point: OnPoint | None = None,
    retry_failed: bool = False,
) -> int:
    """Work on a study that was made elsewhere.

    Parameters
    ----------
    storage : str
        Its database's URL, file, or the directory of the sweep or search.
    study : str or None
        Its name; not needed where there is only one.
    chosen : mapping
        Values of `RunConfig` that differ here, such as where weights and images lie.
    on_point : callable, optional
    retry_failed : bool
        Take points up again that were given up.

    Returns
    -------
    int
        How many points were evaluated here.

    Raises
    ------
    ConfigError
        If weights, images or array are not the study's.
    """
    store = Store(storage, study)
    if "config" not in store.notes:
        raise ConfigError(f"study {store.name!r} was not made by `sysmt sweep` or `sysmt search`")
    config = RunConfig.from_record(store.notes["config"] | chosen, f"study {store.name!r}")
    bench = Bench(config, store.facts.get("held_out", 0.0))
    store = Store(storage, store.name, facts=bench.facts(), layers=bench.layers)
    if retry_failed:
        store.retry_given_up()
    return Worker(store, bench.measure, bench.config.seed + os.getpid()).work(on_point)


def _described(measured: Mapping[str, Any]) -> str:
    return f"{measured['speedup']:.2f}x {100 * measured['top1']:.2f} %"


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as it comes back from a TOML file."""
    return tomllib.loads(tomli_w.dumps({key: value for key, value in record.items() if value is not None}))


def _where_this_package_is() -> dict[str, str]:
    """Return the environment in which ``python -P`` finds the package that runs here."""
    home = str(Path(sysmt.__file__).parents[1])
    if home in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return dict(os.environ)
    others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.environ | {"PYTHONPATH": os.pathsep.join([home, *others])}


def _becomes_kind(path: Path, kind: str) -> bool:
    """Whether a directory that another process has taken is, or becomes at once, a study of the same kind."""
    patience = time.monotonic() + 2
    while not _is_kind(path, kind):
        if time.monotonic() > patience:
            return False
        time.sleep(0.05)
    return True


def _is_kind(path: Path, kind: str) -> bool:
    """Whether a directory holds a study that the same command made."""
    if not (path / "config.toml").is_file():
        return False
    study = read_toml(path / "config.toml").get("study")
    return isinstance(study, Mapping) and study.get("kind") == kind
