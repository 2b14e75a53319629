"""Prepared forms from the installation to the engine's shelf, in a real store: kept, renewed, done without."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from agent.base.clock import SystemClock
from agent.base.config import BatchingConfig, ModelConfig
from agent.base.errors import DamagedError, TryLaterError
from agent.bundles.manifest import BatchingPolicy, Variant
from agent.hardware.facts import Facts
from agent.hardware.profiles import FALLBACK
from agent.infer import preparing
from agent.infer.forms import Figures
from agent.infer.gains import Gain
from agent.infer.landlock import abi_version
from agent.infer.runtimes.base import PLAIN, Route
from agent.infer.runtimes.probe import source_version
from agent.infer.trial import Surroundings
from agent.operations.batching import gain_record
from agent.operations.forms import PREFIX, form_keys, forms_hold, records_of
from agent.operations.install import AddRequest, Installer, Preparing, Serving
from agent.operations.measured import Choice, DeviceView
from agent.operations.preparing import FormMaker
from agent.operations.shelving import Shelves
from agent.selection.inventory import InstalledRuntime, RuntimeInventory
from agent.store.keys import DeviceKeys
from agent.store.store import Store
from tests import onnx_models

CANDIDATE = "fp32@CPUExecutionProvider"
FACTS = Facts()


class Device:
    """A real store and real preparing; the choice falls on the first variant, and serving only takes notes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.version = source_version("onnx")
        self.stopping = False
        self.events: list[str] = []
        self.key = form_keys(FACTS, 1, lambda name: self.version)
        inventory = RuntimeInventory({"onnx": InstalledRuntime(self.version, ("CPUExecutionProvider",))})
        view = DeviceView(FACTS, FALLBACK, 1, (), lambda: inventory, lambda: 1024, lambda: None)
        around = Surroundings(SystemClock(), go_on=self.go_on)
        self.make = FormMaker(view, store, self.key, around, timeout_s=60.0, seconds=0.5)
        self.installer = Installer(
            store,
            self.choose,
            Serving(lambda document: None, lambda name, version: None),
            SystemClock(),
            preparing=Preparing(self.make, lambda entry: forms_hold(entry, self.key)),
        )

    def go_on(self):
        if self.stopping:
            raise TryLaterError("cannot go on: the agent is stopping")

    def choose(self, manifest, blobs, known, shapes, progress):
        measured = {CANDIDATE: {"load_ms": 50.0, "peak_mb": 20.0}}
        return Choice(CANDIDATE, {"order": [CANDIDATE], "explain": {}}, measured)

    def add(self, data, folder):
        path = folder / "m.onnx"
        path.write_bytes(data)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return self.installer.add(descriptor, AddRequest(path.name), lambda e: self.events.append(e["stage"]))
        finally:
            os.close(descriptor)

    @property
    def entry(self):
        model = self.store.document.models["m"]
        return model.versions[model.active]

    def note(self, record, **more):
        """Write that record, and what else a choice may hold, into the catalog."""

        def change(document):
            model = document.models["m"]
            entry = model.versions[model.active]
            choice = {**entry.choice, "forms": {CANDIDATE: record}, **more}
            versions = {model.active: entry.model_copy(update={"choice": choice})}
            return document.model_copy(update={"models": {"m": model.model_copy(update={"versions": versions})}})

        self.store.commit(change)

    def record(self):
        return records_of(self.entry).get(CANDIDATE)

    def parts(self):
        return [part for part in self.entry.blobs if part.startswith(PREFIX)]

    def option(self, threads=1, wanted=MappingProxyType({})):
        shelf = Shelves(self.store.read, threads, self.key).shelf(self.store.document, wanted)
        return shelf.find("m").options[0]

    def forms(self):
        return self.option().forms


@pytest.fixture(autouse=True)
def always_prepared(monkeypatch):
    """Whether a form gains on this machine at this moment is another test's matter."""

    def mapped(figures):
        return tuple(one for one in figures if one.route == Route("mapped")) or (figures[0],)

    monkeypatch.setattr(preparing, "choose_forms", mapped)


