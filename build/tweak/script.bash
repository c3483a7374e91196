#!/bin/bash
# Parameters: LOCALES SYSUSERS TMPFILES ENABLE DISABLE MASK ARCHIVE SIGNATURE
apply_overlay

if [ -n "$LOCALES" ]; then
    in_tree locale-gen --keep-existing
    [ -s "$ROOT/usr/lib/locale/locale-archive" ]
fi

# What the overlay declares is there before the first boot.
if [ "${#SYSUSERS[@]}" -gt 0 ]; then in_tree systemd-sysusers "${SYSUSERS[@]}"; fi
if [ "${#TMPFILES[@]}" -gt 0 ]; then in_tree systemd-tmpfiles --create "${TMPFILES[@]}"; fi

# A unit that is not in the image is an error, not a silent nothing.
present() {
    local file
    for file; do
        if [ -e "$ROOT/$file" ] || [ -L "$ROOT/$file" ]; then return 0; fi
    done
    return 1
}
vendor=usr/lib/systemd/system
for unit in "${ENABLE[@]}" "${DISABLE[@]}" "${MASK[@]}"; do
    present "etc/systemd/system/$unit" "$vendor/$unit" "$vendor/${unit/@*./@.}" "etc/init.d/${unit%.*}" ||
        fail "services: the image has no unit $unit" "take it out of services, or add its package"
done
# switch VERB [UNIT...]
switch() {
    if [ "$#" -gt 1 ]; then in_tree systemctl --quiet "$@"; fi
}
switch enable "${ENABLE[@]}"
switch disable "${DISABLE[@]}"
switch mask "${MASK[@]}"

# The scripts as an archive to be unpacked at /, as a management server would send it, and its checksum. The
# tree's own gzip packs it, so that the bytes depend on the suite and not on this machine's zlib.
if [ -n "$ARCHIVE" ]; then
    tar=${ARCHIVE%.tgz}.tar
    "$PYTHON" -I "$FILES/archive.py" "$ROOT" "$FILES/archive.json" "$tar"
    # shellcheck disable=SC2016  # expanded by the inner shell
    in_tree sh -euc '
        gzip -9 --no-name "/$1"
        mv "/$1.gz" "/$2"
        sha512sum "/$2" | cut -d " " -f 1 >"/$3"
    ' sh "$tar" "$ARCHIVE" "$SIGNATURE"
fi
