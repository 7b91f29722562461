"""What is mounted where: whether a file is mounted by itself, and whether machines may share its file system.

Linux has a list (https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html). Elsewhere nothing is known.
"""

import os

_LIST = "/proc/self/mountinfo"

# By the names that the list has for them. A program behind "fuse" alone can be anything.
_NETWORK = frozenset(
    "9p afs beegfs ceph cifs coda davfs fakeowner fuse.ceph fuse.ceph-fuse fuse.davfs2 fuse.gcsfuse fuse.glusterfs"
    " fuse.grpcfuse fuse.juicefs fuse.osxfs fuse.rclone fuse.s3fs fuse.smbnetfs fuse.sshfs fuse.vmhgfs-fuse gfs2 gpfs"
    " lustre ncpfs nfs nfs4 ocfs2 orangefs prl_fs pvfs2 smb3 smbfs vboxsf virtiofs".split()
)

_EXACT = frozenset("btrfs ext4 tmpfs xfs".split())  # not FAT's root: it has no time; a union's may be another branch's


def mount_of(path: str) -> tuple[bool, str]:
    """Whether something is mounted at the path, and the name of the file system there: "" if nothing is known."""
    real_path = _escaped(os.path.realpath(path))
    line = _mount_of(real_path, _mounts())
    return _point(line) == real_path, os.fsdecode(line.partition(b" - ")[2].split(b" ", 1)[0])


def network_file_system(name: str) -> str | None:
    """The file system's name, if machines may share it."""
    return name if name in _NETWORK else None


def has_exact_times(name: str) -> bool:
    """Whether Linux keeps exact times for that file system."""
    return name in _EXACT


def _mount_of(path: bytes, mounts: bytes) -> bytes:
    """The line of the mount in which the path lies: the last one, because a later mount hides what was there."""
    found = b""
    for line in mounts.splitlines():
        if path == _point(line) or path.startswith(_point(line).rstrip(b"/") + b"/"):
            found = line
    return found


def _point(line: bytes) -> bytes:
    return line.split(b" ", 5)[4] if line else b""


def _mounts() -> bytes:
    try:
        with open(_LIST, "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return b""


def _escaped(path: str) -> bytes:
    """As the list has it, where a space ends a word."""
    name = os.fsencode(path)
    for character in (b"\\", b" ", b"\t", b"\n"):  # the backslash first
        name = name.replace(character, b"\\%03o" % ord(character))
    return name
