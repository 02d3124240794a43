"""Claim: who reads a bucket finds whole uploads, whatever stopped the next; one run writes there.

The store here is a dictionary that fails when it is told to; test_stores has real ones.
"""

import datetime
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flax_resnet.config import Experiment
from flax_resnet.errors import CheckpointError, ConfigError, TrainingError, UserError
from flax_resnet.places import Url
from flax_resnet.training import bucket, lease, mirror
from flax_resnet.training.bucket import Bucket
from flax_resnet.training.lease import Lease
from flax_resnet.training.mirror import Mirror
from flax_resnet.training.starting_weights import read_weights

URL = Url("s3", "bucket/run")


class Store:
    """What Bucket needs of fsspec."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.times: dict[str, int] = {}
        self.acts_left: int | None = None  # that change something, until nothing works any more
        self.clock = 0

    def act(self) -> None:
        if self.acts_left == 0:
            raise ConnectionError("the store is gone")
        if self.acts_left:
            self.acts_left -= 1

    def pipe_file(self, path: str, data: bytes, mode: str) -> None:
        self.act()
        if mode == "create" and path in self.objects:
            raise FileExistsError(path)
        self.objects[path] = data
        self.times[path] = self.clock

    def rm_file(self, path: str) -> None:
        self.act()
        if path not in self.objects:
            raise FileNotFoundError(path)
        del self.objects[path]

    def cat_file(self, path: str) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def find(self, path: str) -> list[str]:
        return sorted(name for name in self.objects if name.startswith(f"{path}/"))

    def modified(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.times[path])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()
    monkeypatch.setattr(bucket, "file_system", lambda scheme: found)
    return found


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], bool]]:
    logging.getLogger("flax_resnet").propagate = True
    with caplog.at_level(logging.INFO, "flax_resnet"):
        yield lambda text: any(text in record.getMessage() for record in caplog.records)


def content(step: int, name: str) -> str:
    return f"{name} of step {step}"


def write_run(workdir: Path, *steps: int, seed: int = 0) -> Path:
    """A work directory as far as a mirror looks into it."""
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    for step in steps:
        for name in ("meta", "state/d/1", "state/empty"):
            path = workdir / "checkpoints" / str(step) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content(step, name))
    (workdir / "config.json").write_text(json.dumps(Experiment(seed=seed).to_dict()))
    (workdir / "metrics.jsonl").write_text(f"rows up to {max(steps)}")
    (workdir / ".lock").touch()
    return workdir


def saved(workdir: Path) -> list[int]:
    """The steps of the checkpoints, each of which must be whole."""
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").glob("*"))
    for step in steps:
        root = workdir / "checkpoints" / str(step)
        files = {str(x.relative_to(root)): x.read_text() for x in root.rglob("*") if x.is_file()}
        assert files == {n: content(step, n) for n in ("meta", "state/d/1", "state/empty")}
    return steps


def begin(workdir: Path) -> Mirror:
    """A mirror that has begun, and whose thread does nothing."""
    found = Mirror(URL, workdir)
    found.thread = threading.Thread(target=lambda: None)
    found.begin()
    return found


def upload(workdir: Path) -> None:
    """What a session does that ends well."""
    session = begin(workdir)
    try:
        session.publish(session.listing(), session.listing())
    finally:
        session.lease.give_back()


def fetched(directory: Path) -> list[int]:
    mirror.fetch_run(Bucket(URL), directory, "", checkpoints=True)
    return saved(directory)


def test_wherever_an_upload_stops_the_last_whole_one_is_found(store: Store, tmp_path: Path) -> None:
    upload(write_run(tmp_path / "first", 3, 6))
    before = dict(store.objects)
    found: list[int] = []
    for acts in range(100):
        store.objects, store.acts_left = dict(before), None
        session = begin(write_run(tmp_path / "first", 6, 9))
        store.acts_left = acts
        try:
            session.publish(session.listing(), session.listing())
        except ConnectionError:
            is_over = False
        else:
            is_over = store.acts_left > 0
        store.acts_left = None
        session.lease.give_back()
        found += fetched(tmp_path / f"read{acts}")
        # And whoever goes on, here or elsewhere, leaves it whole.
        upload(tmp_path / ("first" if acts % 2 else f"other{acts}"))
        assert fetched(tmp_path / f"again{acts}") == [9 if acts % 2 else found[-1]]
        if is_over:
            break
    assert found == sorted(found)
    assert set(found) == {6, 9}
    # Five objects, then the manifest: from there on it is 9; then step 3 goes, object by object.
    assert found.count(6) >= 5
    assert acts == found.count(6) + 1 + 3


def test_half_of_the_first_upload_is_nothing(store: Store, tmp_path: Path) -> None:
    session = begin(write_run(tmp_path / "first", 3))
    store.acts_left = 4
    with pytest.raises(ConnectionError):
        session.publish(session.listing(), session.listing())
    store.acts_left = None
    session.lease.give_back()
    assert any("checkpoints/3/" in name for name in store.objects)
    begin(tmp_path / "other").lease.give_back()
    assert not (tmp_path / "other").exists()


def test_what_is_gone_here_goes_there_and_nothing_else_does(store: Store, tmp_path: Path) -> None:
    workdir = write_run(tmp_path / "run", 3, 6)
    (workdir / "summary.json").write_text("{}")
    upload(workdir)
    others = {f"bucket/run/{x}": b"mine" for x in ("notes.txt", "checkpoints/best-of/x")}
    others["bucket/run2/checkpoints/1/x"] = b"another run's"
    store.objects |= others
    (workdir / "summary.json").unlink()
    upload(write_run(workdir, 6, 9))
    assert others.items() <= store.objects.items()
    names = {name.removeprefix("bucket/run/") for name in store.objects} - others.keys()
    assert bucket.steps_of(names) == ["6", "9"]
    assert "summary.json" not in names
    assert ".lock" not in names


def test_a_checkpoint_that_is_being_deleted_is_not_taken_for_whole(
    store: Store, tmp_path: Path
) -> None:
    session = begin(write_run(tmp_path / "run", 3, 6, 9))
    before = session.listing()
    (tmp_path / "run/checkpoints/3/meta").unlink()
    session.publish(session.listing(), before)
    session.lease.give_back()
    assert bucket.steps_of(Bucket(URL).manifest() or {}) == ["6", "9"]


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_checkpoint_that_is_not_whole_there_is_not_used(
    store: Store, tmp_path: Path, said: Callable[[str], bool], is_lost: bool
) -> None:
    upload(write_run(tmp_path / "run", 3, 6))

    def harm(step: int) -> None:
        name = f"bucket/run/checkpoints/{step}/state/d/1"
        if is_lost:
            del store.objects[name]
        else:
            store.objects[name] = store.objects[name][:-1]

    harm(6)
    begin(tmp_path / "trains").lease.give_back()
    assert saved(tmp_path / "trains") == fetched(tmp_path / "reads") == [3]
    assert said(f"checkpoint 6 is not whole: checkpoints/6/state/d/1 is {'gone' * is_lost}")
    harm(3)
    with pytest.raises(CheckpointError, match=r"no checkpoint in s3://bucket/run is whole"):
        begin(tmp_path / "trains anew")
    with pytest.raises(CheckpointError, match=r"no checkpoint in s3://bucket/run is whole"):
        fetched(tmp_path / "reads again")


@pytest.mark.parametrize(
    ("ours", "theirs", "then"),
    [
        ((), (3, 6), [3, 6]),
        ((3,), (3, 6), [3, 6]),
        ((9,), (9, 10), [9, 10]),
        ((6, 9), (3, 6), [6, 9]),
        ((3,), (3,), [3]),
    ],
)
def test_the_newer_of_both_is_gone_on_from(
    store: Store, tmp_path: Path, ours: tuple[int, ...], theirs: tuple[int, ...], then: list[int]
) -> None:
    upload(write_run(tmp_path / "theirs", *theirs))
    workdir = tmp_path / "ours"
    if ours:
        write_run(workdir, *ours)
        (workdir / "summary.json").write_text("of a run that has gone on elsewhere")
    begin(workdir).lease.give_back()
    assert saved(workdir) == then
    assert (workdir / "metrics.jsonl").read_text() == f"rows up to {then[-1]}"
    assert (workdir / "summary.json").exists() == (bool(ours) and ours[-1] >= theirs[-1])


def test_what_the_bucket_has_lost_goes_up_again(store: Store, tmp_path: Path) -> None:
    workdir = write_run(tmp_path / "run", 3, 6)
    upload(workdir)
    del store.objects["bucket/run/checkpoints/6/state/d/1"]
    upload(workdir)
    assert fetched(tmp_path / "read") == [6]


def test_a_work_directory_that_was_copied_there_by_hand_is_used(
    store: Store, tmp_path: Path
) -> None:
    upload(write_run(tmp_path / "run", 3, 6))
    del store.objects["bucket/run/mirror.json"]
    begin(tmp_path / "other").lease.give_back()
    assert saved(tmp_path / "other") == [3, 6]


def test_another_runs_local_copy_is_refused(store: Store, tmp_path: Path) -> None:
    upload(write_run(tmp_path / "run", 3))
    with pytest.raises(CheckpointError, match=r"holds another run than s3://.*seed: 0 there, 1 he"):
        begin(write_run(tmp_path / "other", 6, seed=1))
    upload(tmp_path / "run")  # the refused one has given the lease back


def test_no_name_reaches_out_of_the_work_directory(store: Store, tmp_path: Path) -> None:
    upload(write_run(tmp_path / "run", 3))
    for name in ("checkpoints/3/../../../stolen", "../stolen", "/tmp/stolen", "tensorboard/.."):
        store.objects[f"bucket/run/{name}"] = b"bad"
        tree = json.loads(store.objects["bucket/run/mirror.json"])
        tree["files"][name] = ""
        store.objects["bucket/run/mirror.json"] = json.dumps(tree).encode()
    inside = {path for path in tmp_path.rglob("*") if "read" in path.parts}
    assert fetched(tmp_path / "read" / "run") == [3]
    outside = {path for path in tmp_path.rglob("*") if "read" not in path.parts}
    assert not inside
    assert not [path for path in outside if path.name == "stolen"]


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}'])
def test_a_damaged_manifest_is_an_error(store: Store, tmp_path: Path, text: str) -> None:
    upload(write_run(tmp_path / "run", 3))
    store.objects["bucket/run/mirror.json"] = text.encode()
    with pytest.raises(CheckpointError, match=r"run/mirror\.json is damaged"):
        begin(tmp_path / "run")


def test_a_driver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.filesystem", fail)
    with pytest.raises(ConfigError, match=r"gs:// needs gcsfs: pip install 'flax-resnet\[gcs\]'"):
        Bucket(Url("gs", "bucket/run"))


class Clock:
    """Time that passes by being waited for."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (mirror, lease):
        monkeypatch.setattr(module, "time", found)
    return found


