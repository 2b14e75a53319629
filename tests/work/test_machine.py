"""Any order of jobs, cancellations, kills, power cuts and restarts, against a world that tells when it is wronged."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.work.attempt import MAX_STALLED
from agent.work.jobs import ENDED, Failure, Refusal, WindowSpec
from tests.work.simulation import Device, order

STEPS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "kind": st.sampled_from(["told", "told", "told", "again", "restart"]),
            "fails": st.sampled_from([None] * 6 + ["before", "after"]),
            "undo": st.booleans(),
            "seconds": st.sampled_from([0, 0, 1, 700]),
            "listens": st.booleans(),
        },
    ),
    min_size=1,
    max_size=4,
)
FUSES = st.sampled_from([None, None, None, 0, 1, 2])
#: Of the writes and effects that one run of a job comes by.
DEADLY = st.one_of(st.none(), st.integers(0, 16))


class WorkMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.device = Device()
        self.orders = {}
        self.cancelled = set()
        self.documents = []
        self.confirmed = {}

    def teardown(self):
        if hasattr(self, "device"):
            try:
                self.device.settle()
                self.everything_ended_once()
            finally:
                self.device.close()

    # -- the fleet ----------------------------------------------------------------------------------------------------

    @rule(
        steps=STEPS,
        lane=st.sampled_from(["normal", "normal", "rescue"]),
        priority=st.integers(0, 9),
        window=st.sampled_from([None, None, WindowSpec("30 * * * *", 600, "Europe/Berlin")]),
        cancel=st.sampled_from([0] * 8 + [1, 2, 3]),
        rejected=st.sampled_from([False] * 7 + [True]),
        fuse=FUSES,
    )
    def accept(self, steps, lane, priority, window, cancel, rejected, fuse):
        number = len(self.documents) + 1
        job = order(number, args={"steps": steps}, lane=lane, priority=priority, window=window)
        ids = [f"job-{cancel}"] if cancel else []
        arguments = {
            "epoch": 1,
            "generation": number,
            "document": b"document %d" % number,
            "cancel": ids,
            "rejection": Failure("wrong_lane", "no") if rejected else None,
        }
        self.documents.append((job, arguments))
        self.orders[job.job_id] = job
        self.device.fuse = fuse
        verdict = self.device.survive(lambda: self.device.journal.accept(job, **arguments))
        if verdict is None:
            # Killed before the verdict: the fleet publishes it again.
            assert self.device.journal.accept(job, **arguments) in ("accepted", "duplicate")
        self.cancelled.update(ids)
        self.device.look()

    @precondition(lambda self: self.documents)
    @rule(pick=st.integers(0, 100), fuse=FUSES)
    def replay(self, pick, fuse):
        """The same document again, or an old one: nothing happens because of it."""
        job, arguments = self.documents[pick % len(self.documents)]
        before = self.device.journal.job(job.job_id)
        self.device.fuse = fuse

        def accept():
            try:
                return self.device.journal.accept(job, **arguments)
            except Refusal as refusal:
                return refusal.code

        verdict = self.device.survive(accept)
        newest = arguments["generation"] == len(self.documents)
        assert verdict in (None, "duplicate" if newest else "old_generation")
        after = self.device.journal.job(job.job_id)
        assert (after.progress, after.order) == (before.progress, before.order)

    @precondition(lambda self: self.documents)
    @rule(pick=st.integers(0, 100), fuse=FUSES)
    def cancel(self, pick, fuse):
        job_id = list(self.orders)[pick % len(self.orders)]
        self.device.fuse = fuse
        self.device.survive(lambda: self.device.journal.cancel([job_id, "job-999"]))
        self.cancelled.add(job_id)
        self.device.look()

    @rule(count=st.integers(1, 4))
    def confirm(self, count):
        """The broker has some states."""
        for status in self.device.journal.unpublished()[:count]:
            self.device.journal.published(status.job_id, status.rev)

    # -- the device ---------------------------------------------------------------------------------------------------

    @rule(pick=st.integers(0, 1), fuse=DEADLY, cancels=st.sampled_from([False] * 5 + [True]), power=st.booleans())
    def run(self, pick, fuse, cancels, power):
        self.device.fuse = fuse
        self.device.power = power
        if cancels:
            self.device.world.during = self.cancel_within
        self.device.survive(lambda: self.device.run_one(pick))
        self.device.world.during = lambda job_id: None

    def cancel_within(self, job_id):
        self.cancelled.add(job_id)
        self.device.journal.cancel([job_id])

    @rule(power=st.booleans(), fuse=FUSES)
    def crash(self, power, fuse):
        self.device.power = power
        self.device.fuse_at_start = fuse
        self.device.crash()

    @rule()
    def restart(self):
        self.device.restart()

    @precondition(lambda self: self.device.world.restart_asked)
    @rule(orderly=st.booleans())
    def restart_as_asked(self, orderly):
        if orderly:
            self.device.restart()
        else:
            self.device.crash()

    @rule(seconds=st.sampled_from([1, 30, 1200]))
    def wait(self, seconds):
        self.device.clock.pass_time(seconds)
        self.device.runner.wake()

    @rule(trusted=st.sampled_from([True, True, False]))
    def lose_the_time(self, trusted):
        self.device.clock.is_trusted = trusted

    # -- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "device"):
            known = {status.job_id for status in self.device.journal.jobs(limit=1000)}
            assert known == set(self.orders)

    def everything_ended_once(self):
        for job_id, job in self.orders.items():
            status = self.device.journal.terminal(job_id)
            assert status is not None and status.state in ENDED, f"{job_id} has not ended"
            assert self.device.seen[job_id] == status
            self.the_end_is_true(job, status)

    def the_end_is_true(self, job, status):
        steps = job.args["steps"]
        world = self.device.world
        if status.state == "succeeded":
            # One that fails with its effect there has succeeded for whoever asks after a kill.
            assert not any(step.get("fails") == "before" for step in steps)
            for number, step in enumerate(steps):
                assert step.get("kind") == "restart" or (job.job_id, f"step-{number}") in world.effects
            return
        # Whatever can be taken back is.
        for number, step in enumerate(steps):
            if step.get("undo", True):
                assert (job.job_id, f"step-{number}") not in world.effects, status
        code = status.error.code
        if status.state == "cancelled":
            assert job.job_id in self.cancelled and code == "cancelled"
        elif status.state == "rejected":
            assert code in ("wrong_lane", "clock_untrusted") and not world.begun.get(job.job_id)
        elif code == "interrupted":
            assert self.device.kills > MAX_STALLED - 1
        elif code == "step_timeout":
            assert any(step.get("seconds") == 700 or step.get("kind") == "restart" for step in steps)
        else:
            assert code in ("failed", "undone") and any(step.get("fails") for step in steps), status


WorkMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestWork = WorkMachine.TestCase
