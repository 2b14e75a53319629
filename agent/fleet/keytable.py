"""The keys that devices obey, published as a target of the repository: devices adopt them at their next refresh.

Invariants: a version stands for one table; what is published is what the registry says at that moment, without revoked
keys; it is signed by the role ``targets``, whose threshold thereby decides who commands the fleet.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuf.api.metadata import TargetFile

from agent.base.clock import iso
from agent.base.errors import RefusedError
from agent.base.files import fsync_directory, write_atomically
from agent.fleet.books import Books
from agent.fleet.repository import Repository
from agent.trust.jobkeys import TARGET, JobKeys, encode_table, parse_table
from agent.trust.wants import TARGETS, target_file


@dataclass(frozen=True, slots=True)
class PublishedKeys:
    """What came of it. ``again``: it was there already, nothing was changed."""

    table: JobKeys
    again: bool


def publish_keys(repository: Repository, books: Books, tenant: str) -> PublishedKeys:
    """List the registry's keys in the repository. RefusedError where the keys of ``targets`` are missing, or all
    signing keys are revoked."""
    rows = [(row.name, row.public, row.classes) for row in books.registry.signing_keys() if row.revoked is None]
    if not rows:
        raise RefusedError("cannot publish keys: every one is revoked", hint="edge-fleet keys add")
    known = books.registry.last_table()
    data = encode_table(known.version if known else 1, tenant, rows)
    listed = repository.edition.targets.signed.targets.get(TARGET)
    if known is None or parse_table(data) != known:
        data = encode_table(known.version + 1 if known else 1, tenant, rows)
        with books.database.transaction():  # the number first: it is given once, also when this is cut off
            books.registry.add_table(parse_table(data).version, data, iso(repository.now))
    table = parse_table(data)
    target = TargetFile.from_data(TARGET, data, ["sha256"])
    if listed is not None and listed.hashes == target.hashes:
        return PublishedKeys(table, again=True)
    folder = repository.folder.site / TARGETS
    path = folder / target_file(TARGET, target.hashes["sha256"])
    path.parent.mkdir(mode=0o755, exist_ok=True)
    fsync_directory(folder)
    write_atomically(path, data, mode=0o644)
    repository.edition.targets.signed.targets[TARGET] = target
    repository.edition.changed.add("targets")
    repository.save()
    for old in path.parent.iterdir():
        if old != path:
            old.unlink()
    return PublishedKeys(table, again=False)