def closing(session: Mirror) -> Mirror:
    session.closed_at = session.bucket.sent_at = 0.0
    session.closing.set()
    return session


def test_an_upload_that_fails_is_tried_again(
    store: Store, clock: Clock, tmp_path: Path, said: Callable[[str], bool]
) -> None:
    session = closing(begin(write_run(tmp_path / "run", 3)))
    store.acts_left = 2

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now > 60:
            store.acts_left = None

    clock.sleep = sleep
    session.follow()
    assert session.failure is None
    assert said("s3://bucket/run: no upload (ConnectionError: the store is gone); it is tried ag")
    assert said("s3://bucket/run: the upload goes on")
    assert fetched(tmp_path / "read") == [3]
    assert 60 < clock.now < 70


def test_a_store_that_stays_away_ends_in_an_error(
    store: Store, clock: Clock, tmp_path: Path
) -> None:
    session = closing(begin(write_run(tmp_path / "run", 3)))
    store.acts_left = 2
    session.follow()
    assert 180 <= clock.now < 190
    with pytest.raises(CheckpointError) as error:
        session.end()
    assert str(error.value) == (
        "s3://bucket/run lacks what is new (ConnectionError: the store is gone); "
        f"{tmp_path / 'run'} is complete: start the same command again on this machine, and it "
        "uploads that"
    )
    store.acts_left = None
    upload(tmp_path / "run")
    assert fetched(tmp_path / "read") == [3]


def terms(number: int, store: Store, **changes: Any) -> None:
    """Changes what a lease says."""
    name = f"bucket/run/lock/{number}"
    store.objects[name] = json.dumps(json.loads(store.objects[name]) | changes).encode()


def taken() -> Lease:
    found = Lease(Bucket(URL))
    found.take()
    return found


def test_a_lease_that_is_held_is_refused_and_one_given_back_is_free(
    store: Store, clock: Clock
) -> None:
    first = taken()
    with pytest.raises(CheckpointError, match=r"s3://bucket/run is in use by another run \(host"):
        taken()
    first.give_back()
    assert json.loads(store.objects["bucket/run/lock/1"])["over"]
    assert clock.now == 0
    second = taken()
    assert store.find("bucket/run") == ["bucket/run/lock/2"]
    second.check()
    with pytest.raises(CheckpointError, match="another run has taken s3://bucket/run"):
        first.check()


def test_a_killed_runs_lease_is_free_at_once_on_its_machine(store: Store) -> None:
    taken()
    terms(1, store, started="12345")  # a process of that number that began at another time
    taken().check()


def test_elsewhere_a_lease_lasts_until_it_is_not_renewed_for_its_time(
    store: Store, clock: Clock, said: Callable[[str], bool]
) -> None:
    taken()
    terms(1, store, machine="another", seconds=90)
    store.clock = 30
    taken().check()
    assert 60 <= clock.now < 63
    assert said("it may be dead: waiting for a sign")
    terms(2, store, machine="another", seconds=90)
    store.clock = 121
    clock.now = 0.0
    taken().check()
    assert clock.now < 3


def test_elsewhere_a_lease_that_is_renewed_is_refused(store: Store, clock: Clock) -> None:
    taken()
    terms(1, store, machine="another")

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now > 20:
            terms(1, store, renewed=1)

    clock.sleep = sleep
    with pytest.raises(CheckpointError, match="in use by another run"):
        taken()
    assert clock.now < 25


def test_of_many_who_want_a_lease_that_is_over_one_gets_it(store: Store) -> None:
    taken()
    many = [Lease(Bucket(URL)) for _ in range(3)]
    assert [one.make(2) for one in many] == [True, False, False]
    assert many[1].make(3)
    assert not many[2].make(2)  # it has slept, and nobody is left on 2
    assert store.find("bucket/run") == ["bucket/run/lock/3"]


def test_who_has_lost_the_lease_writes_no_more(
    store: Store, tmp_path: Path, said: Callable[[str], bool]
) -> None:
    session = closing(begin(write_run(tmp_path / "run", 3)))
    terms(1, store, over=True)
    taken()
    before = dict(store.objects)
    session.follow()
    assert store.objects == before
    with pytest.raises(CheckpointError, match="lacks what is new"):
        session.end()
    assert said("another run has taken s3://bucket/run")


@pytest.mark.parametrize("text", ["soon", "0", "-3", "inf"])
def test_a_patience_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FLAX_RESNET_STORE_SECONDS", text)
    with pytest.raises(ConfigError, match=r"\$FLAX_RESNET_STORE_SECONDS must be at least 1, got"):
        lease.patience()


