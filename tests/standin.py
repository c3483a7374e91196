"""A management server's files in the tests' own words: at the real paths, with scripts that do little."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

BIN = "opt/cloud/bin"
SIGNATURE = "/var/cache/cloud/cloud-scripts-signature"
MERGE = (
    "import json; words = [word.partition('=') for word in input().split()]; "
    "print(json.dumps({'id': 'cmdline', 'config': {key: value for key, _, value in words}}))"
)
"""The boot line as JSON, in the words of Python."""
SCRIPTS = {
    "setup/init.sh": "",
    "setup/cloud-early-config": "",
    # What order and clashes depend on: the agent is unpacked where it runs, units are read anew, sshd starts
    # again with their file, and the services are theirs.
    "setup/bootstrap.sh": (
        "cd /var/cache/cloud || exit\nservices='haproxy apache2 dnsmasq'\n"
        "if grep -qE 'type=(consoleproxy|secstorage)' cmdline; then services=cloud\n"
        "[ ! -e patch.required ] || unzip -qo agent.zip -d /usr/local/cloud/systemvm\nfi\n"
        "rm -f patch.required\nsystemctl daemon-reload\nsysctl -qp\necho $services >enabled_svcs\n"
        "systemctl restart ssh"
    ),
    "setup/postinit.sh": (
        "mkdir -p /etc/cloudstack && cd /etc/cloudstack || exit\n"
        f'python3 -c "{MERGE}" </var/cache/cloud/cmdline >cmdline.json\n'
        "iptables-restore /etc/iptables/rules.v4\n"
        "systemctl start --no-block $(cat /var/cache/cloud/enabled_svcs)\ndate >/var/cache/cloud/boot_up_done"
    ),
    "keystore-setup": "",
    "patched.sh": "exec ls $1",
    "get_template_version.sh": (
        "until [ -e /var/cache/cloud/boot_up_done ]; do sleep 0.2; done\n"
        f'echo "$(cat /etc/cloudstack-release)&$(cat {SIGNATURE})"'
    ),
    # A document that names itself refused is; any other is kept below its kind.
    "update_config.py": (
        'cd /var/cache/cloud || exit\n[ -s "$1" ] || exit 1\n'
        'if grep -q refused "$1"; then echo "refused: $1" >&2; exit 3; fi\n'
        'mkdir -p /run/applied && cat "$1" >>"/run/applied/${1%%.*}" && rm "$1"'
    ),
    "vr_cfg.sh": (
        "while read -r line; do case $line in\n"
        '"<file>") read -r file; : >"$file"\n'
        'while read -r line && [ "$line" != "</file>" ]; do printf "%s\\n" "$line" >>"$file"; done ;;\n'
        '"<script>") read -r line; $line || echo "execution failed: $line" >&2 ;;\n'
        'esac; done <"$2"'
    ),
    "checkrouter.sh": 'echo "Status: UNKNOWN"',
}
"""What each script does besides telling of itself in /var/log/theirs.log."""
UNITS = {
    "cloud-preinit": ("local-fs.target", "init.sh"),
    "cloud-early-config": ("cloud-preinit.service", "cloud-early-config"),
    "cloud-postinit": ("cloud-early-config.service network.target", "postinit.sh"),
}
FILTER = """\
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -p icmp -m comment --comment theirs -j ACCEPT
-A INPUT -i eth1 -p tcp -m state --state NEW -m tcp --dport 3922 -j ACCEPT
COMMIT
"""
FILES = {
    "etc/logrotate.conf": "daily\nrotate 3\ncreate\ncompress\ninclude /etc/logrotate.d\n",
    "etc/logrotate.d/cloud": "/var/log/cloud.log {\n missingok\n copytruncate\n}\n",
    "etc/logrotate.d/haproxy": (
        "/var/log/haproxy.log {\n missingok\n postrotate\n /usr/lib/rsyslog/rsyslog-rotate\n endscript\n}\n"
    ),
    "etc/logrotate.d/rsyslog": (
        "/var/log/auth.log\n/var/log/cron.log\n/var/log/daemon.log\n/var/log/kern.log\n/var/log/messages {\n"
        " missingok\n sharedscripts\n postrotate\n /usr/lib/rsyslog/rsyslog-rotate\n endscript\n}\n"
    ),
    "etc/rsyslog.conf": (
        'module(load="imuxsock")\nmodule(load="imklog")\n$IncludeConfig /etc/rsyslog.d/*.conf\n'
        "auth,authpriv.* /var/log/auth.log\n*.info;auth,authpriv.none /var/log/messages\n"
    ),
    "etc/ssh/sshd_config": (
        "Port 3922\nPermitRootLogin yes\nPasswordAuthentication no\nUsePAM yes\n"
        "Subsystem sftp /usr/lib/openssh/sftp-server\n"
    ),
    "etc/sysctl.conf": "net.ipv4.ip_nonlocal_bind = 1\nvm.panic_on_oom = 1\n",
    "etc/systemd/system/cloud.service": (
        "[Unit]\nDescription=their agent\n[Service]\nExecStart=/usr/bin/sleep infinity\n"
        "WorkingDirectory=/usr/local/cloud/systemvm\n[Install]\nWantedBy=multi-user.target\n"
    ),
    **{
        f"etc/iptables/iptables-{kind}": FILTER
        for kind in ("router", "vpcrouter", "consoleproxy", "secstorage")
    },
}
"""What stands at upstream's paths beside the scripts."""
PATCH = f"""#!/bin/sh
set -e
cd /var/cache/cloud
tar -xzf cloud-scripts.tgz -C /
sha512sum cloud-scripts.tgz | cut -d' ' -f1 >{SIGNATURE}
mv cloud-scripts.tgz /usr/share/cloud/
rm -f agent.zip patch-sysvms.sh
echo "version:$(cat {SIGNATURE}) "
"""


def served(folder: Path, size: int = 1 << 20) -> Path:
    """Write the three files into a folder, agent.zip with `size` bytes in it; returns the archive's path."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "cloud-scripts.tgz", "w:gz") as archive:
        for name, does in SCRIPTS.items():
            text = f"#!/bin/bash\necho theirs {name} >>/var/log/theirs.log\n{does}\n"
            _add(archive, f"{BIN}/{name}", text, 0o755)
        for name, text in FILES.items():
            _add(archive, name, text, 0o644)
        for name, (after, script) in UNITS.items():
            _add(archive, f"etc/systemd/system/{name}.service", _unit(after, script), 0o644)
    with zipfile.ZipFile(folder / "agent.zip", "w") as zipped:
        zipped.writestr("conf/agent.properties", "resource=x\n")
        zipped.writestr("lib/agent.jar", bytes(size))
    (folder / "patch-sysvms.sh").write_text(PATCH)
    return folder / "cloud-scripts.tgz"


def _unit(after: str, script: str) -> str:
    return (
        f"[Unit]\nDescription=theirs\nDefaultDependencies=no\nAfter={after}\n"
        f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/{BIN}/setup/{script}\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )


def _add(archive: tarfile.TarFile, name: str, text: str, mode: int) -> None:
    content = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))
