"""Some hundred simulated devices in one process, for ``fleet.py``: the real link, each with a core of its own.

A device here is ``agent.link.link.Link`` as it is shipped, with its outbox on disk and its own connection. Only core is
a stand-in, called directly and not over ``admin.sock``: it verifies the envelopes of jobs as docs/spec/link.md 3 says,
keeps in memory what the journal would keep on disk, "does" a job by waiting, and signs each state.

Told what to do by lines on stdin (one JSON document each), it answers by one line on stdout: ``go`` gives the links
their settings, all in one instant, as power that comes back would; ``work`` says how long jobs take; ``look`` is
answered by how things are; ``calm``, without an answer, forgets how late the process was; ``stop`` lets the links say
goodbye. Without being asked it tells how many jobs were accepted.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import logging
import random
import resource
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path

from agent.base.clock import iso
from agent.base.errors import PeerError
from agent.link.core_client import Verdict
from agent.link.link import Link
from agent.link.settings import Message, Outgoing, Settings, parse_settings
from agent.trust.allegiance import Allegiance, TrustedKey
from agent.trust.envelope import EnvelopeError, PublicKey, Signer, open_envelope, seal
from agent.wire.messages import Info, Job, JobDocument, JobState, Reported, decode
from agent.wire.ops import OPS, SIGNATURES

#: What a Raspberry Pi says of itself, about as much as a device does.
FACTS = {
    "board": "Raspberry Pi 4 Model B", "profile": "raspberry-pi-4", "arch": "aarch64", "user_bits": 64,
    "features": {"neon": True, "dotprod": False}, "mem_total_mb": 3792, "mem_available_mb": 3000, "supported": True,
    "plan": {"providers": ["CPUExecutionProvider"], "cpu_precisions": ["int8", "fp32"], "memory_budget_mb": 1896},
}  # fmt: skip
INVENTORY = {"runtimes": {"onnx": {"version": "1.23.2", "providers": ["CPUExecutionProvider"]}}, "absent": {}}
GOODBYE_S = 90.0


class Site:
    """What the devices of this process share."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.work_s = 0.0
        self.accepted = 0
        self.tasks: set[asyncio.Task[None]] = set()
        #: Moments that were drawn for first attempts: when devices meant to connect, however busy this machine is.
        self.drawn: list[float] = []

    def draw(self, least: float, most: float) -> float:
        """What links draw their pauses with."""
        found = random.uniform(least, most)
        if not least:
            self.drawn.append(time.monotonic() + found)
        return found

    def begin(self, work) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class Core:
    """What link needs of core (``agent.link.core_client.Core``), for one device."""

    def __init__(self, site: Site, settings: Settings, signer: Signer, allegiance: Allegiance) -> None:
        self._site = site
        self._settings = settings
        self._signer = signer
        self._allegiance = allegiance
        self._start = secrets.token_hex(16)
        self._count = 0
        self._waiting: dict[int, Message] = {}
        self._news = asyncio.Event()
        self._generation = self._seq = 0
        self._document = b""
        self._states: dict[str, JobState] = {}
        #: Times that each job was begun, refusals by reason, what link told: all for the report.
        self.runs: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.duplicates = 0
        self.connected = False
        self.connects = 0
        self._say("up/info", self._info(), retain=True)
        self._say("up/reported", self._reported(), retain=True)

    # -- link asks ----------------------------------------------------------------------------------------------------

    async def settings(self) -> Settings:
        await self._site.go.wait()
        return self._settings

    async def outgoing(self, after: str, wait_s: float) -> Outgoing:
        start, _, number = after.partition(":")
        seen = int(number) if start == self._start else 0
        for known in [known for known, message in self._waiting.items() if known <= seen and not message.confirm]:
            del self._waiting[known]
        later = self._after(seen)
        if not later:
            self._news.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait_s)
            later = self._after(seen)
        last = later[-1].id if later else seen
        return Outgoing(f"{self._start}:{last}", self._settings.version, later, self._start)

    def _after(self, seen: int) -> tuple[Message, ...]:
        return tuple(message for number, message in self._waiting.items() if number > seen)

    async def confirmed(self, ids: Iterable[int | str]) -> None:
        for number in ids:
            self._waiting.pop(number, None)

    async def state(self, document: Mapping[str, object]) -> None:
        if document["connected"] and not self.connected:
            self.connects += 1
        self.connected = bool(document["connected"])

    async def csr(self, pem: str) -> None:
        raise AssertionError("an enrolled device asks for no certificate")

    async def enrolment(self, envelope: bytes) -> Verdict:
        raise AssertionError("an enrolled device is not enrolled by its link")

    async def received(self, topic: str, payload: bytes) -> Verdict:
        try:
            return self._accept(topic, payload)
        except EnvelopeError as error:
            code = error.code
        except PeerError:
            code = "bad_message"
        self.refused[code] += 1
        return Verdict("refused", code)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _accept(self, topic: str, data: bytes) -> Verdict:
        if topic != "dn/job":
            raise EnvelopeError("wrong_topic", "nothing but jobs is expected")
        job, document = self._opened(data)
        if document.generation == self._generation and data == self._document:
            self.duplicates += 1
            self._say_state(self._states[job.job_id])
            return Verdict("duplicate")
        if document.generation <= self._generation:
            raise EnvelopeError("old_generation", "there was a later one")
        if job.seq <= self._seq or job.job_id in self._states:
            raise EnvelopeError("old_sequence", "there was a later one")
        self._generation, self._seq, self._document = document.generation, job.seq, data
        self._site.accepted += 1
        self._site.begin(self._run(job))
        return Verdict("accepted")

    def _opened(self, data: bytes) -> tuple[Job, JobDocument]:
        allegiance = self._allegiance
        opened = open_envelope(data, JobDocument.KIND, allegiance.public_keys)
        document = decode(opened.payload, JobDocument)
        if (document.tenant, document.device) != (allegiance.tenant, allegiance.device):
            raise EnvelopeError("wrong_device", "for another")
        if document.epoch != allegiance.epoch:
            raise EnvelopeError("old_epoch", "of another enrolment")
        if document.job is None:
            raise EnvelopeError("bad_args", "no job")
        row = OPS[document.job.op]
        allegiance.require_class(opened.keyids, row.kind, SIGNATURES[row.kind])
        return document.job, document

    async def _run(self, job: Job) -> None:
        self.runs[job.job_id] += 1
        self._move(job, 1, "queued", "accepted")
        self._move(job, 2, "running", "installing")
        await asyncio.sleep(random.uniform(0.0, self._site.work_s))
        self._move(job, 3, "succeeded")

    def _move(self, job: Job, rev: int, state: str, phase: str | None = None) -> None:
        self._states[job.job_id] = JobState(
            **self._address(), job_id=job.job_id, seq=job.seq, op=job.op, rev=rev, state=state, phase=phase, attempt=1,
            at=_now(), clock_trusted=True, result={} if state == "succeeded" else None,
        )  # fmt: skip
        self._say_state(self._states[job.job_id])

    # -- saying -------------------------------------------------------------------------------------------------------

    def _say_state(self, state: JobState) -> None:
        self._say(f"up/job/{state.job_id}", state, confirm=True)

    def _say(self, topic: str, message, *, retain: bool = False, confirm: bool = False) -> None:
        self._count += 1
        payload = seal(message.KIND, message.encode(), [self._signer])
        self._waiting[self._count] = Message(self._count, topic, "state", retain, confirm or retain, payload)
        self._news.set()

    def _address(self) -> dict:
        return {"tenant": self._allegiance.tenant, "device": self._allegiance.device, "epoch": self._allegiance.epoch}

    def _info(self) -> Info:
        return Info(
            **self._address(), boot_nonce=self._start, at=_now(), agent_version="0.1.0",
            identity=base64.b64encode(self._signer.public.raw).decode(), ops=sorted(OPS), last_seq=0, last_generation=0,
            desired_version=0, facts=FACTS, profile="raspberry-pi-4", inventory=INVENTORY,
        )  # fmt: skip

    def _reported(self) -> Reported:
        return Reported(
            **self._address(), version=1, at=_now(), desired_version=0, config_state="default", config={}, drift=[],
            health="healthy", models=[], jobs={}, maintenance=[], refused={},
        )  # fmt: skip


