"$PYTHON" -I "$FILES/lay.py" "$ROOT" "$FILES/tree" "$FILES/table.json" 2>"$WORK/lay" ||
    fail "$(cat "$WORK/lay")" "change the overlay so that it fits the tree"

in_tree systemd-sysusers /usr/lib/sysusers.d/cloudstack.conf
in_tree systemd-tmpfiles --create /usr/lib/tmpfiles.d/cloudstack.conf

present() {
    local file
    for file; do
        if [ -e "$ROOT/$file" ] || [ -L "$ROOT/$file" ]; then return 0; fi
    done
    return 1
}
for unit in ssh.service cloud-preinit.service cloud-early-config.service cloud-postinit.service apache2.service conntrackd.service dnsmasq.service frr.service haproxy.service irqbalance.service keepalived.service nfs-server.service nfs-blkmap.service open-vm-tools.service radvd.service rpcbind.service rpcbind.socket strongswan-starter.service vgauth.service xl2tpd.service haveged.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service; do
    vendor="usr/lib/systemd/system"
    present "etc/systemd/system/$unit" "$vendor/$unit" "$vendor/${unit/@*./@.}" "etc/init.d/${unit%.*}" ||
        fail "services: the image has no unit $unit" "take it out of services, or add its package"
done
in_tree systemctl --quiet enable ssh.service cloud-preinit.service cloud-early-config.service cloud-postinit.service
in_tree systemctl --quiet disable apache2.service conntrackd.service dnsmasq.service frr.service haproxy.service irqbalance.service keepalived.service nfs-server.service nfs-blkmap.service open-vm-tools.service radvd.service rpcbind.service rpcbind.socket strongswan-starter.service vgauth.service xl2tpd.service haveged.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service

"$PYTHON" -I "$FILES/archive.py" "$ROOT" "$FILES/archive.json" usr/share/cloud/cloud-scripts.tar
in_tree gzip -9 --no-name /usr/share/cloud/cloud-scripts.tar
mv "$ROOT/usr/share/cloud/cloud-scripts.tar.gz" "$ROOT/usr/share/cloud/cloud-scripts.tgz"
sha512sum "$ROOT/usr/share/cloud/cloud-scripts.tgz" | cut -d ' ' -f 1 >"$ROOT/var/cache/cloud/cloud-scripts-signature"
