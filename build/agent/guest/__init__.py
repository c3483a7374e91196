"""Machines that run our images: QEMU, KVM, what they boot from."""
