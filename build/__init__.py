"""The recipe: what becomes of an empty directory until it is a disk image, in this order.

Each name is a module of this package with `step(loaded, resolution) -> Step`. Each step becomes a layer;
`build/disk.py` makes the raw image of the last one, `build/convert.py` what each hypervisor imports.
"""

STEPS = ("debootstrap", "initramfs", "tweak", "minimize", "keepalived", "seal")