def _now() -> str:
    return iso(datetime.now(timezone.utc))


class Crowd:
    """The devices of this process, made from the plan's rows."""

    def __init__(self, plan: dict) -> None:
        self.site = Site()
        keys = {key.keyid: key for key in (PublicKey(base64.b64decode(row["public"])) for row in plan["keys"])}
        trusted = {
            keyid: TrustedKey(row["name"], key, frozenset(row["classes"]))
            for (keyid, key), row in zip(keys.items(), plan["keys"], strict=True)
        }
        self.before = memory()
        #: How late this process was at worst: its devices all wait for one loop, which no real device does.
        self.lag_s = 0.0
        self.cores: dict[str, Core] = {}
        self.links: dict[str, Link] = {}
        for row in plan["devices"]:
            folder = Path(row["folder"])
            folder.mkdir(exist_ok=True)
            allegiance = Allegiance(plan["tenant"], row["name"], row["epoch"], trusted)
            settings = parse_settings({**plan["settings"], "device": row["name"], "broker": row["broker"]})
            core = Core(self.site, settings, Signer(bytes.fromhex(row["seed"])), allegiance)
            self.cores[row["name"]], self.links[row["name"]] = core, Link(core, folder, draw=self.site.draw)

    async def run(self) -> None:
        """Until the last has said goodbye; the first that fails ends all of it."""
        await asyncio.gather(*(link.run() for link in self.links.values()))

    def stop(self) -> None:
        for link in self.links.values():
            link.stop()

    def look(self) -> dict:
        """How things are."""
        cores = self.cores.values()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "connected": sum(core.connected for core in cores),
            "connects": sum(core.connects for core in cores),
            "runs": {name: dict(core.runs) for name, core in self.cores.items()},
            "refused": dict(sum((core.refused for core in cores), Counter())),
            "duplicates": sum(core.duplicates for core in cores),
            "drawn": self.site.drawn,
            "overdue": sum(bool(link.progress.overdue()) for link in self.links.values()),
            "lag_s": self.lag_s,
            "memory_before": self.before,
            "memory": memory(),
            "files": len(list(Path("/proc/self/fd").iterdir())),
            "cpu_s": usage.ru_utime + usage.ru_stime,
        }


