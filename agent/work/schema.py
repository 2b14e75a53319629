"""The journal's tables, as the steps from one version to the next (docs/spec/jobs.md 5). Pure.

A version that was released is never changed: what comes later is a step of its own, and a journal of any earlier
version is carried over when it is opened. A step that only adds (tables, columns with a default) MUST end with ``PRAGMA
application_id = N``, N the oldest version that may still use the file: so an update of the agent can be taken back.
"""

from __future__ import annotations

_FIRST = (
    """CREATE TABLE counters (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        epoch INTEGER NOT NULL DEFAULT 0,
        generation INTEGER NOT NULL DEFAULT 0,
        document TEXT NOT NULL DEFAULT '',
        seq INTEGER NOT NULL DEFAULT 0,
        desired_version INTEGER NOT NULL DEFAULT 0,
        desired BLOB NOT NULL DEFAULT x''
    )""",
    "INSERT INTO counters (one) VALUES (1)",
    """CREATE TABLE jobs (
        key INTEGER PRIMARY KEY,
        epoch INTEGER NOT NULL,
        job_id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        op TEXT NOT NULL,
        kind TEXT NOT NULL,
        lane TEXT NOT NULL CHECK (lane IN ('normal', 'rescue')),
        priority INTEGER NOT NULL,
        args TEXT NOT NULL,
        not_after TEXT,
        step_timeout_s REAL NOT NULL,
        total_timeout_s REAL NOT NULL,
        cron TEXT,
        window_s INTEGER,
        tz TEXT,
        envelope BLOB NOT NULL,
        digest TEXT NOT NULL,
        accepted_at TEXT NOT NULL,
        cancel INTEGER NOT NULL DEFAULT 0,
        published INTEGER NOT NULL DEFAULT 0,
        at TEXT NOT NULL,
        clock_trusted INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (
            state IN ('queued', 'running', 'succeeded', 'failed', 'rejected', 'cancelled')
        ),
        phase TEXT,
        step TEXT,
        rev INTEGER NOT NULL,
        attempt INTEGER NOT NULL DEFAULT 0,
        elapsed_s REAL NOT NULL DEFAULT 0,
        begun TEXT NOT NULL DEFAULT '[]',
        done INTEGER NOT NULL DEFAULT 0,
        ending TEXT,
        notes TEXT NOT NULL DEFAULT '{}',
        result TEXT,
        error TEXT,
        UNIQUE (epoch, job_id)
    )""",
    "CREATE TABLE refusals (code TEXT PRIMARY KEY, count INTEGER NOT NULL)",
    """CREATE TABLE maintenance (
        task TEXT PRIMARY KEY,
        started_at TEXT,
        ended_at TEXT,
        ok INTEGER,
        text TEXT NOT NULL DEFAULT '',
        data TEXT NOT NULL DEFAULT '{}'
    )""",
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
)
#: Starts without progress are counted by the journal itself; what is open is found without reading what has ended.
_SECOND = (
    "ALTER TABLE jobs ADD COLUMN stalled INTEGER NOT NULL DEFAULT 0",
    "UPDATE jobs SET stalled = 1 WHERE state = 'running' AND attempt > 0",
    "CREATE INDEX open_jobs ON jobs (state) WHERE state IN ('queued', 'running')",
)
#: ``VERSIONS[n]`` makes version n + 1 of version n.
VERSIONS: tuple[tuple[str, ...], ...] = (_FIRST, _SECOND)
