"""CRC-32C (Castagnoli, reflected polynomial 0x82F63B78): VHDX headers carry it, Python does not have it."""

from __future__ import annotations


def _table() -> list[int]:
    entries = []
    for entry in range(256):
        for _ in range(8):
            entry = entry >> 1 ^ (0x82F63B78 if entry & 1 else 0)
        entries.append(entry)
    return entries


_TABLE = _table()


def crc32c(content: bytes) -> int:
    """Checksum of a header or table; a byte at a time, meant for kilobytes."""
    value = 0xFFFFFFFF
    for byte in content:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF
