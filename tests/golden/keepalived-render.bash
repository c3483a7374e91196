# systemvm
KEEPALIVED=yes
LIBRARY=usr/local/lib/systemvm
INTERFACE=eth2
SCRIPTS=(/ramdisk/rrouter/heartbeat.sh /opt/cloud/bin/configure_router.py)
# tiny
KEEPALIVED=
SCRIPTS=()
# i386
KEEPALIVED=
SCRIPTS=()
# uefi
KEEPALIVED=
SCRIPTS=()
