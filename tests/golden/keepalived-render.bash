# systemvm
KEEPALIVED=yes
LIBRARY=usr/local/lib/systemvm
INTERFACE=eth2
SCRIPTS=(/ramdisk/rrouter/heartbeat.sh /opt/cloud/bin/configure_router.py)
# tiny
KEEPALIVED=
LIBRARY=usr/local/lib/systemvm
INTERFACE=eth2
SCRIPTS=()
# i386
KEEPALIVED=
LIBRARY=usr/local/lib/systemvm
INTERFACE=eth2
SCRIPTS=()
# uefi
KEEPALIVED=
LIBRARY=usr/local/lib/systemvm
INTERFACE=eth2
SCRIPTS=()
