"""Disk image formats: writers, readers and linters.

They run on the build host: standard library beside the pinned compressor.
"""