@pytest.fixture
def device():
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = Path(folder)
        with Store(path / "store", DeviceKeys(path / "keys"), 64 << 20) as store:
            yield Device(store)


@pytest.fixture
def deep():
    """Most of its load is its graph: the prepared file gains on any machine."""
    return onnx_models.heavy(side=64, layers=300)


needs_landlock = pytest.mark.skipif(abi_version() == 0, reason="without Landlock nothing is prepared")


@needs_landlock
def test_an_installed_model_comes_with_the_forms_that_load_fastest_here(device, deep, tmp_path):
    device.add(deep, tmp_path)
    assert "prepare" in device.events
    record = device.record()
    assert record["forms"], record["note"]
    forms = device.forms()
    assert [form.name for form in forms] == [Figures.from_json(one).name for one in record["forms"]]
    assert all(form.session > 0 and form.load_s > 0 and form.run_s > 0 for form in forms)
    (part,) = device.parts()
    ref = device.entry.blobs[part]
    with forms[0].open_model() as plaintext:
        assert os.pread(plaintext.fd, 8, 0)[4:8] == b"ORTM"  # ONNX Runtime's own format
    assert deep[:64] not in b"".join(file.read_bytes() for file in device.store.root.rglob("*") if file.is_file())
    assert forms[0].digest == ref.payload
    assert forms_hold(device.entry, device.key)
    assert not device.installer.renew_forms("m", device.entry.manifest.version, lambda event: None)


@needs_landlock
def test_a_tiny_model_is_counted_as_its_sessions_were_weighed_not_with_what_a_trial_takes_besides(device, tmp_path):
    device.add(onnx_models.linear(), tmp_path)
    forms = device.forms()
    assert forms
    assert all(
        form.session < 4 << 20 for form in forms
    )  # its trial's peak was 20 MB, the runtime's first steps with it
    assert forms_hold(device.entry, device.key)


@needs_landlock
def test_another_release_of_the_runtime_makes_the_forms_anew_and_meanwhile_the_plain_model_answers(
    device, deep, tmp_path
):
    device.add(deep, tmp_path)
    (before,) = device.parts()
    used = device.store.stats().used_bytes
    device.version = "99.0"
    assert device.forms() == ()
    assert not forms_hold(device.entry, device.key)
    device.installer.review()
    (after,) = device.parts()
    assert after != before
    assert device.forms()
    assert forms_hold(device.entry, device.key)
    assert device.store.stats().unreached_bytes == 0
    assert device.store.stats().used_bytes < used * 1.2  # the old one is gone


@needs_landlock
def test_a_damaged_form_leaves_the_plain_model_and_is_made_anew(device, deep, tmp_path):
    device.add(deep, tmp_path)
    (part,) = device.parts()
    ref = device.entry.blobs[part]
    file = device.store.root / "blobs" / ref.payload
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(DamagedError):
        device.forms()[0].open_model()
    assert device.entry.damaged == (part,)
    assert device.forms() == ()
    device.installer.review()
    assert device.entry.damaged == ()
    with device.forms()[0].open_model() as plaintext:
        assert os.pread(plaintext.fd, 8, 0)[4:8] == b"ORTM"


@needs_landlock
def test_a_form_that_the_quota_has_no_room_for_does_not_keep_the_model_out(device, tmp_path):
    data = onnx_models.heavy(side=64, layers=300)
    device.store.quota_bytes = device.store._space._quota = len(data) + (1 << 20)
    device.add(data, tmp_path)
    assert device.parts() == []
    assert device.store.stats().models == 1


def test_a_stop_while_preparing_ends_the_installation_and_leaves_nothing(device, deep, tmp_path):
    real = device.make._around.go_on

    def stop():
        device.stopping = "prepare" in device.events
        real()

    device.make._around = replace(device.make._around, go_on=stop)
    with pytest.raises(TryLaterError, match="stopping"):
        device.add(deep, tmp_path)
    assert device.store.document.models == {}
    assert device.store.stats().unreached_bytes == 0


def test_what_is_removed_takes_its_forms_along(device, deep, tmp_path):
    device.add(deep, tmp_path)
    device.installer.remove("m", None)
    assert device.store.stats().used_bytes == 0


