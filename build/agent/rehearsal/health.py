"""Ask a system VM how it is: failed units, log rotation, deleted files held open, killed processes."""

from __future__ import annotations

from collections.abc import Mapping

QUESTIONS: Mapping[str, str] = {
    "failed units": (
        "systemctl list-units --failed --plain --no-legend --no-pager | while read -r unit rest; do "
        'echo "$unit: $(journalctl --unit "$unit" --lines 12 --output cat --no-pager | '
        'uniq | tr "\\n" ";")"; done'
    ),
    # Where files are named by the day or the hour (dateext), a second rotation in it finds its name taken.
    "logrotate -f": (
        "told=$(logrotate -f /etc/logrotate.conf 2>&1 >/dev/null); status=$?; "
        'rest=$(printf "%s" "$told" | grep -vE "already exists, (skipping rotation|renaming to)"); '
        '[ -z "$rest" ] || echo "$rest"; [ $status = 0 ] || [ "$told" != "$rest" ] || echo "status $status"'
    ),
    # A file that never had a name is shown as #INODE: so does cron keep what its jobs print.
    "deleted files held open": (
        "find /proc/[0-9]*/fd -lname '/* (deleted)' ! -lname '*/#[0-9]* (deleted)' 2>/dev/null | "
        "while read -r fd; do "
        'case "$(stat -L -f -c %T "$fd" 2>/dev/null)" in ""|tmpfs|ramfs|hugetlbfs|devtmpfs) ;; '
        '*) echo "$(tr "\\0" " " <"${fd%/fd/*}/cmdline" | cut -c1-40): $(readlink "$fd")" ;; esac; done'
    ),
    "killed for want of memory": (
        "journalctl --dmesg --output cat --no-pager | grep -E 'Out of memory: Killed|oom-kill' || true"
    ),
}
"""Shell commands by what they look for; what they print is a fault."""

UNSETTLED = "systemctl is-system-running --wait >/dev/null 2>&1"
"""Waits until no unit is starting any more."""


def script() -> str:
    """Return one shell script that asks everything."""
    asked = [f"echo '@@{name}'; {{ {command}; }}" for name, command in QUESTIONS.items()]
    return "\n".join([UNSETTLED, *asked])


def faults(text: str) -> list[str]:
    """Read the script's output: a line for each fault, with what it was looked for as."""
    found: list[str] = []
    about = ""
    for line in text.splitlines():
        if line.startswith("@@"):
            about = line[2:]
        elif line.strip() and about and not _harmless(line):
            found.append(f"{about}: {line.strip()}")
    return found


def _harmless(line: str) -> bool:
    """Whether logrotate only tells what it does."""
    return line.startswith(("reading config file", "acquired lock", "Reading state"))


def complete(text: str) -> bool:
    """Say whether everything was asked."""
    return all(f"@@{name}" in text.splitlines() for name in QUESTIONS)
