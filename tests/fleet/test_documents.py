"""Documents on doorbells and the states of jobs: what is given, cancelled, overtaken, drafted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.base.errors import ConflictError, NotFoundError, PeerError, RefusedError, TooLargeError
from agent.fleet.documents import TERMINAL
from agent.fleet.jobs import Command, require_op
from agent.trust.envelope import EnvelopeError, add_signatures, open_envelope, seal
from agent.wire.messages import Job, JobDocument, JobState, decode
from tests.fleet.device import SimulatedDevice
from tests.fleet.offices import NOW, TENANT, Desktop


@pytest.fixture
def desk(tmp_path: Path):
    made = Desktop(tmp_path)
    yield made
    made.close()


def message(desk: Desktop, envelope: bytes) -> JobDocument:
    keys = {key.keyid: key for key in desk.public_keys}
    return decode(open_envelope(envelope, JobDocument.KIND, keys).payload, JobDocument)


def current(desk: Desktop, device: str = "cam-1") -> JobDocument | None:
    document = desk.books.documents.current(device)
    return None if document is None else message(desk, document.envelope)


def say(desk: Desktop, device: SimulatedDevice, job: Job, *state: str | None) -> None:
    topic = device.topic(f"up/job/{job.job_id}")
    desk.hear(topic, device.seal(device.state(job, *state)))  # type: ignore[arg-type]


def state_of(desk: Desktop, job_id: str, device: str = "cam-1") -> str:
    return {each.document.device: each.state for each in desk.books.documents.outcomes(job_id)}[device]


# -- giving -----------------------------------------------------------------------------------------------------------


def test_the_doorbell_holds_the_lowest_document_that_is_not_answered(desk: Desktop) -> None:
    device = desk.enrol("cam-1")
    jobs = [desk.give("cam-1")[0] for _ in range(3)]
    for index, job_id in enumerate(jobs):
        document = current(desk)
        assert document is not None and document.job is not None
        assert (document.job.job_id, document.generation, document.job.seq) == (job_id, index + 1, index + 1)
        desk.publish("cam-1")
        say(desk, device, document.job, "queued")
    assert current(desk) is None
    assert [state_of(desk, job) for job in jobs] == ["queued"] * 3


def test_a_device_that_says_it_has_a_document_is_not_waited_for(desk: Desktop) -> None:
    """The states were lost on the way; ``info`` tells how far the device is."""
    device = desk.enrol("cam-1")
    jobs = [desk.give("cam-1")[0] for _ in range(3)]
    device.generation = device.seq = 2
    desk.hear(device.topic("up/info"), device.seal(device.info()))
    document = current(desk)
    assert document is not None and document.generation == 3
    assert [state_of(desk, job) for job in jobs] == ["taken", "taken", "waiting"]


def test_one_id_for_all_devices_and_none_twice_on_one(desk: Desktop) -> None:
    desk.enrol("cam-1"), desk.enrol("cam-2")
    job, documents = desk.give("cam-1", "cam-2")
    assert {document.device for document in documents} == {"cam-1", "cam-2"}
    with pytest.raises(ConflictError, match="it has one of that id already"):
        desk.give("cam-2", job_id=job)
    assert desk.device("cam-2").generation == 1  # the number was not used up


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (Command("store.gc", {"x": "y" * 70_000}), "the envelope has"),
        (Command("store.gc", priority=10), "priority"),
        (Command("store.gc", total_timeout_s=0), "total_timeout_s"),
        (Command("store.gc", {"x": float("nan")}), "args"),
        (Command("store.gc", {"x": {1, 2}}), "args"),  # type: ignore[dict-item]
        (Command("status"), "no such operation"),
        (Command("rm -rf"), "no such operation"),
    ],
)
def test_what_cannot_be_a_job_is_not_given(desk: Desktop, command: Command, reason: str) -> None:
    desk.enrol("cam-1")
    with pytest.raises((PeerError, TooLargeError), match=reason):
        desk.office.give(command, [desk.device("cam-1")], [desk.ann], NOW)
    assert current(desk) is None and desk.device("cam-1").generation == 0


def test_destroying_is_for_one_start_and_two_keys(desk: Desktop) -> None:
    device = desk.enrol("cam-1")
    with pytest.raises(RefusedError, match="it has said nothing since its enrolment"):
        desk.give("cam-1", op="model.remove", signers=[desk.ann, desk.bob])
    desk.hear(device.topic("up/info"), device.seal(device.info()))
    with pytest.raises(RefusedError, match="1 of 2 signatures"):
        desk.give("cam-1", op="model.remove", signers=[desk.ann])
    with pytest.raises(RefusedError, match="1 of 2 signatures"):
        desk.give("cam-1", op="model.remove", signers=[desk.ann, desk.ann])
    with pytest.raises(RefusedError, match="none of these keys in change"):
        desk.give("cam-1", signers=[desk.bob])
    _, (document,) = desk.give("cam-1", op="model.remove", signers=[desk.ann, desk.bob])
    job = message(desk, document.envelope).job
    assert job is not None and job.boot_nonce == device.nonce
    with pytest.raises(NotFoundError):
        require_op("nothing")


# -- states -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 8), st.sampled_from(["queued", "running", "succeeded", "failed"])), max_size=12)
)
def test_states_in_any_order_and_number_lead_to_the_last_and_never_beyond_an_end(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[int, str]]
) -> None:
    desk = Desktop(tmp_path_factory.mktemp("desk"))
    try:
        device = desk.enrol("cam-1")
        job_id, (document,) = desk.give("cam-1")
        job = message(desk, document.envelope).job
        assert job is not None
        best: tuple[int, str] | None = None
        for rev, state in said:
            sent = device.state(job, state).model_copy(update={"rev": rev})
            desk.hear(device.topic(f"up/job/{job_id}"), device.seal(sent))
            if best is None or (rev > best[0] and best[1] not in TERMINAL):
                best = rev, state
            (outcome,) = desk.books.documents.outcomes(job_id)
            assert outcome.said is not None and (outcome.said.rev, outcome.said.state) == best
        counted = sum(count for (_, what, _), count in desk.dropped().items() if what == "job")
        assert counted <= len(said)
    finally:
        desk.close()


def test_a_state_for_a_job_that_was_not_given_or_not_so_is_dropped_and_counted(desk: Desktop) -> None:
    device, other = desk.enrol("cam-1"), desk.enrol("cam-2")
    job_id, (document,) = desk.give("cam-1")
    job = message(desk, document.envelope).job
    assert job is not None
    say(desk, device, job.model_copy(update={"job_id": "made-up"}), "succeeded")
    say(desk, device, job.model_copy(update={"op": "store.scrub"}), "succeeded")
    say(desk, device, job.model_copy(update={"seq": 7}), "succeeded")
    say(desk, other, job, "succeeded")  # given to cam-1 alone
    assert state_of(desk, job_id) == "waiting"
    assert desk.dropped() == {
        ("cam-1", "job", "unknown_job"): 1, ("cam-1", "job", "mismatch"): 2, ("cam-2", "job", "unknown_job"): 1
    }  # fmt: skip
    say(
        desk, device, job.model_copy(update={"seq": 0}), "rejected", None, "bad_message"
    )  # it could not read the number
    assert state_of(desk, job_id) == "rejected"


# -- cancelling -------------------------------------------------------------------------------------------------------


def test_documents_that_nobody_has_seen_move_behind_a_cancellation(desk: Desktop) -> None:
    device = desk.enrol("cam-1")
    first, second, third = (desk.give("cam-1")[0] for _ in range(3))
    desk.publish("cam-1")
    (done,) = desk.office.cancel(first, (), [desk.ann], NOW)
    assert done.result == "asked" and state_of(desk, first) == "void"
    order = []
    while (document := current(desk)) is not None:
        assert document.job is not None
        order.append((document.generation, document.job.seq, document.job.job_id, document.cancel))
        desk.publish("cam-1")
        say(desk, device, document.job, "queued")
    assert [(generation, seq) for generation, seq, _, _ in order] == [(4, 4), (5, 5), (6, 6)]
    assert order[0][3] == [first] and [job for _, _, job, _ in order[1:]] == [second, third]


def test_a_cancellation_takes_a_key_that_may_change(desk: Desktop) -> None:
    desk.enrol("cam-1")
    job, _ = desk.give("cam-1")
    desk.publish("cam-1")
    with pytest.raises(RefusedError, match="cannot cancel on 'cam-1'"):
        desk.office.cancel(job, (), [desk.bob], NOW)
    assert state_of(desk, job) == "sent" and desk.device("cam-1").generation == 1


def test_a_cancelled_job_that_the_device_had_all_the_same_tells_its_end(desk: Desktop) -> None:
    device = desk.enrol("cam-1")
    job_id, (document,) = desk.give("cam-1")
    desk.publish("cam-1")
    desk.office.cancel(job_id, (), [desk.ann], NOW)
    job = message(desk, document.envelope).job
    assert job is not None
    say(desk, device, job, "cancelled", None, "cancelled")  # what a device says outweighs what was thought
    assert state_of(desk, job_id) == "cancelled"
    assert [each.result for each in desk.office.cancel(job_id, (), [desk.ann], NOW)] == ["over"]


def test_what_two_people_signed_is_given_up_when_a_cancellation_overtakes_it(desk: Desktop) -> None:
    device = desk.enrol("cam-1")
    desk.hear(device.topic("up/info"), device.seal(device.info()))
    first, _ = desk.give("cam-1")
    wipe, _ = desk.give("cam-1", op="model.remove", signers=[desk.ann, desk.bob])
    desk.publish("cam-1")
    desk.office.cancel(first, (), [desk.ann], NOW)
    (outcome,) = desk.books.documents.outcomes(wipe)
    assert outcome.state == "void" and "give it again" in outcome.document.note


def test_cancelling_names_devices_that_have_the_job(desk: Desktop) -> None:
    desk.enrol("cam-1"), desk.enrol("cam-2"), desk.enrol("cam-3")
    job, _ = desk.give("cam-1", "cam-2")
    assert [each.device for each in desk.office.cancel(job, ["cam-2"], [desk.ann], NOW)] == ["cam-2"]
    assert state_of(desk, job) == "waiting" and state_of(desk, job, "cam-2") == "void"
    with pytest.raises(NotFoundError, match="on 'cam-3'"):
        desk.office.cancel(job, ["cam-3"], [desk.ann], NOW)


# -- drafts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def draft(desk: Desktop) -> tuple[Desktop, SimulatedDevice, bytes]:
    """A document for ``cam-1`` that bob has yet to sign."""
    device = desk.enrol("cam-1")
    desk.hear(device.topic("up/info"), device.seal(device.info()))
    _, (document,) = desk.give("cam-1", op="model.remove", draft=True)
    assert current(desk) is None
    return desk, device, document.envelope


def test_a_draft_is_published_when_it_has_its_signatures(draft: tuple[Desktop, SimulatedDevice, bytes]) -> None:
    desk, _, envelope = draft
    with pytest.raises(RefusedError, match="1 of 2"):
        desk.office.submit([("cam-1", envelope)], desk.public_keys)
    (taken,) = desk.office.submit([("cam-1", add_signatures(envelope, [desk.bob]))], desk.public_keys)
    found = desk.books.documents.current("cam-1")
    assert found is not None and found.envelope == taken.envelope
    with pytest.raises(ConflictError, match="it is waiting"):
        desk.office.submit([("cam-1", taken.envelope)], desk.public_keys)


def test_a_draft_that_is_not_what_was_exported_is_refused(draft: tuple[Desktop, SimulatedDevice, bytes]) -> None:
    desk, _, envelope = draft
    desk.enrol("cam-2")
    other = message(desk, envelope).model_copy(update={"generation": 9})
    forged = desk_seal(other, desk)
    for name, data, error in (
        ("cam-2", add_signatures(envelope, [desk.bob]), PeerError),
        ("cam-1", forged, PeerError),
        ("cam-1", b"{}", EnvelopeError),
        ("cam-1", envelope[:-9], EnvelopeError),
        ("cam-9", envelope, NotFoundError),
    ):
        with pytest.raises(error):
            desk.office.submit([(name, data)], desk.public_keys)
    with pytest.raises(EnvelopeError, match="no key"):
        desk.office.submit([("cam-1", envelope)], [])
    assert current(desk) is None


def desk_seal(document: JobDocument, desk: Desktop) -> bytes:
    return seal(JobDocument.KIND, document.encode(), [desk.ann, desk.bob])


def test_a_draft_is_overtaken_by_what_was_published_since(draft: tuple[Desktop, SimulatedDevice, bytes]) -> None:
    desk, _, envelope = draft
    signed = add_signatures(envelope, [desk.bob])
    desk.give("cam-1")
    (outcome,) = [each for each in desk.books.documents.of_device("cam-1") if each.document.state == "draft"]
    assert outcome.state == "draft" and not outcome.over
    desk.publish("cam-1")
    with pytest.raises(ConflictError, match="was given a later one since"):
        desk.office.submit([("cam-1", signed)], desk.public_keys)


def test_a_device_that_is_enrolled_anew_gets_nothing_of_its_earlier_life(desk: Desktop) -> None:
    device = desk.enrol("cam-1")
    published, (document,) = desk.give("cam-1")
    waiting, _ = desk.give("cam-1")
    desk.publish("cam-1")
    again = desk.enrol("cam-1", device.identity)
    assert again.epoch == 2 and current(desk) is None
    assert [state_of(desk, job) for job in (published, waiting)] == ["void", "void"]
    job = message(desk, document.envelope).job
    assert job is not None
    say(desk, device, job, "succeeded")  # it had it, and says so too late
    assert state_of(desk, published) == "void" and ("cam-1", "job", "old_epoch") in desk.dropped()
    _, (document,) = desk.give("cam-1")
    assert (document.epoch, document.generation, document.seq) == (2, 1, 1)


def test_a_stored_state_is_read_back_as_it_was_said(desk: Desktop) -> None:
    device = desk.enrol("cam-1")
    job_id, (document,) = desk.give("cam-1")
    job = message(desk, document.envelope).job
    assert job is not None
    said = device.state(job, "failed", None, "failed")
    said = said.model_copy(update={"step": "täst", "result": None})
    desk.hear(device.topic(f"up/job/{job_id}"), device.seal(said))
    (outcome,) = desk.books.documents.outcomes(job_id)
    assert outcome.said == said and isinstance(outcome.said, JobState)
    assert replace(outcome.document, state="waiting", note="") == document
    assert said.tenant == TENANT