# -- keys and records --------------------------------------------------------------------------------------------------


def variant(**changes):
    fields = {
        "id": "fp32", "runtime": "onnx", "precision": "fp32",
        "file": {"name": "m.onnx", "sha256": "0" * 64, "size": 1}, **changes,
    }  # fmt: skip
    return Variant.model_validate(fields)


def test_the_key_changes_with_all_that_forms_depend_on():
    cpu = "CPUExecutionProvider"
    versions = {"onnx": "1.32.0"}
    here = form_keys(FACTS, 1, versions.get)
    key = here(variant(), cpu)
    assert key
    assert key == form_keys(FACTS, 1, versions.get)(variant(), cpu)
    assert key != form_keys(FACTS, 2, versions.get)(variant(), cpu)
    assert key != form_keys(FACTS, 1, {"onnx": "1.32.1"}.get)(variant(), cpu)
    assert key != here(variant(file={"name": "m.onnx", "sha256": "1" * 64, "size": 1}), cpu)
    assert key != here(variant(parameters={"x": 1}), cpu)
    features = dict.fromkeys(FACTS.features, True) | {"avx512_vnni": True}
    assert key != form_keys(replace(FACTS, features=features), 1, versions.get)(variant(), cpu)


def test_there_are_no_forms_for_other_providers_and_runtimes_or_without_a_runtime():
    assert form_keys(FACTS, 1, lambda name: "1.0")(variant(), "CUDAExecutionProvider") == ""
    assert form_keys(FACTS, 1, lambda name: "1.0")(variant(runtime="tflite"), "cpu") == ""
    assert form_keys(FACTS, 1, lambda name: "")(variant(), "CPUExecutionProvider") == ""


@pytest.mark.parametrize(
    "spoil",
    [
        {"key": "other"}, {"key": None}, {"forms": [{}]}, {"forms": 7}, {"part": "prepared/none"}, {"part": None},
        {"forms": [{"route": ["mapped", True]}]},
    ],
)  # fmt: skip
def test_a_record_that_is_not_what_it_should_be_counts_as_none(device, tmp_path, spoil):
    device.load_ms = 1.0
    device.add(onnx_models.linear(), tmp_path)
    figures = Figures(Route("mapped"), 0.001, 0.001, 0.001, 100, 100)
    good = {
        "key": device.key(device.entry.manifest.variants[0], "CPUExecutionProvider"),
        "part": min(device.entry.blobs),
    }
    good["forms"] = [figures.to_json()]
    device.note(good)
    assert [form.route for form in device.forms()] == [Route("mapped")]
    device.note({**good, **spoil})
    assert device.forms() == ()
    device.note({**good, "forms": [replace(figures, route=PLAIN).to_json()], "part": None})
    assert [form.name for form in device.forms()] == ["plain"]


def test_a_session_has_as_many_threads_as_were_found_to_gain(device, tmp_path):
    device.add(onnx_models.linear(), tmp_path)
    key = device.key(device.entry.manifest.variants[0], "CPUExecutionProvider")
    for found, threads in ((1, 1), (2, 2), (None, 4), (8, 4), (0, 4), ("2", 4)):
        device.note({"key": key, "forms": [], "part": None, "threads": found})
        assert device.option(4).threads == threads
    device.note({"key": "other", "forms": [], "part": None, "threads": 1})
    assert device.option(4).threads == 4


def test_a_model_whose_requests_are_joined_keeps_all_threads(device, tmp_path):
    """A batch gains from them where a lone request does not."""
    device.add(onnx_models.linear(), tmp_path)
    key = device.key(device.entry.manifest.variants[0], "CPUExecutionProvider")
    policy = BatchingPolicy(max_size=8, max_delay_us=1000)
    gain = gain_record({"key": None}, policy, Gain(((1, 0.010), (8, 0.020)), 64))
    device.note({"key": key, "forms": [], "part": None, "threads": 1}, batching={CANDIDATE: gain})
    joined = {"m": ModelConfig(batching=BatchingConfig(max_size=8, max_delay_us=1000))}
    assert device.option(4, joined).batching.size == 8
    assert device.option(4, joined).threads == 4
    assert device.option(4).threads == 1
