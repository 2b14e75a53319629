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

#: Refused whatever the arguments. A runtime computes: it has no need of any of them.
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
    # Landlock does not look at these: owner, mode, times and attributes of files that may not even be opened, and
    # before its third version (kernel 6.2) not at cutting a file short by its name.
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "chown32", "fchown32",
    "lchown32", "truncate", "truncate64", "utime", "utimes", "futimesat", "utimensat", "utimensat_time64",
    "setxattr", "lsetxattr", "fsetxattr", "setxattrat", "removexattr", "lremovexattr", "fremovexattr",
    "removexattrat", "file_setattr", "inotify_init", "inotify_init1", "fanotify_init",
    # These it would refuse, but a kernel may lack it.
    "creat", "mkdir", "mkdirat", "mknod", "mknodat", "link", "linkat", "symlink", "symlinkat", "rename", "renameat",
    "renameat2", "unlink", "unlinkat", "rmdir", "fsopen", "fsconfig", "fsmount", "fspick", "open_tree",
    "open_tree_attr", "move_mount", "mount_setattr",
    # Other processes of the same uid, the daemon first: their priority, scheduling class, queues.
    "setpriority", "sched_setscheduler", "sched_setparam", "sched_setattr", "ioprio_set", "process_mrelease",
    "semop", "semtimedop", "semtimedop_time64", "semctl", "msgsnd", "msgrcv", "msgctl", "shmctl", "mq_unlink",
    # The whole machine: write-out of all disks, the kernel's log, clock and name.
    "sync", "syncfs", "syslog", "quotactl", "quotactl_fd", "kexec_file_load", "settimeofday", "clock_settime",
    "clock_settime64", "adjtimex", "clock_adjtime", "clock_adjtime64", "sethostname", "setdomainname", "vhangup",
    "io_setup", "io_submit",
)  # fmt: skip

#: Refused where the argument at that place is one of the values: signals sent through a descriptor's owner
#: (F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP), typing into a terminal (TIOCSTI, TIOCLINUX, TIOCSCTTY),
#: outliving the daemon and being dumped (PR_SET_PDEATHSIG, PR_SET_DUMPABLE).
_DENIED_VALUES: dict[str, tuple[int, tuple[int, ...]]] = {
    "fcntl": (1, (8, 10, 15)),
    "fcntl64": (1, (8, 10, 15)),
    "ioctl": (1, (0x8901, 0x8902, 0x5412, 0x541C, 0x540E)),
    "prctl": (0, (1, 4)),
}
#: Refused where the argument at that place has one of the bits: O_CREAT, O_TRUNC, __O_TMPFILE.
_O_WRONLY, _O_RDWR, _O_TMPFILE = 0o1, 0o2, 0o20000000
_DENIED_BITS: dict[str, tuple[int, int]] = {"open": (1, 0o20001100), "openat": (2, 0o20001100)}
#: Do not exist here: the C library then takes the older call, whose arguments a filter can see.
_UNKNOWN = ("clone3", "openat2")

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
    "chmod": (90, -1, 15), "fchmod": (91, 52, 94), "fchmodat": (268, 53, 333), "fchmodat2": (452, 452, 452),
    "chown": (92, -1, 182), "fchown": (93, 55, 95), "lchown": (94, -1, 16), "fchownat": (260, 54, 325),
    "chown32": (-1, -1, 212), "fchown32": (-1, -1, 207), "lchown32": (-1, -1, 198), "truncate": (76, 45, 92),
    "truncate64": (-1, -1, 193), "utime": (132, -1, -1), "utimes": (235, -1, 269), "futimesat": (261, -1, 326),
    "utimensat": (280, 88, 348), "utimensat_time64": (-1, 412, 412), "setxattr": (188, 5, 226),
    "lsetxattr": (189, 6, 227), "fsetxattr": (190, 7, 228), "setxattrat": (463, 463, 463),
    "removexattr": (197, 14, 235), "lremovexattr": (198, 15, 236), "fremovexattr": (199, 16, 237),
    "removexattrat": (466, 466, 466), "file_setattr": (469, 469, 469), "creat": (85, -1, 8), "mkdir": (83, -1, 39),
    "mkdirat": (258, 34, 323), "mknod": (133, -1, 14), "mknodat": (259, 33, 324), "link": (86, -1, 9),
    "linkat": (265, 37, 330), "symlink": (88, -1, 83), "symlinkat": (266, 36, 331), "rename": (82, -1, 38),
    "renameat": (264, 38, 329), "renameat2": (316, 276, 382), "unlink": (87, -1, 10), "unlinkat": (263, 35, 328),
    "rmdir": (84, -1, 40), "setpriority": (141, 140, 97), "sched_setscheduler": (144, 119, 156),
    "sched_setparam": (142, 118, 154), "sched_setattr": (314, 274, 380), "ioprio_set": (251, 30, 314),
    "sched_setaffinity": (203, 122, 241), "semop": (65, 193, 298), "semtimedop": (220, 192, 312),
    "semtimedop_time64": (-1, 420, 420), "semctl": (66, 191, 300), "msgsnd": (69, 189, 301), "msgrcv": (70, 188, 302),
    "msgctl": (71, 187, 304), "shmctl": (31, 195, 308), "mq_unlink": (241, 181, 275), "sync": (162, 81, 36),
    "syncfs": (306, 267, 373), "syslog": (103, 116, 103), "quotactl": (179, 60, 131), "quotactl_fd": (443, 443, 443),
    "fsopen": (430, 430, 430), "fsconfig": (431, 431, 431), "fsmount": (432, 432, 432), "fspick": (433, 433, 433),
    "open_tree": (428, 428, 428), "open_tree_attr": (467, 467, 467), "move_mount": (429, 429, 429),
    "mount_setattr": (442, 442, 442), "kexec_file_load": (320, 294, 401), "settimeofday": (164, 170, 79),
    "clock_settime": (227, 112, 262), "clock_settime64": (-1, 404, 404), "adjtimex": (159, 171, 124),
    "clock_adjtime": (305, 266, 372), "clock_adjtime64": (-1, 405, 405), "sethostname": (170, 161, 74),
    "setdomainname": (171, 162, 121), "vhangup": (153, 58, 111), "fanotify_init": (300, 262, 367),
    "inotify_init": (253, -1, 316), "inotify_init1": (294, 26, 360), "io_setup": (206, 0, 243),
    "io_submit": (209, 2, 246), "process_mrelease": (448, 448, 448), "fcntl": (72, 25, 55), "fcntl64": (-1, -1, 221),
    "ioctl": (16, 29, 54), "prctl": (157, 167, 172), "open": (2, -1, 5), "openat": (257, 56, 322),
    "openat2": (437, 437, 437),
}  # fmt: skip

