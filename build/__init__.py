"""The recipe: what becomes of an empty directory until it is a disk image, in this order.

Each name is a verb, and a folder of this package (with `_` for `-`): `step(loaded, resolution) -> Step`
says what `script.bash` beside it runs, with which files and programs. Each step becomes a layer;
`build/disk` makes the raw image of the last one, `build/formats` has what each hypervisor imports.
"""

STEPS = ("debootstrap", "initramfs", "tweak", "minimize", "keepalived-render", "seal")
