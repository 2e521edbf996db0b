"""Confines the process that calls it before it reads an untrusted file. Standard library only; Linux system calls.

Each layer is optional, since systems differ; `keye.media.decode.confinement` finds out which hold. Whatever the process
needs must have been imported before: after `confine` it opens nothing, connects to nothing, starts nothing."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys
from dataclasses import dataclass

#: System call numbers, x86-64 and aarch64, of what a decoder never needs; None where the machine has no such call.
#: io_uring passes by any filter of system calls; the mode and attributes of the open media file are not the
#: decoder's to change; calls on processes reach the parent, which runs as the same user.
DENIED_CALLS: dict[str, tuple[int | None, int | None]] = {
    # The network.
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    # Programs and processes.
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "prlimit64": (302, 261),
    "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "unshare": (272, 97), "setns": (308, 268), "personality": (135, 92),
    # Files.
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "mknod": (133, None), "mknodat": (259, 33),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "truncate": (76, 45),
    "ftruncate": (77, 46), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "memfd_create": (319, 279), "open_by_handle_at": (304, 265),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "mount_setattr": (442, 442),
    # The kernel.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
#: What a worker adds to its nice value.
NICENESS = 5

_CLONE, _CLONE3, _CAPSET = (56, 220), (435, 435), (126, 91)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE_THREAD = 0x10000
#: From here on x86-64 numbers the calls of its x32 variant, which the filter does not list.
_X32 = 0x40000000

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 4, 22, 38, 2
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
#: Offsets in the kernel's `struct seccomp_data`, little endian: call number, architecture, low halves of two arguments.
_AT_NUMBER, _AT_ARCHITECTURE, _AT_FLAGS, _AT_SECOND = 0, 4, 16, 24
_AF_INET, _SOCK_STREAM, _SOCK_KIND = 2, 1, 0xF

_LANDLOCK_CREATE, _LANDLOCK_RESTRICT, _LANDLOCK_VERSION = 444, 446, 1
#: Rights to files that each version of Landlock adds, as the number of bits it knows.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_FILE_RIGHTS_NOW = 16
_TCP_RIGHTS, _SCOPES = 0b11, 0b11
#: Rules for a path and for a port, the right to connect, and those to read, write and control a device.
_LANDLOCK_ADD, _PATH_RULE, _PORT_RULE, _CONNECT = 445, 1, 2, 0b10
_READ_FILE, _WRITE_FILE, _CONTROL_DEVICE = 1 << 2, 1 << 1, 1 << 15
#: Calls that a process with a port needs, and open descriptors of one that may open anything.
_PORT_CALLS = frozenset({"socket", "connect", "sendto"})
_DESCRIPTORS = 32


@dataclass(frozen=True)
class Reach:
    """What a relay may open after all: TCP connections to a `port` of this machine, or one `device` file."""

    port: int | None = None
    device: str | None = None


class _Program(ctypes.Structure):
    """`struct sock_fprog`: a filter's length in instructions and its address."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def confine(memory_bytes: int, cpu_seconds: int, reach: Reach | None = None) -> None:
    """Applies every layer that the system offers; call it while the process has one thread.

    `memory_bytes` limits the address space, `cpu_seconds` the processor time. What the system refuses is left out. The
    process also gives way to those that serve: many decoders at once would keep the server from its processor. With
    `reach` it may open that, and nothing else.
    """
    os.nice(NICENESS)
    descriptors = 0 if reach is None else _DESCRIPTORS
    if sys.platform != "linux":
        limit_resources(memory_bytes, cpu_seconds, descriptors)
        return
    libc = load_libc()
    # None of the parent's privileges, and none to be gained: only so may an ordinary user apply the other layers.
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    deny_files(libc, reach)
    limit_resources(memory_bytes, cpu_seconds, descriptors)
    machine = ARCHITECTURES.get(os.uname().machine)
    if machine is not None:
        # Drops what makes root more than a user, also the right to raise one's limits again.
        _call(libc, _CAPSET[machine[0]], struct.pack("<Ii", 0x20080522, 0), bytes(24))
        filter_calls(libc, *machine, connects=reach is not None and reach.port is not None)


def load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
    libc.syscall.restype = ctypes.c_long
    return libc


def _call(libc: ctypes.CDLL, number: int, *arguments: int | bytes | None) -> int:
    """A system call, with whole words for numbers: what is narrower may arrive with garbage in its upper half."""
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in (number, *arguments)]
    return int(libc.syscall(*words))


def limit_resources(memory_bytes: int, cpu_seconds: int, descriptors: int = 0) -> None:
    """Caps memory and processor time; no file grows, no descriptor is opened, no core is dumped."""
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        # Open descriptors stay; any new one, be it a file, a socket or a pipe, would get a number beyond the limit.
        resource.RLIMIT_NOFILE: descriptors,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        free = hard == resource.RLIM_INFINITY
        most = value if free else min(value, hard)
        # At the soft limit of processor time a signal tells the parent what happened; at the hard one the kernel kills.
        later = kind == resource.RLIMIT_CPU and (free or hard > most)
        resource.setrlimit(kind, (most, most + 1 if later else most))


def deny_files(libc: ctypes.CDLL, reach: Reach | None = None) -> None:
    """Landlock: no path can be read, written, made or removed, no TCP port used, no outside process signalled, but for
    what `reach` names."""
    version = _call(libc, _LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION)
    if version < 1:
        return
    files = (1 << _FILE_RIGHTS.get(version, _FILE_RIGHTS_NOW)) - 1
    rules = struct.pack("<Q", files)
    rules += struct.pack("<Q", _TCP_RIGHTS) if version >= 4 else b""
    rules += struct.pack("<Q", _SCOPES) if version >= 6 else b""
    ruleset = _call(libc, _LANDLOCK_CREATE, rules, len(rules), 0)
    if ruleset >= 0:
        if reach is not None and reach.port is not None and version >= 4:
            _call(libc, _LANDLOCK_ADD, ruleset, _PORT_RULE, struct.pack("<QQ", _CONNECT, reach.port), 0)
        if reach is not None and reach.device is not None:
            rights = (_READ_FILE | _WRITE_FILE | _CONTROL_DEVICE) & files
            device = os.open(reach.device, getattr(os, "O_PATH", 0) | os.O_CLOEXEC)
            _call(libc, _LANDLOCK_ADD, ruleset, _PATH_RULE, struct.pack("<Qi", rights, device), 0)
            os.close(device)
        _call(libc, _LANDLOCK_RESTRICT, ruleset, 0)
        os.close(ruleset)


def filter_calls(libc: ctypes.CDLL, column: int, architecture: int, *, connects: bool = False) -> None:
    code = call_filter(column, architecture, connects=connects)
    program = _Program(len(code) // 8, code)
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0)


def call_filter(column: int, architecture: int, *, connects: bool = False) -> bytes:
    """The seccomp program, 8 bytes an instruction: calls in `DENIED_CALLS` fail with EPERM, `clone` too unless it makes
    a thread. `clone3`, whose flags lie out of reach in memory, fails as if it did not exist, so that libraries use
    `clone`. A call of another architecture kills the process. With `connects` there are TCP sockets over IPv4, and no
    others."""
    allowed = _PORT_CALLS if connects else frozenset[str]()
    denied = [n[column] for name, n in DENIED_CALLS.items() if n[column] is not None and name not in allowed]
    socket_number = DENIED_CALLS["socket"][column]
    refuse = _FAIL | errno.EPERM
    code = [
        (_LOAD, 0, 0, _AT_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _AT_NUMBER),
        (_JUMP_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        (_JUMP_EQUAL, 0, 1, _CLONE3[column]),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),
        (_JUMP_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _AT_FLAGS),
        (_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _ALLOW),
        *(
            (
                (_JUMP_EQUAL, 0, 7, socket_number),
                (_LOAD, 0, 0, _AT_FLAGS),
                (_JUMP_EQUAL, 0, 4, _AF_INET),
                (_LOAD, 0, 0, _AT_SECOND),
                (_AND, 0, 0, _SOCK_KIND),
                (_JUMP_EQUAL, 0, 1, _SOCK_STREAM),
                (_RETURN, 0, 0, _ALLOW),
                (_RETURN, 0, 0, refuse),
            )
            if connects
            else ()
        ),
        # Each denied number jumps over those after it and over the return that allows, to the one that refuses.
        *((_JUMP_EQUAL, len(denied) - place, 0, number) for place, number in enumerate(denied)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, refuse),
    ]
    assert len(denied) < 256, "a jump reaches 255 instructions"
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
