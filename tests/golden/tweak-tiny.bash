"$PYTHON" -I "$FILES/lay.py" "$ROOT" "$FILES/tree" "$FILES/table.json" 2>"$WORK/lay" ||
    fail "$(cat "$WORK/lay")" "change the overlay so that it fits the tree"

present() {
    local file
    for file; do
        if [ -e "$ROOT/$file" ] || [ -L "$ROOT/$file" ]; then return 0; fi
    done
    return 1
}
for unit in systemd-networkd.service ssh.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_reap.service e2scrub_all.timer; do
    vendor="usr/lib/systemd/system"
    present "etc/systemd/system/$unit" "$vendor/$unit" "$vendor/${unit/@*./@.}" "etc/init.d/${unit%.*}" ||
        fail "services: the image has no unit $unit" "take it out of services, or add its package"
done
in_tree systemctl --quiet enable systemd-networkd.service ssh.service
in_tree systemctl --quiet disable apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_reap.service e2scrub_all.timer
