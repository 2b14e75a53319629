"""What follows from the configuration for the sockets: limits, access rules, and the ids behind names."""

from __future__ import annotations

import grp
import pwd

from agent.base.config import Config
from agent.serve.access import ModelRule, ModelRules
from agent.serve.limits import MIB, Limits


def infer_limits(config: Config) -> Limits:
    """Limits of ``infer.sock``."""
    server = config.server
    return Limits(
        head_bytes=server.max_header_kb * 1024,
        request_line_bytes=min(8192, server.max_header_kb * 1024),
        body_bytes=server.max_body_mb * MIB,
        request_s=server.deadline_s,
        idle_s=server.idle_s,
        write_s=server.deadline_s,
        connections=server.max_connections,
        connections_per_uid=server.connections_per_uid,
        bytes_per_uid=server.buffered_mb_per_uid * MIB,
        bytes_total=server.max_buffered_mb * MIB,
    )


def model_rules(config: Config) -> ModelRules:
    """Who may use which model. Names that nobody has mean nobody."""
    rules = {
        name: ModelRule(
            frozenset(rule.uids) | {uid for user in rule.users if (uid := uid_of(user)) is not None},
            frozenset(rule.gids) | {gid for group in rule.groups if (gid := gid_of(group)) is not None},
        )
        for name, rule in config.access.models.items()
    }
    return ModelRules(rules, default=ModelRule() if config.access.default == "deny" else None)


def uid_of(user: str) -> int | None:
    """The uid of a user, None when there is none of that name."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return None


def gid_of(group: str) -> int | None:
    """The gid of a group, None when there is none of that name, or no name."""
    try:
        return grp.getgrnam(group).gr_gid if group else None
    except KeyError:
        return None
