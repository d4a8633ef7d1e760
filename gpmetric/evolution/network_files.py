"""Whether a file lies on a file system of another machine, as /proc/self/mounts tells."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

__all__ = ["network_file_system"]

_MOUNTS = Path("/proc/self/mounts")
# Kinds whose locks or shared memory are not those of one machine; of FUSE, by the name of the program.
_NETWORK = re.compile(
    r"(fuse\.)?(nfs\d?|cifs|smb\w*|lustre|gpfs|mmfs|beegfs(_\w+)?|fhgfs|ceph|cephfs|sshfs|9p|virtiofs|afs|glusterfs|"
    r"pvfs2|orangefs|davfs2?|s3fs|goofys|gcsfuse|blobfuse2?|rclone|juicefs|moosefs|mfs|wekafs|vboxsf|ncpfs|coda|drvfs)"
)


def network_file_system(path: Path) -> str:
    """The kind of network file system that a file is on, or would be, "" on a local one or where nothing tells."""
    place = os.path.realpath(path)
    kind, longest = "", 0
    with suppress(OSError):
        for line in _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            mounted, found = (re.sub(r"\\(\d{3})", lambda one: chr(int(one[1], 8)), word) for word in line.split()[1:3])
            if len(mounted) >= longest and (place + "/").startswith(
                mounted.rstrip("/") + "/"
            ):  # the last one hides others
                kind, longest = found, len(mounted)
    return kind if _NETWORK.fullmatch(kind) else ""
