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


def mount_of(real_path: str) -> tuple[bool, str | None]:
    """Whether the file is mounted without its directory, and the name of its file system, if machines may share it."""
    path, mounts = _escaped(real_path), _mounts()
    mount = _mount_of(path, mounts)
    is_alone = _point(mount) == path and _place(path, mount) != _place(path, _mount_of(os.path.dirname(path), mounts))
    name = os.fsdecode(mount.partition(b" - ")[2].split(b" ", 1)[0])
    return is_alone, name if name in _NETWORK else None


def _mounts() -> list[bytes]:
    try:
        with open(_LIST, "rb", buffering=0) as file:
            return file.readall().splitlines()
    except OSError:
        return []


def _mount_of(path: bytes, mounts: list[bytes]) -> bytes:
    """The line of the mount in which the path lies: the last one, because a later mount hides what was there."""
    for line in reversed(mounts):
        point = _point(line)
        if path == point or path.startswith(point.rstrip(b"/") + b"/"):
            return line
    return b""


def _point(mount: bytes) -> bytes:
    return mount.split(b" ", 5)[4] if mount else b""


def _place(path: bytes, mount: bytes) -> tuple[bytes, bytes] | None:
    """The device, and where in its file system the path leads: the mount begins at its `root`."""
    if not mount:
        return None
    _, _, device, root, _ = mount.split(b" ", 4)
    return device, root.rstrip(b"/") + path[len(_point(mount).rstrip(b"/")) :]


def _escaped(path: str) -> bytes:
    """As the list has it, where a space ends a word."""
    name = os.fsencode(path)
    for character in (b"\\", b" ", b"\t", b"\n"):  # the backslash first
        name = name.replace(character, b"\\%03o" % ord(character))
    return name
