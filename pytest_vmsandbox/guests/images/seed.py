"""The seed for cloud-init: a small disk that tells a system from elsewhere which key opens it."""

from __future__ import annotations

import io
import json

import pycdlib

_LABEL = "cidata"  # by which cloud-init's NoCloud finds it


def seed(name: str, public_key: str) -> bytes:
    """The content of a seed disk, an ISO 9660 file system.

    Args:
        name: of the guest. It also identifies the instance, so cloud-init sees a first boot.
        public_key: opens the default user, and root.
    """
    user_data = {"ssh_authorized_keys": [public_key], "disable_root": False, "ssh_pwauth": False}
    files = {
        "user-data": f"#cloud-config\n{json.dumps(user_data)}\n",  # JSON is YAML, too
        "meta-data": json.dumps({"instance-id": f"vmsandbox-{name}", "local-hostname": name}),
    }
    disk = io.BytesIO()
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=_LABEL)
    for path, text in files.items():
        data, short = text.encode(), path.replace("-", "_").upper()
        iso.add_fp(
            io.BytesIO(data), len(data), f"/{short}.;1", rr_name=path, joliet_path=f"/{path}"
        )
    iso.write_fp(disk)
    iso.close()
    return disk.getvalue()
