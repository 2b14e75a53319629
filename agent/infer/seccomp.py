"""A seccomp filter for processes that must only compute: system calls that reach out fail with EPERM.

Sources: kernel documentation, userspace-api/seccomp_filter.rst; opcodes of linux/bpf_common.h; call numbers of
asm-generic/unistd.h (aarch64), x86's syscall_64.tbl and ARM's syscall.tbl.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

from agent.base.errors import UnsupportedError

_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2

_DENIED = (
    "socket", "socketpair", "socketcall", "bind", "connect", "listen", "accept", "accept4",
    "execve", "execveat", "fork", "vfork", "unshare", "setns",
    "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_open", "pidfd_getfd", "pidfd_send_signal",
    "kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "kcmp",
    "open_by_handle_at", "name_to_handle_at", "mount", "umount2", "pivot_root", "chroot", "bpf", "perf_event_open",
    "io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "keyctl", "add_key", "request_key",
    "init_module", "finit_module", "delete_module", "kexec_load", "reboot", "swapon", "swapoff", "acct",
    "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "memfd_secret",
    "shmget", "shmat", "msgget", "semget", "mq_open", "process_madvise", "move_pages", "migrate_pages",
)  # fmt: skip

#: Call numbers by machine: x86_64, aarch64, arm (EABI); -1 where the machine has no such call.
_NUMBERS: dict[str, tuple[int, int, int]] = {
    "socket": (41, 198, 281), "socketpair": (53, 199, 288), "socketcall": (-1, -1, 102), "bind": (49, 200, 282),
    "connect": (42, 203, 283), "listen": (50, 201, 284), "accept": (43, 202, 285), "accept4": (288, 242, 366),
    "execve": (59, 221, 11), "execveat": (322, 281, 387), "fork": (57, -1, 2), "vfork": (58, -1, 190),
    "unshare": (272, 97, 337), "setns": (308, 268, 375), "ptrace": (101, 117, 26),
    "process_vm_readv": (310, 270, 376), "process_vm_writev": (311, 271, 377), "pidfd_open": (434, 434, 434),
    "pidfd_getfd": (438, 438, 438), "pidfd_send_signal": (424, 424, 424), "kill": (62, 129, 37),
    "tkill": (200, 130, 238), "rt_sigqueueinfo": (129, 138, 178), "rt_tgsigqueueinfo": (297, 240, 363),
    "kcmp": (312, 272, 378), "open_by_handle_at": (304, 265, 371), "name_to_handle_at": (303, 264, 370),
    "mount": (165, 40, 21), "umount2": (166, 39, 52), "pivot_root": (155, 41, 218), "chroot": (161, 51, 61),
    "bpf": (321, 280, 386), "perf_event_open": (298, 241, 364), "io_uring_setup": (425, 425, 425),
    "io_uring_enter": (426, 426, 426), "io_uring_register": (427, 427, 427), "userfaultfd": (323, 282, 388),
    "keyctl": (250, 219, 311), "add_key": (248, 217, 309), "request_key": (249, 218, 310),
    "init_module": (175, 105, 128), "finit_module": (313, 273, 379), "delete_module": (176, 106, 129),
    "kexec_load": (246, 104, 347), "reboot": (169, 142, 88), "swapon": (167, 224, 87), "swapoff": (168, 225, 115),
    "acct": (163, 89, 51), "setuid": (105, 146, 213), "setgid": (106, 144, 214), "setreuid": (113, 145, 203),
    "setregid": (114, 143, 204), "setresuid": (117, 147, 208), "setresgid": (119, 149, 210),
    "setgroups": (116, 159, 206), "memfd_secret": (447, 447, 447), "shmget": (29, 194, 307), "shmat": (30, 196, 305),
    "msgget": (68, 186, 303), "semget": (64, 190, 299), "mq_open": (240, 180, 274),
    "process_madvise": (440, 440, 440), "move_pages": (279, 239, 344), "migrate_pages": (256, 238, 400),
    "clone": (56, 220, 120), "clone3": (435, 435, 435), "tgkill": (234, 131, 268), "prlimit64": (302, 261, 369),
}  # fmt: skip

#: uname's machine -> (column above, AUDIT_ARCH value). A 32-bit userland on a 64-bit kernel counts as 32-bit.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "arm": (2, 0x40000028)}

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _ARGUMENT_0 = 0, 4, 16  # offsets in struct seccomp_data (little-endian low words)
_CLONE_THREAD = 0x00010000
_X32_BIT = 0x40000000


def _machine() -> tuple[int, int]:
    name = platform.machine()
    if sys.maxsize < 1 << 32 and name in ("aarch64", "armv7l", "armv8l"):
        name = "arm"
    try:
        return _MACHINES[name]
    except KeyError:
        raise UnsupportedError(f"cannot confine a trial: no system call table for {name}") from None


def program_for(column: int, audit_arch: int, own_pid: int) -> bytes:
    """The classic BPF program: struct sock_filter entries, 8 bytes each. Pure."""
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, audit_arch),
        (_RETURN, 0, 0, _KILL),  # another calling convention would dodge the numbers below
        (_LOAD, 0, 0, _NR),
    ]
    if column == 0:
        code += [(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for name in _DENIED:
        number = _NUMBERS[name][column]
        if number >= 0:
            code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    # glibc falls back from clone3 to clone, whose flags a filter can see: threads yes, processes no.
    code += [(_JUMP_EQUAL, 0, 1, _NUMBERS["clone3"][column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    code += [
        (_JUMP_EQUAL, 0, 4, _NUMBERS["clone"][column]),
        (_LOAD, 0, 0, _ARGUMENT_0),
        (_JUMP_SET, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    # abort() signals the own process; prlimit64 may name it by 0: another process's id is refused.
    for name, also_zero in (("tgkill", False), ("prlimit64", True)):
        zero = [(_JUMP_EQUAL, 2, 0, 0)] if also_zero else []
        code += [
            (_JUMP_EQUAL, 0, 4 + len(zero), _NUMBERS[name][column]),
            (_LOAD, 0, 0, _ARGUMENT_0),
            *zero,
            (_JUMP_EQUAL, 1, 0, own_pid),
            (_RETURN, 0, 0, _ERRNO | errno.EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def restrict() -> None:
    """Put the filter on this thread and all that it starts. UnsupportedError where the kernel or machine has none.

    Needs no_new_privs, or CAP_SYS_ADMIN.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    column, audit_arch = _machine()
    program = program_for(column, audit_arch, os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    argument = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(argument), 0, 0) != 0:
        raise UnsupportedError(f"cannot confine a trial: seccomp filter refused ({os.strerror(ctypes.get_errno())})")