def memory() -> dict[str, float]:
    """Resident megabytes of this process: all, and without what is a file's."""
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")}


async def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    loop = asyncio.get_running_loop()
    crowd = Crowd(plan)
    running = loop.create_task(crowd.run())
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    teller = loop.create_task(tell_accepted(crowd.site))
    worst = loop.create_task(measure_lag(crowd))
    say({"ready": len(crowd.links)})
    commands = loop.create_task(obey(reader, crowd))
    await asyncio.wait({running, commands}, return_when=asyncio.FIRST_COMPLETED)
    if not commands.done():  # a link has failed: nothing that was measured would mean anything
        running.result()
        raise RuntimeError("the links have ended by themselves")
    commands.result()
    teller.cancel()
    worst.cancel()
    crowd.stop()
    await asyncio.wait_for(running, GOODBYE_S)
    say({"stopped": True})


async def obey(reader: asyncio.StreamReader, crowd: Crowd) -> None:
    """Commands until ``stop`` or the end of them."""
    while line := await reader.readline():
        command = json.loads(line)
        if command["do"] == "go":
            crowd.site.go.set()
            say({"gone": time.monotonic()})
        elif command["do"] == "work":
            crowd.site.work_s = command["seconds"]
            say({"works": True})
        elif command["do"] == "calm":
            crowd.lag_s = 0.0
        elif command["do"] == "look":
            say({"look": crowd.look()})
        else:
            return


async def tell_accepted(site: Site) -> None:
    """The number of accepted jobs, when it has changed."""
    told = 0
    while True:
        await asyncio.sleep(0.05)
        if site.accepted != told:
            told = site.accepted
            say({"accepted": told})


async def measure_lag(crowd: Crowd) -> None:
    """Note how late the loop is."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + 0.1
        await asyncio.sleep(0.1)
        crowd.lag_s = max(crowd.lag_s, loop.time() - due)


def say(document: dict) -> None:
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