@pytest.mark.parametrize("how", [None, SystemExit(143), TrainingError("the loss is nan")])
def test_however_a_run_ends_what_it_has_saved_goes_up(
    store: Store, tmp_path: Path, how: BaseException | None
) -> None:
    def run() -> None:
        with mirror.mirrored(URL, tmp_path / "run") as workdir:
            write_run(workdir, 3)
            if how is not None:
                raise how

    if how is None:
        run()
    else:
        with pytest.raises(type(how)) as error:
            run()
        assert error.value is how
    assert fetched(tmp_path / "read") == [3]
    taken()  # the lease is free


def test_a_second_interrupt_waits_for_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        with mirror.mirrored(URL, tmp_path / "run") as workdir:
            write_run(workdir, 3)
            raise KeyboardInterrupt

    publish = Mirror.publish
    monkeypatch.setattr(Mirror, "publish", lambda *args: None)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(Mirror, "publish", publish)
    assert not any("checkpoints" in name for name in store.objects)
    upload(tmp_path / "run")  # the same process may go on


def test_a_local_directory_is_itself(tmp_path: Path) -> None:
    with mirror.mirrored(tmp_path) as workdir:
        assert workdir == tmp_path
    assert mirror.fetch(tmp_path) == tmp_path


def test_what_is_fetched(store: Store, tmp_path: Path) -> None:
    upload(write_run(tmp_path / "run", 3, 6))
    store.objects["bucket/run/net.pt"] = b"weights"
    assert saved(mirror.fetch(URL)) == [6]
    older = mirror.fetch(URL._replace(path="bucket/run/checkpoints/3"))
    assert (older.name, saved(older.parent.parent)) == ("3", [3])
    best = mirror.fetch(URL._replace(path="bucket/run/checkpoints/best"))
    assert (best.name, saved(best.parent.parent)) == ("best", [3, 6])
    assert not (mirror.fetch(URL, checkpoints=False) / "checkpoints").exists()
    assert mirror.fetch(URL._replace(path="bucket/run/net.pt")).read_bytes() == b"weights"
    for path, message in {
        "bucket/run/checkpoints/4": "has no checkpoint of step 4, only 6, 3",
        "bucket/nothing": "is no work directory: it has no config.json",
        "bucket/nothing.pt": "there is no s3://bucket/nothing.pt",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            mirror.fetch(URL._replace(path=path))


def test_a_run_may_begin_with_the_weights_of_one_there(store: Store) -> None:
    for init, message in {
        "s3://bucket/nothing": "s3://bucket/nothing is no work directory",
        "s3:/bucket/run": "init must be s3://BUCKET/NAME, got s3:/bucket/run",
    }.items():
        with pytest.raises(UserError, match=message):
            read_weights(Experiment(init=init))


def test_a_reader_follows_a_run_that_goes_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the manifest named is removed while it is being read: the next manifest is read."""
    upload(write_run(tmp_path / "run", 3))
    download, calls = Bucket.download, []

    def slow(self: Bucket, workdir: Path, files: dict[str, str]) -> None:
        if not calls:
            calls.append(upload(write_run(tmp_path / "run", 6)))
        download(self, workdir, files)

    monkeypatch.setattr(Bucket, "download", slow)
    assert fetched(tmp_path / "read") == [6]


def test_a_driver_may_raise_anything(store: Store, tmp_path: Path) -> None:
    store.find = lambda path: {}["credentials"]
    with pytest.raises(CheckpointError, match="s3://bucket/run cannot be used: KeyError: 'cred"):
        begin(tmp_path / "run")


def test_the_names_by_which_time_is_read_are_no_leases(store: Store) -> None:
    taken().give_back()
    store.objects["bucket/run/lock/7.now"] = b""
    store.objects["bucket/run/lock/mine"] = b""
    assert taken().number == 2