#: uname's machine -> (column above, AUDIT_ARCH value). A 32-bit userland on a 64-bit kernel counts as 32-bit.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "arm": (2, 0x40000028)}

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _ARGUMENT_0 = 0, 4, 16  # offsets in struct seccomp_data (little-endian low words)
_ARGUMENT_BYTES = 8
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


def number_of(name: str) -> int | None:
    """The number of a system call of this table on this machine; None where it is not known."""
    try:
        return _NUMBERS[name][_machine()[0]]
    except UnsupportedError:
        return None


def program_for(column: int, audit_arch: int, own_pid: int, *, rewrites: bool = False) -> bytes:
    """The classic BPF program: struct sock_filter entries, 8 bytes each. Pure.

    ``rewrites``: files may be opened for writing and nothing else, to be made anew. Only for where Landlock decides
    which: it refuses all but those that have no place in any folder, that is memory files held already.
    """
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
    for name in _UNKNOWN:
        code += [(_JUMP_EQUAL, 0, 1, _NUMBERS[name][column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    code += _refusals_by_argument(column, rewrites=rewrites)
    # Threads yes, processes no.
    code += [
        (_JUMP_EQUAL, 0, 4, _NUMBERS["clone"][column]),
        (_LOAD, 0, 0, _ARGUMENT_0),
        (_JUMP_SET, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    # abort() signals the own process; the others may name it by 0: another process's id is refused.
    for name, also_zero in (("tgkill", False), ("prlimit64", True), ("sched_setaffinity", True)):
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


def _refusals_by_argument(column: int, *, rewrites: bool) -> list[tuple[int, int, int, int]]:
    """Instructions for the calls of which only some arguments are refused; they end in a verdict for those calls."""
    code: list[tuple[int, int, int, int]] = []
    tests = {name: (at, [(_JUMP_EQUAL, value) for value in values]) for name, (at, values) in _DENIED_VALUES.items()}
    if rewrites:
        for name, (position, bits) in _DENIED_BITS.items():
            code += _opening(_NUMBERS[name][column], position, bits)
    else:
        tests |= {name: (at, [(_JUMP_SET, bits)]) for name, (at, bits) in _DENIED_BITS.items()}
    for name, (position, conditions) in tests.items():
        number, count = _NUMBERS[name][column], len(conditions)
        if number < 0:
            continue
        code += [
            (_JUMP_EQUAL, 0, count + 3, number),
            (_LOAD, 0, 0, _ARGUMENT_0 + position * _ARGUMENT_BYTES),
            *((jump, count - index, 0, value) for index, (jump, value) in enumerate(conditions)),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        ]
    return code


def _opening(number: int, position: int, bits: int) -> list[tuple[int, int, int, int]]:
    """Of the refused flags O_CREAT and O_TRUNC pass with O_WRONLY alone; a nameless new file never does.

    With O_RDWR as well a file is opened for neither, so that Landlock looks on, and the kernel cuts it all the same.
    """
    if number < 0:
        return []
    return [
        (_JUMP_EQUAL, 0, 7, number),
        (_LOAD, 0, 0, _ARGUMENT_0 + position * _ARGUMENT_BYTES),
        (_JUMP_SET, 4, 0, _O_TMPFILE),
        (_JUMP_SET, 1, 0, _O_RDWR),
        (_JUMP_SET, 1, 0, _O_WRONLY),
        (_JUMP_SET, 1, 0, bits),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]


def restrict(*, rewrites: bool = False) -> None:
    """Put the filter on this thread and all that it starts. UnsupportedError where the kernel or machine has none.

    Needs no_new_privs, or CAP_SYS_ADMIN. ``rewrites`` as in ``program_for``.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    column, audit_arch = _machine()
    program = program_for(column, audit_arch, os.getpid(), rewrites=rewrites)
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    argument = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(argument), 0, 0) != 0:
        raise UnsupportedError(f"cannot confine a trial: seccomp filter refused ({os.strerror(ctypes.get_errno())})")
