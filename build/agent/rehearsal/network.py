"""Networks of a machine that is alone: QEMU's own, with nobody on them but a gateway."""

from __future__ import annotations

from collections.abc import Callable

from build import wire

Backend = Callable[[int], str]
"""QEMU's network backend of a machine's card, by its number."""


def alone(machine: wire.Machine, port: int) -> Backend:
    """Give each card a network of QEMU's own, and let a port of this host in to the control network's."""

    def backend(number: int) -> str:
        nic = machine.nics[number]
        inward = f",hostfwd=tcp:127.0.0.1:{port}-{nic.control}:{machine.port}" if nic.control else ""
        return f"{quiet(nic)}{inward}"

    return backend


def quiet(nic: wire.Nic) -> str:
    """Return the backend of a network where nobody is but a gateway that answers ARP and ping.

    Not a hub without other ports: that takes no frame, and the guest's queue fills up.
    """
    network = f",net={nic.network}" if nic.network else ""
    return f"user,restrict=on{network}{f',host={nic.gateway}' if nic.gateway else ''}"
