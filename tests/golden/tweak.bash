# systemvm
LOCALES=
SYSUSERS=(/usr/lib/sysusers.d/cloudstack.conf)
TMPFILES=(/usr/lib/tmpfiles.d/cloudstack.conf)
ENABLE=(ssh.service cloud-preinit.service cloud-early-config.service cloud-postinit.service)
DISABLE=(
    apache2.service
    conntrackd.service
    containerd.service
    dnsmasq.service
    frr.service
    haproxy.service
    irqbalance.service
    keepalived.service
    nfs-server.service
    nfs-blkmap.service
    open-vm-tools.service
    radvd.service
    rpcbind.service
    rpcbind.socket
    strongswan-starter.service
    vgauth.service
    xl2tpd.service
    haveged.service
    apt-daily.timer
    apt-daily-upgrade.timer
    dpkg-db-backup.timer
    e2scrub_all.timer
    e2scrub_reap.service
)
MASK=()
ARCHIVE=usr/share/cloud/cloud-scripts.tgz
SIGNATURE=var/cache/cloud/cloud-scripts-signature
# tiny
SYSUSERS=()
TMPFILES=()
ENABLE=(systemd-networkd.service ssh.service)
DISABLE=(apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_reap.service e2scrub_all.timer)
ARCHIVE=
# i386
SYSUSERS=()
TMPFILES=()
ENABLE=()
DISABLE=()
ARCHIVE=
# uefi
SYSUSERS=()
TMPFILES=()
ENABLE=()
DISABLE=()
ARCHIVE=
